"""Limits of actions, checked last, right before an action is sent. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dysl_vla.errors import ConfigError, SafetyStop
from dysl_vla.types import EmbodimentSpec, FloatArray, gripper_columns

AXES = ("x", "y", "z")
SAFE_CHANGE = 0.5
"""Share of an action's range that it may change by in a second, where nothing else is known."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the actions that are sent to a robot. NaN, infinity and a wrong dimension always stop it.

    The end effector's position is the state's dimensions named x, y, z. Actions of these names are positions too; those
    named dx, dy, dz move along them. Where the end effector is now is extrapolated from its last two observations;
    leave a margin to what must not be touched.
    """

    on_breach: Literal["clamp", "refuse"] = "clamp"
    """What happens beyond a limit: the nearest allowed action is sent and recorded, or the robot is stopped."""
    low: tuple[float, ...] = ()
    """Smallest action, a value for each dimension; empty: the robot's own."""
    high: tuple[float, ...] = ()
    """Largest action; empty: the robot's own."""
    max_change: tuple[float, ...] = ()
    """Largest change from one action to the next, a value for each dimension. Empty: for positions (joints, x, y, z),
    velocities and torques the largest that the demonstrations show (99.9 % of their changes are smaller), or, where the
    policy does not tell it, half of the robot's range a second; for grippers and deltas (dx, ..., dyaw) no limit."""
    gripper_rate: float | None = None
    """Largest change of a gripper's action ("gripper", "gripper.pos", "left_gripper.pos") a second; None: no limit."""
    gripper_hysteresis: float = 0.1
    """Share of a gripper's range by which its action must turn back before that is sent; less is taken for wavering."""
    workspace_low: tuple[float, ...] = ()
    """Smallest x, y, z of the box that the end effector stays in, in metres; empty: no box."""
    workspace_high: tuple[float, ...] = ()
    """Largest x, y, z of that box, in metres."""
    max_speed: float | None = None
    """Largest measured speed of the end effector, in metres a second; actions that move it are scaled down. None: no
    limit."""

    def __post_init__(self) -> None:
        if self.on_breach not in ("clamp", "refuse"):
            raise ConfigError(f"on_breach must be clamp or refuse, got {self.on_breach!r}.")
        for name in ("low", "high", "max_change", "workspace_low", "workspace_high"):
            if not np.isfinite(getattr(self, name)).all():
                raise ConfigError(f"{name} must be finite, got {getattr(self, name)}.")
        for name in ("gripper_rate", "max_speed"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name} must be above zero and finite, got {value}.")
        if not 0 <= self.gripper_hysteresis < 1:
            raise ConfigError(f"gripper_hysteresis must be from 0 to below 1, got {self.gripper_hysteresis}.")
        if any(change <= 0 for change in self.max_change):
            raise ConfigError(f"max_change must be above zero in every dimension, got {self.max_change}.")
        if (len(self.workspace_low), len(self.workspace_high)) not in ((0, 0), (3, 3)):
            raise ConfigError(
                "workspace_low, workspace_high: give both, three values each, or neither; got "
                f"{self.workspace_low} and {self.workspace_high}."
            )
        for lower, upper in (("low", "high"), ("workspace_low", "workspace_high")):
            both = zip(getattr(self, lower), getattr(self, upper), strict=False)
            if any(low >= high for low, high in both):
                raise ConfigError(
                    f"{lower} must be below {upper} in every dimension, got {getattr(self, lower)} and "
                    f"{getattr(self, upper)}."
                )


@dataclass(frozen=True)
class _Motion:
    """State of the robot, and position and velocity of its end effector, at a time."""

    state: FloatArray
    position: FloatArray
    velocity: FloatArray
    timestamp: float

    def at(self, now: float) -> FloatArray:
        """Position of the end effector by now, if it kept its velocity."""
        return self.position + self.velocity * max(0.0, now - self.timestamp)


