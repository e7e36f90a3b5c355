"""`dysl control`: loads a policy, makes a robot, and runs the control loop on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.loop_stats import LoopStats, render_stats
from dysl_vla.deploy.robot import make_robot, open_policy
from dysl_vla.deploy.stopping import say, stop_robot
from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.files import is_unused
from dysl_vla.policies.compute import ComputeConfig
from dysl_vla.provenance import known_instructions
from dysl_vla.types import FULL_QUALITY


@dataclass(frozen=True)
class ControlConfig:
    """Run a policy on a robot, at a fixed rate, within limits, with statistics of every cycle."""

    robot: str
    """The robot, as KIND:NAME: "mujoco:metaworld-drawer-open" (simulated, in real time), "lerobot:FILE.json", or one of
    a plug-in's."""
    bundle: Path | None = None
    """Folder of `dysl export`."""
    policy: str | None = None
    """Instead of a bundle: a shipped name, a checkpoint's folder or a hub id, run by PyTorch."""
    rate: float | None = None
    """Actions a second; None: those of the world that the policy was trained in. Simulated time runs as they come."""
    seconds: float = 60.0
    """Seconds of control."""
    instruction: str | None = None
    """Instruction for the policy; None: the one in the robot's observations."""
    skip: float | None = None
    """How much to skip, from 0, the full model, to 1; None: the stored operating point."""
    log: Path | None = None
    """New folder for the log, which has a line a cycle, and the statistics."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    limits: Limits = field(default_factory=Limits)


def control(config: ControlConfig) -> LoopStats:
    """Load, connect, run.

    Raises:
        DyslError: See `ControlLoop`.
    """
    if config.log is not None and not is_unused(config.log):
        raise ConfigError(f"log must be a new folder, got {config.log}, which is not empty; give another.")
    policy = open_policy(config.bundle, config.policy, config.skip, config.compute)
    known = known_instructions(policy.provenance)
    if config.instruction is not None and known and config.instruction not in known:
        own = "; ".join(map(repr, known[:10]))
        say(f"The policy was not trained on instruction {config.instruction!r}, and may do anything. Its own: {own}.")
    is_simple = config.robot.startswith("mujoco:") and "full_quality" not in config.robot
    if is_simple and policy.spec.rendering == FULL_QUALITY:
        say("The policy was trained on images with shadows and reflections; add full_quality=1 to --robot's options.")
    robot = make_robot(config.robot, policy.spec.cameras)
    try:
        rate = policy.spec.rate_hz if config.rate is None else config.rate
        loop = ControlLoop(
            policy,
            robot,
            rate,
            config.limits,
            config.loop,
            instruction=config.instruction,
            log=config.log,
            robot_name=config.robot,
            notify=say,
        )
    except BaseException:
        stop_robot(robot)
        raise
    try:
        return loop.run(config.seconds)
    except DyslError:
        if loop.stats.cycles:
            print(render_stats(replace(loop.stats, stopped="")))  # the error, which says why it stopped, follows
        raise
