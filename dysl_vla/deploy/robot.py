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
from dysl_vla.registry import Registry
from dysl_vla.types import RELATIVE, EmbodimentSpec, FloatArray, Observation, is_gripper


@dataclass(frozen=True)
class TimedObservation:
    """What a robot saw, and when.

    Attributes:
        observation: Under LeRobot's keys.
        timestamp: When its oldest part was so, in seconds of `time.perf_counter`. A time that is ahead of that clock,
            or before the last observation's, stops the robot.
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
        """Cameras, state and actions; positions are in metres, angles in radians where their names say nothing else."""

    def connect(self, rate_hz: float) -> None:
        """Get ready, without moving.

        Args:
            rate_hz: Actions a second that will come.

        Raises:
            ConfigError: It cannot take that rate.
            RobotFault: It does not answer.
        """

    def observe(self, after: float) -> TimedObservation:
        """The latest reading.

        Args:
            after: Wait for one that was taken later than that.

        Raises:
            RobotFault: None came within the robot's own time limit.
        """

    def act(self, action: FloatArray) -> None:
        """Execute an action, (action,), in the world's units, until the next one; returns at once.

        Raises:
            RobotFault: It does not take it.
        """

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """The action that keeps it where it is.

        Args:
            last: The action that was sent last; None: none yet.

        Returns:
            (action,); None: the robot holds by itself when no action comes.
        """

    def report(self) -> Mapping[str, Any]:
        """What its side knows of the run, for the account; nothing is fine."""

    def stop(self) -> None:
        """Stop moving, release the motors, and stay so. Called whatever happened, also without `connect`.

        Another call may be under way in another thread, or hang there: it must not be waited for longer than a moment,
        and when it comes back it must neither move the robot nor give its motors torque again. `observe` gives up.
        Should not raise; what it raises is shown to the user, who is told to switch the robot off.
        """


def hold_action(embodiment: EmbodimentSpec, last: FloatArray | None) -> FloatArray | None:
    """No motion where actions are relative; positions, and the gripper, as they were sent last.

    Args:
        embodiment: The robot's.
        last: The action that was sent last; None: none yet.

    Returns:
        (action,); None: there is no last position to keep.
    """
    others = [name for name in embodiment.action_names if name not in RELATIVE and not is_gripper(name)]
    if last is None and others:
        return None
    action = np.zeros(len(embodiment.action_names), np.float32) if last is None else last.copy()
    action[[name in RELATIVE for name in embodiment.action_names]] = 0.0
    return embodiment.clip(action)


RobotMaker = Callable[[str, Mapping[str, tuple[int, int]]], Robot]
"""From the part of a name behind the colon, and the cameras that the policy needs, with their sizes."""
robots: Registry[RobotMaker] = Registry("robot", "dysl_vla.robots")
"""Robots by the part of their name before the colon."""
OURS = {"mujoco": ("dysl_vla.deploy.mujoco_robot", "sim"), "lerobot": ("dysl_vla.deploy.lerobot_robot", "robot")}
"""Modules that register kinds of robots, and the extras that they need: a controller need not have a simulator."""


def make_robot(name: str, cameras: Mapping[str, tuple[int, int]]) -> Robot:
    """The robot of a name like "mujoco:metaworld-drawer-open".

    Args:
        name: Its kind and what it is.
        cameras: That the policy needs, with their sizes.

    Raises:
        ConfigError: Unknown, or it cannot be made so.
        MissingExtraError: What it needs is not installed.
    """
    kind, separator, rest = name.partition(":")
    known = sorted({*robots.names(), *OURS})
    if not separator:
        raise ConfigError(f"robot: {name!r} must be KIND:NAME, with KIND one of: {', '.join(known)}.")
    if kind in OURS:
        with needs_extra(OURS[kind][1]):
            import_module(OURS[kind][0])
    if kind not in known:
        raise ConfigError(f"robot: unknown kind {kind!r}; there are: {', '.join(known)}.")
    return robots.get(kind)(rest, cameras)


def open_policy(bundle: Path | None, policy: str | None, skip: float | None) -> Policy:
    """What runs on a controller: a bundle, or a checkpoint with PyTorch.

    Raises:
        ConfigError: Not exactly one is named, or it cannot skip so.
        CheckpointError: It is damaged, foreign or edited.
        MissingExtraError: What it needs is not installed.
    """
    if (bundle is None) == (policy is None):
        raise ConfigError("bundle, policy: give --bundle or --policy, one of them.")
    if bundle is not None:
        from dysl_vla.deploy.runtime import Bundle

        return Bundle(bundle, skip=skip)
    from dysl_vla.policies import load_policy
    from dysl_vla.workers import use_one_inference_thread

    assert policy is not None
    loaded = load_policy(policy, skip=skip)
    use_one_inference_thread()
    return loaded
