from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.collect import CollectConfig, collect
from dysl_vla.envs import ManipulationEnv, episode_rng, get_suite, with_robot
from dysl_vla.envs.libero import instruction_of
from dysl_vla.envs.libero_package import task_map
from dysl_vla.envs.metaworld import INSTRUCTIONS as METAWORLD
from dysl_vla.envs.perturbations import LEVELS, PerturbedEnv, Perturbing, perturbations
from dysl_vla.envs.perturbations.paraphrases import paraphrase
from dysl_vla.envs.robosuite import INSTRUCTIONS as ROBOSUITE
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.runner import _check_perturbing
from dysl_vla.policies.mini_vla import MiniVLA
from tests.conftest import make_tiny_policy

NAMES = perturbations.names()
PLACED = ("layout", "arm")
"""Those that change where things begin."""
SEEN = tuple(name for name in NAMES if perturbations.get(name).shows)
TOP = "observation.images.top"


def draw(part: str) -> np.random.Generator:
    return episode_rng(part, 0, 0)


def perturbed(name: str, task: str = "reach", suite: str = "mock") -> PerturbedEnv:
    env = get_suite(f"{suite}+{name}").make(task, None)
    assert isinstance(env, PerturbedEnv)
    return env


@pytest.mark.parametrize("name", NAMES)
def test_levels_differ_in_size_and_size_grows(name: str) -> None:
    sizes = perturbations.get(name).magnitudes
    assert len(sizes) == len(LEVELS)
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "instruction"])
def test_the_readme_states_the_sizes(name: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [row] = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
    stated = [
        float(number) for number in re.findall(r"[\d.]+", row.rpartition("|")[0].rpartition("|")[2].partition("cm")[0])
    ]
    assert stated[:5] == list(perturbations.get(name).magnitudes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fog", "unknown perturbation 'fog'; there are: action-noise, arm"),
        ("light:6", "the level of light must be from 1 to 5, got '6'"),
        ("light:", "the level of light"),
        ("light+light:2", "named once"),
        ("plus+light", "leave out what is beside it"),
        ("", "must name a perturbation"),
        ("light+", "must name a perturbation"),
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


def places_of(env: ManipulationEnv) -> Any:
    """Where the things that stand freely are, (things, 3)."""
    assert env.scene is not None
    model, data = env.scene.model, env.scene.data
    joints = [joint for joint in range(model.njnt) if model.jnt_type[joint] == 0]
    return np.array([data.qpos[model.jnt_qposadr[joint] :][:3] for joint in joints])


def test_things_are_moved_by_as_much_as_is_said_and_stay_where_they_are_put(worlds: list[ManipulationEnv]) -> None:
    moved = []
    for env in worlds:
        for index in range(5):
            begin(env, index)
            before = places_of(env)
            world = PerturbedEnv(env, Perturbing((("layout", 5),)))
            begin(world, index)
            placed = places_of(env)
            assert np.linalg.norm(placed - before, axis=1).max() <= 0.06 + 1e-9
            assert (placed[:, 2] == before[:, 2]).all()
            moved.append(np.linalg.norm(placed - before, axis=1).mean())
            for _ in range(10):  # nothing is thrown out of what it was put into, or falls off what it stands on
                world.advance(np.zeros(len(env.embodiment.action_names), np.float32))
            assert np.abs(places_of(env) - placed).max(axis=0) == pytest.approx([0, 0, 0], abs=0.012)
    assert np.mean(moved) > 0.01


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
    clock = perturbations.get("clock")(level, draw)
    steps = sum(clock.repeats(step) for step in range(4000))
    assert (steps - 4000) / steps == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("level", LEVELS)
def test_so_many_frames_are_dropped(level: int) -> None:
    dropping = perturbations.get("dropped-frames")(level, draw)
    pictures = [{"top": np.full((1, 1, 3), number % 256, np.uint8)} for number in range(2000)]
    shown = [int(dropping.images(picture, step)["top"][0, 0, 0]) for step, picture in enumerate(pictures)]
    dropped = np.mean([now == before for before, now in itertools.pairwise(shown)])
    assert dropped == pytest.approx(perturbations.get("dropped-frames").magnitudes[level - 1] / 100, abs=0.04)


@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), st.sampled_from(LEVELS))
def test_a_noisy_action_is_possible_and_has_the_same_gripper(values: list[float], level: int) -> None:
    action = np.array(values, np.float32)
    noisy = perturbations.get("action-noise")(level, draw).action(action, 0)
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
    evaluate(config)  # finds nothing to do
    with pytest.raises(ConfigError, match="another"):
        evaluate(EvalConfig(tmp_path / "r", "mock", suite="mock", episodes=9, tasks="reach"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mock+noise", "mock+noise:3"),
        ("mock+noise+blur:1", "mock+blur:1+noise:3"),
        ("mock+plus", "mock+plus"),
        ("mock+plus:2", "mock+plus:2"),
        ("metaworld-mt10-plus", "metaworld-mt10-plus"),
        ("robosuite-5-plus@UR5e", "robosuite-5-plus@UR5e"),
        ("robosuite-5@UR5e+light:4", "robosuite-5@UR5e+light:4"),
        (with_robot("robosuite-5@Sawyer+light:4", "UR5e"), "robosuite-5@UR5e+light:4"),
    ],
)
def test_a_perturbed_suite_has_one_name(text: str, name: str) -> None:
    suite = get_suite(text)
    assert suite.name == name
    assert suite.perturbing is not None
    assert get_suite(suite.name).perturbing == suite.perturbing
    plain = get_suite(name.partition("+")[0].replace("-plus", ""))
    assert (suite.tasks, suite.horizon, suite.fixed_states) == (plain.tasks, plain.horizon, plain.fixed_states)


