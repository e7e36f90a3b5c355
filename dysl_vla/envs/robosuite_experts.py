"""Scripted experts on robosuite's privileged state: the teachers of its demonstrations.

Each decides by the present state alone, so that it can take over from a policy at any moment and correct what went
wrong. They share one hand, moved by the operational-space controller. They are not for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from dysl_vla.envs.robosuite_arm import Arm
from dysl_vla.types import FloatArray

Vector = NDArray[np.float64]

OPEN, CLOSED = -1.0, 1.0
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""How far, in metres and radians, an action of 1 moves."""
GAIN = 2.0
SIDES = np.array([0.5, -0.5, 1.0]) * np.pi
"""Directions that a nut's handle may have on its peg, in radians about z: the fourth side is out of reach."""
LEFTWARDS = 0.8
"""Radians by which a turn to the left counts as longer, since the wrist turns less far that way."""
UP = np.array([0.0, 0.0, 1.0])
DOWN = -UP
ALONG_Y = np.array([0.0, 1.0, 0.0])
"""The direction in which the fingers close while the arm is at rest."""
OVER = 0.1
"""The distance in metres from which the hand goes straight to what it will grasp."""
WITHIN = 0.012
"""The precision of a grasp in metres."""
STRAIGHT = 0.02
"""The sideways distance in metres within which the hand goes straight on."""
SLANT = 0.75
"""Radians by which the hand leans away from the door, which it would touch if it were upright."""
NEARLY_OPEN = 0.067
"""Metres between the fingers above which they hold nothing: the handle, as it turns, spreads them that far."""
UNLATCHED = 1.2
"""Radians by which the door's handle must be turned."""


class Hand(Arm):
    """The arm's hand, and the actions that move it."""

    def holds(self, geoms: Any) -> bool:
        """Whether both fingers touch an object."""
        return bool(self._world._check_grasp(gripper=self._robot.gripper, object_geoms=geoms))

    def move(self, target: Vector, gripper: float, closing: Vector = ALONG_Y, pointing: Vector = DOWN) -> FloatArray:
        """The action that moves the hand towards a place.

        Args:
            target: Position between the fingertips to move to, in metres, (3,).
            gripper: `OPEN` or `CLOSED`.
            closing: Unit vector along which the fingers shall close.
            pointing: Unit vector at right angles to `closing`, in which the hand shall point.
        """
        straight = GAIN * (target - self.position) / POSITION_SCALE
        turn = GAIN * self._turn(closing, pointing) / ROTATION_SCALE
        return np.array([*_shortened(straight), *_shortened(turn), gripper], np.float32)

    def grasp(self, target: Vector, closing: Vector = ALONG_Y, pointing: Vector = DOWN) -> FloatArray:
        """Move the open hand in front of a target, then straight to it, and close it there; see `move`."""
        away = target - self.position
        depth = away @ pointing
        aside = away - depth * pointing
        before = target - OVER * pointing
        if np.linalg.norm(aside) > STRAIGHT or np.linalg.norm(self._turn(closing, pointing)) > 0.25:
            if depth < 0.5 * OVER and STRAIGHT < np.linalg.norm(aside) < OVER:  # not sideways through what is there
                before = before - aside
            return self.move(before, OPEN, closing, pointing)
        is_there = -0.03 < depth < WITHIN and np.linalg.norm(aside) < WITHIN
        return self.move(target, CLOSED if is_there else OPEN, closing, pointing)

    def carry(
        self, away: Vector, closing: Vector, pointing: Vector = DOWN, *, rise: float, within: float
    ) -> FloatArray | None:
        """Lift what is held and move it sideways; None when it is above its target.

        Args:
            away: Vector from the held object to its target, in metres, (3,).
            closing: See `move`.
            pointing: See `move`.
            rise: Metres below the target's height from which the object is lifted before it moves sideways.
            within: Horizontal precision, in metres.
        """
        if np.linalg.norm(away[:2]) < within:
            return None
        step = away if away[2] < rise else away * UP
        return self.move(self.position + step, CLOSED, closing, pointing)

    def _turn(self, closing: Vector, pointing: Vector) -> Vector:
        """The rotation vector from the hand's present rotation to given directions of fingers and hand."""
        wanted = np.stack([closing, np.cross(pointing, closing), pointing], axis=1)
        rotation: Vector = Rotation.from_matrix(wanted @ self.rotation.T).as_rotvec()
        return rotation


