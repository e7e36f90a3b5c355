"""Skip layers of any Hugging Face decoder, in place: `attach` wraps each layer's forward, `detach` takes the wrap off.

The model's own forward still makes masks, rotary embeddings and caches. Outside `Skipper.step` a wrapped layer is the
layer itself. Within, each row of the batch decides for itself: at an exit behind its allow point the layer's
controller may jump to the block's static layer, over an adapter.

    skipper = attach(model, plan, heads)
    with skipper.step(allow_points) as step:
        output = model(inputs_embeds=...)        # or model.generate(...)
    with skipper.verify(step):
        exact = model(inputs_embeds=...)         # the full model's output, from the first skip on
    with skipper.record() as inputs:
        output = model(inputs_embeds=...)        # the full model; what each of its layers got
    with skipper.force_exits(exits) as forced:
        output = model(inputs_embeds=...)        # skips where it is told to, with gradients, to train the heads

The first layer always runs: models count cached tokens there, and it shows what a layer returns. Not for choosing allow
points (`guidance`) or optimising heads (`distill`).
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan

BATCH_FIRST = ("attention_mask", "causal_mask", "position_ids", "position_embeddings", "encoder_hidden_states")
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
        force_skip: Rows skip at their allow points, and no controller is asked.
        targets: For each row, the layer to land on after each skip: {layer skipped at: target}.
        outputs: For each row, the controllers' outputs by layer.
        layers_run: (batch, layers): which layers ran in the deciding pass.
        first_skip: The first layer at which any row skipped; None when none did.
        first_hidden: What that layer got, (batch, tokens, hidden): the full model's, exactly.
        tokens: Of the deciding pass.
        controllers_s: Seconds in controllers, reading their answers included.
        adapters_s: Seconds in adapters.
        cache: Keys and values of the step, where the model keeps them.
        is_decided: The deciding pass has ended; later ones keep its decisions.
        is_verified: The full model's output has been computed from it.
    """

    allow_points: NDArray[np.int64]
    threshold: float
    mask: Tensor | None
    force_skip: bool = False
    targets: list[dict[int, int]] = field(default_factory=list)
    outputs: list[dict[int, float]] = field(default_factory=list)
    layers_run: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), np.bool_))
    first_skip: int | None = None
    first_hidden: Tensor | None = None
    tokens: int = 0
    controllers_s: float = 0.0
    adapters_s: float = 0.0
    cache: Any = None
    is_decided: bool = False
    is_verified: bool = False


@dataclass
class ForcedExits:
    """One forward for training: where it skipped, and what came of it.

    Attributes:
        exits: For each block, the dynamic layer that it is left at; None: it runs whole.
        is_mixture: Targets get c adapter(x) + (1 - c) layers(x) (DySL-VLA, section 3.4), not the adapter's alone.
        outputs: Block to the controller's output at its place, (batch,).
        targets: Block to what its target got, (batch, tokens, hidden).
    """

    exits: tuple[int | None, ...]
    is_mixture: bool
    mask: Tensor | None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)


