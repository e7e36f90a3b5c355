"""The pose of a robosuite world's arm, and how far its gripper is open: for its environment and for its experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.rendering import load_mujoco

FAR = 0.5
"""Metres, more than any hand opens."""


class Arm:
    """Where a robosuite world's arm is.

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
        """Between the fingertips, in metres, (3,)."""
        position: NDArray[np.float64] = self._world.sim.data.site_xpos[self._site]
        return position

    @property
    def rotation(self) -> NDArray[np.float64]:
        """(3, 3); its first column is where the closing fingers move, its last where the hand points."""
        rotation: NDArray[np.float64] = self._world.sim.data.site_xmat[self._site].reshape(3, 3)
        return rotation

    @property
    def opening(self) -> float:
        """Metres between the pads of the fingers; 0 for a tool that has none."""
        sim = self._world.sim
        distance = self._mujoco.mj_geomDistance
        return min((distance(sim.model._model, sim.data._data, *pair, FAR, None) for pair in self._pads), default=0.0)
