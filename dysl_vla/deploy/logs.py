"""Logs of the control loop: read, played back to a robot, opened in Rerun."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dysl_vla.deploy.control import ACCOUNT, LOG
from dysl_vla.deploy.limits import Guard, Limits
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import read_json, read_lines
from dysl_vla.types import STATE_KEY, FloatArray

clock = time.perf_counter


@dataclass(frozen=True)
class ReplayConfig:
    """Send the actions of a log to a robot again, at their times, within limits. Nobody looks and nobody infers."""

    folder: tyro.conf.Positional[Path]
    """Of `dysl control --log`."""
    robot: str = ""
    """KIND:NAME; empty: the one of the log."""
    limits: Limits = field(default_factory=Limits)


def read_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A log's account, and its lines; those of a run that was killed end where it was.

    Raises:
        ConfigError: There is none.
    """
    if not (folder / LOG).is_file():
        raise ConfigError(f"{folder}: holds no log; dysl control --log writes one.")
    account = read_json(folder / ACCOUNT) if (folder / ACCOUNT).is_file() else {}
    return account, read_lines(folder / LOG)


def replay(config: ReplayConfig) -> dict[str, Any]:
    """Play a log back.

    Returns:
        Actions sent; the largest distance of the state from the logged one, and what the robot reports.

    Raises:
        ConfigError: There is no log, or the robot does not fit it.
        RobotFault: The robot does not answer.
        SafetyStop: An action may not be sent.
    """
    account, lines = read_log(config.folder)
    made_for = account.get("robot_name", "")
    if not (config.robot or made_for):
        raise ConfigError(f"robot: {config.folder / ACCOUNT} does not name one; give --robot.")
    robot = make_robot(config.robot or made_for, {c: (s[0], s[1]) for c, s in account.get("cameras", {}).items()})
    sent, distances = 0, []
    try:
        rate_hz = float(account.get("rate_hz", robot.world.rate_hz))
        guard = Guard(config.limits, robot.world, rate_hz)
        robot.connect(rate_hz)
        reading = robot.observe(-math.inf)
        start = clock()
        last: FloatArray | None = None
        for line in lines:
            if (left := start + line["due_s"] - clock()) > 0:
                time.sleep(left)
            if line.get("action") is None:
                continue
            reading = robot.observe(-math.inf)
            state = reading.observation[STATE_KEY]
            guard.observe(state, reading.taken_at)
            if line.get("state") is not None:
                distances.append(float(np.abs(state - np.array(line["state"])).max()))
            last, _ = guard.check(np.array(line["action"], np.float32), last)
            robot.act(last)
            sent += 1
    finally:
        robot.stop()
    return {"sent": sent, "largest_distance": max(distances, default=math.nan), "robot": dict(robot.report())}


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
