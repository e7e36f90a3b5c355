"""Skip layers of any Hugging Face decoder, in place: `attach` wraps each layer's forward, `detach` takes the wrap off.

The model's own forward still makes masks, rotary embeddings and caches. Outside `Skipper.step` a wrapped layer is the
layer itself. Within, each row of the batch decides for itself: at a dynamic layer behind its allow point the layer's
controller may jump to the block's static layer, over an adapter.

    skipper = attach(model, plan, heads)
    with skipper.step(allow_points) as step:
        output = model(inputs_embeds=...)        # or model.generate(...)
    with skipper.verify(step):
        exact = model(inputs_embeds=...)         # the full model's output, from the first skip on

Not for choosing allow points (`guidance`) or training heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan

BATCH_FIRST = ("attention_mask", "position_ids", "position_embeddings", "encoder_hidden_states")
"""Arguments of a layer whose first dimension is the batch, or 1."""
NOT_BATCHED = ("cache_position", "position_bias")
"""Arguments whose first dimension is something else."""
CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class Step:
    """One control step of a batch, while it runs and after.

    Attributes:
        allow_points: (batch, blocks): dynamic layers of each block that must run before skipping is allowed.
        threshold: A controller's output above it skips.
        mask: (batch, tokens), 1 for tokens and 0 for padding; None: no padding.
        landings: For each row, the layer to land on after each skip: {layer skipped at: landing}.
        outputs: For each row, the controllers' outputs by layer.
        layers_run: (batch, layers): which layers ran in the deciding pass.
        first_skip: The first layer at which any row skipped; None when none did.
        first_hidden: What that layer got, (batch, tokens, hidden): the full model's, exactly.
    """

    allow_points: NDArray[np.int64]
    threshold: float
    mask: Tensor | None
    landings: list[dict[int, int]] = field(default_factory=list)
    outputs: list[dict[int, float]] = field(default_factory=list)
    layers_run: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    first_skip: int | None = None
    first_hidden: Tensor | None = None
    decided: bool = False
    resume_at: list[int] = field(default_factory=list)


class Skipper:
    """A decoder whose layers are wrapped; made by `attach`."""

    def __init__(self, layers: nn.ModuleList, plan: SkipPlan, heads: SkipHeads | None) -> None:
        self._layers = layers
        self.plan = plan
        self.heads = heads
        self._step: Step | None = None
        self._resumed: Step | None = None
        self._returns_tuple: bool | None = None
        self._block_of = {
            layer: (number, block.landing, layer - block.first)
            for number, block in enumerate(plan.blocks)
            for layer in range(block.first, block.landing)
        }
        self._originals: list[Callable[..., Any]] = []
        for index, layer in enumerate(layers):
            self._originals.append(layer.forward)
            layer.forward = self._wrap(index, layer.forward)
        layers.__dict__["_skipper"] = self

    def detach(self) -> None:
        """Restore the layers' own forward."""
        for layer, original in zip(self._layers, self._originals, strict=True):
            if getattr(original, "__func__", None) is type(layer).forward:
                del layer.__dict__["forward"]
            else:  # someone else had wrapped it before
                layer.forward = original
        del self._layers.__dict__["_skipper"]

    @contextmanager
    def step(
        self, allow_points: NDArray[np.int64], *, threshold: float = 0.5, mask: Tensor | None = None
    ) -> Iterator[Step]:
        """Let the forwards in the body skip layers.

        The first forward decides; later ones, the tokens of autoregressive decoding, keep its decisions, so that every
        cache that a layer reads was written.

        Args:
            allow_points: (batch, blocks).
            threshold: A controller's output above it skips.
            mask: (batch, tokens) of the first forward.

        Raises:
            ConfigError: Attached without heads, or allow points of another number of blocks.
        """
        if self.heads is None:
            raise ConfigError("heads: the decoder was attached without; skipping needs adapters and controllers.")
        if allow_points.ndim != 2 or allow_points.shape[1] != len(self.plan.blocks):
            raise ConfigError(
                f"allow_points: shape {allow_points.shape} is not (batch, {len(self.plan.blocks)}), a value a block."
            )
        self._step = Step(allow_points, threshold, mask)
        try:
            yield self._step
        finally:
            self._step = None

    @contextmanager
    def verify(self, step: Step) -> Iterator[None]:
        """Let one forward in the body, of the same inputs, be the full model's, going on from the first skip.

        Bit for bit the full model's result: what ran before the first skip of any row was exact, and is kept.
        """
        self._resumed = step
        try:
            yield
        finally:
            self._resumed = None

    def _wrap(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._step is not None:
                return self._forward(index, original, hidden_states, args, kwargs)
            if self._resumed is not None and self._resumed.first_skip is not None:
                if index < self._resumed.first_skip:
                    return self._like_a_layer(hidden_states)
                if index == self._resumed.first_skip:
                    assert self._resumed.first_hidden is not None
                    hidden_states = self._resumed.first_hidden
            return original(hidden_states, *args, **kwargs)

        return forward

    def _forward(
        self, index: int, original: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        step = self._step
        assert step is not None
        batch = hidden.shape[0]
        if index == 0:
            self._begin_pass(step, batch)
        if index in self._block_of:
            hidden = self._maybe_skip(index, step, hidden, cached=_cache(kwargs) is not None)
        active = [row for row in range(batch) if step.resume_at[row] <= index]
        if not step.decided:
            step.layers_run[active, index] = True
            step.decided = index == len(self._layers) - 1
        if not active:
            return self._like_a_layer(hidden)
        if len(active) == batch:
            output = original(hidden, *args, **kwargs)
        else:
            output = _run_rows(original, hidden, args, kwargs, active)
        self._returns_tuple = isinstance(output, tuple)
        return output

    def _begin_pass(self, step: Step, batch: int) -> None:
        if step.decided:
            step.resume_at = [0] * batch
            return
        if batch != len(step.allow_points):
            raise ConfigError(f"allow_points: {len(step.allow_points)} rows, the batch has {batch}.")
        step.landings = [{} for _ in range(batch)]
        step.outputs = [{} for _ in range(batch)]
        step.layers_run = np.zeros((batch, len(self._layers)), np.bool_)
        step.resume_at = [0] * batch

    def _maybe_skip(self, index: int, step: Step, hidden: Tensor, *, cached: bool) -> Tensor:
        if step.decided:
            rows = [row for row, landings in enumerate(step.landings) if index in landings]
        else:
            rows = self._decide(index, step, hidden, cached=cached)
        if not rows:
            return hidden
        assert self.heads is not None
        landing = self._block_of[index][1]
        for row in rows:
            step.resume_at[row] = landing
        if not step.decided:
            for row in rows:
                step.landings[row][index] = landing
            if step.first_skip is None:
                step.first_skip, step.first_hidden = index, hidden
        adapter = self.heads.adapters[str(index)]
        if len(rows) == hidden.shape[0]:
            bridged: Tensor = adapter(hidden)
            return bridged
        chosen = torch.tensor(rows, device=hidden.device)
        return hidden.index_copy(0, chosen, adapter(hidden[chosen]))

    def _decide(self, index: int, step: Step, hidden: Tensor, *, cached: bool) -> list[int]:
        """Rows that skip at a dynamic layer."""
        # A model counts its cached tokens in its first layer, and the shape of a layer's answer is learnt from one.
        if (cached and index == 0) or self._returns_tuple is None:
            return []
        block, _, offset = self._block_of[index]
        allowed = [
            row
            for row in range(hidden.shape[0])
            if step.resume_at[row] <= index and offset >= step.allow_points[row, block]
        ]
        if not allowed:
            return []
        assert self.heads is not None
        controller = self.heads.controllers[str(index)]
        if len(allowed) == hidden.shape[0]:
            outputs = controller(hidden, step.mask)
        else:
            chosen = torch.tensor(allowed, device=hidden.device)
            outputs = controller(hidden[chosen], None if step.mask is None else step.mask[chosen])
        values = outputs.tolist()
        for row, value in zip(allowed, values, strict=True):
            step.outputs[row][index] = value
        return [row for row, value in zip(allowed, values, strict=True) if value > step.threshold]

    def _like_a_layer(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden


def attach(decoder: nn.Module, plan: SkipPlan, heads: SkipHeads | None = None) -> Skipper:
    """Wrap a decoder's layers in place.

    Args:
        decoder: Any model with one list of layers of the plan's depth.
        plan: Which layers may be skipped.
        heads: Adapters and controllers; None: nothing can be skipped yet.

    Returns:
        The handle; outputs and gradients are unchanged until its `step` is used.

    Raises:
        ConfigError: No list of layers, a plan of another depth, heads of another plan or width, or already attached.
    """
    layers = find_layers(decoder, plan.num_layers)
    if "_skipper" in layers.__dict__:
        raise ConfigError("decoder: is already attached; detach it first.")
    if heads is not None:
        if heads.plan != plan:
            raise ConfigError(f"heads: were made for {heads.plan}, the plan is {plan}.")
        width = getattr(getattr(decoder, "config", None), "hidden_size", heads.config.hidden_size)
        if heads.config.hidden_size != width:
            raise ConfigError(f"heads: were made for a width of {heads.config.hidden_size}, the decoder has {width}.")
    return Skipper(layers, plan, heads)


def detach(decoder: nn.Module) -> None:
    """Undo `attach`.

    Raises:
        ConfigError: The decoder is not attached.
    """
    for module in decoder.modules():
        skipper = module.__dict__.get("_skipper")
        if skipper is not None:
            skipper.detach()
            return
    raise ConfigError("decoder: is not attached.")


def find_layers(decoder: nn.Module, depth: int) -> nn.ModuleList:
    """The decoder's list of layers: the outermost `ModuleList` of that depth.

    Raises:
        ConfigError: There is none, or more than one.
    """
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists if other)
    ]
    if not outermost:
        raise ConfigError(f"decoder: {type(decoder).__name__} has no list of layers (torch.nn.ModuleList).")
    fitting = [module for module in outermost if len(module) == depth]
    if not fitting:
        depths = sorted(len(module) for module in outermost)
        raise ConfigError(f"num_layers: the plan has {depth}, the decoder's lists of layers have {depths}.")
    if len(fitting) > 1:
        raise ConfigError(f"decoder: {len(fitting)} lists of {depth} layers; pass the language model alone.")
    return fitting[0]


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def _run_rows(
    original: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[int]
) -> Any:
    """A layer on some rows of a batch; the others keep their hidden state."""
    batch, chosen = hidden.shape[0], torch.tensor(rows, device=hidden.device)
    if args or not all(name in BATCH_FIRST + NOT_BATCHED or not _has_tensor(v) for name, v in kwargs.items()):
        # Which dimension of these is the batch cannot be known: run all rows, and keep those that asked.
        output = original(hidden, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        kept = hidden.index_copy(0, chosen, first[chosen])
    else:
        few = {name: _rows(v, chosen, batch) if name in BATCH_FIRST else v for name, v in kwargs.items()}
        output = original(hidden[chosen], **few)
        first = output[0] if isinstance(output, tuple) else output
        kept = hidden.index_copy(0, chosen, first)
    return (kept, *output[1:]) if isinstance(output, tuple) else kept


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch) for part in value)
    if isinstance(value, Tensor) and value.shape[0] == batch and batch > 1:
        return value[rows]
    return value
