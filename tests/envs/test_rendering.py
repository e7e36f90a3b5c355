"""Frames are those of MuJoCo's own renderer, to the bit, although what a camera cannot see is not drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dysl_vla.envs import get_suite
from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.metaworld import INSTRUCTIONS
from dysl_vla.envs.rendering import SceneRenderer, load_mujoco
from dysl_vla.envs.robosuite import INSTRUCTIONS as ROBOSUITE_INSTRUCTIONS
from dysl_vla.types import ImageArray

if TYPE_CHECKING:
    import mujoco

pytestmark = pytest.mark.slow

SCENES = {
    "libero-goal": "put_the_bowl_on_the_stove",
    "libero-object": "pick_up_the_milk_and_place_it_in_the_basket",
    "libero-10": "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
    "robosuite-5": "door",
    "metaworld-mt10": "drawer-open",
}


LIKE_GOAL = ("libero-object", "libero-10")
OTHERS = (
    *((suite, SCENES[suite]) for suite in LIKE_GOAL),
    *(("metaworld-mt50", task) for task in INSTRUCTIONS if task != SCENES["metaworld-mt10"]),
    *(("robosuite-all", task) for task in ROBOSUITE_INSTRUCTIONS if task != SCENES["robosuite-5"]),
)


@pytest.fixture(
    scope="module",
    params=[
        *(scene for scene in SCENES.items() if scene[0] not in LIKE_GOAL),
        *(pytest.param(other, marks=pytest.mark.exhaustive) for other in OTHERS),
    ],
    ids="-".join,
)
def env(request: pytest.FixtureRequest) -> Iterator[ManipulationEnv]:
    suite, task = request.param
    with closing(get_suite(suite).make(task, None)) as made:
        made.reset(seed=1)
        yield made


def world(env: ManipulationEnv) -> tuple[mujoco.MjModel, mujoco.MjData, SceneRenderer]:
    inside: Any = env
    if hasattr(inside, "_sawyer"):
        return inside._sawyer.model, inside._sawyer.data, inside._renderer
    return inside._model, inside._data, inside._renderer


def poses(model: mujoco.MjModel, data: mujoco.MjData, count: int) -> Iterator[None]:
    """Put arms and fixtures anywhere within their joints' ranges, and loose objects anywhere near."""
    mujoco, rng = load_mujoco(), np.random.default_rng(0)
    start = data.qpos.copy()
    for _ in range(count):
        yield
        data.qpos[:] = start
        for joint in range(model.njnt):
            at = model.jnt_qposadr[joint]
            if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE:
                data.qpos[at : at + 7] += rng.normal(0, 0.2, 7)
            elif model.jnt_limited[joint]:
                data.qpos[at] = rng.uniform(*model.jnt_range[joint])
        mujoco.mj_forward(model, data)


class Plain:
    """MuJoCo's renderer as it is, with the settings of `SceneRenderer`."""

    def __init__(self, model: mujoco.MjModel, height: int, width: int, full: bool, option: mujoco.MjvOption) -> None:
        mujoco = load_mujoco()
        samples = model.vis.quality.offsamples
        model.vis.quality.offsamples = 4 if full else 0
        self.option, self.renderer = option, mujoco.Renderer(model, height, width)
        model.vis.quality.offsamples = samples
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = full

    def render(self, data: mujoco.MjData, camera: str) -> ImageArray:
        self.renderer.update_scene(data, camera=camera, scene_option=self.option)
        return np.asarray(self.renderer.render())


@pytest.mark.parametrize(("size", "full"), [((64, 96), False), ((64, 64), True)])
def test_no_pixel_differs_from_the_plain_renderer(env: ManipulationEnv, size: tuple[int, int], full: bool) -> None:
    model, data, renderer = world(env)
    cameras = [model.camera(i).name for i in range(model.ncam)][-5:]
    groups = model.geom_group.copy()
    plain = Plain(model, *size, full, renderer._option)
    with closing(plain.renderer):
        for _ in poses(model, data, 1 if full else 2):
            for camera in cameras:
                frame = renderer.render(data, camera, *size, full_quality=full)
                np.testing.assert_array_equal(frame, plain.render(data, camera), err_msg=camera)
    np.testing.assert_array_equal(model.geom_group, groups)


def test_the_quality_may_change_between_frames(env: ManipulationEnv) -> None:
    model, data, renderer = world(env)
    camera = model.camera(0).name
    frames = [renderer.render(data, camera, 64, 64, full_quality=full) for full in (False, True, False, True)]
    np.testing.assert_array_equal(frames[0], frames[2])
    np.testing.assert_array_equal(frames[1], frames[3])
    assert (frames[0] != frames[1]).any()


def test_the_first_frame_has_the_shadows_of_what_is_not_in_view() -> None:
    mujoco = load_mujoco()
    model = mujoco.MjModel.from_xml_string("""<mujoco><visual><map znear="0.01"/></visual><worldbody>
      <light name="sun" directional="true" pos="2 0 2" dir="-1 0 -1" castshadow="true"/>
      <geom type="box" size="3 3 0.01"/><geom type="box" pos="1 0 1" size="0.2 0.2 0.2"/>
      <camera name="above" pos="0 0 1" xyaxes="1 0 0 0 1 0" fovy="40"/></worldbody></mujoco>""")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with closing(SceneRenderer(model)) as renderer:
        plain = Plain(model, 32, 32, True, renderer._option)
        with closing(plain.renderer):
            first = renderer.render(data, "above", 32, 32, full_quality=True)
            np.testing.assert_array_equal(first, plain.render(data, "above"))
    assert first.std() > 20