def test_a_sweep_is_not_perturbed_again_and_nothing_is_demonstrated_in_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="perturbed already"):
        get_suite("metaworld-mt10-plus+light")
    with pytest.raises(ConfigError, match="demonstrate in mock"):
        collect(CollectConfig(out=tmp_path / "d", suite="mock+noise"))
    assert not (tmp_path / "d").exists()


def test_what_applies_to_some_tasks_alone_is_refused() -> None:
    policy = make_tiny_policy()
    seen: Any = SeenFrom(policy, {"corner2": (32, 32)})
    suite = get_suite("metaworld-mt10+layout")
    with pytest.raises(ConfigError, match=r"layout does not apply to door-open.*take --tasks push,pick-place"):
        _check_perturbing(suite, ("push", "pick-place", "door-open"), seen)
    _check_perturbing(suite, ("push",), seen)


class SeenFrom:
    """A policy's spec with other cameras."""

    def __init__(self, policy: MiniVLA, cameras: dict[str, tuple[int, int]]) -> None:
        self.spec = replace(policy.spec, cameras=cameras)


def test_a_perturbation_does_not_depend_on_the_cameras_or_on_how_often_one_looks() -> None:
    images = []
    for cameras, looks in (({"top": (32, 32), "wrist": (16, 16)}, 1), ({"top": (32, 32)}, 3)):
        for name in ("noise", "occlusion", "exposure"):
            env = get_suite(f"mock+{name}").make("reach", cameras)
            begin(env)
            for _ in range(3):
                env.advance(np.zeros(3, np.float32))
                seen = [env.observe()[TOP] for _ in range(looks)][-1]
            images.append(seen)
    for one, other in zip(images[:3], images[3:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_film_does_not_change_what_is_filmed(tmp_path: Path) -> None:
    for name, video in (("plain", 0), ("filmed", 2)):
        config = EvalConfig(tmp_path / name, "mock", suite="mock", perturb="noise+clock:5", episodes=2, video=video)
        evaluate(config)
    tables = [
        pq.read_table(tmp_path / name / "steps.parquet", columns=["task", "step", "action", "reward"])
        for name in ("plain", "filmed")
    ]
    assert tables[0].equals(tables[1])
