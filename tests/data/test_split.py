from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.split import EVERY, Split, split_for
from dysl_vla.errors import ConfigError


@given(st.integers(2, 500))
def test_some_episodes_are_held_out_and_most_are_not(episodes: int) -> None:
    split = split_for(episodes)
    held_out = sum(map(split.is_held_out, range(episodes)))
    assert 1 <= held_out <= episodes / 2
    if episodes >= 10:
        assert held_out <= episodes / 5
    assert held_out >= 2 or episodes < 4
    assert split.every == EVERY or episodes < 2 * EVERY


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 200))
def test_a_dataset_that_grows_keeps_what_it_held_out(every: int, before: int, more: int) -> None:
    record = {"data": {"held_out_every": every}}
    small, large = split_for(before, record), split_for(before + more, record)
    assert [small.is_held_out(e) for e in range(before)] == [large.is_held_out(e) for e in range(before)]


@pytest.mark.parametrize(("share", "every"), [(0.0, 0), (0.05, 20), (0.1, 10), (0.5, 2), (1 / 3, 3)])
def test_the_share_can_be_chosen(share: float, every: int) -> None:
    split = split_for(1000, {"data": {"held_out_every": 7}}, share)
    assert split == Split(every)
    assert sum(map(split.is_held_out, range(1000))) == pytest.approx(1000 * share, abs=1)


def test_what_the_policys_training_held_out_counts_also_for_policies_trained_from_it() -> None:
    assert split_for(50, {"data": {}, "init": {"data": {"held_out_every": 10}}}) == Split(10)
    assert split_for(50, {"data": {"held_out_every": 0}, "init": {"data": {"held_out_every": 10}}}) == Split(0)
    assert split_for(50, {"data": {}}) == split_for(50) == Split(EVERY)
    of_before = {"method": "behaviour cloning", "data": {"episodes": 10}}
    assert split_for(10, of_before) == Split(EVERY)  # it was trained on all ten


@pytest.mark.parametrize(("share", "words"), [(0.4, "0.4; give 0.333 or 0.5"), (0.3, "0.3; give 0.25 or 0.333")])
def test_a_share_that_one_episode_in_a_whole_number_is_far_from_is_refused(share: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_for(10, share=share)


@given(st.floats(0.01, 0.5))
def test_a_share_that_is_taken_is_nearly_what_is_held_out(share: float) -> None:
    try:
        every = split_for(10, share=share).every
    except ConfigError:
        return
    assert 1 / every == pytest.approx(share, rel=0.065)


@pytest.mark.parametrize("share", [-0.1, 0.51, 1.0, float("nan")])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        split_for(10, share=share)
