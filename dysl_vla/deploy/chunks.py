"""Chunks of a running control loop: as they were predicted, and as they are executed, joined to the one before."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dysl_vla.types import ActionChunk, FloatArray


@dataclass(frozen=True)
class Predicted:
    """A chunk, and what it was predicted from.

    Attributes:
        number: Counts the chunks of a run.
        chunk: The policy's answer.
        timestamp: When its reading was so.
        seconds: What the inference took.
    """

    number: int
    chunk: ActionChunk
    timestamp: float
    seconds: float

    def told(self) -> dict[str, Any]:
        """What the log says of a chunk."""
        skips = self.chunk.skips
        told: dict[str, Any] = {"chunk": self.number, "inference_ms": round(1e3 * self.seconds, 3)}
        if skips is not None:
            told |= {
                "layers": skips.layers,
                "continuity": skips.continuity,
                "verified": skips.is_verified,
                "no_time_to_verify": skips.is_verification_late,
            }
        return told


@dataclass(frozen=True)
class Plan:
    """What is being executed: a chunk, joined to the one before."""

    number: int
    actions: FloatArray
    timestamp: float

    def index(self, now: float, period: float) -> int:
        """Of the action that is for now."""
        return max(0, math.floor((now - self.timestamp) / period))

    def blended(self, index: int, rest: FloatArray, last: FloatArray, blend_steps: int) -> Plan:
        """This plan, taking over in equal parts over so many cycles.

        Args:
            index: Of the action that is for now.
            rest: What the plan before has for now and then, (actions, action).
            last: What was sent last, to go on from where `rest` ends.
            blend_steps: Cycles.
        """
        steps = min(blend_steps, len(self.actions) - index)
        if steps < 1:
            return self
        old = np.concatenate([rest[:steps], np.repeat(last[None], max(0, steps - len(rest)), axis=0)])
        share = (np.arange(1, steps + 1, dtype=np.float32) / (blend_steps + 1))[:, None]
        actions = self.actions.copy()
        actions[index : index + steps] = share * actions[index : index + steps] + (1 - share) * old
        return replace(self, actions=actions)
