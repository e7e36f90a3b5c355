"""A simulator in fifty lines, which CONTRIBUTING.md refers to, and demonstrations that are collected in it."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dysl_vla.data.collect import demonstrate
from dysl_vla.data.lerobot import Origin
from dysl_vla.envs import get_suite
from dysl_vla.envs.base import ManipulationEnv, check_cameras
from dysl_vla.envs.rendering import SceneRenderer, load_mujoco
from dysl_vla.envs.suites import Suite, suites
from dysl_vla.eval.bench_env import EnvBenchConfig, bench_env
from dysl_vla.types import EmbodimentSpec, FloatArray, ImageArray

# begin of the example
SCENE = """<mujoco><worldbody>
  <light pos="0 0 2"/> <camera name="top" pos="0 0 1.2"/>
  <body name="disc">
    <joint name="x" type="slide" axis="1 0 0" damping="20"/> <joint name="y" type="slide" axis="0 1 0" damping="20"/>
    <geom type="cylinder" size=".05 .02" mass="1" rgba="0 0 1 1"/>
  </body>
  <body name="goal" mocap="true"> <geom size=".03" rgba="0 1 0 1" contype="0" conaffinity="0"/> </body>
</worldbody> <actuator> <motor joint="x" gear="9"/> <motor joint="y" gear="9"/> </actuator></mujoco>"""


class DiscEnv(ManipulationEnv):
    def __init__(self, task: str, cameras: dict[str, tuple[int, int]] | None = None) -> None:
        sizes = dict(cameras or {"top": (48, 48)})
        check_cameras(sizes, ("top",))
        self._mujoco = mujoco = load_mujoco()  # with a GL backend
        self._model = mujoco.MjModel.from_xml_string(SCENE)
        self._data = mujoco.MjData(self._model)
        self._renderer = SceneRenderer(self._model)
        spec = EmbodimentSpec(sizes, ("x", "y"), ("dx", "dy"), (-1.0, -1.0), (1.0, 1.0), rate_hz=20.0)
        super().__init__(task, "put the disc on the goal", spec, horizon=200)

    def _reset_world(self, rng: np.random.Generator) -> None:
        self._mujoco.mj_resetData(self._model, self._data)
        self._data.mocap_pos[0] = [*rng.uniform(-0.3, 0.3, 2), 0]
        self._mujoco.mj_forward(self._model, self._data)

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        self._data.ctrl[:] = action
        self._mujoco.mj_step(self._model, self._data, nstep=25)
        distance = float(np.linalg.norm(self._data.mocap_pos[0, :2] - self._data.qpos))
        return -distance, distance < 0.03

    def _state(self) -> FloatArray:
        return self._data.qpos.astype(np.float32)

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        return self._renderer.render(self._data, camera, height, width)

    def expert_action(self) -> FloatArray:
        return np.clip(8 * (self._data.mocap_pos[0, :2] - self._data.qpos), -1, 1).astype(np.float32)

    def close(self) -> None:
        self._renderer.close()


def disc() -> Suite:
    return Suite("disc", ("push",), 200, DiscEnv, robot="disc")


# end of the example

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the suite, as a package's entry point would."""
    monkeypatch.setitem(suites._parts, "disc", disc)


def test_gymnasium_accepts_it_and_its_states_are_its_episodes_alone() -> None:
    with closing(get_suite("disc").make("push", None)) as env:
        check_env(env, skip_close_check=True)
        first, second = (env.reset(seed=1, options={"episode_index": 4})[0]["observation.images.top"] for _ in "ab")
        np.testing.assert_array_equal(first, second)


def test_demonstrations_come_of_it() -> None:
    suite = get_suite("disc")
    with closing(suite.make("push", None)) as env:
        episode = demonstrate(env, Origin("disc", "push", 0, 0, "expert", 0.5), None)
    assert episode is not None
    assert episode.images["top"].shape[1:] == (48, 48, 3)


def test_its_time_is_measured() -> None:
    [row] = bench_env(EnvBenchConfig(suite="disc", steps=5))
    assert row.task == "push"
