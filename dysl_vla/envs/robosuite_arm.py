"""The pose and gripper opening of a robosuite world's arm, for its environment and its experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.rendering import load_mujoco

FAR = 0.5
"""A distance in metres that no hand opens to."""


class Arm:
    """The arm of a robosuite world as it is now.

    Args:
        world: robosuite's environment.
    """

    def __init__(self, world: Any) -> None:
        self._world = world
        self._robot = world.robots[0]
        self._site = self._robot.eef_site_id["right"]
        self._mujoco = load_mujoco()
        pads = self._robot.gripper["right"].important_geoms
        self._pads = [
            (world.sim.model.geom_name2id(left), world.sim.model.geom_name2id(right))
            for left in pads["left_fingerpad"]
            for right in pads["right_fingerpad"]
        ]

    @property
    def position(self) -> NDArray[np.float64]:
        """The point between the fingertips, in metres, (3,)."""
        position: NDArray[np.float64] = self._world.sim.data.site_xpos[self._site]
        return position

    @property
    def rotation(self) -> NDArray[np.float64]:
        """The hand's rotation, (3, 3): along its first column the fingers close, along its last the hand points."""
        rotation: NDArray[np.float64] = self._world.sim.data.site_xmat[self._site].reshape(3, 3)
        return rotation

    @property
    def opening(self) -> float:
        """The distance between the pads of the fingers, in metres; 0 for a tool that has none."""
        sim = self._world.sim
        distance = self._mujoco.mj_geomDistance
        return min((distance(sim.model._model, sim.data._data, *pair, FAR, None) for pair in self._pads), default=0.0)