class Skipper:
    """A decoder whose layers are wrapped; made by `attach`."""

    def __init__(self, layers: nn.ModuleList, plan: SkipPlan, heads: SkipHeads | None) -> None:
        self.layers = layers
        self.plan = plan
        self.heads = heads
        self._step: Step | None = None
        self._verified: Step | None = None
        self._inputs: list[Tensor] | None = None
        self._forced: ForcedExits | None = None
        self._jump_to = 0  # the layer before which no row of the running pass has anything to run
        self._landed: list[int] = []  # for each row of the running pass, the layer that it jumps to
        self._output_type: type | None = None  # the container in which a layer answers; None: no container
        self._block_of = {
            layer: (number, block.target, layer - block.first)
            for number, block in enumerate(plan.blocks)
            for layer in range(block.first, block.target)
        }
        self._exits = {layer for block in plan.blocks for layer in plan.exits_of(block)}
        self._block_at = {block.target: number for number, block in enumerate(plan.blocks)}
        self._originals: list[Callable[..., Any]] = [layer.forward for layer in layers]
        self._names = [list(inspect.signature(original).parameters) for original in self._originals]
        for index, layer in enumerate(layers):
            layer.forward = partial(self._run_layer, index)  # no closure: it survives a deep copy
        layers.__dict__["_skipper"] = self

    def detach(self) -> None:
        """Restore the layers' own forward."""
        for layer, original in zip(self.layers, self._originals, strict=True):
            if getattr(original, "__func__", None) is type(layer).forward:
                del layer.__dict__["forward"]
            else:  # someone else had wrapped it before
                layer.forward = original
        del self.layers.__dict__["_skipper"]

    @contextmanager
    def step(
        self,
        allow_points: NDArray[np.int64],
        *,
        threshold: float = 0.5,
        mask: Tensor | None = None,
        force_skip: bool = False,
    ) -> Iterator[Step]:
        """Let the forwards in the body skip layers.

        The first forward decides; later ones, the tokens of autoregressive decoding, keep its decisions, so that every
        cache that a layer reads was written.

        Args:
            allow_points: (batch, blocks).
            threshold: A controller's output above it skips.
            mask: (batch, tokens) of the first forward.
            force_skip: Skip at the allow points without asking controllers; a point at a block's end: not at all.

        Raises:
            ConfigError: Attached without heads, allow points of another number of blocks, within another step, or with
                a cache that holds tokens of before the step.
        """
        self._check_idle()
        if self.heads is None:
            raise ConfigError("heads: the decoder was attached without; skipping needs adapters and controllers.")
        if allow_points.ndim != 2 or allow_points.shape[1] != len(self.plan.blocks):
            raise ConfigError(
                f"allow_points: shape {allow_points.shape} is not (batch, {len(self.plan.blocks)}), a value a block."
            )
        self._step = Step(allow_points, threshold, _padding(mask), force_skip)
        try:
            yield self._step
        finally:
            self._step = None

    @contextmanager
    def verify(self, step: Step) -> Iterator[None]:
        """Let the first forward in the body, of the step's inputs, be the full model's, going on from the first skip.

        Bit for bit the full model's result: what ran before the first skip of any row was exact, and is kept, the keys
        and values of those layers included. Later forwards in the body, tokens of autoregressive decoding, run whole.

        Args:
            step: After its body has ended. It can be verified once.

        Raises:
            ConfigError: Within a step, a step that has not run or was verified, a cache that holds tokens, or one that
                the step did not have.
        """
        self._check_idle()
        if not step.is_decided or step.is_verified:
            raise ConfigError("verify: the step has not run, or was verified before.")
        self._verified = step
        try:
            yield
        finally:
            self._verified = None

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """Let the forward in the body, the full model's, also tell what each layer got, (batch, tokens, hidden)."""
        self._check_idle()
        self._inputs = []
        try:
            yield self._inputs
        finally:
            self._inputs = None

    @contextmanager
    def force_exits(
        self, exits: Sequence[int | None], *, is_mixture: bool = False, mask: Tensor | None = None
    ) -> Iterator[ForcedExits]:
        """Let the forward in the body skip where it is told to, with gradients for adapters and controllers.

        A controller's own input is cut from the graph: it judges hidden states, and does not bend them.

        Args:
            exits: For each block the exit that all rows leave it at; None: it runs whole.
            is_mixture: See `ForcedExits`.
            mask: (batch, tokens).

        Raises:
            ConfigError: Attached without heads, or a place that is not of its block.
        """
        self._check_idle()
        if self.heads is None:
            raise ConfigError("heads: the decoder was attached without; skipping needs adapters and controllers.")
        blocks = self.plan.blocks
        if len(exits) != len(blocks):
            raise ConfigError(f"exits: {len(exits)}, the plan has {len(blocks)} blocks.")
        for place, block in zip(exits, blocks, strict=True):
            if place is not None and place not in self.plan.exits_of(block):
                raise ConfigError(
                    f"exits: {place} is not among {self.plan.exits_of(block)}, where {block} can be left."
                )
        self._forced = ForcedExits(tuple(exits), is_mixture, _padding(mask))
        try:
            yield self._forced
        finally:
            self._forced = None

    def _check_idle(self) -> None:
        if any(running is not None for running in (self._step, self._verified, self._inputs, self._forced)):
            raise ConfigError("step: another one is running; end it first.")

    def _run_layer(self, index: int, *args: Any, **kwargs: Any) -> Any:
        original = self._originals[index]
        if self._step is not None:
            if 0 < index < self._jump_to:  # all rows are on their way to a target: nothing to do, as fast as can be
                return self._wrap_output(args[0] if args else kwargs[self._names[index][0]])
            arguments = dict(zip(self._names[index], args, strict=False)) | kwargs
            return self._skipping(index, original, self._step, arguments)
        if self._verified is not None:
            arguments = dict(zip(self._names[index], args, strict=False)) | kwargs
            return self._verifying(index, original, self._verified, arguments)
        if self._inputs is not None:
            self._inputs.append(args[0] if args else kwargs[self._names[index][0]])
        elif self._forced is not None:
            arguments = dict(zip(self._names[index], args, strict=False)) | kwargs
            return self._run_forced(index, original, self._forced, arguments)
        return original(*args, **kwargs)

    def _verifying(self, index: int, original: Callable[..., Any], step: Step, arguments: dict[str, Any]) -> Any:
        if step.first_skip is None or step.is_verified:
            return original(**arguments)
        name, cache = self._names[index][0], _cache(arguments)
        if index < step.first_skip:
            if cache is not None:
                self._copy_cache(index, step, cache)
            return self._wrap_output(arguments[name])
        if index == step.first_skip:
            arguments[name], step.first_hidden = step.first_hidden, None
        step.is_verified = index == len(self.layers) - 1
        return original(**arguments)

    def _run_forced(
        self, index: int, original: Callable[..., Any], forced: ForcedExits, arguments: dict[str, Any]
    ) -> Any:
        name = self._names[index][0]
        hidden: Tensor = arguments[name]
        if index in self._block_at:
            arguments[name] = hidden = self._land(self._block_at[index], forced, hidden)
        elif index in self._block_of:
            block = self._block_of[index][0]
            place = forced.exits[block]
            if place == index:
                assert self.heads is not None
                forced.targets[block] = self.heads.adapters[str(index)](hidden)
                forced.outputs[block] = self.heads.controllers[str(index)](hidden.detach(), forced.mask).sigmoid()
            if place is not None and place <= index and not forced.is_mixture:
                return self._wrap_output(hidden)
        output = original(**arguments)
        if index == 0:
            self._output_type = type(output) if isinstance(output, (tuple, list)) else None
        return output

    def _land(self, block: int, forced: ForcedExits, hidden: Tensor) -> Tensor:
        if forced.exits[block] is None:
            forced.targets[block] = hidden
        elif forced.is_mixture:
            share = forced.outputs[block][:, None, None]
            forced.targets[block] = share * forced.targets[block] + (1 - share) * hidden
        return forced.targets[block]

    def _copy_cache(self, index: int, step: Step, cache: Any) -> None:
        """What a layer before the first skip wrote is the full model's too; its prompt's part goes to the new cache."""
        if step.cache is None or (index == 0 and cache.get_seq_length() > 0):
            raise ConfigError("past_key_values: begin with an empty cache, in the step and in its verification.")
        written = step.cache.layers[index]
        cache.update(written.keys[..., : step.tokens, :], written.values[..., : step.tokens, :], index)

    def _skipping(self, index: int, original: Callable[..., Any], step: Step, arguments: dict[str, Any]) -> Any:
        name = self._names[index][0]
        hidden: Tensor = arguments[name]
        batch = hidden.shape[0]
        if index == 0:
            self._begin_pass(step, hidden, arguments)
        elif index in self._exits:
            hidden = arguments[name] = self._maybe_skip(index, step, hidden)
        active = [row for row, landed in enumerate(self._landed) if landed <= index]
        if not step.is_decided:
            step.layers_run[active, index] = True
            step.is_decided = index == len(self.layers) - 1
        if not active:
            return self._wrap_output(hidden)
        output = original(**arguments) if len(active) == batch else _run_rows(original, name, arguments, active)
        if index == 0:
            self._output_type = type(output) if isinstance(output, (tuple, list)) else None
        return output

    def _begin_pass(self, step: Step, hidden: Tensor, arguments: dict[str, Any]) -> None:
        batch, tokens = hidden.shape[:2]
        if batch != len(step.allow_points):
            raise ConfigError(f"allow_points: {len(step.allow_points)} rows, the batch has {batch}.")
        self._landed = [0] * batch
        self._jump_to = 0
        if step.is_decided:
            return
        cache = _cache(arguments)
        if cache is not None and cache.get_seq_length() > 0:
            raise ConfigError("past_key_values: holds tokens of before the step; begin a step with an empty cache.")
        step.targets = [{} for _ in range(batch)]
        step.outputs = [{} for _ in range(batch)]
        step.layers_run = np.zeros((batch, len(self.layers)), np.bool_)
        step.first_skip = step.first_hidden = None
        step.tokens, step.cache = tokens, cache

    def _maybe_skip(self, index: int, step: Step, hidden: Tensor) -> Tensor:
        if step.is_decided:
            rows = [row for row, targets in enumerate(step.targets) if index in targets]
        else:
            rows = self._decide(index, step, hidden)
        if not rows:
            return hidden
        assert self.heads is not None
        target = self._block_of[index][1]
        for row in rows:
            self._landed[row] = target
        if not step.is_decided:
            for row in rows:
                step.targets[row][index] = target
            if step.first_skip is None:
                step.first_skip, step.first_hidden = index, hidden
        adapter = self.heads.adapters[str(index)].forward  # a call takes a tenth longer; hooks on heads do not run
        started = time.perf_counter()
        if len(rows) == hidden.shape[0]:
            hidden = adapter(hidden).to(hidden.dtype)  # autocast's may be another
        else:
            chosen = torch.tensor(rows, device=hidden.device)
            hidden = hidden.index_copy(0, chosen, adapter(hidden[chosen]).to(hidden.dtype))
        step.adapters_s += time.perf_counter() - started
        self._jump_to = min(self._landed)
        return hidden

    def _decide(self, index: int, step: Step, hidden: Tensor) -> list[int]:
        """Rows that skip at a dynamic layer."""
        block, _, offset = self._block_of[index]
        allowed = [
            row
            for row, landed in enumerate(self._landed)
            if landed <= index and offset >= step.allow_points[row, block]
        ]
        if not allowed or step.force_skip:
            return allowed
        assert self.heads is not None
        started = time.perf_counter()
        controller = self.heads.controllers[str(index)].forward
        if len(allowed) == hidden.shape[0]:
            outputs = controller(hidden, step.mask)
        else:
            chosen = torch.tensor(allowed, device=hidden.device)
            outputs = controller(hidden[chosen], None if step.mask is None else step.mask[chosen])
        values = [1 / (1 + math.exp(-min(max(logit, -50.0), 50.0))) for logit in outputs.tolist()]
        step.controllers_s += time.perf_counter() - started
        for row, value in zip(allowed, values, strict=True):
            step.outputs[row][index] = value
        return [row for row, value in zip(allowed, values, strict=True) if value > step.threshold]

    def _wrap_output(self, hidden: Tensor) -> Any:
        """A hidden state in the container in which this model's layers answer."""
        return hidden if self._output_type is None else self._output_type((hidden, None))


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
        _check_heads(heads, layers)
    return Skipper(layers, plan, heads)


