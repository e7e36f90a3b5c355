"""Caches of keys and values in a step: what skips leave out of them, what measures them, what a verification copies.

A cache is one of transformers: an object with `layers`, one state for each layer of the decoder. A layer that a row
skipped writes nothing for it, so that a step's cache is of use only within the step. transformers counts tokens and
sizes masks at certain layers, which are the same for the whole model; these must have run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dysl_vla.errors import ConfigError

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Names of the argument by which a layer gets the cache."""
SKIPS_MARK = "_has_skips"
"""Attribute of a cache in which skips left keys and values out: the number of their step."""
ROW_CHANGES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""Methods of a cache that move rows; a layer that some rows skipped holds fewer rows."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a layer's arguments; None without one."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def check_new(cache: Any) -> None:
    """Refuse a cache that holds tokens, or that skips cannot be kept in.

    Raises:
        ConfigError: The cache is not one of transformers, moves its tensors between devices, or holds tokens.
    """
    if not isinstance(getattr(cache, "layers", None), list):
        raise ConfigError(
            f"past_key_values must be a cache of transformers, got {type(cache).__name__}; pass a DynamicCache."
        )
    if getattr(cache, "offloading", False):
        raise ConfigError(
            "past_key_values must stay on its device: an offloaded cache fetches the layer behind the running one, "
            "which may be skipped; pass one without offloading."
        )
    if holds_tokens(cache):
        raise ConfigError(
            "past_key_values must be an empty cache when a step or its verification begins, got one that holds tokens."
        )
    check_whole(cache)


def measured_layers(cache: Any) -> dict[int, str]:
    """Return the layers at which transformers counts cached tokens and sizes masks, with what each decides."""
    layers = cache.layers
    measured: dict[int, str] = {}
    attention = [index for index, layer in enumerate(layers) if hasattr(layer, "get_mask_sizes")]
    sliding = [index for index in attention if getattr(layers[index], "is_sliding", False)]
    linear = [index for index, layer in enumerate(layers) if hasattr(layer, "has_previous_state")]
    full = [index for index in attention if index not in sliding]
    if linear:  # whether a model goes on from a state is asked of the last one
        measured[linear[-1]] = "the last layer of linear attention"
    for kind, indices in (("full", full), ("sliding", sliding)):
        if indices:
            measured[indices[0]] = f"the first layer of {kind} attention"
    return measured


def check_measured(cache: Any, skippable: Collection[int]) -> None:
    """Refuse to go on from a cache whose tokens are counted, or masks sized, at a layer that may be skipped.

    Args:
        cache: The cache, which holds tokens of the step.
        skippable: Layers that a plan allows to be skipped.

    Raises:
        ConfigError: Such a layer may be skipped.
    """
    for index, what in measured_layers(cache).items():
        if index in skippable:
            raise ConfigError(
                f"static_layers must include layer {index} where tokens are generated with a cache, as transformers "
                f"sizes masks by the cache of {what}; add it to the plan, or pass use_cache=False."
            )


def mark_skips(cache: Any, step: int) -> None:
    """Mark a cache as one in which skips leave something out: no forward outside of the step, and no beam, may use it.

    Args:
        cache: The cache.
        step: Number of the step.
    """
    cache.__dict__[SKIPS_MARK] = step
    for name in ROW_CHANGES:
        cache.__dict__[name] = partial(_refuse_rows, name)


def check_whole(cache: Any, step: int | None = None) -> None:
    """Refuse a cache in which the skips of another step left something out; one that was reset since is as new.

    Args:
        cache: The cache, or None.
        step: Number of the running step; None: no step is running.

    Raises:
        ConfigError: The cache was written in another step, which skipped layers.
    """
    if getattr(cache, "__dict__", {}).get(SKIPS_MARK, step) == step:
        return
    if any(map(_has_state, cache.layers)):  # all layers: those at which a cache is measured may have been skipped
        raise ConfigError(
            "past_key_values must not come from another step that skipped layers, as the keys and values of skipped "
            "layers are missing; go on within that step, or begin with an empty cache."
        )
    for name in (SKIPS_MARK, *ROW_CHANGES):
        cache.__dict__.pop(name, None)


def states_of(cache: Any, count: int) -> list[tuple[type, dict[str, Any]]]:
    """Copy the states of the first `count` layers: of each its class and attributes."""
    return [(type(layer), _copy_attributes(layer.__dict__)) for layer in cache.layers[:count]]


def restore_state(cache: Any, index: int, state: tuple[type, dict[str, Any]]) -> None:
    """Write a copied state into a layer of another cache.

    Raises:
        ConfigError: The other cache keeps the layer in another way.
    """
    make: Callable[[], Any] | None = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(cache.layers) <= index:
        cache.layers.append(make())
    kind, attributes = state
    if index >= len(cache.layers) or type(cache.layers[index]) is not kind:
        raise ConfigError(
            f"past_key_values must be a cache of the step's kind in its verification, with layer {index} in a "
            f"{kind.__name__}; make both caches in the same way."
        )
    cache.layers[index].__dict__.update(_copy_attributes(attributes))


def _copy_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in attributes.items()}


def _copy(value: Any) -> Any:
    """Copy tensors, also in containers: some caches write in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(part) for key, part in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value


def holds_tokens(cache: Any) -> bool:
    """Tell whether any layer at which transformers measures a cache has keys, values or a state."""
    return any(_has_state(cache.layers[index]) for index in measured_layers(cache))


def _has_state(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", None)
    if states is not None and any(states.values() if isinstance(states, dict) else [states]):
        return True
    return hasattr(layer, "get_seq_length") and bool(layer.get_seq_length() > 0)


def _refuse_rows(name: str, *_: Any, **__: Any) -> None:
    raise ConfigError(
        f"past_key_values cannot do {name} in a step that skipped layers, whose rows decided what to skip; generate "
        "with num_beams=1, and one sequence for each row."
    )
