"""LIBERO's worlds do what the reference does (robosuite 1.4, MuJoCo 2.3.7), as `record_libero.py` has recorded it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.envs.libero import LiberoEnv
from dysl_vla.envs.libero_package import initial_states

pytestmark = pytest.mark.slow

ARRAYS = np.load(Path(__file__).parent / "libero_reference.npz")
NUMBERS = sorted({name.partition("/")[0] for name in ARRAYS.files})
TOLERANCE = 1e-3
"""Metres."""
STATE_TOLERANCE = np.array([TOLERANCE] * 3 + [0.02] * 3 + [2e-3] * 2)
"""Metres, radians and metres of a finger."""

SAMPLE = ("01", "03", "05", "08", "13")
"""Recordings of a drawer, of the floor's scene, of a touched switch, and of two kitchens; the others are alike."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in SAMPLE else pytest.mark.exhaustive) for n in NUMBERS],
)
def replay(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Any], LiberoEnv]]:
    """A recording, and the same world after the reset that the recording began with."""
    prefix = f"{request.param}/"
    recorded = {name.removeprefix(prefix): ARRAYS[name] for name in ARRAYS.files if name.startswith(prefix)}
    suite, task, _, _ = recorded["task"]
    with closing(LiberoEnv(str(task), {"agentview": (16, 16)}, suite=str(suite).replace("_", "-"))) as env:
        yield recorded, env


def begin(env: LiberoEnv, state: np.ndarray) -> None:
    """Reset as the reference does after `seed(0)`: robosuite 1.4 draws the arm's noise although it is zero."""
    before = np.random.get_state()
    np.random.seed(0)
    np.random.randn(7)
    np.random.random_sample(len(env._world.object_property_initializers))  # those of the reference's first reset
    env._return_fixtures()
    env._world.robots[0].initialization_noise["magnitude"] = 0.0
    env._world.reset()
    np.random.set_state(before)
    env._world.sim.set_state_from_flattened(state)
    env._world.sim.forward()
    env._world._post_process()


def bodies(env: LiberoEnv, names: np.ndarray) -> list[int]:
    return [env._world.obj_body_id[str(name)] for name in names]


def published_state(recorded: dict[str, Any], step: int) -> np.ndarray:
    """The state that the published evaluations make from the reference's observation at a step, (8,)."""
    from robosuite.utils.transform_utils import quat2axisangle

    quaternion = recorded["robot0_eef_quat"][step].astype(np.float64)
    fingers = recorded["robot0_gripper_qpos"][step]
    return np.array([*recorded["robot0_eef_pos"][step], *quat2axisangle(quaternion), *fingers])


def test_recorded_actions_move_the_arm_alike(replay: tuple[dict[str, Any], LiberoEnv]) -> None:
    recorded, env = replay
    suite, task, _, state = recorded["task"]
    np.testing.assert_array_equal(initial_states(str(suite), str(task))[int(state)], recorded["state"])
    begin(env, recorded["state"])
    fixtures = bodies(env, recorded["fixtures"])
    np.testing.assert_allclose(env._model.body_pos[fixtures].reshape(-1, 3), recorded["fixture_pos"], atol=1e-9)
    np.testing.assert_allclose(env._model.body_quat[fixtures].reshape(-1, 4), recorded["fixture_quat"], atol=1e-9)
    site, success = env._world.robots[0].eef_site_id["right"], []
    for step, action in enumerate(recorded["actions"]):
        success.append(env._world._check_success())
        distance = np.linalg.norm(env._data.site_xpos[site] - recorded["position"][step])
        assert distance < TOLERANCE, f"{1e3 * distance:.2f} mm after {step} actions"
        difference = np.abs(env.proprioception() - published_state(recorded, step))
        assert (difference < STATE_TOLERANCE).all(), f"{difference} after {step} actions"
        env._world.step(action.astype(np.float64))
    np.testing.assert_allclose(
        env._data.xpos[bodies(env, recorded["object_names"])], recorded["objects"][-1], atol=5e-3
    )
    np.testing.assert_array_equal([*success, env._world._check_success()], recorded["success"])


def test_the_predicate_holds_where_it_does_in_the_reference(replay: tuple[dict[str, Any], LiberoEnv]) -> None:
    recorded, env = replay
    begin(env, recorded["goal_state"])
    success = [env._world._check_success()]
    for _ in recorded["goal_success"][1:]:
        env._world.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        success.append(env._world._check_success())
    np.testing.assert_array_equal(success, recorded["goal_success"])
