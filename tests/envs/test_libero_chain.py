"""Chains of five instructions: which ones there are, and how an episode goes from one instruction to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from dysl_vla.envs import FIRST_EVALUATION_SEED, get_suite, libero_chain
from dysl_vla.envs.libero import REST, instruction_of
from dysl_vla.envs.libero_chain import CHAIN_TASKS, HORIZON, LiberoChainEnv, is_possible, possible_chains
from dysl_vla.errors import ConfigError

SMALL = {"agentview": (24, 24), "robot0_eye_in_hand": (24, 24)}
PLATE, STOVE = "push_the_plate_to_the_front_of_the_stove", "turn_on_the_stove"
ON_PLATE, ON_STOVE = "put_the_bowl_on_the_plate", "put_the_bowl_on_the_stove"
ON_CABINET, IN_DRAWER = "put_the_bowl_on_top_of_the_cabinet", "open_the_top_drawer_and_put_the_bowl_inside"
CHEESE, BOTTLE = "put_the_cream_cheese_in_the_bowl", "put_the_wine_bottle_on_top_of_the_cabinet"
MIDDLE = "open_the_middle_drawer_of_the_cabinet"


def test_chains_have_five_tasks_of_different_categories_and_every_task_is_in_some() -> None:
    chains = possible_chains()
    assert len(set(chains)) == len(chains) > 200
    for chain in chains:
        assert len({CHAIN_TASKS[task].category for task in chain}) == len(chain) == 5
    assert {task for chain in chains for task in chain} == set(CHAIN_TASKS)
    assert "put_the_wine_bottle_on_the_rack" not in CHAIN_TASKS
    assert len(CHAIN_TASKS) == 9


@pytest.mark.parametrize(
    ("chain", "possible"),
    [
        ((PLATE, ON_PLATE), True),
        ((ON_PLATE, PLATE), False),  # the bowl would be pushed with the plate
        ((ON_STOVE, CHEESE), True),
        ((CHEESE, ON_STOVE), False),  # the bowl is full
        ((IN_DRAWER, CHEESE), True),
        ((IN_DRAWER, MIDDLE), False),  # the open drawer covers the other's handle
        ((MIDDLE, PLATE), False),  # the open drawer hangs over the plate
        ((MIDDLE, CHEESE), False),
        ((ON_STOVE, MIDDLE, CHEESE), True),
        ((ON_CABINET, BOTTLE), False),
        ((BOTTLE, ON_CABINET), False),
        ((STOVE, ON_STOVE), True),
        ((ON_PLATE, ON_STOVE), False),  # one category
        ((STOVE, STOVE), False),
    ],
)
def test_a_task_must_be_possible_in_the_state_that_those_before_it_leave(
    chain: tuple[str, ...], possible: bool
) -> None:
    assert is_possible(chain) is possible


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoChainEnv]:
    with closing(LiberoChainEnv("chain", SMALL)) as env:
        yield env


def begin(env: LiberoChainEnv, chain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset to an episode of the given chain."""
    monkeypatch.setattr(libero_chain, "possible_chains", lambda: (chain,))
    env.reset(seed=FIRST_EVALUATION_SEED, options={"episode_index": 3})


def put(env: LiberoChainEnv, thing: str, position: tuple[float, float, float]) -> None:
    joint = env._data.joint(f"{thing}_1_joint0")
    joint.qpos[:3], joint.qvel[:] = position, 0


def holds(env: LiberoChainEnv, task: str) -> bool:
    return all(env._world._eval_predicate(predicate) for predicate in env._goals[task])


def do(env: LiberoChainEnv, task: str) -> None:
    """Bring the things to where a task wants them."""
    data = env._data
    x, y, _ = data.body("wooden_cabinet_1_main").xpos
    bowl, plate = data.body("akita_black_bowl_1_main").xpos, data.body("plate_1_main").xpos
    if task == MIDDLE:
        data.joint("wooden_cabinet_1_middle_level").qpos[:] = -0.155
    elif task == IN_DRAWER:
        data.joint("wooden_cabinet_1_top_level").qpos[:] = -0.155
        put(env, "akita_black_bowl", (x, y + 0.14, 1.09))
    elif task == PLATE:
        put(env, "plate", (*data.site("main_table_stove_front_region").xpos[:2], 0.905))
    elif task == ON_PLATE:
        put(env, "akita_black_bowl", (plate[0], plate[1], plate[2] + 0.02))
    elif task == ON_STOVE:
        put(env, "akita_black_bowl", (*data.site("flat_stove_1_cook_region").xpos[:2], 0.94))
    elif task == ON_CABINET:
        put(env, "akita_black_bowl", (x, y - 0.02, 1.14))
    elif task == BOTTLE:
        put(env, "wine_bottle", (x, y - 0.02, 1.14))
    elif task == CHEESE:
        put(env, "cream_cheese", (bowl[0], bowl[1], bowl[2] + 0.05))
    elif task == STOVE:
        data.joint("flat_stove_1_button").qpos[:] = 1.5


