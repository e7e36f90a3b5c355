"""A simulated robot in real time: the simulator in a process of its own, with its own clock, cameras and faults.

What it does at a tick is what a robot's controller does: it takes the latest command, unless that has become too old,
moves for one period, and shows what its cameras see then. Nobody waits for anybody.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Lock as LockType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from dysl_vla.deploy.robot import TimedObservation, hold_action, robots
from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.suites import get_suite, suites, with_robot
from dysl_vla.errors import ConfigError, DyslError, RobotFault
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EmbodimentSpec, FloatArray, Observation
from dysl_vla.workers import begin_worker

clock = time.perf_counter
START_S, STOP_S = 60.0, 2.0
POLL_S = 0.0005
COMMAND_S = 0.1
"""A reading is copied in microseconds; who holds the lock for so long is not running."""
COMMAND_AGE_S = 0.25
"""A command that is older is not executed any more: the robot holds, as one does whose controller has died."""
COUNTS = PERIODS, SHORT, EXECUTED, UNSAFE, HELD, EPISODES, SUCCESSES = (
    "periods",
    "periods too short for the simulator",
    "commands executed",
    "unsafe commands refused",
    "periods held for want of a command",
    "episodes",
    "successes",
)


@dataclass(frozen=True)
class Simulation:
    """What is simulated, and what goes wrong, in seconds after the start; infinity: never."""

    task: str
    """Suite's first word and task: "metaworld-drawer-open"; with another robot "robosuite-lift@UR5e"."""
    episode: int = 0
    """Index of the first episode; at the horizon the next one begins."""
    seed: int = 100_000
    """Of the initial states."""
    answer_s: float = 0.5
    """No reading for so long is a fault."""
    freeze_after: float = math.inf
    """From then on, the cameras show what they showed."""
    drop_after: float = math.inf
    """From then on, no reading arrives."""
    late_after: float = math.inf
    """From then on, readings arrive `late_s` after they were taken."""
    late_s: float = 0.5
    """See `late_after`."""
    nan_after: float = math.inf
    """From then on, the state has a NaN."""
    stall_after: float = math.inf
    """The process stops running."""

    def __post_init__(self) -> None:
        for name in ("episode", "seed", "answer_s", "late_s", *(f for f in vars(self) if f.endswith("_after"))):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"robot: {name}={getattr(self, name)} must be a number that is not negative.")

    @classmethod
    def parse(cls, text: str) -> Simulation:
        """From "TASK?name=value&...".

        Raises:
            ConfigError: An unknown name, or a value that is no number.
        """
        task, _, query = text.partition("?")
        kinds = {field.name: int if field.name in ("episode", "seed") else float for field in fields(cls)[1:]}
        values: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in kinds:
                raise ConfigError(f"robot: {name!r} is no option of a simulated one; there are: {', '.join(kinds)}.")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise ConfigError(f"robot: {name}={value} is no number.") from error
        return cls(task, **values)


