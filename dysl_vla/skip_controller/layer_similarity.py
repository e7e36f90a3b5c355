"""The choice of static layers: those whose output differs most from their input (DySL-VLA, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.decoders import argument_names, hidden_of


def similarities(layers: nn.ModuleList, run: Callable[[], object], mask: Tensor | None = None) -> NDArray[np.float64]:
    """Compute the mean cosine similarity of each layer's input and output.

    Args:
        layers: The decoder's layers.
        run: What runs the decoder; where it does so several times, all of its forwards count alike.
        mask: (batch, tokens) of the first forward, 1 for tokens and 0 for padding, which does not count; None: no
            padding.

    Returns:
        (layers,) similarities, in [-1, 1].

    Raises:
        ConfigError: A layer was not run.
    """
    means: list[list[float]] = [[] for _ in layers]
    names = [argument_names(layer)[0] for layer in layers]

    def hook(index: int, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: object) -> None:
        before, after = args[0] if args else kwargs[names[index]], hidden_of(output)
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        weight = torch.ones_like(cosine) if mask is None or means[index] else mask.to(cosine.dtype)
        means[index].append(float((cosine * weight).sum() / weight.sum()))

    handles = [
        layer.register_forward_hook(partial(hook, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    idle = [index for index, values in enumerate(means) if not values]
    if idle:
        raise ConfigError(f"layers must all be run by the policy's `act`, which did not run layer {idle[0]}.")
    return np.array([sum(values) / len(values) for values in means])


def choose_static_layers(
    similarity: NDArray[np.float64], ratio: float, longest_block: int | None = None
) -> tuple[int, ...]:
    """Choose the least similar layers, so that no block between them is too long.

    The first layer and the last are always among them: what comes before the first or behind the last static layer has
    to run in any case.

    Args:
        similarity: (layers,) similarities of input and output.
        ratio: Share of layers that are static, above 0 and below 1.
        longest_block: Largest number of dynamic layers between two static ones, at least 1; None: the smallest that so
            many static layers allow.

    Returns:
        Indices of the static layers, rising.

    Raises:
        ConfigError: The ratio is out of range, so few static layers make longer blocks, or no layer is left to skip.
    """
    depth = len(similarity)
    if not 0 < ratio < 1:
        raise ConfigError(f"static_ratio must be above 0 and below 1, got {ratio}.")
    if longest_block is not None and longest_block < 1:
        raise ConfigError(f"longest_block must be at least 1, got {longest_block}.")
    count = max(2, round(ratio * depth))
    if depth < 3 or count >= depth:
        raise ConfigError(f"static_ratio must leave layers to skip, got {ratio} of {depth} layers.")
    longest = math.ceil((depth - count) / (count - 1)) if longest_block is None else longest_block
    if count + (count - 1) * longest < depth:
        least = math.ceil((depth + longest) / (longest + 1))
        raise ConfigError(
            f"longest_block must be larger, got {longest}: {count} static layers of {depth} leave longer blocks; "
            f"take a static_ratio of at least {least / depth:.2f}."
        )
    # best[m][j]: the least sum of similarities of m + 1 static layers, the first at 0 and the last at j.
    best = np.full((count, depth), np.inf)
    came_from = np.zeros((count, depth), np.int64)
    best[0, 0] = similarity[0]
    for used in range(1, count):
        for layer in range(used, depth):
            earliest = max(0, layer - longest - 1)
            before = best[used - 1, earliest:layer]
            came_from[used, layer] = earliest + int(before.argmin())
            best[used, layer] = before.min() + similarity[layer]
    chosen = [depth - 1]
    for used in range(count - 1, 0, -1):
        chosen.append(int(came_from[used, chosen[-1]]))
    return tuple(reversed(chosen))
