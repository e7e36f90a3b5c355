from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.collect import ActionNoise, CollectConfig, collect, demonstrate, parse_cameras
from dysl_vla.data.lerobot import Demonstrations, Origin
from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ConfigError
from dysl_vla.policies.mock import MockPolicy


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


def test_a_policys_states_are_labelled_by_the_expert(tmp_path: Path) -> None:
    collect(CollectConfig(out=tmp_path / "d", suite="mock", episodes=3, tasks="reach", policy="mock", seed=1))
    demonstrations = Demonstrations(tmp_path / "d")
    assert {row.origin.actor for row in demonstrations.rows if row.origin} == {"mock"}
    env = MockEnv("reach")
    origin = Origin("mock", "reach", 1, 0, "mock")
    episode = demonstrate(env, origin, MockPolicy(), noise=0.0)
    assert episode is not None
    env.reset(seed=1, options={"episode_index": 0})
    np.testing.assert_array_equal(episode.actions[0], env.expert_action())


def test_a_failed_episode_is_dropped() -> None:
    env = MockEnv("reach")
    env.expert_action = lambda: np.zeros(3, np.float32)  # type: ignore[method-assign]
    assert demonstrate(env, Origin("mock", "reach", 0, 0, "expert"), None, noise=0.0) is None


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
        ({"seed": 100_000}, "seed: 100000 is not for demonstrations"),
        ({"seed": -1}, "seed"),
        ({"episodes": 0}, "episodes"),
        ({"suite": "nothing"}, "unknown suite"),
        ({"tasks": "fly"}, "unknown task"),
        ({"policy": "nobody"}, "unknown policy"),
        ({"cameras": "top"}, "cameras"),
        ({"cameras": "side=8x8"}, "no camera 'side'"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path: Path, change: dict, words: str) -> None:
    values = {"out": tmp_path / "d", "suite": "mock", "episodes": 1} | change
    with pytest.raises(ConfigError, match=words):
        collect(CollectConfig(**values))
    assert not (tmp_path / "d").exists()


def test_camera_sizes_are_read() -> None:
    assert parse_cameras("top=32x48,wrist=8x9") == {"top": (32, 48), "wrist": (8, 9)}
    assert parse_cameras("") is None
