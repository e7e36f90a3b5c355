from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.envs import episode_rng, get_suite, suites
from dysl_vla.envs.libero import HORIZONS
from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ConfigError

EPISODES = st.tuples(st.integers(0, 2**31), st.integers(0, 10**6))


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


def test_an_episode_is_truncated_at_its_horizon() -> None:
    env = MockEnv("reach")
    env.reset(seed=0)
    truncated = [env.advance(np.zeros(3, np.float32))[1] for _ in range(env.horizon)]
    assert truncated == [False] * (env.horizon - 1) + [True]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown suite 'libero'; there are: .*metaworld-mt10"):
        get_suite("libero")
    with pytest.raises(ConfigError, match="unknown task 'fly'; suite mock has: reach, linger"):
        get_suite("mock").choose("reach,fly")


def test_the_packages_suites_are_known_by_name() -> None:
    ours = {*HORIZONS, "metaworld-mt10", "metaworld-mt50", "mock", "robosuite-5", "robosuite-5-libero", "robosuite-all"}
    assert ours <= set(suites.names())


def test_tasks_are_chosen_in_the_suites_order() -> None:
    assert get_suite("mock").choose("linger, reach") == ("reach", "linger")
    assert get_suite("mock").choose("") == ("reach", "linger")
