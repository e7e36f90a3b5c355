"""The second simulator: another robot, other actions, the same properties."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from dysl_vla.envs import get_suite
from dysl_vla.envs.robosuite import ARM_ACTIONS, CAMERAS, FIVE, INSTRUCTIONS, ROBOTS, STATE_NAMES, RobosuiteEnv
from dysl_vla.errors import ConfigError

SMALL = {"agentview": (32, 32), "robot0_eye_in_hand": (32, 32)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FIVE)
def env(request: pytest.FixtureRequest) -> Iterator[RobosuiteEnv]:
    """Making one takes a second."""
    with closing(RobosuiteEnv(request.param, SMALL)) as made:
        yield made


@pytest.fixture(scope="module")
def lift() -> Iterator[RobosuiteEnv]:
    with closing(RobosuiteEnv("lift", SMALL)) as made:
        yield made


def digest(env: RobosuiteEnv, seed: int, index: int) -> str:
    """Of everything that decides an episode: the observation, the physics after some steps, and the expert's view."""
    observation, _ = env.reset(seed=seed, options={"episode_index": index})
    parts = [value for value in observation.values() if isinstance(value, np.ndarray)]
    for _ in range(5):
        action = env.expert_action() if env.task in FIVE else np.full(7, 0.3, np.float32)
        env.advance(action)
        world = env._data.qpos, env._data.qvel, env._model.body_pos, env._model.body_quat, env._model.geom_rgba
        parts += [action, *(values.copy() for values in world)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def test_an_initial_state_is_the_same_in_any_order_and_after_any_episode(env: RobosuiteEnv) -> None:
    forwards = [digest(env, 5, index) for index in range(3)]
    for _ in range(30):
        env.advance(env.expert_action())
    backwards = [digest(env, 5, index) for index in (2, 1, 0)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 3


def test_the_expert_solves_the_task(env: RobosuiteEnv) -> None:
    for index in range(2):
        env.reset(seed=13, options={"episode_index": index})
        assert any(env.advance(env.expert_action())[2]["success"] for _ in range(250)), index


def test_the_expert_takes_over_wherever_the_arm_is(env: RobosuiteEnv) -> None:
    env.reset(seed=12, options={"episode_index": 0})
    for action in ([0.6, 0.6, 0.0, 0.1, 0, 0.1, 1.0], [-0.5, 0.2, 0.4, -0.1, 0.1, 0.0, -1.0]):
        for _ in range(8):
            env.advance(np.array(action, np.float32))
    assert any(env.advance(env.expert_action())[2]["success"] for _ in range(300))


def test_zero_holds(env: RobosuiteEnv) -> None:
    env.reset(seed=3)
    before = env._state()
    for _ in range(20):
        env.advance(np.array([0, 0, 0, 0, 0, 0, -1], np.float32))
    after = env._state()
    np.testing.assert_allclose(after[:3], before[:3], atol=0.001)
    np.testing.assert_allclose(after[3:9], before[3:9], atol=0.01)


def test_the_state_is_a_pose_and_an_opening(env: RobosuiteEnv) -> None:
    observation, _ = env.reset(seed=4)
    state = observation["observation.state"]
    assert state.shape == (len(STATE_NAMES),)
    x, y = state[3:6], state[6:9]
    np.testing.assert_allclose([x @ x, y @ y, x @ y], [1, 1, 0], atol=1e-5)
    assert 0 < state[9] < 0.09
    for gripper in (-1, 1):
        for _ in range(15):
            env.advance(np.array([0, 0, 0, 0, 0, 0, gripper], np.float32))
        opening = env._state()[9]
        assert opening > 0.06 if gripper < 0 else opening < 0.03


def test_an_action_moves_the_hand_as_its_name_says(lift: RobosuiteEnv) -> None:
    env = lift
    for axis in range(3):
        env.reset(seed=5)
        before = env._state()
        for _ in range(5):
            env.advance(np.eye(7, dtype=np.float32)[axis])
        moved = (env._state() - before)[:3]
        assert np.argmax(np.abs(moved)) == axis, ARM_ACTIONS[axis]
        assert moved[axis] > 0.02
        env.reset(seed=5)
        before = env._arm.rotation.copy()
        for _ in range(5):
            env.advance(np.eye(7, dtype=np.float32)[3 + axis])
        turned = Rotation.from_matrix(env._arm.rotation @ before.T).as_rotvec()
        assert np.argmax(np.abs(turned)) == axis, ARM_ACTIONS[3 + axis]
        assert turned[axis] > 0.1


@pytest.mark.parametrize("robot", ROBOTS)
def test_actions_are_along_the_worlds_axes_however_the_arm_is_turned(robot: str) -> None:
    with closing(RobosuiteEnv("lift", SMALL, robot=robot)) as env:

        def place_after(action: NDArray[np.float32]) -> NDArray[np.float32]:
            env.reset(seed=5)
            env._data.qpos[env._world.robots[0]._ref_joint_pos_indexes[0]] += 0.4
            env._world.sim.forward()
            for _ in range(4):
                env.advance(action)
            return env._state()[:3]

        held = place_after(np.zeros(7, np.float32))
        for axis in range(3):
            moved = place_after(np.eye(7, dtype=np.float32)[axis]) - held
            assert moved[axis] > 0.95 * np.linalg.norm(moved) > 0.01, ARM_ACTIONS[axis]


def test_a_camera_of_one_scene_alone_is_not_offered() -> None:
    with pytest.raises(ConfigError, match=r"'sideview'.*robot0_robotview"):
        RobosuiteEnv("lift", {"sideview": (32, 32)})


@pytest.mark.parametrize("task", ["lift", "pick-place-can", "nut-assembly", "tool-hang", "wipe"])  # an arena each
def test_every_offered_camera_is_in_every_scene(task: str) -> None:
    with closing(RobosuiteEnv(task, dict.fromkeys(CAMERAS, (16, 16)))) as env:
        env.reset(seed=5)


def test_an_initial_state_is_the_same_in_another_process() -> None:
    code = (
        "from tests.envs.test_robosuite import *\n"
        "print(*(digest(RobosuiteEnv(task, SMALL), 9, 4) for task in INSTRUCTIONS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = []
    for task in INSTRUCTIONS:
        with closing(RobosuiteEnv(task, SMALL)) as env:
            here.append(digest(env, 9, 4))
    assert done.stdout.split()[-len(here) :] == here
    assert not done.stderr, "robosuite's remarks on its own set-up are kept away from users"


def test_gymnasium_accepts_the_environment() -> None:
    with closing(RobosuiteEnv("stack", SMALL)) as env:
        check_env(env, skip_close_check=True)


def test_another_robot_does_the_task() -> None:
    with closing(get_suite("robosuite-5@UR5e").make("lift", SMALL)) as env:
        env.reset(seed=1)
        assert env.embodiment.action_names == (*ARM_ACTIONS, "gripper")
        assert any(env.advance(env.expert_action())[2]["success"] for _ in range(200))


@pytest.mark.parametrize("task", sorted(set(INSTRUCTIONS) - set(FIVE)))
def test_other_tasks_run_without_an_expert_in_the_same_world(task: str, lift: RobosuiteEnv) -> None:
    assert task in get_suite("robosuite-all").without_expert
    with closing(RobosuiteEnv(task, SMALL)) as env:
        env.reset(seed=1)
        assert env.embodiment == lift.embodiment
        forwards = [digest(env, 5, index) for index in (0, 1)]
        assert [digest(env, 5, index) for index in (1, 0)] == forwards[::-1]
        with pytest.raises(ConfigError, match="no scripted expert"):
            env.expert_action()


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'juggle'.*lift"):
        RobosuiteEnv("juggle")
    with pytest.raises(ConfigError, match=r"cameras.*'nowhere'.*agentview"):
        RobosuiteEnv("lift", {"nowhere": (32, 32)})
    with pytest.raises(ConfigError, match=r"robot.*'R2D2'.*" + ROBOTS[1]):
        get_suite("robosuite-5@R2D2")
    with closing(RobosuiteEnv("door", SMALL, robot="Jaco")) as env, pytest.raises(ConfigError, match="no scripted"):
        env.expert_action()
    with pytest.raises(ConfigError, match=r"robot.*only its own"):
        get_suite("mock@Panda")
    assert get_suite("mock@Point").name == "mock"


def test_tasks_and_robots_may_be_named_as_robosuite_does() -> None:
    assert get_suite("robosuite-5@ur5e").name == "robosuite-5@UR5e"
    assert get_suite("robosuite-5@panda").name == "robosuite-5"
    assert get_suite("robosuite-5").choose("PickPlaceCan, Lift") == ("lift", "pick-place-can")
