"""A simulated robot in real time, "mujoco:TASK", whose simulator runs in a process of its own (`simulator_process`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from dysl_vla.deploy.robot import TimedObservation, hold_action, robots
from dysl_vla.deploy.simulator_memory import COUNTS, SimulatorMemory
from dysl_vla.deploy.simulator_process import Simulation, simulate
from dysl_vla.errors import DyslError, RobotFault
from dysl_vla.types import TASK_KEY, EmbodimentSpec, FloatArray

clock = time.perf_counter
START_S, STOP_S = 60.0, 2.0
POLL_S = 0.0005


class MujocoRobot:
    """Implements `Robot` with a simulator, whose process starts when its specification is asked for.

    Args:
        simulation: What is simulated, and what goes wrong.
        cameras: Camera name to image size, (height, width); None: the suite's own.
    """

    def __init__(self, simulation: Simulation, cameras: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._simulation, self._cameras = simulation, cameras
        self._process: BaseProcess | None = None
        self._embodiment: EmbodimentSpec | None = None
        self._using = threading.Lock()
        self._memory: SimulatorMemory | None = None
        self._counts = np.zeros(len(COUNTS), np.int64)

    @property
    def embodiment(self) -> EmbodimentSpec:
        """The suite's specification."""
        if self._embodiment is None:
            self._start()
        assert self._embodiment is not None
        return self._embodiment

    def connect(self, rate_hz: float) -> None:
        """Start the clock. Each action lasts one simulated period, so at another rate time runs slower or faster."""
        assert self.embodiment is not None
        self._pipe.send(1 / rate_hz)

    def observe(self, after: float) -> TimedObservation:
        """See `Robot.observe`."""
        limit = max(clock(), after) + self._simulation.answer_s
        while True:
            with self._using:
                latest = self._connected().read(after, self._simulation.answer_s)
            if latest is not None:
                return TimedObservation({**latest[0], TASK_KEY: self._instruction}, latest[1])
            if clock() > limit:
                assert self._process is not None
                what = "is alive" if self._process.is_alive() else f"ended with code {self._process.exitcode}"
                raise RobotFault(f"robot: no observation for {self._simulation.answer_s:g} s; its process {what}.")
            time.sleep(POLL_S)

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        self._connected().command(action)

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """See `hold_action`."""
        return hold_action(self.embodiment, last)

    def stop(self) -> None:
        """End the process; a stalled one is killed."""
        if self._memory is not None:
            self._memory.end()
        if self._process is not None:
            self._process.join(STOP_S if self._memory is not None else 0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        # Another thread may be reading, which ends by itself; memory under one that hangs is left to the system
        if self._using.acquire(timeout=self._simulation.answer_s + STOP_S):
            try:
                if self._memory is not None:
                    self._counts = self._memory.close()
                    self._memory = None
            finally:
                self._using.release()

    def report(self) -> dict[str, int]:
        """What the simulator's process counted, under the names in `COUNTS`."""
        counts = self._counts if self._memory is None else self._memory.counts
        return dict(zip(COUNTS, counts.tolist(), strict=True))

    def _connected(self) -> SimulatorMemory:
        if self._memory is None:
            raise RobotFault("robot: is not connected, or was stopped.")
        return self._memory

    def _start(self) -> None:
        # Start the process
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        lock = context.Lock()
        self._process = context.Process(
            target=simulate, args=(self._simulation, self._cameras, lock, theirs), name="simulator", daemon=True
        )
        self._process.start()
        theirs.close()
        # Wait for the specification, or an error
        answer: Any = None
        try:
            if self._pipe.poll(START_S):
                answer = self._pipe.recv()
        except EOFError:
            pass
        if not isinstance(answer, tuple):
            self.stop()
            if isinstance(answer, DyslError):
                raise answer
            raise RobotFault("robot: the simulator did not start; try dysl doctor.")
        # Share memory of that size
        self._embodiment, self._instruction = answer
        self._memory = SimulatorMemory(self._embodiment, lock)
        self._pipe.send(self._memory.name)


@robots.register("mujoco")
def make_mujoco_robot(text: str, cameras: Mapping[str, tuple[int, int]]) -> MujocoRobot:
    """A simulated robot: "mujoco:metaworld-drawer-open?episode=3"."""
    return MujocoRobot(Simulation.parse(text), cameras)
