"""robosuite's tasks, observed as LIBERO's are: for policies that were trained on LIBERO's observations.

LIBERO is built on robosuite; its arm, actions and cameras are those of a Panda here. Its state is another one, and the
images that policies were trained on are mirrored left to right: LIBERO's images come upside down, and the datasets turn
them by 180 degrees (openvla-oft, experiments/robot/libero/libero_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dysl_vla.envs.robosuite import RobosuiteEnv
from dysl_vla.envs.robosuite_arm import Arm
from dysl_vla.envs.robosuite_world import mirrored
from dysl_vla.types import LIBERO_STATE, FloatArray, ImageArray


class RobosuiteAsLibero(RobosuiteEnv):
    """One robosuite task with LIBERO's observations; see `RobosuiteEnv`."""

    state_names = LIBERO_STATE
    default_cameras: ClassVar[Mapping[str, tuple[int, int]]] = {
        "agentview": (256, 256),
        "robot0_eye_in_hand": (256, 256),
    }

    def _state(self) -> FloatArray:
        return libero_state(self._world, self._arm)

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        return mirrored(super()._render_camera(camera, height, width))


def libero_state(world: Any, arm: Arm) -> FloatArray:
    """Return LIBERO's state of a robosuite world: position, rotation vector and the two fingers' positions, (8,)."""
    robot, data = world.robots[0], world.sim.data
    w, *axis = data.get_body_xquat(robot.robot_model.eef_name["right"])
    fingers = [data.qpos[index] for index in robot._ref_gripper_joint_pos_indexes["right"]]
    return np.array([*arm.position, *rotation_vector(w, np.array(axis)), *fingers], np.float32)


def rotation_vector(w: float, axis: FloatArray) -> FloatArray:
    """Return the rotation vector of a unit quaternion, whose angle is from 0 to 2 pi.

    It is not brought to the shorter of the two angles: LIBERO's recordings are not.

    Args:
        w: Real part.
        axis: Imaginary part, (3,).
    """
    w = min(max(w, -1.0), 1.0)
    sine = math.sqrt(1 - w * w)
    return axis * 0 if math.isclose(sine, 0) else axis * (2 * math.acos(w) / sine)
