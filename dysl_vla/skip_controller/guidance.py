"""How important is the coming action? Continuity of the executed trajectory decides how much may be skipped.

It needs only NumPy: the same code guides training's replay, evaluation and the torch-free robot runtime. Everything
that is remembered of an episode is one `GuidanceState`, which the caller owns.

This is section 3 of DySL-VLA (arXiv 2602.22896), with three changes. Its release ("one layer back when continuity rises
by more than eta") leaves a steady trajectory without skipping for ever once continuity has fallen: here every inference
at which continuity does not fall gives one layer back. Its continuity is computed over one action of each inference:
here over all that were executed. And it knows only the past: here the window may end in the actions that the last chunk
plans (`SkipGuidance.lookahead`), so that a grasp is protected before it begins.

How smooth a trajectory is, is an interchangeable part: any function of a window of actions can be registered in
`importance_measures`, and everything below calls its value continuity. `dysl distill` takes the gripper's movement
where there is a gripper, and the paper's continuity of the whole trajectory elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dysl_vla.errors import ActionError, ConfigError
from dysl_vla.registry import Registry

ImportanceMeasure = Callable[[NDArray[np.float32] | NDArray[np.float64]], float | None]
"""Maps normalised successive actions, (time, action), to a number that falls where they get important, or None."""
importance_measures: Registry[ImportanceMeasure] = Registry("importance measure", "dysl_vla.importance")
"""Importance measures by name."""

WINDOW = 5
"""Actions that continuity looks back on: k of the paper, which finds 1 and 9 worse."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a fall of continuity: quantiles of what happens on demonstrations, never set by hand.

    Attributes:
        eta: Change of continuity, between two inferences, that moves the allow points by one layer.
        eta_verify: Fall, by the newly predicted actions, that asks for verification.
    """

    eta: float
    eta_verify: float

    def __post_init__(self) -> None:
        for name in ("eta", "eta_verify"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above zero and finite, got {getattr(self, name)}.")


@dataclass
class GuidanceState:
    """What guidance remembers of one running episode.

    Attributes:
        allow_points: For each block, how many of its dynamic layers must run before skipping is allowed.
        recent: The last executed actions, normalised, (at most WINDOW + 1, action).
        planned: Actions of the last chunk that were not executed yet, normalised, (actions, action).
        continuity: C at the last inference; None before two actions are known.
        change: C minus that of the inference before; None before there are two.
        previous_drop: Whether the last inference's actions made continuity fall; then this one needs no verification.
        drop: Whether this inference's actions do.
    """

    allow_points: NDArray[np.int64]
    recent: NDArray[np.float64]
    planned: NDArray[np.float64]
    continuity: float | None = None
    change: float | None = None
    previous_drop: bool = False
    drop: bool = False


class SkipGuidance:
    """Moves the allow points of episodes; holds no episode itself.

    Args:
        block_lengths: Dynamic layers of each block.
        action_dim: Dimensions of an action.
        thresholds: What counts as a fall.
        lookahead: Planned actions at which the window of continuity ends; 0: it ends with the last executed one.
        importance: The importance measure's name.
        grippers: The dimensions of an action that are grippers', which are all that the measure "gripper" gets; when
            empty, it gets the last dimension.

    Raises:
        ConfigError: A length or the lookahead is negative, there is no dimension, or the importance measure is unknown.
    """

    def __init__(
        self,
        block_lengths: Sequence[int],
        action_dim: int,
        thresholds: Thresholds,
        *,
        lookahead: int = 0,
        importance: str = "continuity",
        grippers: Sequence[int] = (),
    ) -> None:
        if action_dim < 1:
            raise ConfigError(f"action_dim must be at least 1, got {action_dim}.")
        if any(length < 0 for length in block_lengths):
            raise ConfigError(f"block_lengths must not be negative, got {list(block_lengths)}.")
        if lookahead < 0:
            raise ConfigError(f"lookahead must not be negative, got {lookahead}.")
        self._lengths = np.asarray(block_lengths, np.int64)
        self._longest = max(block_lengths, default=0)
        self._action_dim = action_dim
        self._thresholds = thresholds
        self._lookahead = lookahead
        self._importance_of = importance_measures.get(importance)
        self._columns = list(grippers or [action_dim - 1]) if importance == "gripper" else None

    def reset(self) -> GuidanceState:
        """Return the state of an episode that begins at rest, so that skipping is allowed until continuity falls."""
        nothing = np.empty((0, self._action_dim))
        return GuidanceState(np.zeros_like(self._lengths), nothing, nothing)

    def observe(self, state: GuidanceState, executed: NDArray[np.float32] | NDArray[np.float64]) -> None:
        """Take in what has been executed, and move the allow points; called before an inference.

        Args:
            state: The episode's state, which is changed in place.
            executed: (steps, action), normalised, oldest first: the episode's latest, at least WINDOW + 1 of them where
                there are as many.

        Raises:
            ActionError: The dimension differs, or a value is NaN or infinite; the state is unchanged.
        """
        self._check(executed)
        state.previous_drop, state.drop = state.drop, False
        state.recent = np.asarray(executed[-WINDOW - 1 :], np.float64)
        before, state.continuity = state.continuity, self._continuity(state.recent, state.planned)
        state.change = None if state.continuity is None or before is None else state.continuity - before
        if state.change is None:
            return
        if state.change < -self._thresholds.eta:
            kept = math.ceil(min(-state.change / self._thresholds.eta, self._longest))
            state.allow_points = np.minimum(state.allow_points + kept, self._lengths)
        elif state.change >= 0:
            state.allow_points = np.maximum(state.allow_points - 1, 0)

    def update_and_check(
        self, state: GuidanceState, predicted: NDArray[np.float32] | NDArray[np.float64], execute_steps: int
    ) -> bool:
        """Remember predicted actions, and tell whether they must be predicted again if the inference skipped.

        They must when they make continuity fall and the last inference's did not: that is the first important action,
        which the allow points, which were moved before, could not know of. The fall that is remembered is that of the
        actions that are executed: call this with the new ones after predicting again.

        Args:
            state: The episode's state, which remembers the fall and the plan until the next `observe`.
            predicted: (chunk, action), normalised.
            execute_steps: How many of them are to be executed.

        Raises:
            ActionError: The dimension differs, or a value is NaN or infinite; the state is unchanged.
        """
        self._check(predicted)
        state.planned = np.asarray(predicted[execute_steps:], np.float64)
        fall = self.predicted_drop(state, predicted, execute_steps)
        state.drop = fall is not None and fall > self._thresholds.eta_verify
        return state.drop and not state.previous_drop

    def predicted_drop(
        self, state: GuidanceState, predicted: NDArray[np.float32] | NDArray[np.float64], execute_steps: int
    ) -> float | None:
        """Return by how much predicted actions make continuity fall; None before it is known.

        The arguments are those of `update_and_check`.
        """
        seen = max(self._lookahead, execute_steps)
        after = self._importance(np.concatenate([state.recent, predicted[:seen]]))
        return None if after is None or state.continuity is None else state.continuity - after

    def _continuity(self, recent: NDArray[np.float64], planned: NDArray[np.float64]) -> float | None:
        return self._importance(np.concatenate([recent, planned[: self._lookahead]]))

    def _importance(self, actions: NDArray[np.float64]) -> float | None:
        """Return the importance measure of the window at the end of some actions."""
        window = actions[-WINDOW - 1 :]
        return self._importance_of(window if self._columns is None else window[:, self._columns])

    def _check(self, actions: NDArray[np.float32] | NDArray[np.float64]) -> None:
        if actions.ndim != 2 or actions.shape[1] != self._action_dim:
            raise ActionError(
                f"action must have the {self._action_dim} dimensions of the guidance, got shape {actions.shape}."
            )
        if not np.isfinite(actions).all():
            raise ActionError(f"action must be finite, got a value that is not finite: {actions.tolist()}.")


@importance_measures.register("continuity")
def continuity(actions: NDArray[np.float32] | NDArray[np.float64]) -> float | None:
    """Return minus the mean distance between successive actions: higher is smoother, and less important.

    Args:
        actions: (time, action), normalised so that no dimension dominates.

    Returns:
        C; None when there are not two actions yet.
    """
    if len(actions) < 2:
        return None
    change = actions[1:] - actions[:-1]  # as np.diff, which takes three times as long
    return -float(np.sqrt((change * change).sum(axis=1)).sum()) / len(change)


@importance_measures.register("gripper")
def gripper(actions: NDArray[np.float32] | NDArray[np.float64]) -> float | None:
    """Return minus the mean change of the grippers, summed over them.

    Args:
        actions: (time, grippers), as `SkipGuidance` hands on no other dimension.

    Returns:
        The value; None when there are not two actions yet.
    """
    if len(actions) < 2:
        return None
    change = 0.0
    for column in actions.T.tolist():
        change += float(sum(abs(after - before) for before, after in pairwise(column)))
    return -change / (len(actions) - 1)
