"""Properties of Meta-World alone; those of every simulator are tested in test_contract.py."""

from __future__ import annotations

import ctypes.util
from contextlib import closing

import numpy as np
import pytest

from dysl_vla.envs import get_suite
from dysl_vla.envs.metaworld import INSTRUCTIONS, MetaWorldEnv
from dysl_vla.envs.rendering import choose_gl_backend
from dysl_vla.errors import RenderingError

SMALL = {"corner2": (32, 32), "gripperPOV": (32, 32)}

pytestmark = pytest.mark.slow


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