def _check_heads(heads: SkipHeads, layers: nn.ModuleList) -> None:
    """Width, kind of numbers and device must be the layers'; their norms have exactly the width."""
    mine, theirs = next(heads.parameters()), next(layers.parameters())
    widths = {p.shape[0] for name, p in layers[0].named_parameters() if p.ndim == 1 and "norm" in name}
    if widths and heads.config.hidden_size not in widths:
        raise ConfigError(f"heads: were made for a width of {heads.config.hidden_size}, the decoder has {min(widths)}.")
    is_cast = torch.is_autocast_enabled(theirs.device.type)
    for what, one, other in (("dtype", mine.dtype, theirs.dtype), ("device", mine.device, theirs.device)):
        if one != other and not (what == "dtype" and is_cast):
            raise ConfigError(f"heads: are of {what} {one}, the decoder of {other}; move them with heads.to({other}).")


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
    outermost = _outermost_lists(decoder)
    fitting = [module for module in outermost if len(module) == depth]
    if not fitting:
        depths = sorted(len(module) for module in outermost)
        raise ConfigError(f"num_layers: the plan has {depth}, the decoder's lists of layers have {depths}.")
    if len(fitting) > 1:
        raise ConfigError(f"decoder: {len(fitting)} lists of {depth} layers; pass the language model alone.")
    return fitting[0]


