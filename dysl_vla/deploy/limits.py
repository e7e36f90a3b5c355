"""What an action may be, checked last, right before it is sent. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dysl_vla.errors import ConfigError, SafetyStop
from dysl_vla.types import FloatArray, WorldSpec

AXES = ("x", "y", "z")
GRIPPER = "gripper"


@dataclass(frozen=True)
class Limits:
    """Bounds of what is sent to a robot. NaN, infinity and a wrong dimension always stop it.

    Positions are the state's dimensions named x, y, z. Actions of these names are positions too; those named dx, dy, dz
    move along them. Where the end effector is now, is reckoned from its last two readings; leave a margin to what must
    not be touched.
    """

    on_breach: Literal["clamp", "refuse"] = "clamp"
    """Send the nearest action that is allowed, and record it; or stop."""
    low: tuple[float, ...] = ()
    """Smallest action, a value a dimension; empty: the robot's own."""
    high: tuple[float, ...] = ()
    """Largest action; empty: the robot's own."""
    max_change: tuple[float, ...] = ()
    """Largest change from one action to the next, a value a dimension; empty: any."""
    gripper_rate: float | None = None
    """Largest change of the action named "gripper", a second; None: any."""
    workspace_low: tuple[float, ...] = ()
    """Corner of the box that the end effector stays in, x, y, z in metres; empty: no box."""
    workspace_high: tuple[float, ...] = ()
    """The opposite corner."""
    max_speed: float | None = None
    """Of the end effector, in metres a second, measured; what moves it is scaled down. None: any."""

    def __post_init__(self) -> None:
        for name in ("low", "high", "max_change", "workspace_low", "workspace_high"):
            if not np.isfinite(getattr(self, name)).all():
                raise ConfigError(f"{name}: {getattr(self, name)} must be finite.")
        for name in ("gripper_rate", "max_speed"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name}: {value} must be above zero and finite.")
        if any(change <= 0 for change in self.max_change):
            raise ConfigError(f"max_change: {self.max_change} must be above zero.")
        if (len(self.workspace_low), len(self.workspace_high)) not in ((0, 0), (3, 3)):
            raise ConfigError("workspace_low, workspace_high: give both, three values each, or neither.")
        for lower, upper in (("low", "high"), ("workspace_low", "workspace_high")):
            both = zip(getattr(self, lower), getattr(self, upper), strict=False)
            if any(low >= high for low, high in both):
                raise ConfigError(f"{lower}, {upper}: the first must be below the second in every dimension.")


@dataclass(frozen=True)
class _Motion:
    """Of the end effector."""

    state: FloatArray
    position: FloatArray
    velocity: FloatArray
    taken_at: float

    def at(self, now: float) -> FloatArray:
        """Where it is by now, if it went on as it did."""
        return self.position + self.velocity * max(0.0, now - self.taken_at)


