"""The robot protocol: all that the control loop knows of a robot, simulated or real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import Policy
from dysl_vla.policies.compute import ComputeConfig
from dysl_vla.registry import Registry
from dysl_vla.types import EmbodimentSpec, FloatArray, Observation, is_gripper


@dataclass(frozen=True)
class TimedObservation:
    """What a robot observed, and when.

    Attributes:
        observation: Images, state and instruction, under LeRobot's keys.
        timestamp: When its oldest part was measured, in seconds of `time.perf_counter`. A time that is ahead of that
            clock, or before the last observation's, stops the robot.
    """

    observation: Observation
    timestamp: float


class Robot(Protocol):
    """A robot, or a simulated one, with its cameras.

    `observe` is called by one thread, `connect`, `act` and `hold` by another, and none of them may wait longer than a
    control period, but for `connect`, and `observe`, which may wait for the next frame. `stop` is called by a third,
    also while another call hangs. What they raise stops the robot.
    """

    @property
    def embodiment(self) -> EmbodimentSpec:
        """Cameras, state and actions; positions are in metres, angles in radians, unless their names say otherwise."""

    def connect(self, rate_hz: float) -> None:
        """Get ready, without moving.

        Args:
            rate_hz: Actions a second that will be sent.

        Raises:
            ConfigError: It cannot take actions at that rate.
            RobotFault: It does not answer.
        """

    def observe(self, after: float) -> TimedObservation:
        """The latest observation.

        Args:
            after: Time that the observation must be later than; it is waited for.

        Raises:
            RobotFault: No observation came within the robot's own time limit.
        """

    def act(self, action: FloatArray) -> None:
        """Execute an action, (action,), in the world's units, until the next one; returns at once.

        Raises:
            RobotFault: The robot does not take it.
        """

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """The action that keeps the robot where it is.

        Args:
            last: The action that was sent last, (action,); None: none yet.

        Returns:
            (action,); None: the robot holds by itself when no action comes.

        Raises:
            ConfigError: No action can do that.
        """

    def report(self) -> Mapping[str, Any]:
        """What the robot's side knows of the run, for the statistics; it may be empty."""

    def stop(self) -> None:
        """Stop moving, release the motors, and stay stopped. Called whatever happened, also without `connect`.

        Another call may be under way in another thread, or hang there: it must not be waited for longer than a moment,
        and when it comes back it must neither move the robot nor give its motors torque again. `observe` gives up.
        It should not raise; what it raises is shown to the user, with the advice to switch the robot off.
        """


def hold_action(
    embodiment: EmbodimentSpec, last: FloatArray | None, measured: Mapping[str, float] | None = None
) -> FloatArray | None:
    """The action that keeps a robot where it is: deltas and velocities are 0, positions and grippers as sent last.

    Args:
        embodiment: The robot's specification.
        last: The action that was sent last, (action,); None: none yet.
        measured: The state by its names; before the first action, positions that have them are where it says.

    Returns:
        (action,), inside the accepted range, but for measured positions, which may be outside of it; None: there is no
        position to keep.

    Raises:
        ConfigError: See `without_motion`; or the range of a delta or velocity has no 0.
    """
    names, kinds = embodiment.action_names, embodiment.kinds
    positions = [name for name, kind in zip(names, kinds, strict=True) if kind == "position"]
    if last is None and measured is not None and positions and set(positions) <= set(measured):
        # Not clipped: a joint that stands outside of its range must be found out
        return _moving_nothing(embodiment, np.array([measured.get(name, 0.0) for name in names], np.float32))
    action = without_motion(embodiment, np.zeros(len(embodiment.action_names), np.float32) if last is None else last)
    if last is None and not all(map(is_gripper, positions)):
        return None
    return _moving_nothing(embodiment, embodiment.clip(action))


def _moving_nothing(embodiment: EmbodimentSpec, action: FloatArray) -> FloatArray:
    """The action without motion, where the robot accepts that.

    Raises:
        ConfigError: See `hold_action`.
    """
    still = without_motion(embodiment, action)
    is_moving = [kind in ("delta", "velocity") for kind in embodiment.kinds]
    bounds = zip(embodiment.action_names, is_moving, embodiment.action_low, embodiment.action_high, strict=True)
    if moving := [name for name, moves, low, high in bounds if moves and not low <= 0 <= high]:
        raise ConfigError(
            f"action_low, action_high must leave 0 for {', '.join(moving)}, because the robot could not be held "
            "otherwise; change them, or give the robot a `hold` of its own."
        )
    return still


