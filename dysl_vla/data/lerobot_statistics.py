"""Statistics in LeRobot's format, of each episode and of all, by which LeRobot's training normalises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.types import ImageArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATISTICS_FRAMES = 16
"""How many of an episode's images are measured; more images change these statistics little."""


def of_numbers(values: NDArray[Any]) -> dict[str, Any]:
    """Range, mean, deviation and quantiles of (frames, dim), each (dim,), exact; `count` of the frames, (1,)."""
    numbers = values.astype(np.float64)
    reduced = {
        "min": numbers.min(0),
        "max": numbers.max(0),
        "mean": numbers.mean(0),
        "std": numbers.std(0),
        **dict(zip(QUANTILES, np.quantile(numbers, list(QUANTILES.values()), axis=0), strict=True)),
    }
    return {name: value.tolist() for name, value in reduced.items()} | {"count": [len(values)]}


def of_images(images: ImageArray) -> dict[str, Any]:
    """The same statistics of the pixels, from 0 to 1, of some of (frames, height, width, 3); each (3, 1, 1)."""
    some = images[:: max(1, len(images) // STATISTICS_FRAMES)]
    pixels = of_numbers(some.reshape(-1, 3) / 255.0)
    return {name: [[[value]] for value in pixels[name]] for name in pixels if name != "count"} | {"count": [len(some)]}


def merged(
    episodes: Mapping[str, Mapping[str, NDArray[np.float64]]], exact: Mapping[str, NDArray[Any]]
) -> dict[str, dict[str, Any]]:
    """The statistics of all episodes.

    Those of states and actions, whose values are at hand, are computed from the values. For other features, images
    above all, range, mean and deviation follow from those of the episodes; quantiles do not, and are the mean of the
    episodes' quantiles, weighted by their counts, as in LeRobot's `aggregate_stats`.

    Args:
        episodes: Feature to statistic to its values, (episodes, ...). Quantiles may be missing.
        exact: Feature to the values of all frames, (frames, dim).

    Returns:
        Feature to statistic to its value.
    """
    result: dict[str, dict[str, Any]] = {}
    for key, of in episodes.items():
        if key in exact:
            result[key] = of_numbers(exact[key])
            continue
        weight = (of["count"] / of["count"].sum()).reshape(-1, *[1] * (of["mean"].ndim - 1))
        mean = (weight * of["mean"]).sum(0)
        variance = (weight * (of["std"] ** 2 + (of["mean"] - mean) ** 2)).sum(0)
        result[key] = {
            "min": of["min"].min(0).tolist(),
            "max": of["max"].max(0).tolist(),
            "mean": mean.tolist(),
            "std": np.sqrt(variance).tolist(),
            **{name: (weight * of[name]).sum(0).tolist() for name in QUANTILES if name in of},
            "count": [int(of["count"].sum())],
        }
    return result
