"""LIBERO-PRO's suites: their tasks, what perturbs them, and how the package's broken files are handled."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.envs import FIRST_EVALUATION_SEED, get_suite, libero_package, suites
from dysl_vla.envs.libero import HORIZONS, PERTURBATIONS, PRO_HORIZONS, LiberoEnv, folder_of
from dysl_vla.envs.libero_package import Libero, initial_states, load_libero, task_file, task_map
from dysl_vla.errors import ConfigError

pytestmark = pytest.mark.slow
SMALL = {"agentview": (24, 24), "robot0_eye_in_hand": (24, 24)}
PAN = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
WITHOUT_STATES = {
    ("libero-pro-spatial-task", "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate"),
    ("libero-pro-spatial-task", "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"),
    (
        "libero-pro-10-object",
        "LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate",
    ),
    ("libero-pro-10-task", PAN),
}
"""Tasks for which the package has a file with no initial state in it."""


def test_there_are_sixteen_suites_of_ten_tasks_with_the_horizons_of_those_they_perturb() -> None:
    assert len(PRO_HORIZONS) == 16
    assert set(PRO_HORIZONS) <= set(suites.names())
    for name, horizon in PRO_HORIZONS.items():
        base = name.replace("pro-", "").rpartition("-")[0]
        suite = get_suite(name)
        assert (len(suite.tasks), suite.horizon, suite.fixed_states) == (10, horizon, 50)
        assert suite.tasks == get_suite(base).tasks
        assert horizon == HORIZONS[base]
    assert folder_of("libero-pro-goal-language") == "libero_goal_lan"
    assert folder_of("libero-pro-10-swap") == "libero_10_swap"


def test_every_task_can_be_read_and_all_but_four_have_fifty_initial_states() -> None:
    libero, empty = load_libero(), set()
    for name in PRO_HORIZONS:
        for task in get_suite(name).tasks:
            states = initial_states(folder_of(name), task)
            if len(states) == 0:
                empty.add((name, task))
            else:
                assert len(states) == 50
            with task_file(folder_of(name), task) as path:
                problem = libero.parse(str(path))
            assert problem["goal_state"], task
            assert problem["problem_name"] in libero.problems
    assert empty == WITHOUT_STATES


def test_the_goal_of_a_file_whose_brackets_do_not_match_is_the_one_it_means() -> None:
    goals = {}
    for name, task in sorted(WITHOUT_STATES):
        with task_file(folder_of(name), task) as path:
            goals[name, task] = load_libero().parse(str(path))["goal_state"]
    assert goals["libero-pro-10-task", PAN] == [
        ["turnon", "flat_stove_1"],
        ["on", "chefmate_8_frypan_1", "flat_stove_1_cook_region"],
    ]
    spatial = [goal for (name, _), goal in goals.items() if "spatial" in name]
    assert spatial == [[["on", "akita_black_bowl_2", "plate_1"]]] * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("suite", "task"), [(suite, task) for suite in PRO_HORIZONS for task in task_map()[folder_of(suite)]]
)
def test_every_task_begins_and_steps(suite: str, task: str) -> None:
    with closing(LiberoEnv(task, SMALL, suite=suite)) as env:
        env.reset(seed=FIRST_EVALUATION_SEED)
        assert env.step(np.zeros(7))[4]["success"] is False


@pytest.mark.parametrize(
    ("perturbation", "task", "instruction"),
    [
        ("language", "open_the_middle_drawer_of_the_cabinet", "open the cabinet's middle drawer"),
        ("task", "put_the_bowl_on_the_plate", "put the wine bottle on the plate"),
        ("swap", "turn_on_the_stove", "turn on the stove"),
        ("object", "push_the_plate_to_the_front_of_the_stove", "push the plate to the front of the stove"),
    ],
)
def test_a_task_of_each_perturbation_has_its_own_instruction_or_scene(
    perturbation: str, task: str, instruction: str
) -> None:
    suite = f"libero-pro-goal-{perturbation}"
    with closing(LiberoEnv(task, SMALL, suite=suite)) as env:
        observation, _ = env.reset(seed=FIRST_EVALUATION_SEED, options={"episode_index": 5})
        assert observation["task"] == env.instruction == instruction
        assert env.observation_space.contains(observation)
        fixed = initial_states(folder_of(suite), task)[5]
        assert fixed.shape == (1 + env._model.nq + env._model.nv,)
        # Objects keep their place on the table while they fall onto it, and lie still.
        np.testing.assert_allclose(env._data.qpos[9:11], fixed[10:12], atol=0.01)
        assert np.abs(env._data.qvel[9:]).max() < 0.01
        _, _, _, _, info = env.step(np.zeros(7))
        assert info["success"] is False


def test_a_task_without_fixed_states_is_placed_by_its_samplers_once_for_each_index() -> None:
    with closing(LiberoEnv(PAN, SMALL, suite="libero-pro-10-task")) as env:
        assert env.instruction == "turn on the stove and put the pan on it"
        begins = []
        for index in (0, 1, 0):
            env.reset(seed=FIRST_EVALUATION_SEED, options={"episode_index": index})
            begins.append(env._data.qpos.copy())
        np.testing.assert_array_equal(begins[0], begins[2])
        assert np.abs(begins[0] - begins[1]).max() > 1e-3
        assert env.step(np.zeros(7))[4]["success"] is False


def test_an_unknown_perturbation_is_refused_with_those_that_exist() -> None:
    assert list(PERTURBATIONS) == ["language", "object", "swap", "task"]
    with pytest.raises(ConfigError, match=r"unknown suite 'libero-pro-goal-colour'.*libero-pro-goal-swap"):
        get_suite("libero-pro-goal-colour")
    with pytest.raises(ConfigError, match=r"'libero-pro-90-swap' is not offered.*libero-pro-10-task"):
        LiberoEnv("turn_on_the_stove", suite="libero-pro-90-swap")


def test_a_file_that_is_broken_in_another_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with task_file("libero_goal", "turn_on_the_stove") as path:
        folder = tmp_path / "bddl_files/libero_goal"
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
    monkeypatch.setattr(libero_package, "load_libero", lambda: Libero(tmp_path, {}, None))
    copy = folder / path.name
    copy.write_text(copy.read_text()[:500])
    with pytest.raises(ConfigError, match=r"turn_on_the_stove\.bddl is damaged"), task_file(folder.name, copy.stem):
        pass
    with pytest.raises(ConfigError, match=r"juggle\.bddl is missing"), task_file("libero_goal", "juggle"):
        pass
