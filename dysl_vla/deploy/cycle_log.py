"""Logs of the control loop: a line for each cycle, and the statistics; written and read."""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dysl_vla.deploy.stopping import start_thread
from dysl_vla.errors import ConfigError
from dysl_vla.files import is_unused, read_json, read_lines, write_json

CYCLES, STATS = "cycles.jsonl", "stats.json"
EARLIER_STATS = "account.json"
"""What logs of version 0.1.0 call the file of the statistics; its content is the same."""
CLOSE_S = 5.0
"""A disk that has not taken the last lines by then is not waited for."""


class CycleLog:
    """Writes a line a cycle to a file, on a thread of its own, because a disk may be slow.

    Args:
        folder: New, or empty.

    Raises:
        ConfigError: It is not empty, or cannot be made.
        RobotFault: The system has no thread left.
    """

    def __init__(self, folder: Path) -> None:
        if not is_unused(folder):
            raise ConfigError(f"log must be a new folder, got {folder}, which is not empty; give another.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"log must be a folder that can be written, got {folder} ({error}).") from error
        self._folder = folder
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        start_thread(self._thread)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; returns at once."""
        if self._error is None:
            self._lines.put(line)

    def close(self, stats: Mapping[str, Any]) -> None:
        """Wait for the last line, and write the statistics.

        A log that could not be written is reported on stderr, not raised: there may be a worse error.
        """
        self._lines.put(None)
        self._thread.join(CLOSE_S)
        try:
            write_json(self._folder / STATS, _finite(json.loads(json.dumps(stats, default=str))))
        except (OSError, ValueError, TypeError) as error:  # also of what a robot reports that JSON cannot have
            self._error = self._error or error
        if self._error is not None or self._thread.is_alive():
            print(f"log: {self._folder} is not whole ({self._error or 'the disk is too slow'}).", file=sys.stderr)

    def _work(self) -> None:
        try:
            with (self._folder / CYCLES).open("w", encoding="utf-8") as file:
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")
                    file.flush()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self._error = error


def _finite(value: Any) -> Any:
    """A JSON value with None in the place of each number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a log.

    Returns:
        Its statistics, empty for a run that was killed; its lines, which then end where the run did.

    Raises:
        ConfigError: The folder has no log, or a damaged one.
    """
    if not (folder / CYCLES).is_file():
        raise ConfigError(f"{folder}: holds no log; dysl control --log writes one.")
    path = stats_path(folder)
    stats, lines = read_json(path) if path.is_file() else {}, read_lines(folder / CYCLES)
    for number, line in enumerate(lines, start=1):
        check_field(f"{folder / CYCLES}: line {number}", line, "", "an object", isinstance(line, dict))
        check_number(folder, number, line, "due_s")
    return stats, lines


def stats_path(folder: Path) -> Path:
    """The file of a log's statistics, which a killed run does not have."""
    return next((path for path in (folder / STATS, folder / EARLIER_STATS) if path.is_file()), folder / STATS)


def check_number(folder: Path, number: int, line: Mapping[str, Any], name: str) -> None:
    """Refuse a line of a log that lacks a number.

    Args:
        folder: The log's folder.
        number: Number of the line, from 1.
        line: The line.
        name: The field.

    Raises:
        ConfigError: The field is no finite number.
    """
    value = line.get(name)
    check_field(f"{folder / CYCLES}: line {number}", value, name, "a finite number", is_number(value))


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_field(where: str, value: object, name: str, expected: str, is_right: bool) -> None:
    """Refuse a value of a log.

    Raises:
        ConfigError: It is not right.
    """
    if not is_right:
        raise ConfigError(f"{where}: {name or 'it'} must be {expected}, got {value!r}; restore the log.")
