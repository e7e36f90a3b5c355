"""Scripted experts for LIBERO's drawers, stoves and plates, from privileged state; see `robosuite_experts`."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from dysl_vla.envs.robosuite_experts import ALONG_Y, CLOSED, DOWN, OPEN, UP, Expert, Hand, Vector
from dysl_vla.types import FloatArray

HANDLE_LEAN = np.deg2rad(75)
"""Radians by which the hand leans before a drawer: its palm clears the table and the other handles."""
RIM_LEAN = 0.5
"""Radians by which the hand leans over the rim of a bowl, so that its palm clears the open drawer."""
RIM_RADIUS, RIM_HEIGHT = 0.049, 0.04
"""Place of a bowl's rim from its origin, in metres."""
HOLDING = (0.001, 0.02)
"""Range of metres between the fingers while they hold the rim of a bowl."""
WIDE = 0.06
"""Metres between the fingers above which they are open enough to go around something."""
OPENED = 0.12
"""Metres by which a drawer is opened to put something into it."""
PULL = 0.022
"""Metres ahead of the handle of the place that a closed hand is moved to: little, so that it does not slip off."""
RETREAT = 0.06
"""Metres ahead of the hand of the place that it is moved to while it leaves a handle."""
SWITCH_HEIGHT, SWITCH_FRONT = 0.04, 0.02
"""Metres above the foot of the stove's switch, and in front of its axis, at which it is taken."""
SWITCH_LEAN = 0.6
"""Radians by which the hand leans sideways over the switch: the arm is near a singularity when it points downwards."""
TURN = 0.6
"""Radians ahead of the switch of the rotation that the hand is turned to."""


class Drawer:
    """A drawer of a cabinet as it is now.

    Args:
        world: LIBERO's environment.
        region: Name of the site inside the drawer.
    """

    def __init__(self, world: Any, region: str) -> None:
        self._data, model = world.sim.data, world.sim.model
        self._site = model.site_name2id(region)
        body = model.site_bodyid[self._site]
        joint = model.body_jntadr[body]
        self._joint, self._qpos = joint, model.jnt_qposadr[joint]
        low, high = model.jnt_range[joint]
        self._sign = 1.0 if high > -low else -1.0
        solid = [geom for geom in np.flatnonzero(model.geom_bodyid == body) if model.geom_contype[geom]]
        self._handle = max(solid, key=lambda geom: float(self._data.geom_xpos[geom] @ self.out))
        self.thickness = 2 * float(np.sort(model.geom_size[self._handle])[1])
        """Thickness of the handle's bar, in metres."""

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
    def inside(self) -> Vector:
        """Middle of the space inside, in metres, (3,)."""
        inside: Vector = self._data.site_xpos[self._site]
        return inside

    @property
    def opened(self) -> float:
        """Metres by which the drawer is open."""
        return float(self._sign * self._data.qpos[self._qpos])


class FixtureHand(Hand):
    """A hand that leans, pulls drawers, and goes over to a place before it goes down to it."""

    def leaning(self, out: Vector, lean: float) -> tuple[Vector, Vector]:
        """Directions in which the fingers close and the hand points while it leans over against a direction.

        Args:
            out: Horizontal unit vector towards which the palm leans, (3,).
            lean: Radians from pointing downwards.
        """
        closing = np.cos(lean) * out - np.sin(lean) * UP
        pointing = -np.sin(lean) * out - np.cos(lean) * UP
        return closing if closing @ self.rotation[:, 0] >= 0 else -closing, pointing

    def has(self, drawer: Drawer) -> bool:
        """Whether the handle of a drawer is between the fingers, which are closed on it."""
        is_near = np.linalg.norm(self.position - drawer.handle) < 0.016
        return bool(is_near and 0.6 * drawer.thickness < self.opening < drawer.thickness + 0.008)

    def pull(self, drawer: Drawer) -> FloatArray:
        """Take the handle of a drawer, one finger above it and one below, and pull."""
        closing, pointing = self.leaning(drawer.out, HANDLE_LEAN)
        away = drawer.handle - self.position
        if self.has(drawer):
            return self.move(drawer.handle + PULL * drawer.out, CLOSED, closing, pointing)
        depth = float(away @ pointing)
        if abs(depth) < (0.008 if self.opening > WIDE else 0.012) and np.linalg.norm(away) < 0.018:
            return self.move(drawer.handle, CLOSED, closing, pointing)
        if self.opening < WIDE and np.linalg.norm(away) < 0.06:  # fingers that slipped off open in front of it
            return self.move(self.position - RETREAT * pointing, OPEN, closing, pointing)
        action = self.grasp(drawer.handle, closing, pointing)
        action[-1] = OPEN
        return action

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
        return self.move(self.position + _over(target - self.position, rise), gripper, closing, pointing)


class OpenDrawerExpert:
    """Take the handle between the fingers, one above it and one below, and pull."""

    def __init__(self, world: Any, region: str) -> None:
        self._hand, self._drawer = FixtureHand(world), Drawer(world, region)

    def act(self) -> FloatArray:
        """See `Expert`."""
        return self._hand.pull(self._drawer)


