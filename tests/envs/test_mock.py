from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import dysl_vla.envs
from dysl_vla.envs import episode_rng, get_suite
from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ActionError, ConfigError

EPISODES = st.tuples(st.integers(0, 2**31), st.integers(0, 10**6))


def test_gymnasium_accepts_the_environment() -> None:
    check_env(gymnasium.make("dysl_vla/mock-reach-v0").unwrapped)


@given(st.lists(EPISODES, min_size=1, max_size=5), EPISODES)
def test_an_initial_state_depends_on_nothing_but_its_episode(
    before: list[tuple[int, int]], now: tuple[int, int]
) -> None:
    fresh, used = MockEnv("reach"), MockEnv("reach")
    for seed, index in before:
        used.reset(seed=seed, options={"episode_index": index})
        used.step(np.ones(3, np.float32))
    first, _ = fresh.reset(seed=now[0], options={"episode_index": now[1]})
    second, _ = used.reset(seed=now[0], options={"episode_index": now[1]})
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])


@given(EPISODES, EPISODES)
def test_episodes_and_tasks_draw_their_own_numbers(first: tuple[int, int], second: tuple[int, int]) -> None:
    same = episode_rng("reach", *first).random() == episode_rng("reach", *second).random()
    assert same == (first == second)
    assert episode_rng("reach", *first).random() != episode_rng("linger", *first).random()


def test_a_reset_without_a_seed_starts_the_next_episode() -> None:
    env, other = MockEnv("reach"), MockEnv("reach")
    env.reset(seed=3)
    following, info = env.reset()
    assert info["episode_index"] == 1
    expected, _ = other.reset(seed=3, options={"episode_index": 1})
    np.testing.assert_array_equal(following["observation.state"], expected["observation.state"])


@pytest.mark.parametrize("action", [[np.nan, 0, 0], [np.inf, 0, 0], [0, 0], [0, 0, 0, 0]])
def test_a_bad_action_moves_nothing(action: list[float]) -> None:
    env = MockEnv("reach")
    before, _ = env.reset(seed=1)
    with pytest.raises(ActionError):
        env.step(np.array(action, np.float32))
    np.testing.assert_array_equal(env.observe()["observation.state"], before["observation.state"])


def test_the_expert_succeeds_and_success_is_reported() -> None:
    env = MockEnv("linger")
    env.reset(seed=5)
    assert any(env.step(env.expert_action())[4]["success"] for _ in range(env.horizon))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown suite 'libero'; there are: .*metaworld-mt10"):
        get_suite("libero")
    with pytest.raises(ConfigError, match="unknown task 'fly'; suite mock has: reach, linger"):
        get_suite("mock").choose("reach,fly")
    with pytest.raises(ConfigError, match="no camera 'side'"):
        MockEnv("reach", {"side": (8, 8)})


def test_tasks_are_chosen_in_the_suites_order() -> None:
    assert get_suite("mock").choose("linger, reach") == ("reach", "linger")
    assert get_suite("mock").choose("") == ("reach", "linger")


def test_importing_the_room_registers_every_task() -> None:
    ours = {"metaworld-mt10", "metaworld-mt50", "mock", "robosuite-5", "robosuite-all"}
    assert ours <= set(dysl_vla.envs.suites.names())
    assert "dysl_vla/robosuite-lift-v1" in gymnasium.registry
    assert "dysl_vla/metaworld-drawer-open-v3" in gymnasium.registry
    assert sum(name.startswith("dysl_vla/metaworld") for name in gymnasium.registry) == 50
