"""Logs of the control loop: a line for each cycle, and the statistics; written and read."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        ConfigError: It is not empty.
    """

    def __init__(self, folder: Path) -> None:
        if not is_unused(folder):
            raise ConfigError(f"log must be a new folder, got {folder}, which is not empty; give another.")
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

    def close(self, stats: Mapping[str, Any]) -> None:
        """Wait for the last line, and write the statistics.

        A log that could not be written is reported on stderr, not raised: there may be a worse error.
        """
        self._lines.put(None)
        self._thread.join(CLOSE_S)
        try:
            write_json(self._folder / STATS, json.loads(json.dumps(stats, default=str)))
        except OSError as error:
            self._error = self._error or error
        if self._error is not None or self._thread.is_alive():
            print(f"log: {self._folder} is not whole ({self._error or 'the disk is too slow'}).", file=sys.stderr)

    def _work(self) -> None:
        try:
            with (self._folder / CYCLES).open("w", encoding="utf-8") as file:
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")
                    file.flush()
        except OSError as error:
            self._error = error


def read_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a log.

    Returns:
        Its statistics, empty for a run that was killed; its lines, which then end where the run did.

    Raises:
        ConfigError: The folder has no log, or a damaged one.
    """
    if not (folder / CYCLES).is_file():
        raise ConfigError(f"{folder}: holds no log; dysl control --log writes one.")
    stats = next((folder / name for name in (STATS, EARLIER_STATS) if (folder / name).is_file()), None)
    return {} if stats is None else read_json(stats), read_lines(folder / CYCLES)
