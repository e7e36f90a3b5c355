from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.errors import ConfigError, SafetyStop
from dysl_vla.types import EmbodimentSpec

RELATIVE = EmbodimentSpec(
    cameras={},
    state_names=("x", "y", "z", "gripper"),
    action_names=("dx", "dy", "dz", "gripper"),
    action_low=(-1.0,) * 4,
    action_high=(1.0,) * 4,
    rate_hz=20.0,
)
ABSOLUTE = EmbodimentSpec(
    cameras={},
    state_names=("x", "y", "z"),
    action_names=("x", "y", "z"),
    action_low=(-5.0,) * 3,
    action_high=(5.0,) * 3,
    rate_hz=20.0,
)
LIMITS = Limits(
    low=(-0.5,) * 4,
    high=(0.5,) * 4,
    max_change=(0.2,) * 4,
    gripper_rate=1.0,
    gripper_hysteresis=0.0,
    workspace_low=(0.0, 0.0, 0.0),
    workspace_high=(1.0, 1.0, 1.0),
    max_speed=0.5,
)
ACTIONS = hnp.arrays(np.float32, 4, elements=st.floats(-10, 10, width=32))
STATES = hnp.arrays(np.float32, 4, elements=st.floats(-1, 2, width=32))


@given(st.lists(st.tuples(ACTIONS, STATES), min_size=1, max_size=8))
def test_what_is_sent_lies_within_every_limit(steps: list[tuple[Any, Any]]) -> None:
    limiter = ActionLimiter(LIMITS, RELATIVE, 20.0)
    last = None
    for number, (action, state) in enumerate(steps):
        limiter.observe(state, number / 20)
        sent, breaches = limiter.check(action, last, number / 20)
        assert sent.dtype == np.float32
        assert (np.abs(sent) <= 0.5 + 1e-6).all()
        leads_out = ((state[:3] <= 0) & (sent[:3] < 0)) | ((state[:3] >= 1) & (sent[:3] > 0))
        assert not leads_out.any()
        if last is not None:
            assert abs(sent[3] - last[3]) <= 1 / 20 + 1e-6
            stopped = sent[:3] == 0
            assert (stopped | (np.abs(sent - last)[:3] <= 0.2 + 1e-6)).all()
        if not breaches:
            np.testing.assert_allclose(sent, np.clip(action, -1, 1))
        last = sent


@given(ACTIONS)
def test_what_is_allowed_is_sent_as_it_is(action: Any) -> None:
    inside = np.clip(action, -0.4, 0.4)
    for limits in (Limits(low=(-0.5,) * 4, high=(0.5,) * 4), Limits("refuse", low=(-0.5,) * 4, high=(0.5,) * 4)):
        sent, breaches = ActionLimiter(limits, RELATIVE, 20.0).check(inside, None, 0.0)
        np.testing.assert_array_equal(sent, inside)
        assert not breaches


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_breach", ["clamp", "refuse"])
def test_what_is_not_finite_always_stops(on_breach: Any, value: float) -> None:
    action = np.zeros(4, np.float32)
    action[2] = value
    with pytest.raises(SafetyStop, match="not finite"):
        ActionLimiter(Limits(on_breach), RELATIVE, 20.0).check(action, None, 0.0)


def test_another_dimension_stops() -> None:
    with pytest.raises(SafetyStop, match="shape"):
        ActionLimiter(Limits(), RELATIVE, 20.0).check(np.zeros(3, np.float32), None, 0.0)


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        (Limits("refuse", high=(0.1,) * 4), "bounds"),
        (Limits("refuse", max_change=(0.1,) * 4), "change"),
        (Limits("refuse", gripper_rate=0.5), "change"),
        (Limits("refuse", workspace_low=(0, 0, 0), workspace_high=(1, 1, 1)), "workspace"),
        (Limits("refuse", max_speed=0.1), "speed"),
    ],
)
def test_refusing_names_the_limit(limits: Limits, word: str) -> None:
    limiter = ActionLimiter(limits, RELATIVE, 20.0)
    limiter.observe(np.array([0.9, 0.9, 0.9, 0], np.float32), 0.0)
    limiter.observe(np.array([1.1, 0.9, 0.9, 0], np.float32), 0.05)
    with pytest.raises(SafetyStop, match=f"^{word}"):
        limiter.check(np.full(4, 0.5, np.float32), np.zeros(4, np.float32), 0.05)


