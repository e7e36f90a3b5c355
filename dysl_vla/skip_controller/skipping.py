"""Skip layers of any Hugging Face decoder in place: `attach` wraps each layer's forward, `detach` unwraps it.

The model's own forward still makes masks, rotary embeddings and caches. Outside `Skipper.step` a wrapped layer is the
layer itself. Within, each row of the batch decides for itself: at an exit behind its allow point the layer's
controller may jump to the block's static layer, whose input then comes from an adapter.

    skipper = attach(model, plan, heads)
    with skipper.step(allow_points) as step:
        output = model(inputs_embeds=...)        # or model.generate(...)
    with skipper.verify(step):
        exact = model(inputs_embeds=...)         # the full model's output, from the first skip on
    with skipper.record() as inputs:
        output = model(inputs_embeds=...)        # the full model, and the input of each of its layers
    with skipper.force_exits(exits) as forced:
        output = model(inputs_embeds=...)        # skips at the given exits, with gradients, to train the heads

Followers are other decoders of the same depth, run after it in the same step (an action expert that reads the keys and
values of each layer): in each row they skip the layers that the row skipped, and decide nothing.

The first layer always runs: models count cached tokens there, and it shows what a layer returns. `guidance` chooses
allow points, and `heads_trainer` optimises heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.decoders import MARK, WrappedLayers, cache_of, find_layers, padding
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.step import ForcedExits, Recording, Step, Verification


class Skipper:
    """A decoder whose layers are wrapped, as made by `attach`."""

    def __init__(
        self,
        layers: nn.ModuleList,
        plan: SkipPlan,
        heads: SkipHeads | None,
        followers: Sequence[nn.ModuleList] = (),
    ) -> None:
        self.layers = layers
        self.plan = plan
        self.heads = heads
        self._mode: Step | ForcedExits | Verification | Recording | None = None
        self._jump_to = 0  # the layer before which no row of the running pass has anything to run
        self._landed: list[int] = []  # for each row of the running pass, the layer that it jumps to
        self._block_of = {
            layer: (number, block.target, layer - block.first)
            for number, block in enumerate(plan.blocks)
            for layer in range(block.first, block.target)
        }
        self._exits = {layer for block in plan.blocks for layer in plan.exits_of(block)}
        self._block_at = {block.target: number for number, block in enumerate(plan.blocks)}
        self._decoder = WrappedLayers(layers, self._run_layer)
        self._followers: list[WrappedLayers] = []
        for number, follower in enumerate(followers):
            self._followers.append(WrappedLayers(follower, partial(self._run_follower, number)))
        for attached in (layers, *followers):
            attached.__dict__[MARK] = self

    def detach(self) -> None:
        """Restore the layers' own forward."""
        for wrapped in (self._decoder, *self._followers):
            wrapped.restore()
            del wrapped.layers.__dict__[MARK]

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
            allow_points: (batch, blocks), the number of dynamic layers of each block that must run before skipping is
                allowed.
            threshold: Controllers skip where their output is above it.
            mask: (batch, tokens) of the first forward, 1 for tokens and 0 for padding; None: no padding.
            force_skip: Whether rows skip at their allow points without asking controllers; a block whose point is at
                its end is not left.

        Raises:
            ConfigError: The decoder was attached without heads, the allow points are of another number of blocks,
                another step is running, or a cache holds tokens of before the step.
        """
        self._check_heads()
        if allow_points.ndim != 2 or allow_points.shape[1] != len(self.plan.blocks):
            raise ConfigError(
                f"allow_points must have the shape (batch, {len(self.plan.blocks)}), a value for each block, got "
                f"{allow_points.shape}."
            )
        step = Step(allow_points, threshold, padding(mask), force_skip)
        with self._running(step):
            yield step

    @contextmanager
    def verify(self, step: Step) -> Iterator[None]:
        """Let the first forward in the body, of the step's inputs, be the full model's, going on from the first skip.

        Its result is the full model's, bit for bit: what ran before the first skip of any row was exact, and is kept,
        the keys and values of those layers included. Later forwards in the body, the tokens of autoregressive decoding,
        run whole.

        Args:
            step: A step whose body has ended. It can be verified once.

        Raises:
            ConfigError: Another step is running, the step has not run or was verified, the cache holds tokens, or the
                step had no cache.
        """
        if not step.is_decided or step.is_verified:
            self._check_idle()
            raise ConfigError("step must have run, and can be verified once: it has not run, or was verified before.")
        with self._running(Verification(step)):
            yield

    @contextmanager
    def record(self) -> Iterator[list[list[Tensor]]]:
        """Let the forwards in the body, the full model's, also keep the input of each layer.

        Yields:
            For each forward of the decoder, the input of each layer, (batch, tokens, hidden).
        """
        recording = Recording([])
        with self._running(recording):
            yield recording.forwards

    @contextmanager
    def force_exits(
        self,
        exits: Sequence[int | None],
        *,
        is_mixture: bool = False,
        mask: Tensor | None = None,
        is_checkpointed: bool = False,
    ) -> Iterator[ForcedExits]:
        """Let the forwards in the body skip at given exits, with gradients for adapters and controllers.

        A controller's input is detached from the graph: its loss must not change the hidden states that it judges.

        Args:
            exits: For each block the exit that all rows leave it at; None: it runs whole.
            is_mixture: See `ForcedExits`.
            mask: (batch, tokens) of the first forward; None: no padding.
            is_checkpointed: Whether backward, in the body or after it, computes the layers' activations again.

        Raises:
            ConfigError: The decoder was attached without heads, or an exit is not of its block.
        """
        self._check_heads()
        blocks = self.plan.blocks
        if len(exits) != len(blocks):
            raise ConfigError(f"exits must be one for each of the plan's {len(blocks)} blocks, got {len(exits)}.")
        layers_run = np.ones(len(self.layers), np.bool_)
        for place, block in zip(exits, blocks, strict=True):
            if place is not None and place not in self.plan.exits_of(block):
                raise ConfigError(
                    f"exits must be among {self.plan.exits_of(block)}, where {block} can be left, got {place}."
                )
            if place is not None and not is_mixture:
                layers_run[place : block.target] = False
        forced = ForcedExits(tuple(exits), is_mixture, padding(mask), layers_run, is_checkpointed)
        with self._running(forced):
            yield forced

    @contextmanager
    def _running(self, mode: Step | ForcedExits | Verification | Recording) -> Iterator[None]:
        self._check_idle()
        self._mode = mode
        try:
            yield
        finally:
            self._mode = None

    def _check_idle(self) -> None:
        if self._mode is not None:
            raise ConfigError("step must be the only one, and another one is running; end it first.")

    def _check_heads(self) -> None:
        self._check_idle()
        if self.heads is None:
            raise ConfigError("heads must be attached with the decoder: skipping needs adapters and controllers.")

    # What a wrapped layer does in each mode.

    def _run_layer(self, index: int, *args: Any, **kwargs: Any) -> Any:
        mode, decoder = self._mode, self._decoder
        if mode is None:
            return decoder.originals[index](*args, **kwargs)
        if isinstance(mode, Step):
            if 0 < index < self._jump_to:  # all rows are on their way to a target: nothing to do, as fast as can be
                return decoder.wrap_output(decoder.hidden(index, args, kwargs))
            return self._skipping(index, mode, decoder.arguments(index, args, kwargs))
        if isinstance(mode, Verification):
            return self._verifying(index, mode.step, decoder.arguments(index, args, kwargs))
        if isinstance(mode, ForcedExits):
            return self._run_forced(index, mode, decoder.arguments(index, args, kwargs))
        if index == 0:
            mode.forwards.append([])
        mode.forwards[-1].append(decoder.hidden(index, args, kwargs))
        return decoder.originals[index](*args, **kwargs)

    def _run_follower(self, number: int, index: int, *args: Any, **kwargs: Any) -> Any:
        """Run a follower's layer for the rows whose decoder ran the layer of the same index."""
        mode, follower = self._mode, self._followers[number]
        if isinstance(mode, Step):
            if not mode.is_decided:
                raise ConfigError("followers must run after their decoder; one ran before it had decided what to skip.")
            active = np.flatnonzero(mode.layers_run[:, index]).tolist()
            is_whole = len(active) == len(mode.layers_run)
        elif isinstance(mode, ForcedExits):
            is_whole = bool(mode.layers_run[index])
            active = []
        else:
            return follower.originals[index](*args, **kwargs)
        arguments = follower.arguments(index, args, kwargs)
        if is_whole:
            is_checkpointed = isinstance(mode, ForcedExits) and mode.is_checkpointed
            return follower.run(index, arguments, is_checkpointed=is_checkpointed)
        hidden = follower.hidden(index, args, kwargs)
        if isinstance(mode, Step) and len(hidden) != len(mode.layers_run):
            raise ConfigError(
                f"followers must run the {len(mode.layers_run)} rows of the decoder that they follow, and one runs "
                f"{len(hidden)}."
            )
        return follower.run(index, arguments, active) if active else follower.wrap_output(hidden)

    def _verifying(self, index: int, step: Step, arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        if step.first_skip is None or step.is_verified:
            return decoder.originals[index](**arguments)
        name, cache = decoder.hidden_name(index), cache_of(arguments)
        if index < step.first_skip:
            if cache is not None:
                self._copy_cache(index, step, cache)
            return decoder.wrap_output(arguments[name])
        if index == step.first_skip:
            arguments[name], step.first_hidden = step.first_hidden, None
        step.is_verified = index == len(self.layers) - 1
        return decoder.originals[index](**arguments)

    def _copy_cache(self, index: int, step: Step, cache: Any) -> None:
        """Copy what a layer before the first skip wrote for the prompt, as the full model would, to a new cache."""
        if step.cache is None or (index == 0 and cache.get_seq_length() > 0):
            raise ConfigError("past_key_values must be an empty cache when a step and its verification begin.")
        written = step.cache.layers[index]
        cache.update(written.keys[..., : step.tokens, :], written.values[..., : step.tokens, :], index)

    def _run_forced(self, index: int, forced: ForcedExits, arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        name = decoder.hidden_name(index)
        hidden: Tensor = arguments[name]
        if index in self._block_at:
            arguments[name] = hidden = self._land(self._block_at[index], forced, hidden)
        elif index in self._block_of:
            block = self._block_of[index][0]
            place = forced.exits[block]
            if place == index:
                assert self.heads is not None
                forced.adapted[block] = self.heads.adapters[str(index)](hidden)
                if forced.is_first:
                    controller = self.heads.controllers[str(index)]
                    forced.outputs[block] = controller(hidden.detach(), forced.mask).sigmoid()
            if not forced.layers_run[index]:
                return decoder.wrap_output(hidden)
        output = decoder.run(index, arguments, is_checkpointed=forced.is_checkpointed)
        if index == len(self.layers) - 1:
            forced.is_first = False
        return output

    def _land(self, block: int, forced: ForcedExits, hidden: Tensor) -> Tensor:
        """Return the input of a block's target."""
        if forced.exits[block] is not None:
            adapted = forced.adapted[block]
            share = forced.outputs[block][:, None, None]
            hidden = share * adapted + (1 - share) * hidden if forced.is_mixture else adapted
        if forced.is_first:
            forced.targets[block] = hidden
        return hidden

    def _skipping(self, index: int, step: Step, arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        name = decoder.hidden_name(index)
        hidden: Tensor = arguments[name]
        # Decide, or repeat what the first pass decided.
        if index == 0:
            self._begin_pass(step, hidden, arguments)
        elif index in self._exits:
            hidden = arguments[name] = self._maybe_skip(index, step, hidden)
        active = [row for row, landed in enumerate(self._landed) if landed <= index]
        if not step.is_decided:
            step.layers_run[active, index] = True
            step.is_decided = index == len(self.layers) - 1
        # Run the layer for the rows that are not on their way to a target.
        if not active:
            return decoder.wrap_output(hidden)
        return decoder.run(index, arguments, None if len(active) == hidden.shape[0] else active)

    def _begin_pass(self, step: Step, hidden: Tensor, arguments: dict[str, Any]) -> None:
        batch, tokens = hidden.shape[:2]
        if batch != len(step.allow_points):
            raise ConfigError(
                f"allow_points must fit the batch; it has {len(step.allow_points)} rows, the batch has {batch}."
            )
        self._landed = [0] * batch
        self._jump_to = 0
        if step.is_decided:
            return
        cache = cache_of(arguments)
        if cache is not None and cache.get_seq_length() > 0:
            raise ConfigError("past_key_values must be an empty cache when a step begins, got one that holds tokens.")
        step.targets = [{} for _ in range(batch)]
        step.outputs = [{} for _ in range(batch)]
        step.layers_run = np.zeros((batch, len(self.layers)), np.bool_)
        step.first_skip = step.first_hidden = None
        step.tokens, step.cache = tokens, cache

    def _maybe_skip(self, index: int, step: Step, hidden: Tensor) -> Tensor:
        """Return the hidden states at an exit, with the adapter's output in the rows that leave their block there."""
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
            hidden = adapter(hidden).to(hidden.dtype)  # autocast may return another dtype
        else:
            chosen = torch.tensor(rows, device=hidden.device)
            hidden = hidden.index_copy(0, chosen, adapter(hidden[chosen]).to(hidden.dtype))
        step.adapters_s += time.perf_counter() - started
        self._jump_to = min(self._landed)
        return hidden

    def _decide(self, index: int, step: Step, hidden: Tensor) -> list[int]:
        """Return the rows that skip at a dynamic layer."""
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


def attach(
    decoder: nn.Module,
    plan: SkipPlan,
    heads: SkipHeads | None = None,
    *,
    followers: Sequence[nn.ModuleList] = (),
) -> Skipper:
    """Wrap a decoder's layers in place.

    Args:
        decoder: Any model with one list of layers of the plan's depth, or that list itself.
        plan: Which layers may be skipped.
        heads: Adapters and controllers; None: nothing can be skipped yet.
        followers: Layers of other decoders that skip what this one skips.

    Returns:
        The handle; outputs and gradients are unchanged until its `step` is used.

    Raises:
        ConfigError: The decoder has no list of layers of the plan's depth, the heads are of another plan, width, dtype
            or device, or it is attached already.
    """
    layers = find_layers(decoder, plan.num_layers)
    for number, one in enumerate((layers, *followers)):
        if MARK in one.__dict__:
            raise ConfigError(f"{'followers' if number else 'decoder'} must not be already attached; detach it first.")
        if len(one) != plan.num_layers:
            raise ConfigError(f"followers must have the plan's {plan.num_layers} layers, and one has {len(one)}.")
    if heads is not None:
        if heads.plan != plan:
            raise ConfigError(f"heads must be made for the plan, {plan}; these were made for {heads.plan}.")
        _check_heads(heads, layers)
    return Skipper(layers, plan, heads, followers)


def _check_heads(heads: SkipHeads, layers: nn.ModuleList) -> None:
    """Refuse heads whose width, dtype or device is not the layers'; the layers' norms have exactly the width."""
    mine, theirs = next(heads.parameters()), next(layers.parameters())
    widths = {p.shape[0] for name, p in layers[0].named_parameters() if p.ndim == 1 and "norm" in name}
    if widths and heads.config.hidden_size not in widths:
        raise ConfigError(f"heads must have the decoder's width of {min(widths)}, got {heads.config.hidden_size}.")
    is_cast = torch.is_autocast_enabled(theirs.device.type)
    for what, one, other in (("dtype", mine.dtype, theirs.dtype), ("device", mine.device, theirs.device)):
        if one != other and not (what == "dtype" and is_cast):
            raise ConfigError(f"heads must be of the decoder's {what} {other}, got {one}; use heads.to({other}).")


def detach(decoder: nn.Module) -> None:
    """Undo `attach`.

    Raises:
        ConfigError: The decoder is not attached.
    """
    for module in decoder.modules():
        skipper = module.__dict__.get(MARK)
        if skipper is not None:
            skipper.detach()
            return
    raise ConfigError("decoder must be attached to be detached, and is not attached.")
