"""What an evaluation on demonstrations records of each episode, and the figures that are made of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.types import FloatArray, PolicySpec

BLOCK_S = 1.0
"""Neighbouring moments are alike, so intervals are over blocks of this length, not over moments."""
MIN_BLOCKS = 5
"""Blocks of successive moments below which no interval is given."""
RESAMPLES = 2000
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Played:
    """One episode as it was demonstrated, and as each variant would have acted.

    Attributes:
        frames: Frames of the episode at which the policy inferred, (moments,).
        demonstrated: Demonstrated actions, (length, action), in the embodiment's units.
        predicted: Predicted chunks, (variants, moments, chunk, action), in the embodiment's units.
        llm_ms: Latency of the backbone, (variants, moments).
        total_ms: Latency of the whole policy, (variants, moments).
        layers: Layers that ran, (variants, moments); NaN for a policy that skips nothing.
        verified: Whether the full model predicted again, (variants, moments).
    """

    frames: NDArray[np.int64]
    demonstrated: FloatArray
    predicted: FloatArray
    llm_ms: FloatArray
    total_ms: FloatArray
    layers: FloatArray
    verified: NDArray[np.bool_]


def summarise(parts: Sequence[Played], names: Sequence[str], spec: PolicySpec) -> dict[str, Any]:
    """The figures of an evaluation.

    Args:
        parts: The records of its episodes.
        names: Names of the variants, in the order of the records' first dimension.
        spec: The policy's specification.

    Returns:
        For each variant under "variants": `error`, the mean distance of the executed actions from those demonstrated,
        in deviations of the demonstrated actions; `per_dimension`, in the embodiment's units; `horizon`, by the place
        of the action in the chunk, None beyond the end of the longest episode; layers, latencies and, except for the
        first, `difference`, paired by frame with the first, and `distance`, of the executed actions from the first's.
        `repeating` is the error of repeating the last demonstrated action, which is what a policy must do better than.
    """
    std = np.array(spec.action_normalisation.std, np.float32)
    steps = spec.execute_steps
    distances = [np.abs(_compared(part, spec.chunk_length)) for part in parts]
    executed = [np.nanmean(one[:, :, :steps] / std, axis=(2, 3)) for one in distances]  # (variants, moments)
    blocks, moments = _blocks(executed, max(1, round(BLOCK_S * spec.rate_hz / steps)))
    variants = {}
    for variant, name in enumerate(names):
        units = np.concatenate([one[variant, :, :steps].reshape(-1, len(std)) for one in distances])
        variants[name] = {
            "error": _interval(blocks[:, variant], moments),
            "per_dimension": dict(zip(spec.action_names, np.nanmean(units, axis=0).tolist(), strict=True)),
            "horizon": [
                _mean([one[variant, :, place] / std for one in distances]) for place in range(spec.chunk_length)
            ],
            "layers": _mean([part.layers[variant] for part in parts]),
            "verified": _mean([part.verified[variant] for part in parts]),
            **{key: _quantiles([getattr(part, key)[variant] for part in parts]) for key in ("llm_ms", "total_ms")},
        }
        if variant:
            apart = [np.abs(part.predicted[variant] - part.predicted[0])[:, :steps] / std for part in parts]
            variants[name]["difference"] = _interval(blocks[:, variant] - blocks[:, 0], moments)
            variants[name]["distance"] = _mean([one.mean(axis=(1, 2)) for one in apart])
    repeated = [_compared(_repeating(part, spec.chunk_length), steps)[0] for part in parts]
    return {
        "moments": sum(len(part.frames) for part in parts),
        "execute_steps": steps,
        "rate_hz": spec.rate_hz,
        "action_std": dict(zip(spec.action_names, std.tolist(), strict=True)),
        "repeating": _mean([np.nanmean(np.abs(one) / std, axis=(1, 2)) for one in repeated]),
        "variants": variants,
    }


def _compared(part: Played, steps: int) -> FloatArray:
    """Predicted minus demonstrated, (variants, moments, steps, action); NaN behind the episode's end."""
    places = part.frames[:, None] + np.arange(steps)
    exists = places < len(part.demonstrated)
    wanted = np.where(exists[..., None], part.demonstrated[np.minimum(places, len(part.demonstrated) - 1)], np.nan)
    return np.asarray(part.predicted[:, :, :steps] - wanted, np.float32)


def _repeating(part: Played, chunk: int) -> Played:
    """The record of a policy that repeats the last demonstrated action."""
    last = part.demonstrated[np.maximum(part.frames - 1, 0)]
    return Played(**{**vars(part), "predicted": np.repeat(last[None, :, None], chunk, axis=2)})


def _blocks(values: Sequence[FloatArray], moments: int) -> tuple[FloatArray, FloatArray]:
    """Means over blocks of successive moments, (blocks, variants), and how many moments each has, (blocks,)."""
    parts = [one[:, start : start + moments] for one in values for start in range(0, one.shape[1], moments)]
    return (
        np.array([part.mean(axis=1) for part in parts], np.float32),
        np.array([part.shape[1] for part in parts], np.float32),
    )


def _interval(values: FloatArray, moments: FloatArray) -> dict[str, Any]:
    """Mean over moments, and its 95 % bootstrap interval over blocks; None where they are too few to tell.

    It holds for moments like those of these episodes; few episodes do not show how episodes differ from each other.
    """
    mean = float(np.average(values, weights=moments))
    if len(values) < MIN_BLOCKS:
        return {"mean": mean, "ci95": None}
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
    means = (values[drawn] * moments[drawn]).sum(axis=1) / moments[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": mean, "ci95": [float(low), float(high)]}


def _mean(values: Sequence[NDArray[Any]]) -> float | None:
    joined = np.concatenate([np.asarray(value, np.float64) for value in values])
    return None if np.isnan(joined).all() else float(np.nanmean(joined))


def _quantiles(values: Sequence[FloatArray]) -> Mapping[str, float]:
    joined = np.concatenate(values)
    p50, p99 = np.percentile(joined, (50, 99))
    return {"mean": float(joined.mean()), "p50": float(p50), "p99": float(p99)}
