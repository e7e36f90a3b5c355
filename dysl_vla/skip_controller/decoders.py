"""A decoder's layers: how they are found, wrapped in place, and run for some rows of a batch alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dysl_vla.errors import ConfigError

BATCH_FIRST = ("attention_mask", "causal_mask", "position_ids", "position_embeddings", "encoder_hidden_states")
"""Arguments of a layer whose first dimension is the batch, or 1."""
NOT_BATCHED = ("cache_position", "position_bias")
"""Arguments of a layer whose first dimension is something else."""
CACHES = ("past_key_values", "past_key_value", "layer_past")
MARK = "_skipper"
"""Attribute that marks a list of layers as attached."""


class WrappedLayers:
    """Layers whose `forward` is replaced, until `restore`.

    Args:
        layers: The layers, which stay where they are in their model.
        run: What is called in place of layer i's forward, as `run(i, *args, **kwargs)`.

    Attributes:
        originals: Each layer's own forward.
    """

    def __init__(self, layers: nn.ModuleList, run: Callable[..., Any]) -> None:
        self.layers = layers
        self.originals: list[Callable[..., Any]] = [layer.forward for layer in layers]
        self._names = [list(inspect.signature(original).parameters) for original in self.originals]
        self._output_type: type | None = None  # the container that a layer returns; None: no container
        for index, layer in enumerate(layers):
            layer.forward = partial(run, index)  # no closure: it survives a deep copy

    def restore(self) -> None:
        """Give the layers back their own forward."""
        for layer, original in zip(self.layers, self.originals, strict=True):
            if getattr(original, "__func__", None) is type(layer).forward:
                del layer.__dict__["forward"]
            else:  # someone else had wrapped it before
                layer.forward = original

    def hidden_name(self, index: int) -> str:
        """Return the name of a layer's first argument, the hidden states."""
        return self._names[index][0]

    def hidden(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the hidden states that a layer is called with, (batch, tokens, hidden)."""
        found: Tensor = args[0] if args else kwargs[self._names[index][0]]
        return found

    def arguments(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments that a layer is called with, by name."""
        return dict(zip(self._names[index], args, strict=False)) | dict(kwargs)

    def run(
        self,
        index: int,
        arguments: dict[str, Any],
        rows: Sequence[int] | None = None,
        *,
        is_checkpointed: bool = False,
    ) -> Any:
        """Run a layer's own forward.

        Args:
            index: Index of the layer.
            arguments: All its arguments, by name.
            rows: Rows of the batch that run; the others keep their hidden states. None: all rows run.
            is_checkpointed: Whether backward computes the layer's activations again instead of keeping them.

        Raises:
            ConfigError: A layer that is checkpointed has a cache, or a layer returns what a skipped one cannot.
        """
        original = self.originals[index]
        if is_checkpointed:
            if cache_of(arguments) is not None:
                raise ConfigError(
                    "checkpointing must be off for a decoder that keeps keys and values, which it would write twice; "
                    "let the policy's act call it with use_cache=False, or train without checkpointing."
                )
            # What runs again is the layer's own forward, which does not depend on the mode of the skipper.
            output = checkpoint(original, use_reentrant=False, **arguments)
        elif rows is None:
            output = original(**arguments)
        else:
            output = run_rows(original, self._names[index][0], arguments, rows)
        if index == 0:
            is_container = isinstance(output, (tuple, list))
            if is_container and len(output) > 2:
                raise ConfigError(
                    f"layers answer {len(output)} values, which a skipped layer cannot; skipping needs layers that "
                    "answer hidden states, and attention weights or a cache at most."
                )
            self._output_type = type(output) if is_container else None
        return output

    def wrap_output(self, hidden: Tensor) -> Any:
        """Put hidden states into the container that these layers return."""
        return hidden if self._output_type is None else self._output_type((hidden, None))


def find_layers(decoder: nn.Module, depth: int) -> nn.ModuleList:
    """Return the decoder's list of layers: the outermost `ModuleList` of that depth, or the decoder if it is one.

    Raises:
        ConfigError: There is no list of that depth, or more than one.
    """
    outermost = _outermost_lists(decoder)
    fitting = [module for module in outermost if len(module) == depth]
    if not fitting:
        depths = sorted(len(module) for module in outermost)
        raise ConfigError(
            f"num_layers must be a depth of the decoder's lists of layers, {depths}; the plan has {depth}."
        )
    if len(fitting) > 1:
        raise ConfigError(f"decoder must have one list of {depth} layers, got {len(fitting)}; pass its language model.")
    return fitting[0]


def find_all_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the decoder's only, or longest, list of layers.

    Raises:
        ConfigError: There is no list of layers, or two are equally long.
    """
    return find_layers(decoder, max(map(len, _outermost_lists(decoder))))


def _outermost_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    if isinstance(decoder, nn.ModuleList):
        return [decoder]
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists if other)
    ]
    if not outermost:
        raise ConfigError(
            f"decoder must have a torch.nn.ModuleList of layers; {type(decoder).__name__} has no list of layers."
        )
    return outermost


def padding(mask: Tensor | None) -> Tensor | None:
    """Return a mask, (batch, tokens), if it hides something, else None: pooling without one is faster."""
    return None if mask is None or mask.all() else mask


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache of keys and values among a layer's arguments; None without one."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def run_rows(original: Callable[..., Any], name: str, arguments: Mapping[str, Any], rows: Sequence[int]) -> Any:
    """Run a layer on some rows of a batch; the others keep their hidden states.

    Args:
        original: The layer's own forward.
        name: The name of its first argument, the hidden states.
        arguments: All its arguments, by name.
        rows: The rows that run.
    """
    hidden: Tensor = arguments[name]
    others = {key: value for key, value in arguments.items() if key != name}
    chosen = torch.tensor(rows, device=hidden.device)
    if all(key in BATCH_FIRST + NOT_BATCHED or not _has_tensor(value) for key, value in others.items()):
        few = {key: _rows(key, v, chosen, len(hidden)) if key in BATCH_FIRST else v for key, v in others.items()}
        output = original(**{name: hidden[chosen]}, **few)
        first = output[0] if isinstance(output, (tuple, list)) else output
    else:  # an unknown argument may have its batch in any dimension: run all rows, keep the chosen ones
        output = original(**arguments)
        first = (output[0] if isinstance(output, (tuple, list)) else output)[chosen]
    kept = hidden.index_copy(0, chosen, first.to(hidden.dtype))
    return type(output)((kept, *output[1:])) if isinstance(output, (tuple, list)) else kept


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _rows(key: str, value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(key, part, rows, batch) for part in value)
    if not isinstance(value, Tensor) or batch == 1:
        return value
    # Vision-language models have positions in time, height and width: (3, batch, tokens), and an angle for each.
    is_threefold = value.ndim == {"position_ids": 3, "position_embeddings": 4}.get(key)
    if is_threefold:
        return value[:, rows] if value.shape[1] == batch else value
    return value[rows] if value.shape[0] == batch else value
