"""What `attach` asks of a decoder and its heads, before it touches either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.decoders import BATCH_FIRST
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan


def skippable_layers(plan: SkipPlan) -> frozenset[int]:
    """Return the layers that a row may skip: those from the first exit of each block to before its target."""
    return frozenset(
        layer for block in plan.blocks for place in plan.exits_of(block)[:1] for layer in range(place, block.target)
    )


def check_shared_keys(layers: nn.ModuleList, plan: SkipPlan) -> bool:
    """Refuse a plan that may skip a layer whose keys and values later layers read.

    Returns:
        Whether layers read keys and values of others.

    Raises:
        ConfigError: Such a layer may be skipped, or it is not known which ones are read.
    """
    readers = _with_flag(layers, "is_kv_shared_layer")
    if not readers:
        return False
    sources = _with_flag(layers, "store_full_length_kv")
    if not sources:
        raise ConfigError(
            f"decoder must tell which layers' keys and values its layers {readers} read (`store_full_length_kv`), and "
            f"{type(layers[0]).__name__} does not; it cannot be attached."
        )
    skipped = sorted(skippable_layers(plan).intersection(sources))
    if skipped:
        raise ConfigError(
            f"static_layers must include {skipped}, whose keys and values the layers {readers} read; got "
            f"{list(plan.static_layers)}."
        )
    return True


def _with_flag(layers: nn.ModuleList, flag: str) -> list[int]:
    """Return the layers with a part whose attribute of that name is true."""
    return [i for i, layer in enumerate(layers) if any(getattr(part, flag, False) is True for part in layer.modules())]


def check_arguments(arguments: Mapping[str, Any], name: str, shares_keys: bool) -> None:
    """Refuse what a decoder calls its first layer with, where rows could not skip for themselves.

    Args:
        arguments: All arguments of the layer, by name.
        name: The name of the hidden states.
        shares_keys: Whether the layers are known to share keys and values.

    Raises:
        ConfigError: Hidden states are not (batch, tokens, hidden), or layers write into an argument for later ones.
    """
    hidden = arguments[name]
    if hidden.ndim != 3:
        raise ConfigError(
            f"layers must take hidden states of the shape (batch, tokens, hidden), got {tuple(hidden.shape)}; several "
            "streams of them cannot skip."
        )
    written = [key for key, value in arguments.items() if isinstance(value, Mapping) and key not in BATCH_FIRST]
    if written and not shares_keys:
        raise ConfigError(
            f"layers must not hand states to later layers, as they may by the argument {written[0]}: a skipped layer "
            "would leave them out."
        )


def check_heads(heads: SkipHeads, plan: SkipPlan, layers: nn.ModuleList) -> None:
    """Refuse heads that are not made for the plan, or whose width, dtype or device is not the layers'.

    Raises:
        ConfigError: One of them differs, or it is not known where the layers run.
    """
    if heads.plan != plan:
        raise ConfigError(f"heads must be made for the plan, {plan}; these were made for {heads.plan}.")
    widths = {p.shape[0] for name, p in layers[0].named_parameters() if p.ndim == 1 and "norm" in name}
    if widths and heads.config.hidden_size not in widths:
        raise ConfigError(f"heads must have the decoder's width of {min(widths)}, got {heads.config.hidden_size}.")
    dtype = compute_dtype(layers)
    for place in heads.adapters:
        device = run_device(layers[int(place)], place)
        for mine in (*heads.adapters[place].parameters(), *heads.controllers[place].parameters()):
            if device is not None and mine.device != device:
                raise ConfigError(
                    f"heads must be of the decoder's device {device} at layer {place}, got {mine.device}; use "
                    f"heads.to({device}), or move the adapter and the controller of that layer."
                )
            if dtype is not None and mine.dtype != dtype and not torch.is_autocast_enabled(mine.device.type):
                raise ConfigError(
                    f"heads must be of the decoder's dtype {dtype}, got {mine.dtype}; use heads.to({dtype})."
                )


def check_followers(heads: SkipHeads, followers: Sequence[nn.ModuleList]) -> None:
    """Refuse heads whose adapters for followers are of another number, width or dtype than these.

    Raises:
        ConfigError: One of them differs.
    """
    sizes = heads.config.follower_sizes
    if len(sizes) not in (0, len(followers)):
        raise ConfigError(f"heads must have adapters for {len(followers)} followers, got those for {len(sizes)}.")
    for size, layers, adapters in zip(sizes, followers, heads.followers, strict=False):
        norms = (p for name, p in layers[0].named_parameters() if "norm" in name and name.endswith("weight"))
        widths = {norm.shape[0] for norm in norms if norm.ndim == 1}
        if widths and size not in widths:
            raise ConfigError(f"follower_sizes must be the followers' width of {min(widths)}, got {size}.")
        dtype, mine = compute_dtype(layers), next(adapters.parameters())
        if dtype is not None and mine.dtype != dtype and not torch.is_autocast_enabled(mine.device.type):
            raise ConfigError(
                f"heads must be of the followers' dtype {dtype}, got {mine.dtype}; use heads.to({dtype})."
            )


def match_heads(heads: SkipHeads, layers: nn.ModuleList, followers: Sequence[nn.ModuleList]) -> None:
    """Bring heads to the device and the dtype of the layers that they stand in for."""
    parts = [(layers, heads.adapters), (layers, heads.controllers), *zip(followers, heads.followers, strict=False)]
    for like, part in parts:  # each by itself, so that none is rounded to another's dtype on the way
        part.to(run_device(like, "0"), compute_dtype(like))


def compute_dtype(layers: nn.Module) -> torch.dtype | None:
    """Return the dtype in which layers compute, whatever their weights are stored in; None where nothing tells.

    Quantised weights are integers, or floats of eight bits, or no parameters at all; then norms tell.
    """
    floats = [p for p in layers.parameters() if p.is_floating_point() and p.element_size() > 1]
    like = next((p for p in floats if p.ndim > 1), next(iter(floats), None))
    return None if like is None else like.dtype


def run_device(layer: nn.Module, place: str) -> torch.device | None:
    """Return the device on which a layer runs; None where it has no weights.

    Raises:
        ConfigError: Its weights are on the device `meta`, and no hook of accelerate says where they run.
    """
    devices = {parameter.device for parameter in layer.parameters()}
    loaded = [device for device in devices if device.type != "meta"]
    for part in layer.modules():  # offloaded weights are fetched when they are needed
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if getattr(one, "offload", False) and one.execution_device is not None:
                return torch.device(one.execution_device)
    if devices and not loaded:
        raise ConfigError(
            f"decoder must have weights, and those of layer {place} are on the device meta; load them, or let "
            "accelerate offload them."
        )
    return loaded[0] if loaded else None