class Expert(Protocol):
    """A scripted expert of one task, for one episode."""

    def act(self) -> FloatArray:
        """The next action, (action,), which may exceed the action space."""


class LiftExpert:
    """Grasp the cube and lift it."""

    def __init__(self, world: Any) -> None:
        self._world, self._hand = world, Hand(world)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, cube = self._hand, _Body(self._world, self._world.cube.root_body)
        closing = cube.nearest_axis(ALONG_Y)
        if hand.holds(self._world.cube):
            return hand.move(hand.position + OVER * UP, CLOSED, closing)
        return hand.grasp(cube.position, closing)


class StackExpert:
    """Grasp the red cube, carry it over the green one, let go."""

    def __init__(self, world: Any) -> None:
        self._world, self._hand = world, Hand(world)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, world = self._hand, self._world
        red, green = (_Body(world, cube.root_body) for cube in (world.cubeA, world.cubeB))
        between = green.position - red.position
        is_tight = np.linalg.norm(between[:2]) < 0.1 and abs(horizontal(between) @ red.nearest_axis(ALONG_Y)) > 0.7
        closing = red.nearest_axis(np.cross(UP, horizontal(between)) if is_tight else ALONG_Y)
        place = green.position + 0.045 * UP
        away = place - red.position
        is_there = np.linalg.norm(away[:2]) < 0.02 and abs(away[2]) < 0.008
        if not hand.holds(world.cubeA):
            if is_there:
                return hand.move(hand.position + OVER * UP, OPEN, closing)
            return hand.grasp(red.position, closing)
        carrying = hand.carry(away + 0.04 * UP, closing, rise=0.02, within=0.012)
        if carrying is not None and not is_there:
            return carrying
        if not is_there:
            return hand.move(hand.position + away - 0.01 * UP, CLOSED, closing)
        return hand.move(hand.position, OPEN, closing)


class DoorExpert:
    """Take the handle between the fingers, press it down, pull the door."""

    def __init__(self, world: Any) -> None:
        self._world, self._hand = world, Hand(world)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, world = self._hand, self._world
        latch = _Body(world, world.door.latch_body)
        out = latch.rotation @ np.array([0.0, -1.0, 0.0])
        grip = latch.position + latch.rotation @ np.array([0.10, -0.10, 0.0])
        closing = np.cos(SLANT) * out - np.sin(SLANT) * UP
        pointing = -np.cos(SLANT) * UP - np.sin(SLANT) * out
        if hand.opening > NEARLY_OPEN or np.linalg.norm(hand.position - grip) > 0.04:
            return hand.grasp(grip, closing, pointing)
        turned, opened = (world.sim.data.qpos[at] for at in (world.handle_qpos_addr, world.hinge_qpos_addr))
        if turned < UNLATCHED and opened < 0.05:
            further = Rotation.from_rotvec(0.5 * latch.rotation[:, 1]).apply(grip - latch.position) + latch.position
            return hand.move(hand.position + further - grip, CLOSED, closing, pointing)
        return hand.move(hand.position + 0.05 * out, CLOSED, closing, pointing)