def without_motion(embodiment: EmbodimentSpec, action: FloatArray) -> FloatArray:
    """An action with its deltas and velocities set to 0.

    Args:
        embodiment: The robot's specification.
        action: (action,).

    Returns:
        (action,); positions, and grippers among them, are as given.

    Raises:
        ConfigError: The robot takes torques, none of which keeps an arm where it is.
    """
    kinds = embodiment.kinds
    if torques := [name for name, kind in zip(embodiment.action_names, kinds, strict=True) if kind == "torque"]:
        raise ConfigError(
            f"action_kinds: {', '.join(torques)} are torques, and repeating a torque does not hold an arm but drives "
            "it on; give the robot a `hold` of its own, which returns the torques that keep it where it is, or None if "
            "its controller holds it when no action comes."
        )
    still = action.copy()
    still[[kind in ("delta", "velocity") for kind in kinds]] = 0.0
    return still


RobotMaker = Callable[[str, Mapping[str, tuple[int, int]]], Robot]
"""Makes a robot from the part of its name behind the colon, and the cameras that the policy needs, with their sizes."""
robots: Registry[RobotMaker] = Registry("robot", "dysl_vla.robots")
"""Robots by the part of their name before the colon."""
OURS = {"mujoco": ("dysl_vla.deploy.mujoco_robot", "sim"), "lerobot": ("dysl_vla.deploy.lerobot_robot", "robot")}
"""Modules that register kinds of robots, and the extras that they need: a controller needs no simulator."""


def make_robot(name: str, cameras: Mapping[str, tuple[int, int]]) -> Robot:
    """The robot of a name like "mujoco:metaworld-drawer-open".

    Args:
        name: The robot's kind and what it is, KIND:NAME.
        cameras: Cameras that the policy needs, with their sizes, (height, width).

    Raises:
        ConfigError: The kind is unknown, or the robot cannot be made from that name.
        MissingExtraError: A package that it needs is not installed.
    """
    kind, separator, rest = name.partition(":")
    known = sorted({*robots.names(), *OURS})
    if not separator:
        raise ConfigError(f"robot must be KIND:NAME, with KIND one of {', '.join(known)}; got {name!r}.")
    if kind in OURS:
        with needs_extra(OURS[kind][1]):
            import_module(OURS[kind][0])
    if kind not in known:
        raise ConfigError(f"robot must be of a kind among {', '.join(known)}; got {kind!r}.")
    return robots.get(kind)(rest, cameras)


def open_policy(
    bundle: Path | None, policy: str | None, skip: float | None, compute: ComputeConfig | None = None
) -> Policy:
    """Load what runs on a controller: a bundle, or a checkpoint with PyTorch.

    Args:
        bundle: Folder of `dysl export`; None: `policy` is loaded.
        policy: A shipped name, a checkpoint's folder or a hub id; None: `bundle` is loaded.
        skip: How much to skip, from 0 to 1; None: the stored operating point.
        compute: Device and type of numbers of a checkpoint; None: the CPU, and its own.

    Raises:
        ConfigError: Not exactly one of them is named, or it cannot skip that much.
        CheckpointError: It is damaged, foreign or edited.
        MissingExtraError: A package that it needs is not installed.
    """
    if (bundle is None) == (policy is None):
        given = "neither" if bundle is None else "both"
        raise ConfigError(f"bundle, policy: exactly one must be given, got {given}; give --bundle or --policy.")
    if bundle is not None:
        if compute not in (None, ComputeConfig()):
            raise ConfigError("device, dtype: a bundle runs on the CPU, with its own numbers; leave them out.")
        from dysl_vla.deploy.runtime import Bundle

        return Bundle(bundle, skip=skip)
    from dysl_vla.policies import load_policy
    from dysl_vla.workers import use_one_inference_thread

    assert policy is not None
    loaded = load_policy(policy, skip=skip, compute=compute)
    use_one_inference_thread()
    return loaded
