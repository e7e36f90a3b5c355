"""Logs of the control loop: written, read, played back to a robot, opened in Rerun."""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.deploy.robot import make_robot
from dysl_vla.deploy.stopping import WatchedRobot
from dysl_vla.errors import ConfigError, RobotFault, SafetyStop
from dysl_vla.extras import needs_extra
from dysl_vla.files import is_unused, read_json, read_lines, write_json
from dysl_vla.types import STATE_KEY

clock = time.perf_counter
LOG, ACCOUNT = "cycles.jsonl", "account.json"
NAP_S = 0.02
CLOSE_S = 5.0
"""A disk that has not taken the last lines by then is not waited for."""


class CycleLog:
    """A line a cycle to a file, written by a thread of its own: a disk may be slow.

    Args:
        folder: New, or empty.

    Raises:
        ConfigError: It is not empty.
    """

    def __init__(self, folder: Path) -> None:
        if not is_unused(folder):
            raise ConfigError(f"log: {folder} is not empty; give a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; returns at once."""
        if self._error is None:
            self._lines.put(line)

    def close(self, account: Mapping[str, Any]) -> None:
        """Wait for the last line; a log that could not be written is told, not raised: there may be a worse error."""
        self._lines.put(None)
        self._thread.join(CLOSE_S)
        try:
            write_json(self._folder / ACCOUNT, json.loads(json.dumps(account, default=str)))
        except OSError as error:
            self._error = self._error or error
        if self._error is not None or self._thread.is_alive():
            print(f"log: {self._folder} is not whole ({self._error or 'the disk is too slow'}).", file=sys.stderr)

    def _work(self) -> None:
        try:
            with (self._folder / LOG).open("w", encoding="utf-8") as file:
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")
                    file.flush()
        except OSError as error:
            self._error = error


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
    cameras = {camera: (size[0], size[1]) for camera, size in account["cameras"].items()}
    robot = WatchedRobot(make_robot(name, cameras))
    counts = {"sent": 0, "passed": 0}
    stopped = robot.run(lambda: _play(robot, account, lines, counts))
    if robot.fault is not None:
        raise robot.fault
    if stopped.problem:
        raise RobotFault(stopped.problem)
    return {**counts, "robot": dict(stopped.report)}


def _play(
    robot: WatchedRobot, account: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], counts: dict[str, int]
) -> None:
    """Send a log's actions at their times."""
    if list(robot.embodiment.action_names) != account["action_names"]:
        raise ConfigError(f"robot: takes {robot.embodiment.action_names}, the log has {account['action_names']}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in account["limits"].items()}
    limiter, period = ActionLimiter(Limits(**values), robot.embodiment, account["rate_hz"]), 1 / account["rate_hz"]

    def wait_until(due: float) -> None:
        while (left := due - clock()) > 0 and not robot.is_over:
            time.sleep(min(left, NAP_S))

    robot.connect(account["rate_hz"])
    robot.observe(-math.inf)
    last = robot.hold(None)
    if last is None and limiter.positions:
        raise SafetyStop("robot: does not say where it holds, so that its first command could be a jump.")
    start = clock()
    for line in lines:
        due = start + line["due_s"]
        wait_until(due)
        if robot.is_over:
            return
        if line.get("action") is None:
            continue
        if clock() - due >= period:
            counts["passed"] += 1
            continue
        reading = robot.observe(-math.inf)
        limiter.observe(reading.observation[STATE_KEY], reading.timestamp)
        last, _ = limiter.check(np.array(line["action"], np.float32), last, clock())
        robot.act(last)
        counts["sent"] += 1
    wait_until(clock() + period)  # the last one is executed, too


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
