"""`dysl control replay`: sends the actions of a control log to a robot again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.cycle_log import CYCLES, check_field, is_number, read_log, stats_path
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
    limits = _checked(folder, stats, lines)
    # Make the robot
    name = robot_name or stats.get("robot_name", "")
    if not name or not isinstance(name, str):
        raise ConfigError(f"robot: the log in {folder} does not name one; give --robot.")
    cameras = {camera: (size[0], size[1]) for camera, size in stats["cameras"].items()}
    robot = WatchedRobot(make_robot(name, cameras))
    # Move it, and stop it whatever happens
    counts = {"sent": 0, "passed": 0}
    stopped = robot.run(lambda: _send_all(robot, stats, limits, lines, counts))
    # Raise what stopped it, or report
    if robot.fault is not None:
        raise robot.fault
    if stopped.problem:
        raise RobotFault(stopped.problem)
    return {**counts, "robot": dict(stopped.report)}


def _checked(folder: Path, stats: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Limits:
    """Check all of a log, before anything is opened or moved.

    Returns:
        The limits that it was made with.

    Raises:
        ConfigError: A field cannot be; the message names file, line and field.
    """
    path = stats_path(folder)

    def check(name: str, expected: str, is_right: bool) -> None:
        check_field(str(path), stats[name], name, expected, is_right)

    rate, names, cameras, limits = (stats[name] for name in ("rate_hz", "action_names", "cameras", "limits"))
    check("rate_hz", "a number above zero", is_number(rate) and rate > 0)
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check("action_names", "a list of names", are_names and bool(names))
    are_sizes = isinstance(cameras, dict) and all(
        isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)
        for size in cameras.values()
    )
    check("cameras", "an object with a height and a width for each camera", are_sizes)
    check("limits", "an object", isinstance(limits, dict))
    for number, line in enumerate(lines, start=1):
        action = line.get("action")
        is_action = isinstance(action, list) and len(action) == len(names) and all(map(is_number, action))
        expected = f"{len(names)} finite numbers, one for each of {', '.join(names)}"
        check_field(f"{folder / CYCLES}: line {number}", action, "action", expected, action is None or is_action)
    if unknown := [name for name in limits if name not in Limits.__dataclass_fields__]:
        raise ConfigError(f"{path}: limits must have known names, got {', '.join(unknown)}; remove them from there.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in limits.items()}
    try:
        return Limits(**values)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: limits: {error}") from error


def _send_all(
    robot: WatchedRobot,
    stats: Mapping[str, Any],
    limits: Limits,
    lines: Sequence[Mapping[str, Any]],
    counts: dict[str, int],
) -> None:
    """Send a log's actions at their times."""
    # Apply the log's limits to a robot that takes the log's actions
    if list(robot.embodiment.action_names) != stats["action_names"]:
        raise ConfigError(f"robot: takes {robot.embodiment.action_names}, the log has {stats['action_names']}.")
    limiter, period = ActionLimiter(limits, robot.embodiment, stats["rate_hz"]), 1 / stats["rate_hz"]
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