def test_positions_are_kept_inside_the_workspace() -> None:
    limiter = ActionLimiter(Limits(workspace_low=(0, 0, 0), workspace_high=(1, 1, 1)), ABSOLUTE, 20.0)
    sent, breaches = limiter.check(np.array([2, 0.5, -1], np.float32), None, 0.0)
    assert sent.tolist() == [1, 0.5, 0]
    assert breaches == ["workspace"]


def test_where_the_arm_will_be_by_now_counts() -> None:
    limiter = ActionLimiter(Limits(workspace_low=(0, 0, 0), workspace_high=(1, 1, 1)), RELATIVE, 20.0)
    limiter.observe(np.array([0.90, 0.5, 0.5, 0], np.float32), 0.00)
    limiter.observe(np.array([0.95, 0.5, 0.5, 0], np.float32), 0.05)
    outward = np.array([1, 0, 0, 0], np.float32)
    assert limiter.check(outward, None, 0.06)[0][0] == 1
    assert limiter.check(outward, None, 0.15)[0][0] == 0


@given(hnp.arrays(np.float32, 3, elements=st.floats(-5, 5, width=32)))
def test_positions_are_approached_no_faster_than_allowed(target: Any) -> None:
    limiter = ActionLimiter(Limits(max_speed=0.5), ABSOLUTE, 20.0)
    here = np.array([0.1, 0.2, 0.3], np.float32)
    limiter.observe(here, 0.0)
    sent, _ = limiter.check(target, None, 0.0)
    assert np.linalg.norm(sent - here) <= 0.5 / 20 + 1e-5
    if np.linalg.norm(target - here) <= 0.024:
        np.testing.assert_allclose(sent, target, atol=1e-6)


def test_a_robots_own_range_is_no_breach() -> None:
    sent, breaches = ActionLimiter(Limits("refuse"), RELATIVE, 20.0).check(np.full(4, 1.2, np.float32), None, 0.0)
    assert sent.tolist() == [1.0] * 4
    assert not breaches


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"low": (0.0,)}, "low must have a value for each of the robot's 4 actions.*got 1 values"),
        ({"max_change": (0.1, 0.1)}, "max_change must have .*got 2 values"),
        ({"low": (2.0,) * 4}, "low, high must leave an action"),
        ({"max_change": (0.0,) * 4}, "above zero"),
        ({"gripper_rate": -1.0}, "gripper_rate"),
        ({"max_speed": float("nan")}, "max_speed"),
        ({"low": (float("inf"),) * 4}, "finite"),
        ({"workspace_low": (0.0, 0.0, 0.0)}, "give both"),
        ({"workspace_low": (1.0,) * 3, "workspace_high": (0.0,) * 3}, "below"),
    ],
)
def test_limits_that_cannot_work_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ActionLimiter(Limits(**values), RELATIVE, 20.0)


def test_limits_that_need_what_the_robot_does_not_have_are_refused() -> None:
    for state in (("a",), ("x", "y", "z")):
        world = EmbodimentSpec({}, state, ("shoulder",), (-1.0,), (1.0,), 20.0)
        for limits in (
            Limits(gripper_rate=1.0),
            Limits(max_speed=1.0),
            Limits(workspace_low=(0, 0, 0), workspace_high=(1, 1, 1)),
        ):
            with pytest.raises(ConfigError, match=r"gripper_rate|x, y and z"):
                ActionLimiter(limits, world, 20.0)


ARM = EmbodimentSpec(
    cameras={},
    state_names=("shoulder.pos", "elbow.pos", "gripper.pos"),
    action_names=("shoulder.pos", "elbow.pos", "gripper.pos"),
    action_low=(-100.0, -100.0, 0.0),
    action_high=(100.0, 100.0, 100.0),
    rate_hz=30.0,
)


