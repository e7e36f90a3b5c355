from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.collect import ActionNoise, CollectConfig, _demonstrate, _envs, collect, demonstrate
from dysl_vla.data.lerobot import Demonstrations, Origin
from dysl_vla.data.options import PLACE, SIZE, camera_options
from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.policies import ComputeConfig, load_policy
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.types import FULL_QUALITY
from tests.conftest import make_tiny_policy


def columns(root: Path) -> dict[str, np.ndarray]:
    return Demonstrations(root).columns()


def test_every_task_has_as_many_episodes_as_asked_for(mock_demos: Path) -> None:
    tasks = [row.origin.task for row in Demonstrations(mock_demos).rows if row.origin]
    assert tasks.count("reach") == tasks.count("linger") == 12


def test_collecting_again_adds_only_what_is_missing(tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    collect(CollectConfig(out=parts, suite="mock", episodes=2, tasks="reach"))
    collect(CollectConfig(out=parts, suite="mock", episodes=5, tasks="reach"))
    collect(CollectConfig(out=parts, suite="mock", episodes=5, tasks="reach"))
    collect(CollectConfig(out=whole, suite="mock", episodes=5, tasks="reach", workers=2))
    for name, values in columns(whole).items():
        np.testing.assert_array_equal(columns(parts)[name], values)


def test_a_policy_of_full_quality_is_shown_it_and_the_dataset_says_so(tmp_path: Path) -> None:
    spec = replace(make_tiny_policy().spec, rendering=FULL_QUALITY)
    make_tiny_policy(spec=spec).save_pretrained(tmp_path / "policy")
    policy = load_policy(str(tmp_path / "policy"))
    name = str(tmp_path / "policy")
    collected = collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=1, tasks="reach", policy=name))
    assert collected.rendering == FULL_QUALITY
    env = _envs("mock", ()).env("reach")
    origin = Origin("mock", "reach", 0, 0, f"policy@{policy.fingerprint[:12]}", 0.0)
    for actor, is_full in ((name, True), (None, False)):
        _demonstrate(origin, {}, actor, ComputeConfig())
        assert env.full_quality == is_full


def test_a_policy_is_shown_images_of_the_size_that_it_was_trained_on(tmp_path: Path) -> None:
    spec = replace(make_tiny_policy().spec, cameras={"top": (40, 56)})
    make_tiny_policy(spec=spec).save_pretrained(tmp_path / "policy")
    name = str(tmp_path / "policy")
    collected = collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=1, tasks="reach", policy=name))
    assert collected.spec.cameras == {"top": (40, 56)}
    with pytest.raises(ConfigError, match="trained on 'top' at 40x56"):
        collect(CollectConfig(tmp_path / "e", "mock", episodes=1, tasks="reach", policy=name, cameras="top=48x48"))


def test_a_policys_states_are_labelled_by_the_expert(tmp_path: Path) -> None:
    collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=3, tasks="reach", policy="mock", seed=1))
    demonstrations = Demonstrations(tmp_path / "d")
    assert {row.origin.actor for row in demonstrations.rows if row.origin} == {"mock@mock"}
    env = MockEnv("reach")
    origin = Origin("mock", "reach", 1, 0, "mock@mock", 0.0)
    episode = demonstrate(env, origin, MockPolicy())
    assert episode is not None
    env.reset(seed=1, options={"episode_index": 0})
    np.testing.assert_array_equal(episode.actions[0], env.expert_action())


def test_a_failed_episode_is_dropped() -> None:
    env = MockEnv("reach")
    env.expert_action = lambda: np.zeros(3, np.float32)  # type: ignore[method-assign]
    assert demonstrate(env, Origin("mock", "reach", 0, 0, "expert", 0.0), None) is None


@given(st.integers(0, 10**6), st.floats(0, 2))
def test_noise_spares_the_gripper_and_is_reproducible(seed: int, strength: float) -> None:
    names = ("dx", "dy", "gripper")
    first, second = (ActionNoise(names, strength, np.random.default_rng(seed)) for _ in range(2))
    for _ in range(20):
        noise = first()
        np.testing.assert_array_equal(noise, second())
        assert noise[2] == 0
        assert strength > 0 or not noise.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 100_000}, "seed must be from 0 to 99999, got 100000"),
        ({"seed": -1}, "seed"),
        ({"episodes": 0}, "episodes"),
        ({"workers": 0}, "workers"),
        ({"noise": float("nan")}, "noise"),
        ({"noise": -1.0}, "noise"),
        ({"suite": "nothing"}, "unknown suite"),
        ({"suite": "robosuite-5@UR5e"}, r"no scripted expert for door; take --tasks lift,stack"),
        (
            {"suite": "robosuite-5", "robot": "sawyer"},
            r"Sawyer has no .* lift, stack.*; take another --robot or",
        ),
        ({"tasks": "fly"}, "unknown task"),
        ({"policy": "nobody"}, "unknown policy"),
        ({"policy": "mock", "suite": ""}, "suite: this policy does not say which suite it was trained in"),
        ({"cameras": "top"}, "cameras"),
        ({"cameras": "side=8x8"}, "no camera 'side'"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path: Path, change: dict, words: str) -> None:
    values = {"out": tmp_path / "d", "suite": "mock", "episodes": 1} | change
    with pytest.raises(ConfigError, match=words):
        collect(CollectConfig(**values))
    assert not (tmp_path / "d").exists()


def test_another_noise_is_another_collection(tmp_path: Path) -> None:
    for noise in (0.0, 1.0):
        collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=2, tasks="reach", noise=noise))
    assert [row.origin.noise for row in Demonstrations(tmp_path / "d").rows if row.origin] == [0.0, 0.0, 1.0, 1.0]


def test_an_expert_that_always_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dysl_vla.data.collect.worker_pool", ThreadPoolExecutor)  # so that the next line reaches it
    monkeypatch.setattr("dysl_vla.data.collect._demonstrate", lambda *_: None)
    with pytest.raises(DatasetError, match="reach: 20 episodes failed, 0 succeeded"):
        collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=2, tasks="reach"))


def test_camera_options_are_read() -> None:
    assert camera_options("cameras", "top=32x48,wrist=8x9", SIZE, "8x8") == {"top": (32, 48), "wrist": (8, 9)}
    assert camera_options("crops", "top=8x9+1+2", PLACE, "8x8+0+0") == {"top": (8, 9, 1, 2)}
    assert camera_options("crops", "", PLACE, "8x8+0+0") == {}
    for wrong in ("top", "top=8", "top=8x9x7", "=8x8", "top=ax8"):
        with pytest.raises(ConfigError, match=r"^cameras[: ]"):
            camera_options("cameras", wrong, SIZE, "8x8", ["top"])
