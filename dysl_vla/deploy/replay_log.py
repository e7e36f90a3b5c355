"""`dysl control replay`: sends the actions of a control log to a robot again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.cycle_log import read_log
from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.deploy.robot import make_robot
from dysl_vla.deploy.stopping import WatchedRobot
from dysl_vla.errors import ConfigError, RobotFault, SafetyStop
from dysl_vla.types import STATE_KEY

clock = time.perf_counter


def replay(folder: Path, robot_name: str | None = None) -> dict[str, Any]:
    """Send the actions of a log at their times, within the log's limits. No policy runs, and no camera is watched.

    Args:
        folder: Folder of `dysl control --log`.
        robot_name: KIND:NAME; None: the log's.

    Returns:
        How many actions were sent, and how many were not because their time was over; what the robot reports.

    Raises:
        ConfigError: There is no log, or the robot does not fit it.
        RobotFault: The robot does not answer.
        SafetyStop: An action may not be sent.
    """
    # Read the log
    stats, lines = read_log(folder)
    for name in ("rate_hz", "action_names", "limits", "cameras"):
        if name not in stats:
            raise ConfigError(f"{folder}: its statistics have no {name}; a log of a killed run cannot be replayed.")
    # Make the robot
    name = robot_name or stats.get("robot_name", "")
    if not name:
        raise ConfigError(f"robot: the log in {folder} does not name one; give --robot.")
    cameras = {camera: (size[0], size[1]) for camera, size in stats["cameras"].items()}
    robot = WatchedRobot(make_robot(name, cameras))
    # Move it, and stop it whatever happens
    counts = {"sent": 0, "passed": 0}
    stopped = robot.run(lambda: _send_all(robot, stats, lines, counts))
    # Raise what stopped it, or report
    if robot.fault is not None:
        raise robot.fault
    if stopped.problem:
        raise RobotFault(stopped.problem)
    return {**counts, "robot": dict(stopped.report)}


def _send_all(
    robot: WatchedRobot, stats: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], counts: dict[str, int]
) -> None:
    """Send a log's actions at their times."""
    # Apply the log's limits to a robot that takes the log's actions
    if list(robot.embodiment.action_names) != stats["action_names"]:
        raise ConfigError(f"robot: takes {robot.embodiment.action_names}, the log has {stats['action_names']}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stats["limits"].items()}
    limiter, period = ActionLimiter(Limits(**values), robot.embodiment, stats["rate_hz"]), 1 / stats["rate_hz"]
    # Begin only if it is known where the robot stands
    robot.connect(stats["rate_hz"])
    robot.observe(-math.inf)
    last = robot.hold(None)
    if last is None and limiter.positions:
        raise SafetyStop("robot: does not tell where it holds, so that its first command could be a jump.")
    start = clock()
    for line in lines:
        # Wait for this cycle's time
        due = start + line["due_s"]
        robot.wait_until(due)
        if robot.is_over:
            return
        # Pass over cycles that sent nothing, and those whose time is over
        if line.get("action") is None:
            continue
        if clock() - due >= period:
            counts["passed"] += 1
            continue
        # Check the action against where the robot is now, and send it
        timed = robot.observe(-math.inf)
        limiter.observe(timed.observation[STATE_KEY], timed.timestamp)
        last, _ = limiter.check(np.array(line["action"], np.float32), last, clock())
        robot.act(last)
        counts["sent"] += 1
    robot.wait_until(clock() + period)  # the last action has its period, too
