"""Properties of the scripted experts of LIBERO's drawers, stoves and plates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from dysl_vla.envs.libero import LiberoEnv
from dysl_vla.envs.libero_fixture_experts import make_fixture_expert

SMALL = {"agentview": (32, 32), "robot0_eye_in_hand": (32, 32)}
TASKS = (
    "open_the_middle_drawer_of_the_cabinet",
    "turn_on_the_stove",
    "push_the_plate_to_the_front_of_the_stove",
    "open_the_top_drawer_and_put_the_bowl_inside",
)


@pytest.fixture(scope="module", params=TASKS)
def env(request: pytest.FixtureRequest) -> Iterator[LiberoEnv]:
    """Making one takes seconds."""
    with closing(LiberoEnv(request.param, SMALL, suite="libero-goal")) as made:
        yield made


def steps_to_success(env: LiberoEnv) -> int | None:
    expert = make_fixture_expert(env._world)
    assert expert is not None
    for step in range(env.horizon):
        if env.advance(np.clip(expert.act(), -1, 1))[2]["success"]:
            return step
    return None


@pytest.mark.slow
def test_the_expert_is_quick_enough_to_demonstrate(env: LiberoEnv) -> None:
    env.reset(seed=7, options={"episode_index": 0})
    steps = steps_to_success(env)
    assert steps is not None
    assert steps < 200


@pytest.mark.slow
def test_the_expert_takes_over_wherever_the_arm_is(env: LiberoEnv) -> None:
    env.reset(seed=7, options={"episode_index": 0})
    rng = np.random.default_rng(1)
    for _ in range(6):
        action = rng.uniform(-1, 1, 7) * [0.6, 0.6, 0.3, 0.3, 0.3, 0.3, 1]
        for _ in range(4):
            env.advance(action.astype(np.float32))
    assert steps_to_success(env) is not None


@pytest.mark.slow
def test_the_expert_remembers_nothing(env: LiberoEnv) -> None:
    env.reset(seed=7, options={"episode_index": 1})
    expert = make_fixture_expert(env._world)
    assert expert is not None
    for _ in range(30):
        action = expert.act()
        another = make_fixture_expert(env._world)
        assert another is not None
        np.testing.assert_array_equal(another.act(), action)
        env.advance(np.clip(action, -1, 1))


@pytest.mark.parametrize(
    "goal",
    [
        [["on", "wine_bottle_1", "wine_rack_1_top_region"]],
        [["open", "microwave_1"]],
        [["in", "milk_1", "basket_1_contain_region"]],
        [["open", "wooden_cabinet_1_top_region"], ["turnon", "flat_stove_1"]],
    ],
)
def test_other_goals_have_no_expert_here(goal: list[list[str]]) -> None:
    assert make_fixture_expert(SimpleNamespace(parsed_problem={"goal_state": goal})) is None