class MujocoRobot:
    """Implements `Robot` with a simulator. Its process starts when its world is asked for.

    Args:
        simulation: What, and what goes wrong.
        cameras: To sizes; None: the suite's own.
    """

    def __init__(self, simulation: Simulation, cameras: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._simulation, self._cameras = simulation, cameras
        self._process: BaseProcess | None = None
        self._embodiment: EmbodimentSpec | None = None
        self._using = threading.Lock()
        self._shared: _Shared | None = None
        self._counts = np.zeros(len(COUNTS), np.int64)

    @property
    def embodiment(self) -> EmbodimentSpec:
        """Of the suite."""
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
                reading = self._connected().read(after, self._simulation.answer_s)
            if reading is not None:
                return TimedObservation({**reading[0], TASK_KEY: self._instruction}, reading[1])
            if clock() > limit:
                assert self._process is not None
                what = "is alive" if self._process.is_alive() else f"ended with code {self._process.exitcode}"
                raise RobotFault(f"robot: no reading for {self._simulation.answer_s:g} s; its process {what}.")
            time.sleep(POLL_S)

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        self._connected().command(action)

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """No motion, the gripper as it is."""
        return hold_action(self.embodiment, last)

    def stop(self) -> None:
        """End the process; a stalled one is killed."""
        if self._shared is not None:
            self._shared.end()
        if self._process is not None:
            self._process.join(STOP_S if self._shared is not None else 0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        # Another thread may be reading, which ends by itself; memory under one that hangs is left to the system
        if self._using.acquire(timeout=self._simulation.answer_s + STOP_S):
            try:
                if self._shared is not None:
                    self._counts = self._shared.close()
                    self._shared = None
            finally:
                self._using.release()

    def report(self) -> dict[str, int]:
        """What the robot's side counted, by the names in `COUNTS`; unsafe is what is not finite, or out of range."""
        counts = self._counts if self._shared is None else self._shared.counts
        return dict(zip(COUNTS, counts.tolist(), strict=True))

    def _connected(self) -> _Shared:
        if self._shared is None:
            raise RobotFault("robot: is not connected, or was stopped.")
        return self._shared

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        lock = context.Lock()
        self._process = context.Process(
            target=_simulate, args=(self._simulation, self._cameras, lock, theirs), name="simulator", daemon=True
        )
        self._process.start()
        theirs.close()
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
        self._embodiment, self._instruction = answer
        self._shared = _Shared(self._embodiment, lock)
        self._pipe.send(self._shared.name)


class _Shared:
    """Memory that both processes see: the latest reading, the latest command, counts.

    Args:
        embodiment: Decides the sizes.
        lock: Held while reading or command are copied.
        name: Of memory that exists; empty: make it.
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
        self._shown = [STATE_KEY, *(image[0] for image in images)]
        if not name:
            self._values["is_over"] = 0
            self._values["counts"] = 0
            self._values["timestamp"] = self._values["commanded_at"] = -math.inf

    @property
    def counts(self) -> NDArray[np.int64]:
        """Of `COUNTS`, changed in place by the robot's side."""
        counts: NDArray[np.int64] = self._values["counts"]
        return counts

    @property
    def is_over(self) -> bool:
        """The robot shall end."""
        return bool(self._values["is_over"])

    def end(self) -> None:
        """Tell the robot to end."""
        self._values["is_over"] = 1

    def show(self, observation: Observation, timestamp: float) -> None:
        """Publish a reading."""
        with self._lock:
            for name in self._shown:
                self._values[name][...] = observation[name]
            self._values["timestamp"] = timestamp

    def read(self, after: float, wait_s: float) -> tuple[dict[str, Any], float] | None:
        """The reading, if it was taken later than that."""
        if not self._lock.acquire(timeout=wait_s):
            return None
        try:
            timestamp = float(self._values["timestamp"])
            return ({name: self._values[name].copy() for name in self._shown}, timestamp) if timestamp > after else None
        finally:
            self._lock.release()

    def command(self, action: FloatArray) -> None:
        """Set the command.

        Raises:
            RobotFault: The other side holds the lock, and does not run.
        """
        if not self._lock.acquire(timeout=COMMAND_S):
            raise RobotFault(f"robot: takes no command for {COMMAND_S:g} s.")
        try:
            self._values["command"][...] = action
            self._values["commanded_at"] = clock()
        finally:
            self._lock.release()

    def commanded(self) -> tuple[FloatArray, float]:
        """The latest command, and when it came."""
        with self._lock:
            return self._values["command"].copy(), float(self._values["commanded_at"])

    def close(self) -> NDArray[np.int64]:
        """Free the memory; the last counts."""
        counts = self.counts.copy()
        del self._values
        self._memory.close()
        self._memory.unlink()
        return counts


def _simulate(
    simulation: Simulation, cameras: Mapping[str, tuple[int, int]] | None, lock: LockType, pipe: Connection
) -> None:
    """The simulator's process."""
    begin_worker()
    try:
        env = _make_env(simulation.task, cameras)
        env.reset(seed=simulation.seed, options={"episode_index": simulation.episode})
        env.observe()  # a renderer's first frame is slow
    except DyslError as error:
        pipe.send(error)
        return
    embodiment = env.embodiment
    pipe.send((embodiment, env.instruction))
    try:
        shared = _Shared(embodiment, lock, pipe.recv())
        while not pipe.poll(0.01):
            if shared.is_over:
                return
        _tick(simulation, env, shared, pipe.recv())
    except EOFError:  # the other side is gone
        pass
    finally:
        env.close()


def _tick(simulation: Simulation, env: ManipulationEnv, shared: _Shared, period: float) -> None:
    """The robot's controller: move, look, publish, until told to end."""
    count = dict.fromkeys(COUNTS, 0)
    count[EPISODES] = 1
    arm, eyes = _Arm(env, count), _Eyes(simulation, clock())
    due = eyes.start
    while not shared.is_over:
        if (left := due - clock()) > 0:
            time.sleep(left)
        elif -left > period:
            count[SHORT] += 1
            due = clock()
        now = clock()
        if now - eyes.start >= simulation.stall_after:
            os.kill(os.getpid(), signal.SIGSTOP)
        if count[PERIODS]:
            arm.move(*shared.commanded(), now)
        for observation, timestamp in eyes.look(env.observe(), now):
            shared.show(observation, timestamp)
        count[PERIODS] += 1
        shared.counts[:] = list(count.values())
        due += period


class _Arm:
    """Executes commands, and counts them."""

    def __init__(self, env: ManipulationEnv, count: dict[str, int]) -> None:
        self._env, self._count = env, count
        self._last: FloatArray | None = None
        self._has_succeeded = False

    def move(self, action: FloatArray, commanded_at: float, now: float) -> None:
        env, count = self._env, self._count
        if now - commanded_at > COMMAND_AGE_S:
            count[HELD] += 1
            action = self._held()
        elif not np.isfinite(action).all() or (action != env.embodiment.clip(action)).any():
            count[UNSAFE] += 1
            action = self._held()
        else:
            count[EXECUTED] += 1
        self._last = action
        _, is_truncated, info = env.advance(action)
        if info["success"] and not self._has_succeeded:
            self._has_succeeded = True
            count[SUCCESSES] += 1
        if is_truncated:
            env.reset()
            count[EPISODES] += 1
            self._has_succeeded = False

    def _held(self) -> FloatArray:
        held = hold_action(self._env.embodiment, self._last)
        return np.zeros(len(self._env.embodiment.action_names), np.float32) if held is None else held


class _Eyes:
    """Shows what the cameras see, and what is wrong with them.

    A camera shows the very same image all the time only if it is frozen: as in a real one there is noise, here of one
    pixel. Without, an arm that has left the view of a camera that stands still would look like a frozen camera.
    """

    def __init__(self, simulation: Simulation, start: float) -> None:
        self._simulation, self.start = simulation, start
        self._noise = np.random.default_rng(simulation.seed)
        self._pending: deque[tuple[Observation, float]] = deque()
        self._frozen: dict[str, Any] = {}

    def look(self, observation: dict[str, Any], now: float) -> Iterator[tuple[Observation, float]]:
        """Readings that are due now."""
        simulation, since = self._simulation, now - self.start
        images = {name: value.copy() for name, value in observation.items() if name.startswith(IMAGE_PREFIX)}
        for image in images.values():
            image[0, 0, 0] ^= self._noise.integers(8, dtype=np.uint8)
        if since >= simulation.freeze_after:
            images = self._frozen = self._frozen or images
        observation |= images
        if since >= simulation.nan_after:
            observation[STATE_KEY] = np.full_like(observation[STATE_KEY], np.nan)
        if since < simulation.drop_after:
            self._pending.append((observation, now))
        delay = simulation.late_s if since >= simulation.late_after else 0.0
        while self._pending and clock() - self._pending[0][1] >= delay:
            yield self._pending.popleft()


def _make_env(name: str, cameras: Mapping[str, tuple[int, int]] | None) -> ManipulationEnv:
    family, _, asked = name.partition("-")
    asked, _, robot = asked.partition("@")
    tasks: list[str] = []
    for suite_name in suites.names():
        if suite_name.partition("-")[0] == family:
            suite = get_suite(with_robot(suite_name, robot))
            if (task := suite.find(asked)) is not None:
                return suite.make(task, cameras)
            tasks.extend(f"{family}-{other}" for other in suite.tasks)
    known = ", ".join(dict.fromkeys(tasks))
    if not known:
        families = dict.fromkeys(suite_name.partition("-")[0] for suite_name in suites.names())
        known = ", ".join(f"{one}-TASK" for one in families)
    raise ConfigError(f"robot: nothing to simulate is named {name!r}; there are: {known}.")


@robots.register("mujoco")
def make_mujoco_robot(text: str, cameras: Mapping[str, tuple[int, int]]) -> MujocoRobot:
    """A simulated robot: "mujoco:metaworld-drawer-open?episode=3"."""
    return MujocoRobot(Simulation.parse(text), cameras)