def test_positions_have_a_safe_speed_that_nobody_asked_for() -> None:
    """An arm at -90 degrees is not sent to +15 in one cycle; grippers and deltas are free."""
    held = np.array([-90, 0, 50], np.float32)
    limiter = ActionLimiter(Limits(), ARM, 30.0)
    sent, breaches = limiter.check(np.array([15, 0, 0], np.float32), held, 0.0)
    assert sent.tolist() == pytest.approx([-90 + 100 / 30, 0, 0])
    assert breaches == ["change"]
    slow = ActionLimiter(Limits(), ARM, 30.0, [2.0, 0.0, 1.0])
    assert slow.check(np.array([15, 0, 0], np.float32), held, 0.0)[0].tolist() == pytest.approx([-88, 0, 0], abs=1e-4)
    assert slow.limits.max_change == pytest.approx((2, 1 / 3, 100))  # one that never moved may, slowly
    free = ActionLimiter(Limits(max_change=(200.0,) * 3), ARM, 30.0)
    assert free.check(np.array([15, 0, 0], np.float32), held, 0.0)[0].tolist() == [15, 0, 0]
    jump = np.array([1, -1, 1, 1], np.float32)
    assert ActionLimiter(Limits(), RELATIVE, 20.0).check(jump, -jump, 0.0)[0].tolist() == jump.tolist()
    with pytest.raises(ConfigError, match="trained on 2 actions, the robot has 3"):
        ActionLimiter(Limits(), ARM, 30.0, [1.0, 1.0])


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=60), st.floats(0.01, 0.5))
def test_a_gripper_turns_back_only_for_more_than_the_hysteresis(wanted: list[float], band: float) -> None:
    limiter = ActionLimiter(Limits(gripper_hysteresis=band), RELATIVE, 20.0)
    last = np.zeros(4, np.float32)
    sent = [0.0]
    for value in wanted:
        last, _ = limiter.check(np.array([0, 0, 0, value], np.float32), last, 0.0)
        sent.append(float(last[3]))
        assert last[3] == np.float32(value) or abs(value - last[3]) <= 2 * band + 1e-6
    steps = [step for step in np.diff(sent) if step]
    turns = [abs(after) for before, after in pairwise(steps) if before * after < 0]
    assert all(turn > 2 * band - 1e-6 for turn in turns)


def test_a_chattering_answer_does_not_reach_the_gripper() -> None:
    """An action that flips by 0.05 at each inference changed its sign 39 times in 160 cycles."""
    for name in ("gripper", "gripper.pos", "left_gripper.pos"):
        world = EmbodimentSpec({}, (), ("dx", name), (-1.0, -1.0), (1.0, 1.0), 20.0)
        limiter = ActionLimiter(Limits(), world, 20.0)
        last = np.zeros(2, np.float32)
        sent = []
        for cycle in range(160):
            last, breaches = limiter.check(np.array([0, 0.05 * (-1) ** (cycle // 4)], np.float32), last, 0.0)
            sent.append(last[1])
            assert not breaches
        assert len(set(sent)) == 1


@pytest.mark.parametrize("name", ["gripper", "gripper.pos", "left_gripper.pos"])
def test_every_kind_of_gripper_has_a_rate(name: str) -> None:
    embodiment = EmbodimentSpec({}, (), ("shoulder.pos", name), (-100.0, 0.0), (100.0, 100.0), 20.0)
    limiter = ActionLimiter(Limits(gripper_rate=40.0), embodiment, 20.0)
    sent, breaches = limiter.check(np.array([0, 100], np.float32), np.zeros(2, np.float32), 0.0)
    assert sent.tolist() == [0, 2]
    assert breaches == ["change"]


def test_a_state_that_is_not_finite_keeps_no_limit_and_is_refused() -> None:
    limiter = ActionLimiter(LIMITS, RELATIVE, 20.0)
    with pytest.raises(SafetyStop, match="state: has a value that is not finite"):
        limiter.observe(np.array([np.nan, 0, 0, 0], np.float32), 0.0)