class Guard:
    """Applies limits to the actions of one run.

    Args:
        limits: What is allowed.
        world: The robot's.
        rate_hz: Actions a second.

    Raises:
        ConfigError: The limits do not fit the robot.
    """

    def __init__(self, limits: Limits, world: WorldSpec, rate_hz: float) -> None:
        dim = len(world.action_names)
        for name in ("low", "high", "max_change"):
            if len(getattr(limits, name)) not in (0, dim):
                raise ConfigError(
                    f"{name}: {len(getattr(limits, name))} values, the robot has {dim} actions: "
                    f"{', '.join(world.action_names)}."
                )
        if limits.gripper_rate is not None and GRIPPER not in world.action_names:
            raise ConfigError(f"gripper_rate: none of the actions is named {GRIPPER!r}.")
        names = world.action_names
        moved = set(AXES) <= set(names) or {f"d{axis}" for axis in AXES} <= set(names)
        if (limits.workspace_low or limits.max_speed is not None) and not (
            moved and set(AXES) <= set(world.state_names)
        ):
            raise ConfigError(
                "workspace, max_speed: state and actions must have x, y and z (actions: or dx, dy, dz); this robot has "
                f"{', '.join(world.state_names)} and {', '.join(names)}."
            )
        self._limits = limits
        self._world = world
        self._dim = dim
        self._low = np.maximum(world.action_low, limits.low or world.action_low).astype(np.float32)
        self._high = np.minimum(world.action_high, limits.high or world.action_high).astype(np.float32)
        if (self._low > self._high).any():
            raise ConfigError("low, high: leave no action that the robot accepts.")
        change = np.array(limits.max_change or [np.inf] * dim, np.float32)
        if limits.gripper_rate is not None:
            index = world.action_names.index(GRIPPER)
            change[index] = min(change[index], limits.gripper_rate / rate_hz)
        self._change = change
        has_position = set(AXES) <= set(world.state_names)
        self._positions = [world.state_names.index(axis) for axis in AXES if has_position]
        self._absolute = [(number, names.index(axis)) for number, axis in enumerate(AXES) if axis in names]
        self._relative = [(number, names.index(f"d{axis}")) for number, axis in enumerate(AXES) if f"d{axis}" in names]
        self._period = 1 / rate_hz
        self._reading: _Motion | None = None

    @property
    def state(self) -> FloatArray | None:
        """The robot's latest, (state,); None: not known yet."""
        return None if self._reading is None else self._reading.state

    def observe(self, state: FloatArray, taken_at: float) -> None:
        """Take in where the robot is.

        Args:
            state: (state,).
            taken_at: When, in seconds.
        """
        position = state[self._positions]
        velocity = np.zeros_like(position)
        before = self._reading
        if before is not None and taken_at > before.taken_at:
            velocity = (position - before.position) / (taken_at - before.taken_at)
        self._reading = _Motion(state, position, velocity, taken_at)  # at once: another thread reads it

    def check(self, action: FloatArray, last: FloatArray | None, now: float) -> tuple[FloatArray, list[str]]:
        """The action that may be sent.

        Args:
            action: (action,), in the world's units.
            last: The one that was sent before; None: none.
            now: In seconds, on the clock of `observe`.

        Returns:
            It, or the nearest that is allowed; names of the limits that changed it.

        Raises:
            SafetyStop: It is not finite or of another dimension, or exceeds a limit and is to be refused.
        """
        if action.shape != (self._dim,):
            raise SafetyStop(f"action: shape {action.shape}, the robot takes ({self._dim},).")
        if not np.isfinite(action).all():
            raise SafetyStop(f"action: has a value that is not finite: {action.tolist()}.")
        breaches: list[str] = []
        accepted = self._world.clip(action)  # as in evaluation: policies answer somewhat beyond it, and mean its end
        allowed = self._apply(accepted, np.clip(accepted, self._low, self._high), "bounds", breaches)
        if self._limits.max_speed is not None and self._reading is not None:
            allowed = self._apply(allowed, self._slow(allowed, self._reading, now), "speed", breaches)
        if last is not None:
            near = np.clip(allowed, last - self._change, last + self._change)
            allowed = self._apply(allowed, near, "change", breaches)
        if self._limits.workspace_low:  # comes last: at the wall, stopping at once is the smaller evil
            allowed = self._apply(allowed, self._inside(allowed, now), "workspace", breaches)
        return allowed, breaches

    def _slow(self, action: FloatArray, reading: _Motion, now: float) -> FloatArray:
        """What moves the end effector, scaled down while it is too fast; positions no further than it may come."""
        limit = self._limits.max_speed
        assert limit is not None
        slower = action.copy()
        speed = float(np.linalg.norm(reading.velocity))
        if speed > limit:
            slower[[index for _, index in self._relative]] *= limit / speed
        if self._absolute:
            axes, indices = zip(*self._absolute, strict=True)
            here = reading.at(now)[list(axes)]
            way = slower[list(indices)] - here
            length = float(np.linalg.norm(way))
            if length > limit * self._period:
                slower[list(indices)] = here + way * (limit * self._period / length)
        return slower

    def _inside(self, action: FloatArray, now: float) -> FloatArray:
        low, high = self._limits.workspace_low, self._limits.workspace_high
        inside = action.copy()
        for axis, index in self._absolute:
            inside[index] = np.clip(inside[index], low[axis], high[axis])
        if self._reading is not None:
            here = self._reading.at(now)
            for axis, index in self._relative:
                if (here[axis] <= low[axis] and action[index] < 0) or (here[axis] >= high[axis] and action[index] > 0):
                    inside[index] = 0.0
        return inside

    def _apply(self, before: FloatArray, after: FloatArray, name: str, breaches: list[str]) -> FloatArray:
        if np.array_equal(before, after):
            return before
        if self._limits.on_breach == "refuse":
            raise SafetyStop(f"{name}: the action {before.tolist()} exceeds it; allowed would be {after.tolist()}.")
        breaches.append(name)
        return after.astype(np.float32)
