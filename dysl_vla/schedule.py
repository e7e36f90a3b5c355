"""The learning rate over a training: one schedule for policies and for their heads."""

from __future__ import annotations

import math

FINAL_SHARE = 0.02
"""Share of the peak at which the cosine ends."""


def cosine_with_warmup(peak: float, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of a step: a linear warm-up times a cosine from the peak.

    Args:
        peak: The largest rate.
        step: Number of steps that are done.
        steps: Number of steps in all.
        warmup: Number of steps over which the rate rises.
    """
    warm = min(1.0, (step + 1) / max(1, warmup))
    return peak * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / steps)))