def carry_out(env: LiberoChainEnv, task: str) -> dict[str, Any]:
    """Do a task, and wait until it counts."""
    do(env, task)
    before = env._completed
    for _ in range(25):
        _, _, info = env.advance(REST)
        if info["completed"] > before:
            break
    return info


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        (PLATE, ON_PLATE, CHEESE, MIDDLE, STOVE),
        (PLATE, IN_DRAWER, STOVE, CHEESE, BOTTLE),
        (ON_CABINET, CHEESE, PLATE, MIDDLE, STOVE),
        (STOVE, ON_STOVE, BOTTLE, PLATE, MIDDLE),
    ],
)
def test_the_instruction_changes_when_its_goal_holds_and_five_are_a_success(
    env: LiberoChainEnv, chain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_possible(chain)
    begin(env, chain, monkeypatch)
    assert env.instructions == tuple(map(instruction_of, chain))
    for number, task in enumerate(chain):
        assert env.instruction == env.observe()["task"] == instruction_of(task)
        _, truncated, info = env.advance(REST)
        assert (info, truncated) == ({"success": False, "completed": number}, False)
        info = carry_out(env, task)
        assert info["completed"] == number + 1, task
        assert info["success"] is (number == 4)
    assert all(holds(env, task) for task in chain), "nothing was reset in between"


@pytest.mark.slow
def test_a_goal_counts_when_its_turn_has_come(env: LiberoChainEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(env, (PLATE, STOVE, ON_PLATE, CHEESE, BOTTLE), monkeypatch)
    do(env, STOVE)
    _, _, info = env.advance(REST)
    assert holds(env, STOVE)
    assert info["completed"] == 0
    assert carry_out(env, PLATE)["completed"] == 1
    assert env.advance(REST)[2]["completed"] == 2


@pytest.mark.slow
def test_each_task_has_its_own_steps_and_the_episode_ends_with_those_of_one(
    env: LiberoChainEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libero_chain, "TASK_STEPS", 30)
    begin(env, (STOVE, MIDDLE, BOTTLE, ON_STOVE, CHEESE), monkeypatch)
    for _ in range(29):
        assert not env.advance(REST)[1]
    do(env, STOVE)
    _, truncated, info = env.advance(REST)
    assert (info["completed"], truncated) == (1, False), "the thirtieth step still counts"
    assert [env.advance(REST)[1] for _ in range(30)] == [False] * 29 + [True]
    assert env.instruction == instruction_of(MIDDLE)


@pytest.mark.slow
def test_an_expert_acts_by_the_present_instruction(env: LiberoChainEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(env, (PLATE, ON_PLATE, BOTTLE, STOVE, MIDDLE), monkeypatch)
    first = env._expert
    carry_out(env, PLATE)
    assert env._expert is not first
    for _ in range(60):
        env.advance(env.expert_action())
    hand = env._data.site("gripper0_right_grip_site").xpos
    assert np.linalg.norm((hand - env._data.body("akita_black_bowl_1_main").xpos)[:2]) < 0.12, (
        "it went to another thing"
    )


@pytest.mark.slow
def test_chain_and_initial_state_depend_on_seed_and_index_alone(env: LiberoChainEnv) -> None:
    begins = {}
    for seed, index in ((FIRST_EVALUATION_SEED, 7), (FIRST_EVALUATION_SEED + 1, 7), (FIRST_EVALUATION_SEED, 57)):
        observation, _ = env.reset(seed=seed, options={"episode_index": index})
        assert observation["task"] == env.instructions[0]
        begins[seed, index] = env.instructions, env._data.qpos[:37].copy()
    env.advance(REST)
    env.reset(seed=FIRST_EVALUATION_SEED, options={"episode_index": 7})
    chain, state = begins[FIRST_EVALUATION_SEED, 7]
    assert env.instructions == chain
    np.testing.assert_array_equal(env._data.qpos[:37], state)
    same_state = begins[FIRST_EVALUATION_SEED, 57]
    assert same_state[0] != chain
    np.testing.assert_allclose(same_state[1][9:37], state[9:37], atol=1e-4)
    other_seed = begins[FIRST_EVALUATION_SEED + 1, 7]
    assert other_seed[0] != chain
    assert np.abs(other_seed[1] - state).max() > 1e-3
    assert not any(holds(env, task) for task in CHAIN_TASKS)


@pytest.mark.slow
def test_the_suite_has_one_task_without_demonstrations(env: LiberoChainEnv) -> None:
    suite = get_suite("libero-chain")
    assert (suite.tasks, suite.horizon, env.horizon) == (("chain",), HORIZON, 1800)
    assert suite.without_expert == {"chain"}
    with pytest.raises(ConfigError, match="libero-chain has no 'juggle'; there is: chain"):
        LiberoChainEnv("juggle")
