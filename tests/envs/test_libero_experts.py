"""The scripted experts of LIBERO's pick-and-place tasks finish them, also from states that they did not make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from dysl_vla.envs import get_suite
from dysl_vla.envs.libero import LiberoEnv
from dysl_vla.envs.libero_experts import make_expert

pytestmark = pytest.mark.slow

TASKS = (
    ("libero-goal", "put_the_bowl_on_the_plate"),
    ("libero-object", "pick_up_the_milk_and_place_it_in_the_basket"),
    ("libero-spatial", "pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate"),
)
OPEN = -1.0


@pytest.fixture(scope="module", params=TASKS, ids=[suite for suite, _ in TASKS])
def env(request: pytest.FixtureRequest) -> Iterator[LiberoEnv]:
    """Making one takes seconds."""
    suite, task = request.param
    with closing(get_suite(suite).make(task, {"agentview": (8, 8)})) as made:
        assert isinstance(made, LiberoEnv)
        yield made


def _finish(env: LiberoEnv, steps: int) -> int | None:
    """Let the expert act; return the step of success, None when it fails."""
    for step in range(steps):
        _, _, info = env.advance(env.expert_action())
        if info["success"]:
            return step
    return None


def test_the_expert_finishes_its_task_and_remembers_nothing(env: LiberoEnv) -> None:
    for index in range(2):
        env.reset(seed=3, options={"episode_index": index})
        for _ in range(10):
            env.advance(env.expert_action())
        before: Any = env.expert_action()
        env._expert = make_expert(env._world)
        np.testing.assert_array_equal(env.expert_action(), before)
        assert _finish(env, 150) is not None


def test_the_expert_takes_over_after_random_actions(env: LiberoEnv) -> None:
    env.reset(seed=3, options={"episode_index": 0})
    rng = np.random.default_rng(0)
    push = np.zeros(7, np.float32)
    for step in range(40):
        if step % 10 == 0:
            push = (rng.uniform(-1, 1, 7) * [0.6, 0.6, 0.3, 0.3, 0.3, 0.3, 1]).astype(np.float32)
        env.advance(push)
    assert _finish(env, 240) is not None


def test_a_dropped_object_is_grasped_again(env: LiberoEnv) -> None:
    env.reset(seed=3, options={"episode_index": 0})
    expert: Any = env._expert
    body = env._world.obj_body_id[expert._thing.name]
    at_first = env._data.xpos[body].copy()
    for _ in range(150):
        env.advance(env.expert_action())
        if np.linalg.norm(env._data.xpos[body] - at_first) > 0.03:
            break
    else:
        pytest.fail("it was never carried")
    for _ in range(12):
        env.advance(np.array([0, 0, 0, 0, 0, 0, OPEN], np.float32))
    assert not expert._hand.holds(expert._thing.geoms)
    assert _finish(env, 240) is not None