def find_all_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's only, or longest, list of layers.

    Raises:
        ConfigError: There is none, or two are equally long.
    """
    return find_layers(decoder, max(map(len, _outermost_lists(decoder))))


def _outermost_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists if other)
    ]
    if not outermost:
        raise ConfigError(f"decoder: {type(decoder).__name__} has no list of layers (torch.nn.ModuleList).")
    return outermost


def _padding(mask: Tensor | None) -> Tensor | None:
    """A mask that hides something, or None: pooling without one is faster."""
    return None if mask is None or mask.all() else mask


def _cache(arguments: Mapping[str, Any]) -> Any:
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def _run_rows(original: Callable[..., Any], name: str, arguments: Mapping[str, Any], rows: list[int]) -> Any:
    """A layer on some rows of a batch; the others keep their hidden state.

    Args:
        original: The layer's own forward.
        name: Of its first argument, the hidden state.
        arguments: All its arguments.
        rows: Those that run.
    """
    hidden: Tensor = arguments[name]
    others = {key: value for key, value in arguments.items() if key != name}
    chosen = torch.tensor(rows, device=hidden.device)
    if all(key in BATCH_FIRST + NOT_BATCHED or not _has_tensor(value) for key, value in others.items()):
        few = {key: _rows(v, chosen, len(hidden)) if key in BATCH_FIRST else v for key, v in others.items()}
        output = original(**{name: hidden[chosen]}, **few)
        first = output[0] if isinstance(output, (tuple, list)) else output
    else:  # which dimension of an unknown argument is the batch, nobody knows: run all rows, keep those that asked
        output = original(**arguments)
        first = (output[0] if isinstance(output, (tuple, list)) else output)[chosen]
    kept = hidden.index_copy(0, chosen, first.to(hidden.dtype))
    return type(output)((kept, *output[1:])) if isinstance(output, (tuple, list)) else kept


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch) for part in value)
    if isinstance(value, Tensor) and value.shape[0] == batch and batch > 1:
        return value[rows]
    return value
