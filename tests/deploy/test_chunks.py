"""What of the running chunk is told to the inference of the coming one."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.deploy.chunks import LATENESS, Continuation, Plan
from dysl_vla.types import EpisodeState

PERIOD, LENGTH, START = 0.05, 8, 100.0
ACTIONS = np.arange(LENGTH, dtype=np.float32)[:, None]


def prepared(delays: list[float], first: float | None, second: float) -> EpisodeState:
    """A state while a chunk of an observation at `first` runs, and another is made of one at `second`, in periods."""
    continuation, state = Continuation(PERIOD), EpisodeState()
    for delay in delays:
        continuation.took(delay * PERIOD)
    plan = None if first is None else Plan(0, ACTIONS, START + first * PERIOD)
    continuation.prepare(state, plan, START + second * PERIOD, START)
    return state


def test_the_first_chunk_and_one_of_unmeasured_delay_begin_anew() -> None:
    for delays, first in (([1.0], None), ([], 0.0)):
        state = prepared(delays, first, 2.0)
        assert (state.leftover, state.sent_before) == (None, 0)


@given(st.floats(-1.0, 3.0).map(lambda x: round(x, 3) + 0.0003), st.floats(0.1, 7.5).map(lambda x: round(x, 3)))
def test_in_every_cycle_both_chunks_have_the_same_action_for_it(first: float, since: float) -> None:
    """The i-th of a chunk is for the cycle between i and i + 1 periods after its observation."""
    second = first + since
    state = prepared([1.0], first, second)
    sent, told = [], []
    for cycle in range(math.floor(second) + 1, math.floor(second) + 1 + LENGTH):
        old, new = math.floor(cycle + LATENESS - first), math.floor(cycle + LATENESS - second)
        if old < LENGTH:
            sent.append(float(ACTIONS[old, 0]))
            assert state.leftover is not None
            told.append(float(state.leftover[new, 0]))
    assert sent == told
    assert (state.leftover is None) == (not sent)


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=80))
def test_most_delays_are_covered(delays: list[float]) -> None:
    state, recent = prepared(delays, 0.0, 1.0), delays[-50:]
    assert state.sent_before <= math.ceil(max(recent) + 1e-9)
    assert np.mean([delay <= state.sent_before + 1e-9 for delay in recent]) >= 0.9 - 1 / len(recent)
