"""Chunks of a running control loop: as they are predicted, and as they are executed, blended with the one before."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dysl_vla.types import ActionChunk, EpisodeState, FloatArray

DELAYS, DELAY_QUANTILE = 50, 0.9
"""Number of inferences whose delay is remembered, and the quantile of them that is expected."""
LATENESS = 0.01
"""Share of a period by which a cycle is after its time."""


@dataclass(frozen=True)
class Predicted:
    """A chunk, and what it was predicted from.

    Attributes:
        number: Number of the chunk in the run, from 0.
        chunk: The policy's prediction.
        timestamp: Timestamp of the observation that it was predicted from.
        seconds: Duration of the inference.
    """

    number: int
    chunk: ActionChunk
    timestamp: float
    seconds: float

    def action_at(self, now: float, period: float) -> FloatArray:
        """Return the action that is for now, or the last one, (action,)."""
        index = min(len(self.chunk.actions) - 1, max(0, math.floor((now - self.timestamp) / period)))
        action: FloatArray = self.chunk.actions[index]
        return action

    def log_record(self) -> dict[str, Any]:
        """What the log says of the chunk."""
        skips = self.chunk.skips
        record: dict[str, Any] = {"chunk": self.number, "inference_ms": round(1e3 * self.seconds, 3)}
        if skips is not None:
            record |= {
                "layers": skips.layers,
                "continuity": skips.continuity,
                "verified": skips.is_verified,
                "no_time_to_verify": skips.is_verification_late,
            }
        return record


@dataclass(frozen=True)
class Plan:
    """What is being executed: a chunk, blended with the one before.

    Attributes:
        number: The chunk's number.
        actions: (chunk, action).
        timestamp: Timestamp of the observation that it was predicted from.
    """

    number: int
    actions: FloatArray
    timestamp: float

    def index(self, now: float, period: float) -> int:
        """Index of the action that is for now."""
        return max(0, math.floor((now - self.timestamp) / period))

    def blended(self, index: int, rest: FloatArray, last: FloatArray, blend_steps: int) -> Plan:
        """This plan, taking over in equal parts over so many cycles.

        Args:
            index: Index of the action that is for now.
            rest: Actions that the plan before has from now on, (actions, action).
            last: The action that was sent last, (action,), which continues `rest`.
            blend_steps: Cycles that taking over lasts.
        """
        steps = min(blend_steps, len(self.actions) - index)
        if steps < 1:
            return self
        old = np.concatenate([rest[:steps], np.repeat(last[None], max(0, steps - len(rest)), axis=0)])
        share = (np.arange(1, steps + 1, dtype=np.float32) / (blend_steps + 1))[:, None]
        actions = self.actions.copy()
        actions[index : index + steps] = share * actions[index : index + steps] + (1 - share) * old
        return replace(self, actions=actions)


class Continuation:
    """Tells a policy what of the running chunk will have been sent when the coming one is there (real-time chunking).

    The delay is measured, in actions that are sent meanwhile: a guess that is too short makes the arm jump.

    Args:
        period: Seconds of a cycle.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._delays: deque[float] = deque(maxlen=DELAYS)

    def took(self, seconds: float) -> None:
        """Record how long after its observation a chunk was there."""
        self._delays.append(seconds / self._period)

    def prepare(self, state: EpisodeState, plan: Plan | None, timestamp: float, start: float | None) -> None:
        """Write what is left of the running chunk into the state of an inference.

        Args:
            state: The state.
            plan: What is being executed, as it is sent; None where it does not go on: there is none yet, or the robot
                approaches or holds.
            timestamp: Timestamp of the inference's observation.
            start: Time of the first cycle; the others follow at whole periods. None: before it.
        """
        state.leftover, state.sent_before = None, 0
        if plan is None or start is None or not self._delays:
            return
        # Both chunks' actions are for cycles, which begin, a little late, between the observations they count from.
        cycle = start + (math.floor((timestamp - start) / self._period) + 1 + LATENESS) * self._period
        passed = plan.index(cycle, self._period) - math.floor((cycle - timestamp) / self._period)
        if len(rest := plan.actions[max(0, passed) :]):
            state.leftover = rest
            state.sent_before = math.ceil(float(np.quantile(self._delays, DELAY_QUANTILE)))
