"""Scripted experts for LIBERO's tasks, from privileged state; see `robosuite_experts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from dysl_vla.envs.libero_fixture_experts import make_fixture_expert
from dysl_vla.envs.libero_objects import Obstacles, Thing
from dysl_vla.envs.robosuite_experts import ALONG_Y, CLOSED, DOWN, OPEN, OVER, UP, Expert, Hand, Vector, horizontal
from dysl_vla.types import FloatArray

FINGERTIP = 0.013
"""Metres by which the fingers reach further than the point between the fingertips."""
PALM = 0.022
"""Metres below the top of an object at which it is grasped, so that the palm does not touch it."""
GRASPABLE = 0.072
"""Metres between the open fingers."""
RIM_DEPTH = 0.012
"""Metres below the rim of a bowl at which it is grasped."""
RIM_WALL = 0.004
"""Half of what the wall of a bowl is thick at its rim, in metres."""
SIDES = np.arange(8) * np.pi / 4
"""Directions from the middle of a bowl to the part of its rim that is grasped, in radians about z."""
REACH = 0.765
"""Horizontal metres from the arm's base within which the hand still points straight down."""
CLEAR = 0.04
"""Metres between what moves and the obstacles below it."""
ROUND = {"alphabet_soup": 1, "tomato_sauce": 1, "wine_bottle": 2}
"""The round objects, to the index of their axis."""
BOWLS = ("akita_black_bowl",)
PUT_ON = ("akita_black_bowl", "cream_cheese", "wine_bottle")
"""The objects that are put on others."""


@dataclass(frozen=True)
class Grip:
    """A way to grasp an object.

    Attributes:
        position: Where the point between the fingertips shall be, in metres, (3,).
        closing: Unit vector along which the fingers shall close, (3,).
        width: The distance between the fingers at which they hold it, in metres.
    """

    position: Vector
    closing: Vector
    width: float


class CarryingHand(Hand):
    """A hand that grasps and carries over obstacles."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        geoms = self._robot.gripper["right"].important_geoms
        self._fingers = [geoms["left_finger"], geoms["right_finger"]]

    def holds(self, geoms: Any) -> bool:
        """Whether both fingers touch an object: rims touch the fingers and not only their pads."""
        return bool(self._world._check_grasp(gripper=self._fingers, object_geoms=geoms))

    def take(self, grip: Grip, obstacles: Obstacles) -> FloatArray:
        """Move the open hand over what is in the way, then straight down to a grip, and close it there."""
        away = grip.position - self.position
        aside = float(np.linalg.norm(away[:2]))
        is_turned = np.linalg.norm(self._turn(grip.closing, DOWN)) < 0.2
        is_closing = self.opening < GRASPABLE - 0.004
        near, deep = (0.02, 0.025) if is_closing else (0.008, 0.008)
        if is_turned and aside < near and abs(away[2]) < deep:
            return self.move(grip.position, CLOSED, grip.closing)
        over = max(obstacles.height(self.position, grip.position, 0.05) + CLEAR + FINGERTIP, grip.position[2] + 0.06)
        far = _between(aside, 0.008, 0.035) if is_turned else 1.0
        return self.move(self.position + _glide(away, over - grip.position[2], far), OPEN, grip.closing)

    def bring(self, thing: Thing, place: Vector, closing: Vector, obstacles: Obstacles) -> FloatArray:
        """Carry what is held over what is in the way, and lower it to a place.

        Args:
            thing: What is held.
            place: Where its origin shall be, in metres, (3,).
            closing: See `move`.
            obstacles: Everything else.
        """
        away = place - thing.position
        radius = float(np.linalg.norm(thing.half[:2])) * 0.8
        over = obstacles.height(thing.position, place, radius) + CLEAR + thing.position[2] - thing.bottom
        far = _between(float(np.linalg.norm(away[:2])), 0.015, 0.045)
        return self.move(self.position + _glide(away, max(over - place[2], 0.02), far), CLOSED, closing)


class PickAndPlace(ABC):
    """Grasp an object, carry it to its place, let go, retreat upwards.

    Args:
        world: LIBERO's environment.
        name: The object's name.
        target: The name of the object, fixture or region that it is put in or on.
    """

    def __init__(self, world: Any, name: str, target: str) -> None:
        self._world, self._hand = world, CarryingHand(world)
        self._thing = Thing(world, name)
        self._obstacles = Obstacles(world, [other for other in world.obj_body_id if other != name])
        region = world.object_sites_dict.get(target)
        self._target = Thing(world, region.parent_name if region else target)
        self._region = world.sim.model.site_name2id(target) if region else None

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, thing = self._hand, self._thing
        grip = self._grip()
        if hand.holds(thing.geoms) and hand.opening < grip.width + 0.012:
            place = self._place()
            if self._is_there(place):
                return hand.move(hand.position, OPEN, grip.closing)
            return hand.bring(thing, place, grip.closing, self._obstacles)
        if self._is_let_go():
            return hand.move(hand.position + OVER * UP, OPEN, grip.closing)
        return hand.take(grip, self._obstacles)

    @abstractmethod
    def _place(self) -> Vector:
        """Where the object's origin shall be, in metres, (3,)."""

    @abstractmethod
    def _is_there(self, place: Vector) -> bool:
        """Whether the object that is held can be let go."""

    def _is_let_go(self) -> bool:
        """Whether the object, which is not held, is in its place or falls into it."""
        return bool(self._world._check_success())

    def _middle_of_target(self) -> Vector:
        if self._region is None:
            return self._target.position
        middle: Vector = self._world.sim.data._data.site_xpos[self._region]
        return middle

    def _grip(self) -> Grip:
        if self._thing.name.startswith(BOWLS):
            return self._grip_at_rim()
        return self._grip_at_body()

    def _grip_at_body(self) -> Grip:
        """Grasp along the narrow side, as the hand is turned already where several sides are narrow."""
        thing, hand = self._thing, self._hand
        upright = int(np.argmax(np.abs(thing.rotation[2])))
        sides = [axis for axis in range(3) if axis != upright]
        narrow = [axis for axis in sides if 2 * thing.half[axis] < GRASPABLE] or sides
        axis = max(narrow, key=lambda side: abs(thing.rotation[:, side] @ hand.rotation[:, 0]))
        closing = horizontal(thing.rotation[:, axis])
        if ROUND.get(thing.name.rpartition("_")[0]) == upright:
            closing = ALONG_Y
        closing = closing * (1.0 if closing @ hand.rotation[:, 0] >= 0 else -1.0)
        position = np.array([*thing.middle[:2], max(thing.top - min(thing.height, PALM), thing.bottom + FINGERTIP)])
        return Grip(position, closing, 2 * float(thing.half[axis]))

    def _grip_at_rim(self) -> Grip:
        """Grasp the rim of a bowl where nothing is in the way, and where the arm reaches it, here and at its place."""
        thing, hand = self._thing, self._hand
        outwards = np.stack([np.cos(SIDES), np.sin(SIDES), 0 * SIDES], axis=1)
        ring = outwards @ thing.rotation * (1, 1, 0)  # in the frame of the bowl, which may lie askew
        ring *= (thing.half[0] - RIM_WALL) / np.linalg.norm(ring, axis=1, keepdims=True)
        rim = thing.middle + (ring + (thing.half[2] - RIM_DEPTH) * UP) @ thing.rotation.T
        apart = np.linalg.norm(rim - hand.position, axis=1)
        turns = np.abs(outwards @ hand.rotation[:, 0])
        if hand.holds(thing.geoms):
            costs = apart
        else:
            hits = self._obstacles.hit(_outline(rim, outwards))
            costs = 4 * apart + 0.8 * (1 - np.abs(outwards[:, 1])) - 0.125 * outwards[:, 1] - 0.1 * turns + 0.3 * hits
            for moved in (0, self._place() - thing.position):
                reach = np.linalg.norm((rim + moved - self._world.robots[0].base_pos)[:, :2], axis=1)
                costs = costs + 25 * np.maximum(reach - REACH, 0)
        best = int(np.argmin(costs))
        closing = outwards[best] * (1.0 if outwards[best] @ hand.rotation[:, 0] >= 0 else -1.0)
        return Grip(rim[best], closing, 0.02)


