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
values of each layer): in each row they skip the layers that the row skipped, and decide nothing. They may have adapters
of their own, which stand in for what they skip.

The first layer always runs: models count cached tokens there, and it shows what a layer returns. `guidance` chooses
allow points, and `heads_trainer` optimises heads.

A step, and each of the other modes, belongs to the thread that enters it: forwards of other threads run the full model
meanwhile, and another thread that enters one waits until it has ended. A copy of an attached model (`copy.deepcopy`,
`pickle`, `torch.save`) is attached to copies of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.caches import (
    cache_of,
    check_measured,
    check_new,
    check_whole,
    holds_tokens,
    mark_skips,
    restore_state,
)
from dysl_vla.skip_controller.compatibility import (
    check_arguments,
    check_followers,
    check_heads,
    check_shared_keys,
    skippable_layers,
)
from dysl_vla.skip_controller.decoders import (
    MARK,
    WrappedLayers,
    argument_names,
    call,
    find_layers,
    padding,
)
from dysl_vla.skip_controller.heads import SkipHeads, adapted
from dysl_vla.skip_controller.passes import Attached, SkippingPasses
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
        self._idle()
        self._block_of = {
            layer: (number, block.target, layer - block.first)
            for number, block in enumerate(plan.blocks)
            for layer in range(block.first, block.target)
        }
        self._block_at = {block.target: number for number, block in enumerate(plan.blocks)}
        self._shares_keys = check_shared_keys(layers, plan)
        self._decoder = WrappedLayers(layers, self._run_layer)
        self._attached = Attached(
            self._decoder,
            heads,
            self._block_of,
            frozenset(layer for block in plan.blocks for layer in plan.exits_of(block)),
            skippable_layers(plan),
            self._shares_keys,
        )
        self._followers = [
            WrappedLayers(follower, self._run_follower, number) for number, follower in enumerate(followers)
        ]
        for attached in (layers, *followers):
            attached.__dict__[MARK] = self

    def _idle(self) -> None:
        self._lock = Lock()  # held as long as a mode runs
        self._owner = 0  # the thread whose forwards the mode is for
        self._mode: SkippingPasses | ForcedExits | Verification | Recording | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_owner", "_mode")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._idle()

    def detach(self) -> None:
        """Restore the layers' own forward, when no other thread uses it.

        Raises:
            ConfigError: A step is running.
        """
        self._check_idle()
        with self._lock:
            for wrapped in (self._decoder, *self._followers):
                wrapped.restore()
                wrapped.layers.__dict__.pop(MARK, None)

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
                this thread runs another step, the layers were replaced since, or a cache cannot be used in a step.
        """
        self._check_heads()
        if allow_points.ndim != 2 or allow_points.shape[1] != len(self.plan.blocks):
            raise ConfigError(
                f"allow_points must have the shape (batch, {len(self.plan.blocks)}), a value for each block, got "
                f"{allow_points.shape}."
            )
        step = Step(allow_points, threshold, padding(mask), force_skip)
        with self._running(SkippingPasses(step, self._attached)):
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
            ConfigError: Another step is running, the step has not run or was verified, an earlier verification of it
                failed, the cache holds tokens, or the step had no cache.
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
        has_gradient = torch.is_grad_enabled()
        forced = ForcedExits(tuple(exits), is_mixture, padding(mask), layers_run, has_gradient, is_checkpointed)
        with self._running(forced):
            yield forced

    @contextmanager
    def _running(self, mode: SkippingPasses | ForcedExits | Verification | Recording) -> Iterator[None]:
        self._check_idle()
        with self._lock:
            for wrapped in (self._decoder, *self._followers):
                wrapped.check_intact()
            self._owner, self._mode = get_ident(), mode
            try:
                yield
            finally:
                self._mode, self._owner = None, 0

    def _check_idle(self) -> None:
        """Refuse what would wait for this thread itself; other threads wait for each other."""
        if self._mode is not None and self._owner == get_ident():
            raise ConfigError("step must be the only one, and another one is running; end it first.")

    def _check_heads(self) -> None:
        self._check_idle()
        if self.heads is None:
            raise ConfigError("heads must be attached with the decoder: skipping needs adapters and controllers.")

    # What a wrapped layer does in each mode.

    def _run_layer(self, index: int, *args: Any, **kwargs: Any) -> Any:
        mode, decoder = self._mode, self._decoder
        if mode is None or self._owner != get_ident():
            if index == 0:
                check_whole(cache_of(kwargs if len(args) < 2 else decoder.arguments(0, args, dict(kwargs))))
            return decoder.originals[index](*args, **kwargs)
        if isinstance(mode, SkippingPasses):
            if 0 < index < mode.jump_to:  # all rows are on their way to a target: nothing to do, as fast as can be
                return decoder.wrap_output(mode.arrived(index, decoder.hidden(index, args, kwargs)))
            return mode.run(index, decoder.arguments(index, args, kwargs))
        if isinstance(mode, Verification):
            return self._verifying(index, mode.step, decoder.arguments(index, args, kwargs))
        if isinstance(mode, ForcedExits):
            return self._run_forced(index, mode, decoder.arguments(index, args, kwargs))
        if index == 0:
            check_whole(cache_of(decoder.arguments(0, args, dict(kwargs))))
            mode.forwards.append([])
        mode.forwards[-1].append(decoder.hidden(index, args, kwargs))
        return decoder.originals[index](*args, **kwargs)

    def _run_follower(self, number: int, index: int, *args: Any, **kwargs: Any) -> Any:
        """Run a follower's layer for the rows whose decoder ran the layer of the same index."""
        mode, follower = self._mode, self._followers[number]
        if mode is None or self._owner != get_ident():
            return follower.originals[index](*args, **kwargs)
        if not isinstance(mode, (SkippingPasses, ForcedExits)):
            return follower.originals[index](*args, **kwargs)
        hidden, name = follower.hidden(index, args, kwargs), follower.hidden_name(index)
        # Which rows run, and which leave their block here?
        if isinstance(mode, ForcedExits):
            active = list(range(len(hidden))) if mode.layers_run[index] else []
            leaving = [] if active or index not in mode.exits else list(range(len(hidden)))
        else:
            step = mode.step
            if not step.is_decided:
                raise ConfigError("followers must run after their decoder; one ran before it had decided what to skip.")
            if len(hidden) != len(step.layers_run):
                raise ConfigError(
                    f"followers must run the {len(step.layers_run)} rows of the decoder that they follow, and one runs "
                    f"{len(hidden)}."
                )
            active = np.flatnonzero(step.layers_run[:, index]).tolist()
            leaving = [row for row, targets in enumerate(step.targets) if index in targets]
        # Their adapter stands in for what they skip.
        hidden = self._adapted(number, index, hidden, leaving)
        if not active:
            return follower.wrap_output(hidden)
        arguments = {**follower.arguments(index, args, kwargs), name: hidden}
        if len(active) < len(hidden):
            return follower.run(index, arguments, active)
        return follower.run(index, arguments, is_checkpointed=isinstance(mode, ForcedExits) and mode.is_checkpointed)

    def _adapted(self, number: int, index: int, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Return a follower's hidden states, with those of its adapter in the rows that leave their block."""
        adapter = self.heads.follower_adapter(number, index) if rows and self.heads is not None else None
        return hidden if adapter is None else adapted(adapter, hidden, rows)

    def _verifying(self, index: int, step: Step, arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        name, cache = decoder.hidden_name(index), cache_of(arguments)
        if step.first_skip is None or step.is_verified:
            return call(decoder.originals[index], name, arguments)
        if index == 0 and step.first_hidden is None:
            raise ConfigError(
                "step must not have begun another verification: an earlier one failed after it had used up what the "
                "step keeps; run the step again."
            )
        if index == 0 and cache is not None:
            if step.cache is None:
                raise ConfigError("past_key_values must be in the step, too, when its verification has a cache.")
            check_new(cache)
        is_whole = self._shares_keys  # what the first layers hand to later ones is not kept
        if index < step.first_skip and not is_whole:
            if cache is not None:
                restore_state(cache, index, step.states[index])
            return decoder.wrap_output(arguments[name])
        if index == step.first_skip:
            arguments[name] = arguments[name] if is_whole else step.first_hidden
            step.first_hidden, step.states = None, []
        step.is_verified = index == len(self.layers) - 1
        return call(decoder.originals[index], name, arguments)

    def _run_forced(self, index: int, forced: ForcedExits, arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        name = decoder.hidden_name(index)
        hidden: Tensor = arguments[name]
        if index == 0:
            self._begin_forced(forced, arguments)
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
                    mask = None if forced.mask is None else forced.mask.to(hidden.device)
                    forced.outputs[block] = controller(hidden.detach(), mask).sigmoid()
            if not forced.layers_run[index]:
                return decoder.wrap_output(hidden)
        output = decoder.run(index, arguments, is_checkpointed=forced.is_checkpointed)
        if index == len(self.layers) - 1:
            forced.is_first = False
        return output

    def _begin_forced(self, forced: ForcedExits, arguments: dict[str, Any]) -> None:
        check_arguments(arguments, self._decoder.hidden_name(0), self._shares_keys)
        if forced.is_first and forced.has_gradient and not torch.is_grad_enabled():
            raise ConfigError(
                "act must return actions with a gradient, which heads learn from, and its decoder runs without one; "
                "where `forward.needs_gradient` is set, run it outside of torch.no_grad and torch.inference_mode, and "
                "set use_reentrant=False where gradient checkpointing is around whole layers."
            )
        cache = cache_of(arguments)
        if cache is None or forced.layers_run.all():
            return
        if forced.is_first:
            check_new(cache)
        check_whole(cache, forced.number)
        if holds_tokens(cache):
            check_measured(cache, self._attached.skippable)
        mark_skips(cache, forced.number)

    def _land(self, block: int, forced: ForcedExits, hidden: Tensor) -> Tensor:
        """Return the input of a block's target."""
        if forced.exits[block] is not None:
            adapted = forced.adapted[block]
            share = forced.outputs[block][:, None, None]
            hidden = share * adapted + (1 - share) * hidden if forced.is_mixture else adapted
        if forced.is_first:
            forced.targets[block] = hidden
        return hidden


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
        ConfigError: The decoder has no list of layers of the plan's depth, or several; it is attached already; its
            layers hide their arguments, or the plan may skip one whose keys and values others read; or the heads are of
            another plan, width, dtype or device. Nothing is wrapped then.
    """
    layers = find_layers(decoder, plan.num_layers)
    for number, one in enumerate((layers, *followers)):
        if MARK in one.__dict__:
            raise ConfigError(f"{'followers' if number else 'decoder'} must not be already attached; detach it first.")
        if len(one) != plan.num_layers:
            raise ConfigError(f"followers must have the plan's {plan.num_layers} layers, and one has {len(one)}.")
        if len({id(layer) for layer in one}) < len(one):
            raise ConfigError("layers must each be in the list once; one that runs twice in a forward cannot skip.")
        for layer in one:
            argument_names(layer)
    if heads is not None:
        check_heads(heads, plan, layers)
        check_followers(heads, followers)
    return Skipper(layers, plan, heads, followers)


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