class PickPlaceCanExpert:
    """Grasp the can, lift it over the wall between the bins, let it fall into its compartment."""

    def __init__(self, world: Any) -> None:
        self._world, self._hand = world, Hand(world)
        # The middle of the compartment is at the limit of the arm's reach.
        self._drop = world.target_bin_placements[world.object_id] + np.array([-0.05, -0.05, 0.21])

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, world = self._hand, self._world
        can = _Body(world, world.objects[world.object_id].root_body)
        if not hand.holds(world.objects[world.object_id]):
            if not world.not_in_bin(can.position, world.object_id):
                return hand.move(hand.position + OVER * UP, OPEN, ALONG_Y, self._leaning(hand.position))
            return hand.grasp(can.position + 0.01 * UP, ALONG_Y, self._leaning(can.position))
        pointing = self._leaning(hand.position)
        carrying = hand.carry(self._drop - can.position, ALONG_Y, pointing, rise=0.03, within=0.03)
        return hand.move(hand.position, OPEN, ALONG_Y, pointing) if carrying is None else carrying

    def _leaning(self, place: Vector) -> Vector:
        """The direction of the hand: it leans forwards where the arm cannot reach straight down."""
        lean = np.clip(2.5 * (np.linalg.norm(place - self._world.robots[0].base_pos) - 0.6), 0, 0.5)
        return np.array([np.sin(lean), 0.0, -np.cos(lean)])


class NutAssemblySquareExpert:
    """Grasp the nut's handle, turn it as the peg stands, lower it over the peg."""

    def __init__(self, world: Any) -> None:
        self._world, self._hand = world, Hand(world)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, world = self._hand, self._world
        nut = _Body(world, world.nuts[0].root_body)
        handle = nut.position + nut.rotation @ np.array([0.054, 0.0, 0.0])
        peg = world.sim.data.body_xpos[world.peg1_body_id]
        top = peg + 0.1 * UP
        across = horizontal(nut.rotation[:, 1])
        closing = across if across[1] >= 0 else -across
        away = top + 0.06 * UP - nut.position
        is_on = np.linalg.norm(away[:2]) < 0.012 and nut.position[2] < top[2] - 0.005
        if not hand.holds(world.nuts[0]):
            if is_on:
                return hand.move(hand.position + OVER * UP, OPEN, horizontal(hand.rotation[:, 0]))
            return hand.grasp(handle, closing)
        turns = (SIDES - np.arctan2(nut.rotation[1, 0], nut.rotation[0, 0]) + np.pi) % (2 * np.pi) - np.pi
        turn = min(turns, key=lambda angle: abs(angle) + LEFTWARDS * (angle > 0))
        square = Rotation.from_rotvec(turn * UP).apply(horizontal(hand.rotation[:, 0]))
        if is_on:
            return hand.move(hand.position + away - 0.2 * UP, CLOSED, square)
        carrying = hand.carry(away, square, rise=0.02, within=0.006)
        if carrying is not None:
            return carrying
        if abs(turn) > 0.08:
            return hand.move(hand.position + away, CLOSED, square)
        return hand.move(hand.position + away - 0.2 * UP, CLOSED, square)


experts: dict[str, Callable[[Any], Expert]] = {
    "lift": LiftExpert,
    "stack": StackExpert,
    "door": DoorExpert,
    "pick-place-can": PickPlaceCanExpert,
    "nut-assembly-square": NutAssemblySquareExpert,
}
"""Task to the expert of an episode, given robosuite's environment."""


class _Body:
    """The present pose of a body of the world."""

    def __init__(self, world: Any, name: str) -> None:
        index = world.sim.model.body_name2id(name)
        self.position: Vector = world.sim.data.body_xpos[index]
        self.rotation: Vector = world.sim.data.body_xmat[index].reshape(3, 3)

    def nearest_axis(self, direction: Vector) -> Vector:
        """The horizontal axis of a cube, in either direction, that is nearest to a horizontal direction."""
        axes = self.rotation.T[np.abs(self.rotation[2]) < np.sqrt(0.5)]
        nearest = axes[np.argmax(np.abs(axes @ direction))]
        return horizontal(nearest * np.sign(nearest @ direction))


def horizontal(direction: Vector) -> Vector:
    """The unit vector in the horizontal direction of a vector that is not vertical, (3,)."""
    flat: Vector = direction * (1 - UP)
    return flat / float(np.linalg.norm(flat))


def _shortened(vector: Vector) -> Vector:
    """The vector, scaled down in the same direction until no dimension exceeds 1."""
    return vector / max(1.0, float(np.abs(vector).max()))
