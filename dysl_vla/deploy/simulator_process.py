"""The process of a simulated robot: the simulator with a clock of its own, its cameras, and faults that are asked for.

At each tick it does what a robot's controller does: it takes the latest command, unless that has become too old, moves
for one period, and publishes what its cameras see then. Nobody waits for anybody.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock as LockType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from dysl_vla.deploy.robot import hold_action
from dysl_vla.deploy.simulator_memory import (
    COUNTS,
    EPISODES,
    EXECUTED,
    HELD,
    PERIODS,
    SHORT,
    SUCCESSES,
    UNSAFE,
    SimulatorMemory,
)
from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.libero import PRO_HORIZONS
from dysl_vla.envs.suites import get_suite, suites, with_robot
from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, FloatArray, Observation
from dysl_vla.workers import begin_worker

clock = time.perf_counter
MANY_TASKS = 60
"""Number of tasks above which an error names the nearest alone."""
COMMAND_AGE_S = 0.25
"""A command that is older is not executed any more: the robot holds, as one does whose controller has died."""


@dataclass(frozen=True)
class Simulation:
    """What is simulated, and what goes wrong, in seconds after the start; infinity: never."""

    task: str
    """Suite's first word and task: "metaworld-drawer-open"; with another robot "robosuite-lift@UR5e"."""
    episode: int = 0
    """Index of the first episode; at the horizon the next one begins."""
    seed: int = 100_000
    """Seed of the initial states."""
    full_quality: int = 0
    """1 for frames with shadows and reflections, on which public checkpoints were trained."""
    answer_s: float = 0.5
    """The robot has a fault if there is no observation for so long."""
    freeze_after: float = math.inf
    """From then on, the cameras show the same images."""
    drop_after: float = math.inf
    """From then on, no observation arrives."""
    late_after: float = math.inf
    """From then on, observations arrive `late_s` after they were made."""
    late_s: float = 0.5
    """See `late_after`."""
    nan_after: float = math.inf
    """From then on, the state has a NaN."""
    stall_after: float = math.inf
    """From then on, the process does not run."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)[1:]):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"robot: {name} must be a number that is not negative, got {getattr(self, name)}.")
        if self.full_quality > 1:
            raise ConfigError(f"robot: full_quality must be 0 or 1, got {self.full_quality}.")

    @classmethod
    def parse(cls, text: str) -> Simulation:
        """Make one from "TASK?name=value&...".

        Raises:
            ConfigError: A name is unknown, or a value is not a number.
        """
        task, _, query = text.partition("?")
        kinds = {field.name: int if field.type == "int" else float for field in fields(cls)[1:]}
        values: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in kinds:
                raise ConfigError(f"robot: a simulated one has no option {name!r}; it has {', '.join(kinds)}.")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise ConfigError(f"robot: {name} must be a number, got {value!r}.") from error
        return cls(task, **values)


def simulate(
    simulation: Simulation, cameras: Mapping[str, tuple[int, int]] | None, lock: LockType, pipe: Connection
) -> None:
    """What the process does: make the environment, wait for the memory and the period, run until it is to end.

    Args:
        simulation: What is simulated, and what goes wrong.
        cameras: Camera name to image size, (height, width); None: the suite's own.
        lock: The memory's lock.
        pipe: It sends the robot's specification and instruction, or a `DyslError`; it receives the memory's name, and
            then the period in seconds.
    """
    begin_worker()
    try:
        env = make_env(simulation.task, cameras)
        env.full_quality = bool(simulation.full_quality)
        hold_action(env.embodiment, None)  # a robot that no action can hold is refused before it moves
        env.reset(seed=simulation.seed, options={"episode_index": simulation.episode})
        if len(env.instructions) > 1:
            raise ConfigError(
                f"robot: {simulation.task} has several instructions one after another, and a policy is given one; take "
                "a single task."
            )
        env.observe()  # a renderer's first frame is slow
    except DyslError as error:
        pipe.send(error)
        return
    embodiment = env.embodiment
    pipe.send((embodiment, env.instruction))
    try:
        memory = SimulatorMemory(embodiment, lock, pipe.recv())
        while not pipe.poll(0.01):
            if memory.is_over:
                return
        _run(simulation, env, memory, pipe.recv())
    except EOFError:  # the other process has ended
        pass
    finally:
        env.close()


def _run(simulation: Simulation, env: ManipulationEnv, memory: SimulatorMemory, period: float) -> None:
    """Move, observe and publish each period, until the process is to end."""
    count = dict.fromkeys(COUNTS, 0)
    count[EPISODES] = 1
    arm, cameras = _Arm(env, count, simulation), Cameras(simulation, clock())
    due = cameras.start
    while not memory.is_over:
        # Keep the schedule
        if (left := due - clock()) > 0:
            time.sleep(left)
        elif -left > period:
            count[SHORT] += 1
            due = clock()
        now = clock()
        if now - cameras.start >= simulation.stall_after:
            os.kill(os.getpid(), signal.SIGSTOP)
        # Move for a period, and publish what is seen then
        if count[PERIODS]:
            arm.move(*memory.commanded(), now)
        seen = clock()  # later than `now` where an episode began
        for observation, timestamp in cameras.frames(env.observe(), seen):
            memory.publish(observation, timestamp)
        count[PERIODS] += 1
        memory.counts[:] = list(count.values())
        due += period


class _Arm:
    """Executes commands, and counts them."""

    def __init__(self, env: ManipulationEnv, count: dict[str, int], simulation: Simulation) -> None:
        self._env, self._count = env, count
        self._seed, self._index = simulation.seed, simulation.episode
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
            self._index += 1
            env.begin(self._seed, self._index)
            count[EPISODES] += 1
            self._has_succeeded = False

    def _held(self) -> FloatArray:
        held = hold_action(self._env.embodiment, self._last)
        return np.zeros(len(self._env.embodiment.action_names), np.float32) if held is None else held


class Cameras:
    """Turns what the environment shows into what arrives, with the faults that are asked for.

    Only a frozen camera shows the very same image all the time: a real one has noise, and so each image has, in one
    pixel. Without it, a camera whose view the arm has left would look like a frozen one.

    Args:
        simulation: What goes wrong, and when.
        start: Time from which the faults' times count.
    """

    def __init__(self, simulation: Simulation, start: float) -> None:
        self._simulation, self.start = simulation, start
        self._noise = np.random.default_rng(simulation.seed)
        self._pending: deque[tuple[Observation, float]] = deque()
        self._frozen: dict[str, Any] = {}

    def frames(self, observation: dict[str, Any], now: float) -> Iterator[tuple[Observation, float]]:
        """Take in an observation that is made now; yields those that arrive now, each with its time."""
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


def make_env(name: str, cameras: Mapping[str, tuple[int, int]] | None) -> ManipulationEnv:
    """The environment of a task.

    Args:
        name: See `Simulation.task`.
        cameras: Camera name to image size, (height, width); None: the suite's own.

    Raises:
        ConfigError: There is no such task, or no such robot.
    """
    family, _, asked = name.partition("-")
    asked, _, robot = asked.partition("@")
    tasks: list[str] = []
    for suite_name in suites.names():
        if suite_name.partition("-")[0] == family:
            suite = get_suite(with_robot(suite_name, robot))
            if suite.perturbing is not None:  # a robot's faults are options of its own
                continue
            # Tasks may be named by the simulator alone, or by the suite, where several have a task of one name. Those
            # of LIBERO-PRO have LIBERO's names, and are always named by the suite.
            is_named = f"{family}-{asked}".startswith(f"{suite_name}-")
            short = f"{family}-{asked}".removeprefix(f"{suite_name}-") if is_named else asked
            if (is_named or suite_name not in PRO_HORIZONS) and (task := suite.find(short)) is not None:
                return suite.make(task, cameras)
            prefix = suite_name if family == "libero" else family
            tasks.extend(f"{prefix}-{other}" for other in suite.tasks)
    known = list(dict.fromkeys(tasks))
    if not known:
        known = [f"{one}-TASK" for one in dict.fromkeys(one.partition("-")[0] for one in suites.names())]
    what = "there are"
    if len(known) > MANY_TASKS:
        known, what = get_close_matches(name, known, 5, cutoff=0), f"the nearest of {len(known)} are"
    raise ConfigError(f"robot: nothing to simulate is named {name!r}; {what}: {', '.join(known)}.")
