from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.envs import ManipulationEnv, get_suite
from dysl_vla.envs.libero import instruction_of
from dysl_vla.envs.libero_package import task_map
from dysl_vla.envs.metaworld import INSTRUCTIONS as METAWORLD
from dysl_vla.envs.perturbations import LEVELS, PerturbedEnv, Perturbing, perturbations
from dysl_vla.envs.perturbations.paraphrases import paraphrase
from dysl_vla.envs.robosuite import INSTRUCTIONS as ROBOSUITE
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig

NAMES = perturbations.names()
PLACED = ("layout", "arm")
"""Those that change where things begin."""
SEEN = tuple(name for name in NAMES if perturbations.get(name).shows)
TOP = "observation.images.top"


def perturbed(name: str, task: str = "reach", suite: str = "mock") -> PerturbedEnv:
    env = get_suite(f"{suite}+{name}").make(task, None)
    assert isinstance(env, PerturbedEnv)
    return env


@pytest.mark.parametrize("name", NAMES)
def test_levels_differ_in_size_and_size_grows(name: str) -> None:
    sizes = perturbations.get(name).magnitudes
    assert len(sizes) == len(LEVELS)
    assert list(sizes) == sorted(set(sizes))
    assert perturbations.get(name).unit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fog", "unknown perturbation 'fog'; there are: action-noise, arm"),
        ("light:6", "the level of light must be from 1 to 5, got '6'"),
        ("light:", "the level of light"),
        ("light+light:2", "named once"),
        ("plus+light", "leave out what is beside it"),
    ],
)
def test_what_is_no_perturbation_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_suite(f"mock+{text}")


def test_what_a_world_has_not_is_refused_and_left_out_of_a_sweep() -> None:
    with closing(perturbed("light")) as env, pytest.raises(ConfigError, match="light does not apply to reach"):
        env.reset(seed=0)
    with closing(perturbed("plus")) as env:
        met = set()
        for index in range(len(NAMES) * len(LEVELS)):
            env.reset(seed=0, options={"episode_index": index})
            met.add(str(env.perturbation).partition(":")[0])
    assert met == {name for name in NAMES if not hasattr(perturbations.get(name), "change")}


def test_a_sweep_has_every_perturbation_at_every_level_once_in_an_order_of_the_tasks_own() -> None:
    perturbing = Perturbing.parse("plus")
    with closing(get_suite("metaworld-mt10").make("pick-place", None)) as env:
        orders = [
            [perturbing.of_episode(env, np.random.default_rng(task), index)[0] for index in range(len(NAMES) * 5)]
            for task in (0, 1)
        ]
    assert set(orders[0]) == {(name, level) for name in NAMES for level in LEVELS}
    assert len(set(orders[0])) == len(orders[0])
    assert orders[0] != orders[1]
    assert {level for _, level in Perturbing.parse("plus:2").cells} == {2}


@pytest.fixture(scope="module")
def worlds() -> Iterator[list[ManipulationEnv]]:
    """A task of each simulator, at a size that is quick to render."""
    asked = (
        ("metaworld-mt10", "pick-place", {"corner2": (48, 48), "gripperPOV": (32, 32)}),
        ("robosuite-5", "lift", {"agentview": (48, 48)}),
        ("libero-goal", "put_the_bowl_on_the_plate", {"agentview": (48, 48), "robot0_eye_in_hand": (32, 32)}),
    )
    made = [get_suite(suite).make(task, cameras) for suite, task, cameras in asked]
    yield made
    for env in made:
        env.close()


def begin(env: ManipulationEnv, index: int = 3, seed: int = 7) -> dict[str, Any]:
    observation, _ = env.reset(seed=seed, options={"episode_index": index})
    return observation


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_a_perturbed_episode_is_the_episode_perturbed_and_leaves_the_world_as_it_was(
    worlds: list[ManipulationEnv], name: str
) -> None:
    for env in worlds:
        nominal = begin(env)
        assert env.scene is not None
        qpos = env.scene.data.qpos.copy()
        strong = PerturbedEnv(env, Perturbing(((name, 5),)))
        seen = begin(strong)
        assert strong.perturbation == f"{name}:5"
        assert same(seen, begin(strong))
        assert (name in PLACED) != np.array_equal(env.scene.data.qpos, qpos)
        if name in SEEN:
            assert not same(seen, nominal)
            weak = begin(PerturbedEnv(env, Perturbing(((name, 1),))))
            assert not same(weak, seen)
            assert not same(seen, begin(strong, index=4))
        begin(strong)
        before = strong.proprioception().copy()
        for _ in range(6):  # an expert can act in it
            _, truncated, info = strong.advance(strong.expert_action())
            assert not truncated
            assert not info["success"]
        assert not np.array_equal(strong.proprioception(), before)
        env.scene.restore()
        assert same(begin(env), nominal)


