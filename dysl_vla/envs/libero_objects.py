"""The objects of a LIBERO scene as its scripted experts see them, and what stands in the way of a hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.robosuite_experts import Vector

SPACING = 0.02
"""Metres between the places of a path that are compared with the obstacles."""
MARGIN = 0.005
"""Metres by which an obstacle counts as larger than its boxes."""


class Thing:
    """One object or fixture, with its present pose.

    Args:
        world: LIBERO's environment.
        name: The object's name in the BDDL file, "milk_1".
    """

    def __init__(self, world: Any, name: str) -> None:
        self.name = name
        self.geoms: list[str] = world.get_object(name).contact_geoms
        self._data = world.sim.data._data
        self._body = world.obj_body_id[name]
        ids = np.array([world.sim.model.geom_name2id(geom) for geom in self.geoms])
        centers, halves, rotations = geom_boxes(world, ids)
        turned = self.rotation.T @ rotations
        middle = (centers - self.position) @ self.rotation
        half = np.einsum("gij,gj->gi", np.abs(turned), halves)
        low, high = (middle - half).min(axis=0), (middle + half).max(axis=0)
        self.half: Vector = (high - low) / 2
        """Half the sides of the box around the object in its own frame, in metres, (3,)."""
        self._middle: Vector = (high + low) / 2

    @property
    def position(self) -> Vector:
        """The origin of the object, which LIBERO's predicates are about, in metres, (3,)."""
        position: Vector = self._data.xpos[self._body]
        return position

    @property
    def rotation(self) -> Vector:
        """The object's rotation, (3, 3)."""
        rotation: Vector = self._data.xmat[self._body].reshape(3, 3)
        return rotation

    @property
    def middle(self) -> Vector:
        """The middle of the box around the object, in metres, (3,)."""
        middle: Vector = self.position + self.rotation @ self._middle
        return middle

    @property
    def height(self) -> float:
        """Half the height of the box around the object as it now lies, in metres."""
        return float(np.abs(self.rotation[2]) @ self.half)

    @property
    def top(self) -> float:
        """The height of the highest point of the box, in metres."""
        return float(self.middle[2]) + self.height

    @property
    def bottom(self) -> float:
        """The height of the lowest point of the box, in metres."""
        return float(self.middle[2]) - self.height


class Obstacles:
    """The collision geometries of every object and fixture of a scene but one, as boxes.

    Args:
        world: LIBERO's environment.
        names: The objects and fixtures that are obstacles.
    """

    def __init__(self, world: Any, names: Sequence[str]) -> None:
        self._world = world
        geoms = [world.sim.model.geom_name2id(geom) for name in names for geom in world.get_object(name).contact_geoms]
        self._geoms = np.array(geoms, int)

    def height(self, start: Vector, end: Vector, radius: float) -> float:
        """The height of the highest obstacle on a straight path, in metres; minus infinity when there is none.

        Args:
            start: Where the path begins, in metres; only the first two coordinates count.
            end: Where it ends.
            radius: Half the width of what moves along the path, in metres.
        """
        centers, halves, rotations = geom_boxes(self._world, self._geoms)
        around = np.einsum("gij,gj->gi", np.abs(rotations), halves)
        count = 2 + int(np.linalg.norm(end[:2] - start[:2]) / SPACING)
        path = np.linspace(start[:2], end[:2], count)
        apart = np.abs(path[:, None] - centers[:, :2]) - around[:, :2]
        crossed = (apart < radius).all(axis=2).any(axis=0)
        return float((centers + around)[crossed, 2].max(initial=-np.inf))

    def hit(self, points: Vector) -> NDArray[np.int64]:
        """How many points of each group are inside of an obstacle.

        Args:
            points: (groups, points, 3), in metres.

        Returns:
            (groups,).
        """
        centers, halves, rotations = geom_boxes(self._world, self._geoms)
        near = np.linalg.norm(centers - points.mean(axis=(0, 1)), axis=1) < 0.3 + np.linalg.norm(halves, axis=1)
        centers, halves, rotations = centers[near], halves[near], rotations[near]
        inside = np.einsum("kpgi,gij->kpgj", points[:, :, None] - centers, rotations)
        hits: NDArray[np.int64] = (np.abs(inside) < halves + MARGIN).all(axis=3).any(axis=2).sum(axis=1)
        return hits


def geom_boxes(world: Any, geoms: NDArray[np.int64]) -> tuple[Vector, Vector, Vector]:
    """The present boxes around geometries: centers (geoms, 3), half sides (geoms, 3), rotations (geoms, 3, 3)."""
    model, data = world.sim.model._model, world.sim.data._data
    boxes = model.geom_aabb[geoms]
    rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
    return data.geom_xpos[geoms] + np.einsum("gij,gj->gi", rotations, boxes[:, :3]), boxes[:, 3:], rotations
