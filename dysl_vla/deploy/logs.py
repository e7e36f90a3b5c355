"""Logs of the control loop: read, played back to a robot, opened in Rerun."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.control import ACCOUNT, LOG, NAP_S, handled_signals
from dysl_vla.deploy.limits import Guard, Limits
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import read_json, read_lines
from dysl_vla.types import STATE_KEY

clock = time.perf_counter


def read_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's account, and its lines; those of a run that was killed end where it was.

    Raises:
        ConfigError: There is none.
    """
    if not (folder / LOG).is_file():
        raise ConfigError(f"{folder}: holds no log; dysl control --log writes one.")
    account = read_json(folder / ACCOUNT) if (folder / ACCOUNT).is_file() else {}
    return account, read_lines(folder / LOG)


def replay(folder: Path, robot_name: str = "") -> dict[str, Any]:
    """Send the actions of a log to a robot again, at their times, within the log's limits. Nobody looks, nobody infers.

    Args:
        folder: Of `dysl control --log`.
        robot_name: KIND:NAME; empty: the log's.

    Returns:
        Actions sent, and those whose time was over; what the robot reports.

    Raises:
        ConfigError: There is no log, or the robot does not fit it.
        RobotFault: The robot does not answer.
        SafetyStop: An action may not be sent.
    """
    account, lines = read_log(folder)
    for name in ("rate_hz", "action_names", "limits", "cameras"):
        if name not in account:
            raise ConfigError(f"{folder / ACCOUNT}: has no {name}; a log of a run that was killed cannot be replayed.")
    name = robot_name or account.get("robot_name", "")
    if not name:
        raise ConfigError(f"robot: {folder / ACCOUNT} does not name one; give --robot.")
    robot = make_robot(name, {camera: (size[0], size[1]) for camera, size in account["cameras"].items()})
    period = 1 / account["rate_hz"]
    is_over = False
    sent = passed = 0

    def stop(_: str) -> None:
        nonlocal is_over
        is_over = True

    def wait_until(due: float) -> None:
        while (left := due - clock()) > 0 and not is_over:
            time.sleep(min(left, NAP_S))

    try:
        with handled_signals(stop):
            if list(robot.world.action_names) != account["action_names"]:
                raise ConfigError(f"robot: takes {robot.world.action_names}, the log has {account['action_names']}.")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in account["limits"].items()}
            limits = Limits(**values)
            guard = Guard(limits, robot.world, account["rate_hz"])
            robot.connect(account["rate_hz"])
            robot.observe(-math.inf)
            start = clock()
            last = robot.hold(None)
            for line in lines:
                due = start + line["due_s"]
                wait_until(due)
                if is_over:
                    break
                if line.get("action") is None:
                    continue
                if clock() - due >= period:
                    passed += 1
                    continue
                reading = robot.observe(-math.inf)
                guard.observe(reading.observation[STATE_KEY], reading.taken_at)
                last, _ = guard.check(np.array(line["action"], np.float32), last, clock())
                robot.act(last)
                sent += 1
            wait_until(clock() + period)  # the last one is executed, too
    finally:
        robot.stop()
    return {"sent": sent, "passed": passed, "robot": dict(robot.report())}


def view(folder: Path, out: Path | None = None) -> Path:
    """Write a log as a recording that Rerun's viewer opens.

    Args:
        folder: Of `dysl control --log`.
        out: The recording; None: `cycles.rrd` beside the log.

    Returns:
        The recording.

    Raises:
        ConfigError: There is no log.
        MissingExtraError: Rerun is not installed.
    """
    with needs_extra("viz"):
        import rerun
    account, lines = read_log(folder)
    out = out or folder / "cycles.rrd"
    recording = rerun.new_recording("dysl control")
    names = account.get("action_names", [])
    state_names = account.get("state_names", [])
    for line in lines:
        rerun.set_time_seconds("control", line["due_s"], recording=recording)

        def scalar(path: str, value: float) -> None:
            rerun.log(path, rerun.Scalar(value), recording=recording)

        scalar("schedule/sent_after_its_time_ms", line["jitter_ms"])
        for index, value in enumerate(line.get("action") or ()):
            scalar(f"action/{names[index] if names else index}", value)
        for index, value in enumerate(line.get("state") or ()):
            scalar(f"state/{state_names[index] if state_names else index}", value)
        if "age_ms" in line:
            scalar("schedule/age_of_reading_ms", line["age_ms"])
        inference = line.get("inference")
        if inference:
            scalar("inference/ms", inference["inference_ms"])
            if "layers" in inference:
                scalar("inference/layers", inference["layers"])
        if line["status"] != "on_time" or line.get("breaches"):
            text = f"cycle {line['cycle']}: {line['status']} {' '.join(line.get('breaches', ()))}"
            rerun.log("events", rerun.TextLog(text), recording=recording)
    rerun.save(out, recording=recording)
    return out
