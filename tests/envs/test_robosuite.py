"""Properties of robosuite alone; those of every simulator are tested in test_contract.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from dysl_vla.envs import get_suite
from dysl_vla.envs.robosuite import FIVE, INSTRUCTIONS, ROBOTS, STATE_NAMES, RobosuiteEnv
from dysl_vla.envs.robosuite_libero import RobosuiteAsLibero, rotation_vector
from dysl_vla.envs.robosuite_world import ARM_ACTIONS
from dysl_vla.errors import ConfigError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY

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


def test_another_robot_does_the_task() -> None:
    with closing(get_suite("robosuite-5@UR5e").make("lift", SMALL)) as env:
        env.reset(seed=1)
        assert env.embodiment.action_names == (*ARM_ACTIONS, "gripper")
        assert any(env.advance(env.expert_action())[2]["success"] for _ in range(200))


def test_the_tasks_with_an_expert_are_those_of_the_suite_of_five() -> None:
    assert get_suite("robosuite-all").without_expert == set(INSTRUCTIONS) - set(FIVE)
    assert get_suite("robosuite-5").without_expert == set()


def test_robots_and_experts_that_do_not_exist_are_named() -> None:
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


def test_observed_as_libero_is_the_same_world(lift: RobosuiteEnv) -> None:
    with closing(get_suite("robosuite-5-libero").make("lift", SMALL)) as env:
        assert isinstance(env, RobosuiteAsLibero)
        for seed in (1, 2):
            ours, _ = lift.reset(seed=seed)
            theirs, _ = env.reset(seed=seed)
            for _ in range(4):
                for name in SMALL:  # upside down, as LIBERO renders them, turned by 180 degrees
                    image = ours[IMAGE_PREFIX + name]
                    np.testing.assert_array_equal(theirs[IMAGE_PREFIX + name], image[::-1][::-1, ::-1])
                state = theirs[STATE_KEY]
                np.testing.assert_array_equal(state[:3], ours[STATE_KEY][:3])
                reference = env._world._get_observations(force_update=True)
                np.testing.assert_allclose(
                    Rotation.from_rotvec(state[3:6]).as_matrix(),
                    Rotation.from_quat(reference["robot0_eef_quat"]).as_matrix(),
                    atol=1e-6,
                )
                np.testing.assert_allclose(state[6:], reference["robot0_gripper_qpos"], atol=1e-7)
                action = np.array([0.3, -0.2, 0.1, 0.2, 0.1, -0.3, 1], np.float32)
                ours, theirs = lift.step(action)[0], env.step(action)[0]


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.5, np.pi, 4.0, 2 * np.pi - 1e-3])
def test_a_rotation_vector_keeps_the_side_of_its_quaternion(angle: float) -> None:
    axis = np.array([2.0, -1.0, 2.0]) / 3
    vector = rotation_vector(float(np.cos(angle / 2)), np.sin(angle / 2) * axis)
    np.testing.assert_allclose(vector, angle * axis, atol=1e-6)