class PutInDrawerExpert:
    """Open a drawer, take the bowl by its rim, put it into the drawer.

    Args:
        world: LIBERO's environment.
        bowl: Name of the bowl.
        region: Name of the site inside the drawer.
    """

    def __init__(self, world: Any, bowl: str, region: str) -> None:
        self._hand, self._drawer = FixtureHand(world), Drawer(world, region)
        self._data, self._bowl = world.sim.data, world.obj_body_id[bowl]

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, drawer = self._hand, self._drawer
        directions = hand.leaning(drawer.out, RIM_LEAN)
        bowl = self._data.xpos[self._bowl]
        rim = bowl + RIM_RADIUS * drawer.out + RIM_HEIGHT * UP
        away = drawer.inside + 0.015 * drawer.out - bowl
        is_there = bool(np.abs(away[:2]).max() < 0.03) and away[2] > -0.02
        if HOLDING[0] < hand.opening < HOLDING[1] and np.linalg.norm(hand.position - rim) < 0.025 and not is_there:
            step = _over(away, 0.06)
            before = 0.045 - float((bowl - drawer.handle) @ drawer.out)
            if step[2] > 0.02 and before > 0:  # not up against the drawer
                step = step + before * drawer.out
            return hand.move(hand.position + step, CLOSED, *directions)
        if is_there:
            rise = 0.0 if hand.opening < HOLDING[1] else 0.1
            return hand.move(hand.position + rise * UP, OPEN, *directions)
        if drawer.opened < (OPENED if hand.has(drawer) else 0.85 * OPENED):
            return hand.pull(drawer)
        return self._take(rim)

    def _take(self, rim: Vector) -> FloatArray:
        """Leave the handle, and take the bowl by its rim."""
        hand, drawer = self._hand, self._drawer
        directions = hand.leaning(drawer.out, RIM_LEAN)
        off = hand.position - drawer.handle
        if off @ drawer.out < 0.05 and abs(off[2]) < 0.06 and np.linalg.norm(off) < 0.1:
            back = RETREAT * drawer.out if hand.opening > 0.035 else 0 * off
            return hand.move(hand.position + back, OPEN, *hand.leaning(drawer.out, HANDLE_LEAN))
        near = 0.012 if hand.opening > WIDE else 0.02
        if np.linalg.norm(hand.position - rim) < near and hand.opening > HOLDING[0]:
            return hand.move(rim, CLOSED, *directions)
        above = np.clip(hand.position[2] - rim[2], 0, 0.1)
        aim = rim + np.tan(RIM_LEAN) * above * drawer.out
        if hand.opening < WIDE:
            aim = aim + 0.04 * UP
        return hand.lower(aim, OPEN, *directions, rise=0.1)


class TurnStoveExpert:
    """Take the stove's switch between the fingers and turn the hand.

    Args:
        world: LIBERO's environment.
        stove: Name of the stove.
    """

    def __init__(self, world: Any, stove: str) -> None:
        self._hand = FixtureHand(world)
        self._data, model = world.sim.data, world.sim.model
        self._body = model.jnt_bodyid[model.joint_name2id(world.get_object(stove).joints[0])]

    def act(self) -> FloatArray:
        """See `Expert`."""
        hand, axes = self._hand, self._data.xmat[self._body].reshape(3, 3)
        across = axes[:, 0] if axes[:, 0] @ ALONG_Y >= 0 else -axes[:, 0]
        grip = self._data.xpos[self._body] - SWITCH_FRONT * axes[:, 1] + SWITCH_HEIGHT * UP
        closing = np.cos(SWITCH_LEAN) * across + np.sin(SWITCH_LEAN) * UP
        pointing = np.sin(SWITCH_LEAN) * across - np.cos(SWITCH_LEAN) * UP
        if np.linalg.norm(hand.position - grip) > (0.02 if hand.opening > 0.04 else 0.04):
            return hand.lower(grip, OPEN, closing, pointing, rise=0.05)
        if hand.opening > 0.04:
            return hand.move(grip, CLOSED, closing, pointing)
        further = Rotation.from_rotvec(TURN * UP)
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
        case [["open", str(region)]] if "cabinet" in region:
            return OpenDrawerExpert(world, region)
        case [["in", str(bowl), str(region)]] if "bowl" in bowl and "cabinet" in region:
            return PutInDrawerExpert(world, bowl, region)
        case [["turnon", stove]]:
            return TurnStoveExpert(world, stove)
        case [["on", str(plate), str(region)]] if plate.startswith("plate") and "table" in region:
            return DragPlateExpert(world, plate, region)
    return None


def _over(away: Vector, rise: float) -> Vector:
    """The step to a target on a curve that ends downwards, upwards first where the height does not suffice.

    Args:
        away: Vector to the target, in metres, (3,).
        rise: Metres above the target at which to move sideways.
    """
    height = away[2] + np.clip(2.5 * (np.linalg.norm(away[:2]) - 0.01), 0, rise)
    pace = np.clip(2 - height / 0.02, 0, 1)  # what stands there is not to be touched on the way
    return np.array([*(pace * away[:2]), height])
