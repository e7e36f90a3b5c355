"""Properties of the controller that acts as robosuite 1.4's; the recordings of 1.4 are tested with the environments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dysl_vla.envs.libero_controller import libero_controllers, next_fingers
from dysl_vla.envs.robosuite import load_robosuite

PHYSICS_STEPS = 25
"""Physics steps of one action at 20 Hz."""


@pytest.fixture
def world() -> Iterator[Any]:
    made = load_robosuite().make(
        "Lift",
        robots="Panda",
        controller_configs=libero_controllers(),
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        hard_reset=False,
        seed=0,
    )
    yield made
    made.close()


def test_fingers_go_from_open_to_closed_in_eight_actions() -> None:
    target = np.array([1.0, -1.0])
    for _ in range(8 * PHYSICS_STEPS - 1):
        target = next_fingers(target, np.array([0.3]))
    assert target[0] > -1
    np.testing.assert_allclose(next_fingers(target, np.array([0.3])), [-1, 1])


def test_fingers_hold_at_zero_and_stay_within_their_range() -> None:
    np.testing.assert_array_equal(next_fingers(np.array([0.4, -0.4]), np.zeros(1)), [0.4, -0.4])
    np.testing.assert_array_equal(next_fingers(np.array([-1.0, 1.0]), np.ones(1)), [-1, 1])


@pytest.mark.slow
def test_the_orientation_goal_is_kept_where_no_rotation_is_commanded(world: Any) -> None:
    def goal(*action: float) -> np.ndarray:
        world.step(np.array(action))
        return np.array(world.robots[0].part_controllers["right"].goal_ori)

    world.reset()
    start = goal(0.5, 0, 0, 0, 0, 0, -1)
    np.testing.assert_array_equal(goal(-0.5, 0.3, 0, 0, 0, 0, -1), start)
    turned = goal(0, 0, 0, 0, 0.2, 0, -1)
    assert np.abs(turned - start).max() > 0.05
    np.testing.assert_array_equal(goal(0, 0, 0.5, 0, 0, 0, -1), turned)


@pytest.mark.slow
def test_the_gripper_moves_a_quarter_of_its_half_range_in_an_action_and_starts_anew_after_a_reset(world: Any) -> None:
    for _ in range(2):
        world.reset()
        world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        np.testing.assert_allclose(world.robots[0].gripper["right"].current_action, [-0.25, 0.25])
