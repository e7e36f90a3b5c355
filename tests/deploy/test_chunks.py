"""What of the running chunk is told to the inference of the coming one."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.deploy.chunks import Continuation, Predicted
from dysl_vla.types import ActionChunk, EpisodeState, InferenceTiming

PERIOD, LENGTH = 0.05, 8
CHUNK = ActionChunk(np.arange(LENGTH, dtype=np.float32)[:, None], InferenceTiming(0.0, 0.0, 0.0))


def prepared(delays: list[float], since: float | None) -> EpisodeState:
    continuation, state = Continuation(PERIOD), EpisodeState()
    for delay in delays:
        continuation.took(delay * PERIOD)
    running = None if since is None else Predicted(0, CHUNK, 10.0, 0.0)
    continuation.prepare(state, running, 10.0 + (since or 0.0) * PERIOD)
    return state


def test_the_first_chunk_and_one_of_unmeasured_delay_begin_anew() -> None:
    for delays, since in (([1.0], None), ([], 2.0)):
        state = prepared(delays, since)
        assert (state.leftover, state.sent_before) == (None, 0)


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=80), st.floats(0.0, 12.0))
def test_actions_are_told_from_the_observations_time_on_and_most_delays_are_covered(
    delays: list[float], since: float
) -> None:
    state = prepared(delays, since)
    passed = round(since)
    if passed >= LENGTH:
        assert state.leftover is None
        return
    assert state.leftover is not None
    np.testing.assert_array_equal(state.leftover[:, 0], np.arange(passed, LENGTH))
    recent = delays[-50:]
    assert state.sent_before <= math.ceil(max(recent) + 1e-9)
    assert np.mean([delay <= state.sent_before + 1e-9 for delay in recent]) >= 0.9 - 1 / len(recent)


def test_a_state_forgets_what_is_over() -> None:
    continuation, state = Continuation(PERIOD), EpisodeState()
    continuation.took(PERIOD)
    continuation.prepare(state, Predicted(0, CHUNK, 0.0, 0.0), PERIOD)
    assert state.leftover is not None
    continuation.prepare(state, Predicted(0, CHUNK, 0.0, 0.0), 100.0)
    assert (state.leftover, state.sent_before) == (None, 0)
