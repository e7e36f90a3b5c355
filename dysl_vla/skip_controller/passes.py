"""The forwards of a step: each row of the batch decides for itself where to leave a block, and waits for its target."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.caches import (
    cache_of,
    check_measured,
    check_new,
    check_whole,
    holds_tokens,
    mark_skips,
    states_of,
)
from dysl_vla.skip_controller.compatibility import check_arguments
from dysl_vla.skip_controller.decoders import WrappedLayers, hidden_of
from dysl_vla.skip_controller.heads import SkipHeads, adapted
from dysl_vla.skip_controller.step import Step


@dataclass(frozen=True)
class Attached:
    """An attached decoder, and what follows from its plan.

    Attributes:
        layers: The decoder's layers.
        heads: Adapters and controllers.
        block_of: Dynamic layer to the number of its block, the block's target, and its place in the block.
        exits: Layers at which a block may be left.
        skippable: Layers that a row may skip.
        shares_keys: Whether layers read keys and values of others.
    """

    layers: WrappedLayers
    heads: SkipHeads | None
    block_of: Mapping[int, tuple[int, int, int]]
    exits: frozenset[int]
    skippable: frozenset[int]
    shares_keys: bool


class SkippingPasses:
    """The forwards of one step, one after the other.

    Args:
        step: The step, which keeps what is decided.
        attached: The decoder that runs.

    Attributes:
        step: The step.
        jump_to: The layer before which no row of the running forward has anything to run.
    """

    def __init__(self, step: Step, attached: Attached) -> None:
        self.step = step
        self.jump_to = 0
        self._attached = attached
        self._index = -1  # the layer that ran last
        self._landed: list[int] = []  # for each row of the running forward, the layer that it jumps to
        self._passing: Tensor | None = None  # what the layer before answered

    def run(self, index: int, arguments: dict[str, Any]) -> Any:
        """Run a layer, for the rows that are not on their way to a target.

        Args:
            index: Index of the layer.
            arguments: All its arguments, by name.
        """
        step, decoder = self.step, self._attached.layers
        name = decoder.hidden_name(index)
        hidden: Tensor = arguments[name]
        # Decide, or repeat what the first pass decided.
        if index == 0:
            self._begin_pass(hidden, arguments)
        else:
            hidden = arguments[name] = self.arrived(index, hidden)
        if index in self._attached.exits:
            hidden = arguments[name] = self._maybe_skip(index, hidden)
        active = [row for row, landed in enumerate(self._landed) if landed <= index]
        if not step.is_decided:
            step.layers_run[active, index] = True
            step.is_decided = index == len(decoder.originals) - 1
        # Run the layer for the rows that are not on their way to a target.
        if not active:
            self._passing = hidden
            return decoder.wrap_output(hidden)
        output = decoder.run(index, arguments, None if len(active) == len(self._landed) else active)
        self._passing = hidden_of(output)
        return output

    def arrived(self, index: int, hidden: Tensor) -> Tensor:
        """Return a layer's input, in which rows on their way have what their adapter gave, and nothing else.

        A model may add to hidden states between layers (deepstack); an adapter's output includes that.

        Args:
            index: Index of the layer, above 0.
            hidden: What the model calls it with, (batch, tokens, hidden).

        Raises:
            ConfigError: It is not the next layer, or the model changed the shape of the hidden states.
        """
        if index != self._index + 1:
            raise ConfigError(f"layers must run in order and once in each forward; {self._index} was before {index}.")
        self._index = index
        if hidden is self._passing:
            return hidden
        rows = [row for row, landed in enumerate(self._landed) if landed >= index]
        if not rows:
            return hidden
        assert self._passing is not None
        if hidden.shape != self._passing.shape:
            raise ConfigError(
                f"static_layers must include {index - 1}: the model changes the shape of hidden states behind it, from "
                f"{tuple(self._passing.shape)} to {tuple(hidden.shape)}, while rows skip; or keep the shape "
                "(logits_to_keep=0)."
            )
        before = self._passing.to(hidden)
        if len(rows) == len(self._landed):
            self._passing = before
            return before
        chosen = torch.tensor(rows, device=hidden.device)
        return hidden.index_copy(0, chosen, before[chosen])

    def _begin_pass(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        check_arguments(arguments, self._attached.layers.hidden_name(0), self._attached.shares_keys)
        batch = len(hidden)
        if batch != len(self.step.allow_points):
            raise ConfigError(
                f"allow_points must fit the batch; it has {len(self.step.allow_points)} rows, the batch has {batch}."
            )
        self._index = 0
        self._landed = [0] * batch
        self.jump_to = 0
        cache = cache_of(arguments)
        if cache is not None:
            self._check_cache(cache)
        if self.step.is_decided:
            return
        self.step.targets = [{} for _ in range(batch)]
        self.step.outputs = [{} for _ in range(batch)]
        self.step.layers_run = np.zeros((batch, len(self._attached.layers.layers)), np.bool_)
        self.step.first_skip = self.step.first_hidden = None
        self.step.cache, self.step.states = cache, []

    def _check_cache(self, cache: Any) -> None:
        """Refuse a cache that the pass cannot go on from; tokens that it may hold were written in this step."""
        if not self.step.is_decided:
            check_new(cache)
            return
        check_whole(cache, self.step.number)
        if holds_tokens(cache):
            check_measured(cache, self._attached.skippable)
        if self.step.first_skip is not None:
            mark_skips(cache, self.step.number)

    def _maybe_skip(self, index: int, hidden: Tensor) -> Tensor:
        """Return the hidden states at an exit, with the adapter's output in the rows that leave their block there."""
        if self.step.is_decided:
            rows = [row for row, targets in enumerate(self.step.targets) if index in targets]
        else:
            rows = self._decide(index, hidden)
        if not rows:
            return hidden
        heads = self._attached.heads
        assert heads is not None
        target = self._attached.block_of[index][1]
        for row in rows:
            self._landed[row] = target
        if not self.step.is_decided:
            for row in rows:
                self.step.targets[row][index] = target
            if self.step.first_skip is None:
                self.step.first_skip, self.step.first_hidden = index, hidden
                if self.step.cache is not None:
                    self.step.states = states_of(self.step.cache, index)
                    mark_skips(self.step.cache, self.step.number)
        adapter = heads.adapters[str(index)].forward  # a call takes a tenth longer; hooks on heads do not run
        started = time.perf_counter()
        hidden = adapted(adapter, hidden, rows)
        self.step.adapters_s += time.perf_counter() - started
        self.jump_to = min(self._landed)
        return hidden

    def _decide(self, index: int, hidden: Tensor) -> list[int]:
        """Return the rows that skip at a dynamic layer."""
        block, _, offset = self._attached.block_of[index]
        allowed = [
            row
            for row, landed in enumerate(self._landed)
            if landed <= index and offset >= self.step.allow_points[row, block]
        ]
        if not allowed or self.step.force_skip:
            return allowed
        heads = self._attached.heads
        assert heads is not None
        started = time.perf_counter()
        controller = heads.controllers[str(index)].forward
        mask = None if self.step.mask is None else self.step.mask.to(hidden.device)
        if len(allowed) == hidden.shape[0]:
            outputs = controller(hidden, mask)
        else:
            chosen = torch.tensor(allowed, device=hidden.device)
            outputs = controller(hidden[chosen], None if mask is None else mask[chosen])
        values = [1 / (1 + math.exp(-min(max(logit, -50.0), 50.0))) for logit in outputs.tolist()]
        self.step.controllers_s += time.perf_counter() - started
        for row, value in zip(allowed, values, strict=True):
            self.step.outputs[row][index] = value
        return [row for row, value in zip(allowed, values, strict=True) if value > self.step.threshold]
