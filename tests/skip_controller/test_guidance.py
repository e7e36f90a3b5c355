from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.errors import ActionError, ConfigError
from dysl_vla.skip_controller import SkipGuidance, Thresholds
from dysl_vla.skip_controller.guidance import WINDOW, continuity, gripper, importance_measures

BLOCKS = (3, 13)
GUIDE = SkipGuidance(BLOCKS, 2, Thresholds(eta=0.1, eta_verify=0.2))


class Episode:
    """An episode that is guided: remembers all that was executed."""

    def __init__(self, guidance: SkipGuidance = GUIDE) -> None:
        self.guidance = guidance
        self.state = guidance.reset()
        self.executed = np.empty((0, 2))

    def observe(self, chunk: np.ndarray) -> None:
        self.executed = np.concatenate([self.executed, chunk])
        self.guidance.observe(self.state, self.executed)


VALUES = st.floats(-3, 3, width=32)
CHUNKS = st.lists(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(2)), elements=VALUES), max_size=12)


@given(CHUNKS)
def test_falling_continuity_never_allows_more_skipping(chunks: list[np.ndarray]) -> None:
    episode = Episode()
    state = episode.state
    for chunk in chunks:
        points, before = state.allow_points, state.continuity
        episode.observe(chunk)
        if before is None or state.continuity is None or state.continuity >= before:
            continue
        assert (state.allow_points >= points).all()
        if state.continuity - before < -0.1:
            assert (state.allow_points > points).any() or (points == BLOCKS).all()


@given(CHUNKS)
def test_protection_is_at_once_and_release_is_gradual(chunks: list[np.ndarray]) -> None:
    episode = Episode()
    state = episode.state
    for chunk in chunks:
        points, before = state.allow_points, state.continuity
        episode.observe(chunk)
        assert (points - state.allow_points <= 1).all()
        if before is None or state.continuity is None:
            continue
        fall = before - state.continuity
        if fall > 0.1:
            kept = int(np.ceil(min(fall / 0.1, 100)))
            np.testing.assert_array_equal(state.allow_points, np.minimum(points + kept, BLOCKS))


@given(CHUNKS, hnp.arrays(np.float32, 2, elements=VALUES))
def test_a_constant_trajectory_ends_at_full_skipping(chunks: list[np.ndarray], action: np.ndarray) -> None:
    episode = Episode()
    for chunk in chunks:
        episode.observe(chunk)
    for _ in range(WINDOW + 2 + max(BLOCKS)):
        episode.observe(action[None])
    assert (episode.state.allow_points == 0).all()


@given(st.lists(CHUNKS, min_size=1, max_size=4))
def test_episodes_do_not_touch_each_other(episodes: list[list[np.ndarray]]) -> None:
    alone = []
    for chunks in episodes:
        episode = Episode()
        for chunk in chunks:
            episode.observe(chunk)
        alone.append(episode.state)
    together = [Episode() for _ in episodes]
    for turn in range(max(map(len, episodes))):
        for episode, chunks in zip(together, episodes, strict=True):
            if turn < len(chunks):
                episode.observe(chunks[turn])
    for one, other in zip(alone, (episode.state for episode in together), strict=True):
        np.testing.assert_array_equal(one.allow_points, other.allow_points)
        assert one.continuity == other.continuity


def test_an_episode_begins_at_rest_and_may_skip() -> None:
    np.testing.assert_array_equal(GUIDE.reset().allow_points, 0)


def test_only_the_first_fall_is_verified() -> None:
    episode = Episode()
    for _ in range(4):
        episode.observe(np.zeros((2, 2)))
    still, jump = np.zeros((1, 2)), np.array([[1.0, 1.0]])
    asked = []
    for predicted in (still, jump, jump, still, jump):
        asked.append(GUIDE.update_and_check(episode.state, predicted, 1))
        episode.observe(still)  # what was executed stays smooth
    assert asked == [False, True, False, False, True]


def test_a_verified_prediction_replaces_the_verdict_on_the_first() -> None:
    episode = Episode()
    still, jump = np.zeros((1, 2)), np.array([[1.0, 1.0]])
    for _ in range(4):
        episode.observe(still)
    assert GUIDE.update_and_check(episode.state, jump, 1)
    assert not GUIDE.update_and_check(episode.state, still, 1)  # predicted again: no fall after all
    episode.observe(still)
    assert GUIDE.update_and_check(episode.state, jump, 1)