def test_things_are_moved_by_as_much_as_is_said_and_touch_nothing_new(worlds: list[ManipulationEnv]) -> None:
    from dysl_vla.envs.perturbations.scene import _free_joints, _touching

    for env in worlds:
        for index in range(5):
            begin(env, index)
            assert env.scene is not None
            model, data = env.scene.model, env.scene.data
            joints = _free_joints(model)
            places = [data.qpos[model.jnt_qposadr[joint] :][:3].copy() for joint in joints]
            touched = [_touching(env.scene, model.jnt_bodyid[joint]) for joint in joints]
            begin(PerturbedEnv(env, Perturbing((("layout", 5),))), index)
            for joint, place, before in zip(joints, places, touched, strict=True):
                moved = data.qpos[model.jnt_qposadr[joint] :][:3] - place
                assert np.linalg.norm(moved) <= 0.06 + 1e-9
                assert moved[2] == 0
                assert _touching(env.scene, model.jnt_bodyid[joint]) <= before


@pytest.mark.parametrize("level", LEVELS)
def test_the_arm_begins_elsewhere_by_as_much_as_is_said(worlds: list[ManipulationEnv], level: int) -> None:
    for env in worlds:
        begin(env)
        before = env.proprioception()[:3].copy()
        arm = PerturbedEnv(env, Perturbing((("arm", level),)))
        begin(arm)
        away = 100 * np.linalg.norm(arm.proprioception()[:3] - before)
        assert away == pytest.approx(perturbations.get("arm").magnitudes[level - 1], abs=1.6)


def test_late_actions_are_the_same_actions_later() -> None:
    executed = []
    with closing(perturbed("latency:3")) as env:
        begin(env)
        step = env._env._step_world
        env._env._step_world = lambda action: (executed.append(action), step(action))[1]  # type: ignore[method-assign]
        actions = [np.array([0.01 * number, -0.02 * number, 1.0], np.float32) for number in range(1, 9)]
        for action in actions:
            env.advance(action)
    np.testing.assert_array_equal(executed[:3], [[0, 0, 1]] * 3)
    np.testing.assert_array_equal(executed[3:], actions[:5])


@pytest.mark.parametrize("level", LEVELS)
def test_so_many_cycles_are_missed(level: int) -> None:
    share = perturbations.get("clock").magnitudes[level - 1] / 100
    clock = perturbations.get("clock")(level, np.random.default_rng(0))
    steps = sum(clock.steps() for _ in range(4000))
    assert (steps - 4000) / steps == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("level", LEVELS)
def test_so_many_frames_are_dropped(level: int) -> None:
    dropping = perturbations.get("dropped-frames")(level, np.random.default_rng(0))
    shown = [int(dropping.images({"top": np.full((1, 1, 3), n % 256, np.uint8)})["top"][0, 0, 0]) for n in range(2000)]
    dropped = np.mean([now == before for before, now in itertools.pairwise(shown)])
    assert dropped == pytest.approx(perturbations.get("dropped-frames").magnitudes[level - 1] / 100, abs=0.04)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), st.sampled_from(LEVELS))
def test_a_noisy_action_is_possible_and_has_the_same_gripper(values: list[float], level: int) -> None:
    action = np.array(values, np.float32)
    noisy = perturbations.get("action-noise")(level, np.random.default_rng(0)).action(action)
    assert noisy[-1] == action[-1]
    assert (noisy[:-1] != action[:-1]).all()


INSTRUCTIONS = sorted(
    {
        *METAWORLD.values(),
        *ROBOSUITE.values(),
        *(instruction_of(task) for suite in ("libero_goal", "libero_90") for task in task_map()[suite]),
    }
)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_has_other_words(level: int) -> None:
    others = {text: paraphrase(text, level) for text in INSTRUCTIONS}
    assert all(other != text and other.islower() for text, other in others.items())
    assert len(set(others.values())) == len(INSTRUCTIONS)


def test_whole_words_are_replaced_once() -> None:
    assert paraphrase("put the candle into the can", 3) == "place the candle into the tin"
    assert paraphrase("unlock the door", 2) == "unbolt the door"


def test_an_evaluation_says_what_was_perturbed(tmp_path: Path) -> None:
    config = EvalConfig(tmp_path / "r", "mock", suite="mock", perturb="plus:2", episodes=9, tasks="reach")
    result = evaluate(config)["variants"]["policy"]
    assert result["suite"] == "mock+plus:2"
    cells = {f"{name}:2" for name in NAMES if not hasattr(perturbations.get(name), "change")}
    assert set(result["per_perturbation"]) == cells
    lines = [json.loads(line) for line in (tmp_path / "r/episodes.jsonl").read_text().splitlines()]
    assert {line["perturbation"] for line in lines} == cells
    assert "| blur |" in (tmp_path / "r/report.md").read_text()
    assert (tmp_path / "r/perturbations.png").is_file()
    evaluate(config)  # goes on, and finds nothing to do
    with pytest.raises(ConfigError, match="another"):
        evaluate(EvalConfig(tmp_path / "r", "mock", suite="mock", episodes=9, tasks="reach"))


def test_a_film_does_not_change_what_is_filmed(tmp_path: Path) -> None:
    for name, video in (("plain", 0), ("filmed", 2)):
        config = EvalConfig(tmp_path / name, "mock", suite="mock", perturb="noise+clock:5", episodes=2, video=video)
        evaluate(config)
    tables = [
        pq.read_table(tmp_path / name / "steps.parquet", columns=["task", "step", "action", "reward"])
        for name in ("plain", "filmed")
    ]
    assert tables[0].equals(tables[1])
