"""What an action may be, checked last, right before it is sent. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dysl_vla.errors import ConfigError, SafetyStop
from dysl_vla.types import RELATIVE, EmbodimentSpec, FloatArray, gripper_columns

AXES = ("x", "y", "z")
SAFE_CHANGE = 0.5
"""Share of a position's range that it may change by in a second, where nothing else is known."""


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
    """Largest change from one action to the next, a value a dimension. Empty: for positions (joints, x, y, z) the
    largest that the demonstrations show (99.9 % of their changes are smaller), or, where the policy does not say that,
    half of the robot's range a second; for grippers and for relative actions (dx, ..., dyaw) any."""
    gripper_rate: float | None = None
    """Largest change of a gripper's action ("gripper", "gripper.pos", "left_gripper.pos"), a second; None: any."""
    gripper_hysteresis: float = 0.1
    """Share of a gripper's range by which its action must turn back before it does: a smaller wavering is not sent."""
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
        if not 0 <= self.gripper_hysteresis < 1:
            raise ConfigError(f"gripper_hysteresis: {self.gripper_hysteresis} must be from 0 to below 1.")
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
    timestamp: float

    def at(self, now: float) -> FloatArray:
        """Where it is by now, if it went on as it did."""
        return self.position + self.velocity * max(0.0, now - self.timestamp)