@pytest.mark.parametrize(("lookahead", "protected_after"), [(0, 8), (4, 4)])
def test_looking_ahead_protects_before_the_drop(lookahead: int, protected_after: int) -> None:
    """A chunk of six, two executed at a time; the gripper closes at action 8."""
    guidance = SkipGuidance((3,), 2, Thresholds(0.1, 0.2), lookahead=lookahead)
    trajectory = np.zeros((30, 2))
    trajectory[8:, 1] = 1.0
    state = guidance.reset()
    for executed in range(0, 20, 2):
        guidance.observe(state, trajectory[:executed])
        if state.allow_points.any():
            assert executed == protected_after + 2
            return
        assert not guidance.update_and_check(state, trajectory[executed : executed + 6], 2) or lookahead == 0
    pytest.fail("never protected")


@given(st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    state = GUIDE.reset()
    GUIDE.observe(state, np.zeros((3, 2)))
    before = copy.deepcopy(state)
    with pytest.raises(ActionError, match="not finite"):
        GUIDE.observe(state, np.array([[0.0, value]]))
    with pytest.raises(ActionError, match="not finite"):
        GUIDE.update_and_check(state, np.array([[0.0, value]]), 1)
    with pytest.raises(ActionError, match="the 2 dimensions of the guidance"):
        GUIDE.observe(state, np.zeros((1, 3)))
    np.testing.assert_array_equal(state.recent, before.recent)
    np.testing.assert_array_equal(state.allow_points, before.allow_points)
    assert (state.previous_drop, state.drop, state.continuity) == (before.previous_drop, before.drop, before.continuity)


@given(hnp.arrays(np.float64, st.tuples(st.integers(0, 8), st.just(3)), elements=st.floats(-5, 5)))
def test_continuity_is_the_mean_distance_of_neighbours(actions: np.ndarray) -> None:
    value = continuity(actions)
    if len(actions) < 2:
        assert value is None
        return
    distances = [np.sqrt(sum((a - b) ** 2)) for a, b in zip(actions[1:], actions, strict=False)]
    assert value == pytest.approx(-np.mean(distances))
    assert value <= 0


def test_the_importance_measure_is_interchangeable() -> None:
    moving = np.zeros((6, 2))
    moving[3:, 0] = 1.0  # the arm jumps, the gripper rests
    assert continuity(moving) == pytest.approx(-0.2)
    assert gripper(moving[:, 1:]) == 0.0
    assert gripper(moving[:, :1]) == gripper(moving) == pytest.approx(-0.2)
    for name in ("continuity", "gripper"):
        guidance = SkipGuidance(BLOCKS, 2, Thresholds(0.1, 0.2), importance=name)
        state = guidance.reset()
        guidance.observe(state, np.zeros((6, 2)))
        guidance.observe(state, moving)
        assert state.allow_points.tolist() == ([2, 2] if name == "continuity" else [0, 0])
    with pytest.raises(ConfigError, match="unknown importance measure 'touch'; there are: continuity, gripper"):
        SkipGuidance(BLOCKS, 2, Thresholds(0.1, 0.2), importance="touch")
    assert importance_measures.names() == ["continuity", "gripper"]


@pytest.mark.parametrize(("grippers", "points"), [((), [0, 0]), ((0,), [2, 2]), ((0, 2), [2, 2]), ((1, 2), [0, 0])])
def test_the_signal_sees_every_gripper_and_nothing_else(grippers: tuple[int, ...], points: list[int]) -> None:
    """Bimanual arms have one in the middle of their actions."""
    moving = np.zeros((6, 3))
    moving[3:, 0] = 1.0
    guidance = SkipGuidance(BLOCKS, 3, Thresholds(0.1, 0.2), importance="gripper", grippers=grippers)
    state = guidance.reset()
    guidance.observe(state, np.zeros((6, 3)))
    guidance.observe(state, moving)
    assert state.allow_points.tolist() == points


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -1.0), (np.inf, 1.0), (1.0, np.nan)])
def test_thresholds_that_cannot_work_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"^eta"):
        Thresholds(*values)