class ActionLimiter:
    """Applies limits to the actions of one run.

    Args:
        limits: The limits.
        embodiment: The robot's specification.
        rate_hz: Actions a second.
        demonstrated_change: Largest change from one demonstrated action to the next, a value for each dimension; None:
            not known.

    Attributes:
        limits: The limits as they are applied, with the largest change that holds where none was given.
        positions: Indices of the actions that are positions, without grippers.

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
        names, kinds = embodiment.action_names, embodiment.kinds
        self._embodiment = embodiment
        self._dim = len(names)
        self._grippers = list(gripper_columns(names))
        self._absolute = _actions_along_axes(embodiment, "", "position")
        self._relative = _actions_along_axes(embodiment, "d", "delta")
        self._check_fit(limits)
        arm = [(index, kind) for index, kind in enumerate(kinds) if index not in self._grippers]
        self.positions = [index for index, kind in arm if kind == "position"]
        self._gradual = [index for index, kind in arm if kind != "delta"]
        self._low = np.maximum(embodiment.action_low, limits.low or embodiment.action_low).astype(np.float32)
        self._high = np.minimum(embodiment.action_high, limits.high or embodiment.action_high).astype(np.float32)
        if (self._low > self._high).any():
            raise ConfigError(
                f"low, high must leave an action that the robot accepts, got {limits.low} and {limits.high}; it "
                f"accepts {embodiment.action_low} to {embodiment.action_high}."
            )
        self.limits = self._limits = replace(
            limits, max_change=limits.max_change or self._safe_change(rate_hz, demonstrated_change)
        )
        self._change = np.array(self._limits.max_change, np.float32)
        if limits.gripper_rate is not None:
            self._change[self._grippers] = np.minimum(self._change[self._grippers], limits.gripper_rate / rate_hz)
        self._band = limits.gripper_hysteresis * (self._high - self._low)
        self._turned = np.zeros(self._dim, np.float32)  # direction in which each gripper's action last went, -1 or 1
        has_position = set(AXES) <= set(embodiment.state_names)
        self._axes = [embodiment.state_names.index(axis) for axis in AXES if has_position]
        self._period = 1 / rate_hz
        self._motion: _Motion | None = None

    def _check_fit(self, limits: Limits) -> None:
        """Refuse limits that this robot does not have the actions or the state for."""
        names, state_names = self._embodiment.action_names, self._embodiment.state_names
        for name in ("low", "high", "max_change"):
            if (count := len(getattr(limits, name))) not in (0, self._dim):
                raise ConfigError(
                    f"{name} must have a value for each of the robot's {self._dim} actions, {', '.join(names)}; got "
                    f"{count} values."
                )
        if limits.gripper_rate is not None and not self._grippers:
            raise ConfigError(f"gripper_rate needs an action of a gripper; this robot's are {', '.join(names)}.")
        can_move = len(AXES) in (len(self._absolute), len(self._relative))
        needs_position = limits.workspace_low or limits.max_speed is not None
        if needs_position and not (can_move and set(AXES) <= set(state_names)):
            raise ConfigError(
                "workspace_low, max_speed need a state with x, y and z, and actions that are positions x, y and z or "
                f"deltas dx, dy and dz; this robot has {', '.join(state_names)} and {', '.join(names)}."
            )

    def _safe_change(self, rate_hz: float, demonstrated: Sequence[float] | None) -> tuple[float, ...]:
        """The largest change that holds where the user gave none; of grippers and deltas, their whole range."""
        span = np.asarray(self._embodiment.action_high, np.float64) - self._embodiment.action_low
        if not np.isfinite(span).all():
            raise ConfigError(
                "action_low, action_high must be finite, got "
                f"{self._embodiment.action_low} and {self._embodiment.action_high}."
            )
        safe = SAFE_CHANGE * span / rate_hz
        if demonstrated is not None:
            if len(demonstrated) != len(span):
                raise ConfigError(
                    f"max_change: the policy was trained on {len(demonstrated)} actions, the robot has {len(span)}; "
                    "use a policy that was trained for this robot."
                )
            safe = np.maximum(demonstrated, 0.1 * safe)  # a joint that nobody moved may come to where it was, slowly
        change = span.copy()
        change[self._gradual] = safe[self._gradual]
        return tuple(map(float, change))

    @property
    def state(self) -> FloatArray | None:
        """The robot's latest state, (state,); None: not known yet."""
        return None if self._motion is None else self._motion.state

    def observe(self, state: FloatArray, timestamp: float) -> None:
        """Take in where the robot is.

        Args:
            state: (state,).
            timestamp: Time of the state, in seconds.

        Raises:
            SafetyStop: The state is not finite, so that no limit could be kept.
        """
        if not np.isfinite(state).all():
            raise SafetyStop(f"state: has a value that is not finite: {state.tolist()}; check the robot's sensors.")
        position = state[self._axes]
        velocity = np.zeros_like(position)
        before = self._motion
        if before is not None and timestamp > before.timestamp:
            velocity = (position - before.position) / (timestamp - before.timestamp)
        self._motion = _Motion(state, position, velocity, timestamp)  # at once: another thread reads it

    def check(self, action: FloatArray, last: FloatArray | None, now: float) -> tuple[FloatArray, list[str]]:
        """The action that may be sent.

        Args:
            action: (action,), in the robot's units.
            last: The action that was sent before, (action,); None: none.
            now: Time in seconds, on the clock of `observe`.

        Returns:
            The action, or the nearest one that is allowed, (action,); names of the limits that changed it.

        Raises:
            SafetyStop: The action is not finite or of another dimension, or exceeds a limit and is to be refused.
        """
        if action.shape != (self._dim,):
            raise SafetyStop(f"action must have the shape ({self._dim},) that the robot takes, got {action.shape}.")
        if not np.isfinite(action).all():
            raise SafetyStop(f"action: has a value that is not finite: {action.tolist()}.")
        breaches: list[str] = []
        accepted = self._embodiment.clip(action)  # no breach: policies predict somewhat beyond the range, as in `eval`
        allowed = self._apply(accepted, np.clip(accepted, self._low, self._high), "bounds", breaches)
        if self._limits.max_speed is not None and self._motion is not None:
            allowed = self._apply(allowed, self._slow(allowed, self._motion, now), "speed", breaches)
        if last is not None:
            allowed = self._without_wavering(allowed, last)
            near = np.clip(allowed, last - self._change, last + self._change)
            allowed = self._apply(allowed, near, "change", breaches)
        if self._limits.workspace_low:  # last of all: at the wall, stopping at once is the smaller evil
            allowed = self._apply(allowed, self._inside(allowed, now), "workspace", breaches)
        return allowed, breaches

    def towards(self, action: FloatArray, last: FloatArray) -> FloatArray:
        """As far from the last action towards another as actions may change in one step, grippers and deltas aside.

        Args:
            action: The action to come to, (action,).
            last: The action that was sent before, (action,).

        Returns:
            (action,); `action` itself where that is near enough.
        """
        near = action.copy()
        where = self._gradual
        near[where] = np.clip(action[where], last[where] - self._change[where], last[where] + self._change[where])
        return near

    def _without_wavering(self, action: FloatArray, last: FloatArray) -> FloatArray:
        """Turn grippers' actions back only for more than the hysteresis: one that chatters wears, and drops things."""
        steady = action.copy()
        for index in self._grippers:
            step = float(action[index] - last[index])
            if step * self._turned[index] >= 0 or abs(step) > self._band[index]:
                self._turned[index] = np.sign(step) or self._turned[index]
            else:
                steady[index] = last[index]
        return steady

    def _slow(self, action: FloatArray, motion: _Motion, now: float) -> FloatArray:
        """Scale down what moves the end effector while it is too fast; cut positions to where it may come in time."""
        limit = self._limits.max_speed
        assert limit is not None
        slower = action.copy()
        speed = float(np.linalg.norm(motion.velocity))
        if speed > limit:
            slower[[index for _, index in self._relative]] *= limit / speed
        if self._absolute:
            axes, indices = zip(*self._absolute, strict=True)
            here = motion.at(now)[list(axes)]
            step = slower[list(indices)] - here
            length = float(np.linalg.norm(step))
            if length > limit * self._period:
                slower[list(indices)] = here + step * (limit * self._period / length)
        return slower

    def _inside(self, action: FloatArray, now: float) -> FloatArray:
        low, high = self._limits.workspace_low, self._limits.workspace_high
        inside = action.copy()
        for axis, index in self._absolute:
            inside[index] = np.clip(inside[index], low[axis], high[axis])
        if self._motion is not None:
            here = self._motion.at(now)
            for axis, index in self._relative:
                if (here[axis] <= low[axis] and action[index] < 0) or (here[axis] >= high[axis] and action[index] > 0):
                    inside[index] = 0.0
        return inside

    def _apply(self, before: FloatArray, after: FloatArray, name: str, breaches: list[str]) -> FloatArray:
        if np.array_equal(before, after):
            return before
        if self._limits.on_breach == "refuse":
            raise SafetyStop(f"{name}: the action {before.tolist()} exceeds this limit; it allows {after.tolist()}.")
        breaches.append(name)
        return after.astype(np.float32)


def _actions_along_axes(embodiment: EmbodimentSpec, prefix: str, kind: str) -> list[tuple[int, int]]:
    """Actions of a kind along x, y and z: number of the axis, and index of the action."""
    names = embodiment.action_names
    found = [(number, names.index(prefix + axis)) for number, axis in enumerate(AXES) if prefix + axis in names]
    return [(number, index) for number, index in found if embodiment.kinds[index] == kind]
