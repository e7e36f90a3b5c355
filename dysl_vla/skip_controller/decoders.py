"""A decoder's layers: how they are found, wrapped in place, and run for some rows of a batch alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.caches import cache_of

BATCH_FIRST = (
    "attention_mask",
    "causal_mask",
    "position_ids",
    "position_embeddings",
    "encoder_hidden_states",
    "adarms_cond",
)
"""Arguments of a layer whose first dimension is the batch, or 1."""
NOT_BATCHED = ("cache_position", "position_bias")
"""Arguments of a layer whose first dimension is something else."""
MARK = "_skipper"
"""Attribute that marks a list of layers as attached."""


class WrappedLayers:
    """Layers whose `forward` is replaced, until `restore`.

    A copy of the model (`copy.deepcopy`, `pickle`, `torch.save`) holds a copy of it, wrapped in the same way.

    Args:
        layers: The layers, which stay where they are in their model.
        run: The method that is called in place of layer i's forward, as `run(*first, i, *args, **kwargs)`.
        first: Arguments of `run` that come first.

    Attributes:
        originals: Each layer's own forward.

    Raises:
        ConfigError: A layer's forward does not name its arguments; nothing is replaced then.
    """

    def __init__(self, layers: nn.ModuleList, run: Callable[..., Any], *first: Any) -> None:
        self.layers = layers
        self._names = [argument_names(layer) for layer in layers]
        self._wrapped = list(layers)
        self._run, self._first = run, first
        self._output_type: type | None = None  # the container that a layer returns; None: no container
        self.originals: list[Callable[..., Any]] = [layer.forward for layer in layers]
        self._intact: list[Any] = []  # the forwards that were found to lead here
        for index, layer in enumerate(layers):
            layer.forward = partial(run, *first, index)  # no closure: it survives a copy
            self._intact.append(layer.forward)

    def __getstate__(self) -> dict[str, Any]:
        # A layer's own forward would be looked up by its name, which leads to the replacement.
        pairs = zip(self._wrapped, self.originals, strict=True)
        originals = [None if _is_own(layer, one) else one for layer, one in pairs]
        return self.__dict__ | {"originals": originals, "_intact": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        pairs = zip(self._wrapped, state["originals"], strict=True)
        self.originals = [MethodType(type(layer).forward, layer) if one is None else one for layer, one in pairs]

    def restore(self) -> None:
        """Give the layers back their own forward, except those whose forward something else has replaced since."""
        for index, (layer, original) in enumerate(zip(self._wrapped, self.originals, strict=True)):
            if not self._is_mine(layer.__dict__.get("forward"), index):
                continue
            if _is_own(layer, original):
                del layer.__dict__["forward"]
            else:  # someone else had wrapped it before
                layer.forward = original

    def check_intact(self) -> None:
        """Refuse to go on when the model does not call the replaced forwards any more.

        Raises:
            ConfigError: A layer, or its forward, was replaced since by something that does not lead here.
        """
        forwards = [layer.__dict__.get("forward") for layer in self.layers]
        if forwards == self._intact and list(self.layers) == self._wrapped:
            return
        intact = list(self.layers) == self._wrapped and all(map(self._leads_here, forwards, range(len(forwards))))
        if not intact:
            raise ConfigError(
                "layers must be those that were attached, with the forward that `attach` gave them, and a layer or its "
                "forward was replaced since: by a hook that was added or removed, by torch.compile, or by `detach`; "
                "detach, and attach again when the model is ready."
            )
        self._intact = forwards

    def _leads_here(self, forward: Any, index: int) -> bool:
        """Tell whether a forward is the replacement, or wraps it and says so by `__wrapped__`."""
        for _ in range(8):
            if self._is_mine(forward, index):
                return True
            forward = getattr(forward, "__wrapped__", None)
            if forward is None:
                return False
        return False

    def _is_mine(self, forward: Any, index: int) -> bool:
        return isinstance(forward, partial) and forward.func == self._run and forward.args == (*self._first, index)

    def hidden_name(self, index: int) -> str:
        """Return the name of a layer's first argument, the hidden states."""
        return self._names[index][0]

    def hidden(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the hidden states that a layer is called with, (batch, tokens, hidden)."""
        found: Tensor = args[0] if args else kwargs[self._names[index][0]]
        return found

    def arguments(self, index: int, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments that a layer is called with, by name.

        Args:
            index: Index of the layer.
            args: Its positional arguments.
            kwargs: Its other arguments, which get the positional ones as well.

        Raises:
            ConfigError: The layer is called with more positional arguments than it names.
        """
        names = self._names[index]
        if len(args) > len(names):
            raise ConfigError(
                f"layers must name their arguments; layer {index} names {len(names)}, and is called with {len(args)} "
                "positional ones."
            )
        kwargs.update(zip(names, args, strict=False))
        return kwargs

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
        original, name = self.originals[index], self._names[index][0]
        if is_checkpointed:
            if cache_of(arguments) is not None:
                raise ConfigError(
                    "checkpointing must be off for a decoder that keeps keys and values, which it would write twice; "
                    "let the policy's act call it with use_cache=False, or train without checkpointing."
                )
            # What runs again is the layer's own forward, which does not depend on the mode of the skipper.
            # It saves the random state of the devices of positional tensors alone.
            others = dict(arguments)
            output = checkpoint(original, others.pop(name), use_reentrant=False, **others)
        elif rows is None:
            output = call(original, name, arguments)
        else:
            output = run_rows(original, name, arguments, rows)
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


def _is_own(layer: nn.Module, forward: Any) -> bool:
    """Tell whether a forward is that of the layer's class."""
    return getattr(forward, "__func__", None) is type(layer).forward


def argument_names(layer: nn.Module) -> list[str]:
    """Return the names of a layer's arguments that may be positional, from the hidden states on.

    A forward that was wrapped may hide them behind `*args, **kwargs`; then those of the layer's class count, or of the
    module that `torch.compile` wrapped.

    Raises:
        ConfigError: None of them names its first argument.
    """
    inner: Any = getattr(layer, "_orig_mod", layer)  # of torch.compile's OptimizedModule
    for forward in (layer.forward, inner.forward, MethodType(type(inner).forward, inner)):
        parameters = inspect.signature(forward).parameters.values()
        names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        if names:
            return names
    raise ConfigError(
        f"layers must name their arguments, and the forward of {type(layer).__name__} takes *args alone; give it a "
        "parameter for the hidden states."
    )


def find_layers(decoder: nn.Module, depth: int) -> nn.ModuleList:
    """Return the decoder's list of layers: the outermost `ModuleList` of that depth, or the decoder if it is one.

    Where a model tells which of its parts is the language model, only lists of that part count.

    Args:
        decoder: The model, or its list of layers.
        depth: Number of layers.

    Raises:
        ConfigError: There is no list of that depth, or more than one.
    """
    lists = _outermost_lists(decoder)
    fitting = {name: layers for name, layers in lists.items() if len(layers) == depth}
    if not fitting:
        depths = sorted(map(len, lists.values()))
        raise ConfigError(
            f"num_layers must be a depth of the decoder's lists of layers, {depths}; the plan has {depth}."
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"decoder must have one list of {depth} layers, got {len(fitting)}, {_named(fitting)}; pass the one that "
            "is meant, or its language model."
        )
    return next(iter(fitting.values()))


def find_all_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the decoder's only list of layers, or that of the depth that its configuration states.

    Args:
        decoder: The model, or its list of layers.

    Raises:
        ConfigError: There is no list of layers, or the configuration does not tell which one is meant.
    """
    lists = _outermost_lists(decoder)
    if len(lists) > 1:
        depth = _stated_depth(decoder)
        lists = {name: layers for name, layers in lists.items() if len(layers) == depth} or lists
    if len(lists) > 1:
        raise ConfigError(
            f"decoder must have one list of layers, got {len(lists)}, {_named(lists)}; pass the one that is meant, or "
            "its language model."
        )
    return next(iter(lists.values()))


def _outermost_lists(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of layers that are in no other list, by their path, of the language model where it is known."""
    if isinstance(decoder, nn.ModuleList):
        return {"": decoder}
    lists = {
        name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outermost = {
        name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise ConfigError(
            f"decoder must have a torch.nn.ModuleList of layers; {type(decoder).__name__} has no list of layers."
        )
    get_decoder: Any = getattr(decoder, "get_decoder", None)
    language = get_decoder() if callable(get_decoder) else None
    inside = {id(module) for module in language.modules()} if isinstance(language, nn.Module) else set()
    return {name: module for name, module in outermost.items() if id(module) in inside} or outermost


def _stated_depth(decoder: nn.Module) -> int | None:
    """Return the depth of the language model by the model's configuration; None without one."""
    config: Any = getattr(decoder, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _named(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name or 'itself'} ({len(layers)} layers)" for name, layers in lists.items())


def padding(mask: Tensor | None) -> Tensor | None:
    """Return a mask, (batch, tokens), if it hides something, else None: pooling without one is faster.

    To know it would make the host wait for an accelerator, where a mask is kept unseen.
    """
    return None if mask is None or (mask.device.type == "cpu" and mask.all()) else mask


def call(forward: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """Call a layer's forward by name, with its hidden states as the positional argument.

    Re-entrant gradient checkpointing follows gradients of positional arguments alone.

    Args:
        forward: The layer's own forward.
        name: The name of its first argument, the hidden states.
        arguments: All its arguments, by name.
    """
    others = dict(arguments)
    return forward(others.pop(name), **others)


def hidden_of(output: Any) -> Any:
    """Return the hidden states in what a layer answers."""
    return output[0] if isinstance(output, (tuple, list)) else output


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
    if all(_has_known_rows(key, value) for key, value in others.items()):
        few = {key: _rows(key, v, chosen, len(hidden)) if key in BATCH_FIRST else v for key, v in others.items()}
        output = original(hidden[chosen], **few)
        first = hidden_of(output)
    else:  # an unknown argument may have its batch in any dimension: run all rows, keep the chosen ones
        output = original(hidden, **others)
        first = hidden_of(output)[chosen]
    kept = hidden.index_copy(0, chosen, first.to(hidden.dtype))
    return type(output)((kept, *output[1:])) if isinstance(output, (tuple, list)) else kept


def _has_known_rows(key: str, value: Any) -> bool:
    """Tell whether it is known which part of an argument belongs to which row."""
    if key in BATCH_FIRST:  # an object of another kind, as of flex attention, has its rows inside
        return value is None or isinstance(value, (Tensor, tuple, list))
    return key in NOT_BATCHED or not _has_tensor(value)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True  # it may get tensors while layers run
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