class ActionLimiter:
    """Applies limits to the actions of one run.

    Args:
        limits: What is allowed.
        embodiment: The robot's.
        rate_hz: Actions a second.
        demonstrated_change: Largest change from one demonstrated action to the next, a value a dimension; None: not
            known.

    Attributes:
        limits: As they are applied, with the largest change that holds where none was given.
        positions: Indices of the actions that are positions, grippers aside.

    Raises:
        ConfigError: The limits do not fit the robot.
    """

    def __init__(
        self,
        limits: Limits,
        embodiment: EmbodimentSpec,
        rate_hz: float,
        demonstrated_change: Sequence[float] | None = None,
    ) -> None:
        dim = len(embodiment.action_names)
        for name in ("low", "high", "max_change"):
            if len(getattr(limits, name)) not in (0, dim):
                raise ConfigError(
                    f"{name}: {len(getattr(limits, name))} values, the robot has {dim} actions: "
                    f"{', '.join(embodiment.action_names)}."
                )
        self._grippers = list(gripper_columns(embodiment.action_names))
        if limits.gripper_rate is not None and not self._grippers:
            raise ConfigError(
                f"gripper_rate: none of the actions is a gripper's; they are {', '.join(embodiment.action_names)}."
            )
        names = embodiment.action_names
        moved = set(AXES) <= set(names) or {f"d{axis}" for axis in AXES} <= set(names)
        if (limits.workspace_low or limits.max_speed is not None) and not (
            moved and set(AXES) <= set(embodiment.state_names)
        ):
            raise ConfigError(
                "workspace, max_speed: state and actions must have x, y and z (actions: or dx, dy, dz); this robot has "
                f"{', '.join(embodiment.state_names)} and {', '.join(names)}."
            )
        self._embodiment = embodiment
        self._dim = dim
        self.positions = [
            index for index, name in enumerate(names) if name not in RELATIVE and index not in self._grippers
        ]
        self._low = np.maximum(embodiment.action_low, limits.low or embodiment.action_low).astype(np.float32)
        self._high = np.minimum(embodiment.action_high, limits.high or embodiment.action_high).astype(np.float32)
        if (self._low > self._high).any():
            raise ConfigError("low, high: leave no action that the robot accepts.")
        self.limits = self._limits = replace(
            limits, max_change=limits.max_change or self._safe_change(rate_hz, demonstrated_change)
        )
        self._change = np.array(self._limits.max_change, np.float32)
        if limits.gripper_rate is not None:
            self._change[self._grippers] = np.minimum(self._change[self._grippers], limits.gripper_rate / rate_hz)
        self._band = limits.gripper_hysteresis * (self._high - self._low)
        self._turned = np.zeros(dim, np.float32)  # the way that each gripper's action last went, -1 or 1
        has_position = set(AXES) <= set(embodiment.state_names)
        self._positions = [embodiment.state_names.index(axis) for axis in AXES if has_position]
        self._absolute = [(number, names.index(axis)) for number, axis in enumerate(AXES) if axis in names]
        self._relative = [(number, names.index(f"d{axis}")) for number, axis in enumerate(AXES) if f"d{axis}" in names]
        self._period = 1 / rate_hz
        self._reading: _Motion | None = None

    def _safe_change(self, rate_hz: float, demonstrated: Sequence[float] | None) -> tuple[float, ...]:
        """The largest change that holds where the user gave none; of what is not a position, its whole range."""
        span = np.asarray(self._embodiment.action_high, np.float64) - self._embodiment.action_low
        if not np.isfinite(span).all():
            raise ConfigError("action_low, action_high: the robot's range must be finite.")
        safe = SAFE_CHANGE * span / rate_hz
        if demonstrated is not None:
            if len(demonstrated) != len(span):
                raise ConfigError(
                    f"max_change: the policy was trained on {len(demonstrated)} actions, the robot has {len(span)}."
                )
            safe = np.maximum(demonstrated, 0.1 * safe)  # a joint that nobody moved may come to where it was, slowly
        change = span.copy()
        change[self.positions] = safe[self.positions]
        return tuple(map(float, change))

    @property
    def state(self) -> FloatArray | None:
        """The robot's latest, (state,); None: not known yet."""
        return None if self._reading is None else self._reading.state

    def observe(self, state: FloatArray, timestamp: float) -> None:
        """Take in where the robot is.

        Args:
            state: (state,).
            timestamp: When, in seconds.

        Raises:
            SafetyStop: It is not finite: no limit could be kept.
        """
        if not np.isfinite(state).all():
            raise SafetyStop(f"state: has a value that is not finite: {state.tolist()}; see to the robot's sensors.")
        position = state[self._positions]
        velocity = np.zeros_like(position)
        before = self._reading
        if before is not None and timestamp > before.timestamp:
            velocity = (position - before.position) / (timestamp - before.timestamp)
        self._reading = _Motion(state, position, velocity, timestamp)  # at once: another thread reads it

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
        accepted = self._embodiment.clip(
            action
        )  # as in evaluation: policies answer somewhat beyond it, and mean its end
        allowed = self._apply(accepted, np.clip(accepted, self._low, self._high), "bounds", breaches)
        if self._limits.max_speed is not None and self._reading is not None:
            allowed = self._apply(allowed, self._slow(allowed, self._reading, now), "speed", breaches)
        if last is not None:
            allowed = self._without_wavering(allowed, last)
            near = np.clip(allowed, last - self._change, last + self._change)
            allowed = self._apply(allowed, near, "change", breaches)
        if self._limits.workspace_low:  # comes last: at the wall, stopping at once is the smaller evil
            allowed = self._apply(allowed, self._inside(allowed, now), "workspace", breaches)
        return allowed, breaches

    def towards(self, action: FloatArray, last: FloatArray) -> FloatArray:
        """As far from the last action towards another as positions may change in one step.

        Args:
            action: Where to, (action,).
            last: The one that was sent before, (action,).

        Returns:
            (action,); `action` itself where that is near enough.
        """
        near = action.copy()
        where = self.positions
        near[where] = np.clip(action[where], last[where] - self._change[where], last[where] + self._change[where])
        return near

    def _without_wavering(self, action: FloatArray, last: FloatArray) -> FloatArray:
        """Grippers' actions, which turn back only for more than the hysteresis: one that chatters wears, and drops."""
        steady = action.copy()
        for index in self._grippers:
            step = float(action[index] - last[index])
            if step * self._turned[index] >= 0 or abs(step) > self._band[index]:
                self._turned[index] = np.sign(step) or self._turned[index]
            else:
                steady[index] = last[index]
        return steady

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
