from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ActionError
from dysl_vla.policies import select_action
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.types import ActionChunk, EpisodeState, FloatArray, Observation

ENV = MockEnv("reach")


class Counting(MockPolicy):
    """Each inference answers its own number, in rising tenths along the chunk, and notes what it was shown."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.shown: list[float] = []
        self.executed: list[list[float]] = []

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        [chunk] = super().infer(observations, states)
        self.shown.append(float(observations[0]["observation.state"][0]))
        self.executed.append([float(action[0]) for action in states[0].executed])
        steps = len(self.shown) + np.arange(len(chunk.actions)) / 10
        return [replace(chunk, actions=np.repeat(self.scale * steps[:, None], 3, axis=1).astype(np.float32))]


def act(policy: Counting, steps: int, *, is_clipped: bool = False) -> list[FloatArray]:
    observation, _ = ENV.reset(seed=0)
    state = policy.reset()
    return [
        select_action(
            policy,
            {**observation, "observation.state": np.array([step, 0], np.float32)},
            state,
            ENV.embodiment if is_clipped else None,
        )
        for step in range(steps)
    ]


def test_a_chunk_is_executed_before_the_policy_looks_again() -> None:
    policy = Counting()
    assert policy.spec.execute_steps == 2
    assert [float(action[0]) for action in act(policy, 5)] == pytest.approx([1.0, 1.1, 2.0, 2.1, 3.0])
    assert policy.shown == [0, 2, 4]


@pytest.mark.parametrize("is_clipped", [False, True])
def test_the_next_inference_knows_what_was_executed(is_clipped: bool) -> None:
    policy = Counting()
    executed = [float(action[0]) for action in act(policy, 5, is_clipped=is_clipped)]
    assert policy.executed == [[], executed[:2], executed[:4]]
    assert (max(executed) == 1) == is_clipped


def test_nothing_of_a_chunk_that_is_not_finite_counts_as_executed() -> None:
    state = MockPolicy().reset()
    with pytest.raises(ActionError, match="not finite"):
        select_action(Counting(np.nan), ENV.reset(seed=0)[0], state)
    assert not state.executed
    assert not state.planned
