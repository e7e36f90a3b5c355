"""Scripted experts for LIBERO's drawers, stoves and plates, from privileged state; see `robosuite_experts`."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from dysl_vla.envs.robosuite_experts import ALONG_Y, CLOSED, DOWN, OPEN, UP, Expert, Hand, Vector
from dysl_vla.types import FloatArray

LEAN = np.deg2rad(15)
"""Radians below the horizontal in which the hand points at a drawer: its palm clears the table and the other handles."""
PULL = 0.06
"""Metres ahead of the hand of the place that it is moved to while it pulls or pushes."""
SWITCH_HEIGHT, SWITCH_FRONT = 0.04, 0.02
"""Metres above the foot of the stove's switch, and in front of its axis, at which it is taken."""
SWITCH_LEAN = 0.6
"""Radians by which the hand leans sideways over the switch: the arm is near a singularity when it points downwards."""
TURN = 0.6
"""Radians ahead of the switch of the rotation that the hand is turned to."""


class FixtureHand(Hand):
    """A hand that goes over to a place before it goes down to it."""

    def lower(
        self, target: Vector, gripper: float, closing: Vector = ALONG_Y, pointing: Vector = DOWN, *, rise: float
    ) -> FloatArray:
        """Move over a place and down to it on one curve.

        Args:
            target: Position to reach, in metres, (3,).
            gripper: `OPEN` or `CLOSED`.
            closing: See `move`.
            pointing: See `move`.
            rise: Metres above the target at which the hand moves sideways.
        """
        away = (target - self.position) * (1 - UP)
        height = target[2] + np.clip(2.5 * (np.linalg.norm(away) - 0.01), 0, rise)
        # What stands there is not to be touched on the way.
        pace = np.clip(2 - (height - self.position[2]) / 0.02, 0, 1)
        return self.move(np.array([*(self.position + pace * away)[:2], height]), gripper, closing, pointing)


class Drawer:
    """A drawer of a cabinet as it is now.

    Args:
        world: LIBERO's environment.
        region: Name of the site inside the drawer.
    """

    def __init__(self, world: Any, region: str) -> None:
        self._data, model = world.sim.data, world.sim.model
        body = model.site_bodyid[model.site_name2id(region)]
        joint = model.body_jntadr[body]
        self._joint, self._qpos = joint, model.jnt_qposadr[joint]
        low, high = model.jnt_range[joint]
        self._sign = 1.0 if high > -low else -1.0
        solid = [geom for geom in np.flatnonzero(model.geom_bodyid == body) if model.geom_contype[geom]]
        self._handle = max(solid, key=lambda geom: float(self._data.geom_xpos[geom] @ self.out))

    @property
    def out(self) -> Vector:
        """Unit vector in which the drawer opens, (3,)."""
        out: Vector = self._sign * self._data.xaxis[self._joint]
        return out

    @property
    def handle(self) -> Vector:
        """Middle of the handle's bar, in metres, (3,)."""
        handle: Vector = self._data.geom_xpos[self._handle]
        return handle

    @property
    def opened(self) -> float:
        """Metres by which the drawer is open."""
        return float(self._sign * self._data.qpos[self._qpos])


class OpenDrawerExpert:
    """Take the handle between the fingers, one above it and one below, and pull."""

    def __init__(self, world: Any, region: str) -> None:
        self._hand, self._drawer = FixtureHand(world), Drawer(world, region)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, out, handle = self._hand, self._drawer.out, self._drawer.handle
        closing, pointing = -np.cos(LEAN) * UP - np.sin(LEAN) * out, -np.cos(LEAN) * out - np.sin(LEAN) * UP
        closing = np.sin(LEAN) * -out - np.cos(LEAN) * UP
        if hand.opening < 0.035 and np.linalg.norm(hand.position - handle) < 0.025:
            return hand.move(handle + PULL * out, CLOSED, closing, pointing)
        return hand.grasp(handle, closing, pointing)


class TurnStoveExpert:
    """Take the stove's switch between the fingers and turn the hand.

    Args:
        world: LIBERO's environment.
        stove: Name of the stove.
        way: 1 to turn it on, -1 to turn it off.
    """

    def __init__(self, world: Any, stove: str, way: int) -> None:
        self._hand, self._way = FixtureHand(world), way
        self._data, model = world.sim.data, world.sim.model
        self._body = model.jnt_bodyid[model.joint_name2id(world.get_object(stove).joints[0])]

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, axes = self._hand, self._data.xmat[self._body].reshape(3, 3)
        across = axes[:, 0] if axes[:, 0] @ ALONG_Y >= 0 else -axes[:, 0]
        grip = self._data.xpos[self._body] - SWITCH_FRONT * axes[:, 1] + SWITCH_HEIGHT * UP
        closing, pointing = np.cos(SWITCH_LEAN) * across + np.sin(SWITCH_LEAN) * UP, np.sin(SWITCH_LEAN) * across - np.cos(SWITCH_LEAN) * UP
        if np.linalg.norm(hand.position - grip) > (0.02 if hand.opening > 0.04 else 0.04):
            return hand.lower(grip, OPEN, closing, pointing, rise=0.05)
        if hand.opening > 0.04:
            return hand.move(grip, CLOSED, closing, pointing)
        further = Rotation.from_rotvec(self._way * TURN * UP)
        return hand.move(grip, CLOSED, further.apply(closing), further.apply(pointing))


class DragPlateExpert:
    """Press the closed fingers into the plate and drag it along the table.

    Args:
        world: LIBERO's environment.
        plate: Name of the plate.
        region: Name of the site on the table that the plate shall be at.
    """

    def __init__(self, world: Any, plate: str, region: str) -> None:
        self._hand = FixtureHand(world)
        self._data = world.sim.data
        self._plate = world.obj_body_id[plate]
        self._site = world.sim.model.site_name2id(region)

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand = self._hand
        plate = self._data.xpos[self._plate]
        away = (self._data.site_xpos[self._site] - plate) * (1 - UP)
        ahead = 0.02 * away / max(0.02, float(np.linalg.norm(away)))
        off = hand.position - plate
        if np.linalg.norm(off[:2]) < 0.05 and off[2] < 0.025:
            return hand.move(np.array([*(hand.position + away)[:2], plate[2] - 0.01]), CLOSED)
        return hand.lower(plate + ahead + 0.01 * UP, CLOSED, rise=0.08)


def make_fixture_expert(world: Any) -> Expert | None:
    """Return the expert of a task on LIBERO's fixtures; None for a goal that no expert here reaches.

    Args:
        world: LIBERO's environment, whose `parsed_problem` has the goal.
    """
    match world.parsed_problem["goal_state"]:
        case [["open", region]]:
            return OpenDrawerExpert(world, region)
        case [["turnon", stove]]:
            return TurnStoveExpert(world, stove, 1)
        case [["turnoff", stove]]:
            return TurnStoveExpert(world, stove, -1)
        case [["on", str(plate), str(region)]] if plate.startswith("plate"):
            return DragPlateExpert(world, plate, region)
    return None
