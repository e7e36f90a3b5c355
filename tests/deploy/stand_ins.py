"""A policy and a robot that record what is done to them, for tests of the control loop. They need NumPy alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.types import ActionChunk, EmbodimentSpec, EpisodeState, InferenceTiming, Normalisation, PolicySpec

WORLD = EmbodimentSpec(
    cameras={"top": (32, 32), "wrist": (16, 16)},
    state_names=("x", "y"),
    action_names=("dx", "dy", "gripper"),
    action_low=(-1.0,) * 3,
    action_high=(1.0,) * 3,
    rate_hz=20.0,
)
RATE = 100.0
SPEC = PolicySpec(
    cameras=WORLD.cameras,
    state_names=WORLD.state_names,
    action_names=WORLD.action_names,
    rate_hz=WORLD.rate_hz,
    chunk_length=4,
    execute_steps=2,
    state_normalisation=Normalisation((0.0,) * 2, (1.0,) * 2),
    action_normalisation=Normalisation((0.0,) * 3, (0.5,) * 3),
)


class Counting:
    """A policy whose actions tell which observation and which step they are for; it may be slow."""

    def __init__(self, delays: Sequence[float] = (), chunk: int = 8) -> None:
        self.spec = replace(SPEC, chunk_length=chunk)
        self.provenance: dict[str, Any] = {}
        self.fingerprint = "counting"
        self._delays = deque(delays)
        self.states: list[Any] = []
        self.warm = 0

    def reset(self) -> EpisodeState:
        return EpisodeState()

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        if not states[0].executed and not self.states and self.warm < 2:
            self.warm += 1
        elif self._delays:
            time.sleep(self._delays.popleft())
        self.states.append((list(states[0].executed), states[0].needed_at))
        number = float(observations[0]["observation.state"][0])
        steps = np.arange(self.spec.chunk_length, dtype=np.float32)
        actions = np.stack([np.full_like(steps, number), steps / 100, np.zeros_like(steps)], axis=1)
        return [ActionChunk(actions, InferenceTiming(0, 0, 0))]


class FakeRobot:
    """A robot with observations at times of its own, which records all that is done to it."""

    def __init__(self, period: float = 1 / RATE, delay: float = 0.0) -> None:
        self.embodiment = WORLD
        self.calls: list[str] = []
        self.sent: list[tuple[float, Any]] = []
        self.start = 0.0
        self._period, self._delay = period, delay
        self.observed_at: list[float] = []

    def connect(self, rate_hz: float) -> None:
        self.calls.append("connect")
        self.start = time.perf_counter()

    def observe(self, after: float) -> TimedObservation:
        now = time.perf_counter()
        number = int((max(now, after) - self.start) / self._period) + (after > now)
        timestamp = self.start + number * self._period
        while time.perf_counter() < timestamp + self._delay:
            time.sleep(0.0005)
        self.observed_at.append(timestamp)
        rng = np.random.default_rng(number)
        return TimedObservation(
            {
                "observation.images.top": rng.integers(0, 256, (32, 32, 3), np.uint8),
                "observation.images.wrist": rng.integers(0, 256, (16, 16, 3), np.uint8),
                "observation.state": np.array([number / 1000, 0], np.float32),
                "task": "go",
            },
            timestamp,
        )

    def act(self, action: Any) -> None:
        self.sent.append((time.perf_counter(), action))

    def hold(self, last: Any) -> Any:
        return np.array([0, 0, 0.5], np.float32)

    def report(self) -> dict[str, Any]:
        return {"acts": len(self.sent)}

    def stop(self) -> None:
        self.calls.append("stop")
