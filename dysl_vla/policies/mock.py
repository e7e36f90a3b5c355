"""A policy for the mock suite without any model: it finds the mark in the image and moves towards it.

It serves tests of everything around a policy. It remembers nothing, and fails from some initial states, so that its
success rate is neither 0 nor 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    ActionChunk,
    EpisodeState,
    InferenceTiming,
    Normalisation,
    Observation,
    PolicySpec,
)

GAIN = 6.0
CHUNK = 4
BLIND_ABOVE = 0.7
"""Height above which the policy does not see marks, and so fails."""


class MockPolicy:
    """Proportional control towards the red mark; see the module."""

    spec = PolicySpec(
        cameras={"top": (32, 32), "wrist": (16, 16)},
        state_names=("x", "y"),
        action_names=("dx", "dy", "gripper"),
        rate_hz=20.0,
        chunk_length=CHUNK,
        execute_steps=2,
        state_normalisation=Normalisation((0.0, 0.0), (1.0, 1.0)),
        action_normalisation=Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )

    provenance: Mapping[str, Any] = MappingProxyType({})
    fingerprint = "mock"

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""
        return EpisodeState()

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch; see `Policy.infer`."""
        chunks = []
        for observation in observations:
            started = time.perf_counter()
            self.spec.check_observation(observation)
            marks = np.argwhere(observation[IMAGE_PREFIX + "top"][..., 0] == 255)
            seen = time.perf_counter()
            position = observation[STATE_KEY]
            mark = marks.mean(axis=0) / 15.5 - 1 if len(marks) else position
            wanted = position if mark[0] > BLIND_ABOVE else mark
            action = np.array([*np.clip(GAIN * (wanted - position), -1, 1), -1.0], np.float32)
            decided = time.perf_counter()
            timing = InferenceTiming(encode_s=seen - started, llm_s=decided - seen, decode_s=0.0)
            chunks.append(ActionChunk(np.tile(action, (CHUNK, 1)), timing))
        return chunks
