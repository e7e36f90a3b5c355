"""Memory that a simulated robot's driver and its simulator's process share: observation, command, counts."""

from __future__ import annotations

import math
import time
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Lock as LockType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.errors import RobotFault
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, EmbodimentSpec, FloatArray, Observation

clock = time.perf_counter
COMMAND_S = 0.1
"""An observation is copied in microseconds; a process that holds the lock for so long is not running."""
COUNTS = PERIODS, SHORT, EXECUTED, UNSAFE, HELD, EPISODES, SUCCESSES = (
    "periods",
    "periods too short for the simulator",
    "commands executed",
    "unsafe commands refused",
    "periods held for want of a command",
    "episodes",
    "successes",
)
"""What the simulator's process counts; an unsafe command is not finite, or out of range."""


class SimulatorMemory:
    """The latest observation, the latest command, and the counts.

    Args:
        embodiment: The robot's specification, which decides the sizes.
        lock: Held while the observation or the command are copied.
        name: Name of memory that exists; empty: it is made.
    """

    def __init__(self, embodiment: EmbodimentSpec, lock: LockType, name: str = "") -> None:
        images = [(IMAGE_PREFIX + camera, np.uint8, (*size, 3)) for camera, size in embodiment.cameras.items()]
        kind = np.dtype(
            [
                ("is_over", np.int64),
                ("counts", np.int64, (len(COUNTS),)),
                ("timestamp", np.float64),
                ("commanded_at", np.float64),
                ("command", np.float32, (len(embodiment.action_names),)),
                (STATE_KEY, np.float32, (len(embodiment.state_names),)),
                *images,
            ]
        )
        self._memory = SharedMemory(name or None, create=not name, size=kind.itemsize)
        self.name = self._memory.name
        self._lock = lock
        self._values: Any = np.ndarray((), kind, self._memory.buf)
        self._observed = [STATE_KEY, *(image[0] for image in images)]
        if not name:
            self._values["is_over"] = 0
            self._values["counts"] = 0
            self._values["timestamp"] = self._values["commanded_at"] = -math.inf

    @property
    def counts(self) -> NDArray[np.int64]:
        """The counts in the order of `COUNTS`, (counts,), which the simulator's process changes in place."""
        counts: NDArray[np.int64] = self._values["counts"]
        return counts

    @property
    def is_over(self) -> bool:
        """Whether the simulator's process is to end."""
        return bool(self._values["is_over"])

    def end(self) -> None:
        """Ask the simulator's process to end."""
        self._values["is_over"] = 1

    def publish(self, observation: Observation, timestamp: float) -> None:
        """Put down an observation and its time."""
        with self._lock:
            for name in self._observed:
                self._values[name][...] = observation[name]
            self._values["timestamp"] = timestamp

    def read(self, after: float, wait_s: float) -> tuple[dict[str, Any], float] | None:
        """The observation and its time.

        Args:
            after: Time that the observation must be later than.
            wait_s: How long to wait for the lock.

        Returns:
            None: there is no later observation, or the lock was not free in time.
        """
        if not self._lock.acquire(timeout=wait_s):
            return None
        try:
            timestamp = float(self._values["timestamp"])
            if timestamp <= after:
                return None
            return {name: self._values[name].copy() for name in self._observed}, timestamp
        finally:
            self._lock.release()

    def command(self, action: FloatArray) -> None:
        """Put down a command.

        Raises:
            RobotFault: The other process holds the lock, and does not run.
        """
        if not self._lock.acquire(timeout=COMMAND_S):
            raise RobotFault(f"robot: it has taken no command for {COMMAND_S:g} s; its process does not run.")
        try:
            self._values["command"][...] = action
            self._values["commanded_at"] = clock()
        finally:
            self._lock.release()

    def commanded(self) -> tuple[FloatArray, float]:
        """The latest command, (action,), and when it was put down."""
        with self._lock:
            return self._values["command"].copy(), float(self._values["commanded_at"])

    def close(self) -> NDArray[np.int64]:
        """Free the memory, and return the last counts."""
        counts = self.counts.copy()
        del self._values
        self._memory.close()
        self._memory.unlink()
        return counts
