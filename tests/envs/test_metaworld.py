"""The real simulator: slower than the rest, and the only proof that it behaves."""

from __future__ import annotations

import ctypes.util
import hashlib
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dysl_vla.envs import get_suite
from dysl_vla.envs.metaworld import INSTRUCTIONS, MT10, MetaWorldEnv
from dysl_vla.envs.rendering import choose_gl_backend
from dysl_vla.errors import ConfigError, RenderingError

SMALL = {"corner2": (32, 32), "gripperPOV": (32, 32)}

pytestmark = pytest.mark.slow


def digest(env: MetaWorldEnv, seed: int, index: int) -> str:
    """Of everything that decides an episode: the observation, the whole physics state and the expert's view."""
    observation, _ = env.reset(seed=seed, options={"episode_index": index})
    data = env._sawyer.data
    parts = [value for value in observation.values() if isinstance(value, np.ndarray)]
    parts += [data.qpos, data.qvel, data.mocap_pos, env._full_state]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("task", [*MT10, "assembly", "hammer"])
def test_an_initial_state_is_the_same_in_any_order_and_after_any_episode(task: str) -> None:
    with closing(MetaWorldEnv(task, SMALL)) as env:
        forwards = [digest(env, 5, index) for index in range(3)]
        for _ in range(30):
            env.advance(env.expert_action())
        backwards = [digest(env, 5, index) for index in (2, 1, 0)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 3


def test_an_initial_state_is_the_same_in_another_process() -> None:
    code = (
        "from tests.envs.test_metaworld import *\n"
        "with closing(MetaWorldEnv('push', SMALL)) as env: print(digest(env, 9, 4))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with closing(MetaWorldEnv("push", SMALL)) as env:
        assert done.stdout.split()[-1] == digest(env, 9, 4)


def test_a_process_that_forgets_to_close_ends_quietly() -> None:
    code = "from tests.envs.test_metaworld import *\nenv = MetaWorldEnv('push', SMALL); env.reset(seed=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception" not in done.stderr, done.stderr


def test_gymnasium_accepts_the_environment() -> None:
    with closing(MetaWorldEnv("drawer-open", SMALL)) as env:
        check_env(env, skip_close_check=True)


@pytest.mark.parametrize("task", MT10)
def test_the_expert_solves_the_task(task: str) -> None:
    with closing(MetaWorldEnv(task, SMALL)) as env:
        for index in range(2):
            env.reset(seed=11, options={"episode_index": index})
            assert any(env.advance(env.expert_action())[2]["success"] for _ in range(250)), index


def test_the_policy_does_not_see_the_goal() -> None:
    with closing(MetaWorldEnv("reach", SMALL)) as env:
        observation, _ = env.reset(seed=0)
        assert observation["observation.state"].shape == (4,)
        assert np.abs(env._full_state[-3:]).sum() > 0


def test_pictures_are_upright_and_of_the_asked_size() -> None:
    with closing(MetaWorldEnv("reach", {"corner2": (96, 128)})) as env:
        image = env.reset(seed=0)[0]["observation.images.corner2"]
        assert image.shape == (96, 128, 3)
        # The wall behind the table is grey, the table brown: the grey belongs to the top.
        colourful = np.ptp(image.astype(int), axis=2).mean(axis=1)
        assert colourful[:10].mean() < colourful[-30:].mean()
        assert env.render().shape == (256, 256, 3)


def test_full_quality_shows_more_than_fast_quality() -> None:
    images = []
    for full in (False, True):
        with closing(MetaWorldEnv("reach", SMALL, full_quality=full)) as env:
            images.append(env.reset(seed=0)[0]["observation.images.corner2"].astype(int))
    assert np.abs(images[0] - images[1]).mean() > 1


def test_every_task_has_an_instruction_and_an_environment() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(ALL_V3_ENVIRONMENTS)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)
    assert len(get_suite("metaworld-mt50").tasks) == 50


def test_unknown_tasks_and_cameras_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown Meta-World task 'fly'"):
        MetaWorldEnv("fly")
    with pytest.raises(ConfigError, match="no camera 'side'"):
        MetaWorldEnv("reach", {"side": (32, 32)})


def test_a_machine_without_opengl_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RenderingError, match="apt-get install libegl1"):
        choose_gl_backend()


def test_osmesa_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None if name == "EGL" else f"lib{name}.so")
    assert choose_gl_backend() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert choose_gl_backend() == "glfw"