class PutIntoBasket(PickAndPlace):
    """Let an object fall into the basket from above its rim."""

    def _place(self) -> Vector:
        above = self._target.top + FINGERTIP - self._hand.position[2]
        return np.array([*self._middle_of_target()[:2], self._thing.position[2] + above])

    def _is_there(self, place: Vector) -> bool:
        away = place - self._thing.position
        return bool(np.linalg.norm(away[:2]) < 0.02 and away[2] > -0.015)

    def _is_let_go(self) -> bool:
        away = self._middle_of_target() - self._thing.position
        return bool(np.abs(away[:2]).max() < 0.06)


class PutOn(PickAndPlace):
    """Lower an object onto another until they touch."""

    def _place(self) -> Vector:
        middle = self._middle_of_target()
        below = self._thing.position[2] - self._thing.bottom
        return np.array([*middle[:2], middle[2] + below - 0.01])

    def _is_there(self, place: Vector) -> bool:
        away = place - self._thing.position
        touches = self._world.check_contact(self._thing.geoms, self._target.geoms)
        return bool(np.linalg.norm(away[:2]) < (0.025 if touches else 0.015) and (touches or away[2] > -0.002))


def make_expert(world: Any) -> Expert | None:
    """Return the expert of an episode that has just begun; None for a task that has none.

    Args:
        world: LIBERO's environment, whose `parsed_problem` has the goal.
    """
    match world.parsed_problem["goal_state"]:
        case [["in", str(name), str(target)]] if target.startswith("basket"):
            return PutIntoBasket(world, name, target)
        case [["on", str(name), str(target)]] if name.startswith(PUT_ON) and not target.startswith("wine_rack"):
            return PutOn(world, name, target)
    return make_fixture_expert(world)


def _glide(away: Vector, over: float, far: float) -> Vector:
    """The step to a target: at a height above it while far, downwards when near, sideways only when high enough.

    Args:
        away: Vector to the target, in metres, (3,).
        over: Height above the target at which to travel, in metres.
        far: From 0, straight to the target, to 1, at the height of travelling.
    """
    rise = float(away[2]) + over * far
    pace = 1 - far * _between(rise, 0.01, 0.05)
    return np.array([*(away[:2] * pace), rise])


def _between(value: float, low: float, high: float) -> float:
    """From 0 where a value is low to 1 where it is high."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def _outline(positions: Vector, closing: Vector) -> Vector:
    """Points of the open hand at several places, (places, points, 3): its outer finger, and its palm."""
    across = np.cross(UP, closing)
    finger = [(c, a, h) for c in (0.038, 0.052, 0.066) for a in (-0.014, 0.014) for h in (-0.012, 0.01, 0.03)]
    palm = [(c, a, h) for c in (-0.1, -0.05, 0.0, 0.05, 0.1) for a in (-0.03, 0.03) for h in (0.035, 0.08, 0.12)]
    points = np.array(finger + palm)
    along = np.stack([closing, across, np.broadcast_to(UP, closing.shape)], axis=1)
    outline: Vector = positions[:, None] + points @ along
    return outline
