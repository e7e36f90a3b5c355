"""A skipping decoder as data flow: what `skipping` does with control flow, in operations that an exporter can trace.

Each layer becomes a condition (`torch.cond`), so that one graph answers for every pattern of skips, and a layer that is
skipped is not computed. It is for a batch of one, and one forward in each control step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dysl_vla.denoising import SEEN
from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.decoders import MARK, find_layers
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan

EMBEDS = "inputs_embeds"


class ConditionalDecoder(nn.Module):
    """A decoder with its adapters and controllers, to be exported.

    Args:
        decoder: A Hugging Face decoder, not attached, whose layers answer a tensor.
        plan: Which layers may be skipped.
        heads: The plan's adapters and controllers.
        decode: Maps the decoder's output, (1, tokens, hidden), to what the graph returns; None where that is what its
            layers write.

    Attributes:
        exits: Layers at which a block may be left, in the order of the outputs about them.

    Raises:
        ConfigError: The decoder has no list of layers of the plan's depth or is attached, or nothing can be skipped.
    """

    def __init__(self, decoder: nn.Module, plan: SkipPlan, heads: SkipHeads, decode: nn.Module | None) -> None:
        super().__init__()
        self.decoder, self.heads, self.decode = decoder, heads, decode
        self._layers = _layers_of(decoder, plan)
        self._block_of = {
            layer: (number, layer - block.first)
            for number, block in enumerate(plan.blocks)
            for layer in range(block.first, block.target)
        }
        self.exits = [layer for block in plan.blocks for layer in plan.exits_of(block)]
        self._without_cache = _without_cache(decoder)
        self._running: list[Callable[..., Any]] = []

    def forward(
        self, inputs: Mapping[str, Tensor], allow_points: Tensor, threshold: Tensor, resume_from: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one pass.

        Args:
            inputs: The decoder's arguments; `inputs_embeds`, (1, tokens, hidden), is among them. To resume, it is the
                hidden state at the first skip, which the pass before returned. `SEEN` is for controllers alone.
            allow_points: (blocks,), the number of dynamic layers of each block that must run before it may be left.
            threshold: Log-odds of a controller above which a block is left.
            resume_from: The first layer to run; all behind it run, too. 0 runs the whole decoder, with skips.

        Returns:
            The output of `decode`, or what the layers write; for each exit whether its controller was asked, its
            log-odds, and whether the block was left there, (exits,); the input of the first layer that a block was left
            at, (1, tokens, hidden).
        """
        run, decided = self._runner(inputs, allow_points, threshold, resume_from)
        self._running.append(run)
        arguments = {name: value for name, value in inputs.items() if name != SEEN}
        hidden = self.decoder(**arguments, **self._without_cache).last_hidden_state
        self._running.pop()
        asked, logits, lefts, first, written = decided()
        answers = written if self.decode is None else [self.decode(hidden)]
        return (*answers, torch.stack(asked), torch.stack(logits), torch.stack(lefts), first)

    def layer(
        self, index: int, original: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[[Tensor], tuple[Tensor, ...]]]:
        """Return what runs a layer, and what stands in for one that does not run.

        Both map hidden states to the next, and to what else a layer writes; it is copied, as conditions ask for.

        Args:
            index: The layer's number.
            original: Its own forward.
            arguments: What it gets beside hidden states.
            named: What it gets by name.
        """
        return lambda h: (original(h, *arguments, **named),), lambda h: (h.clone(),)

    def _runner(
        self, inputs: Mapping[str, Tensor], allow_points: Tensor, threshold: Tensor, resume_from: Tensor
    ) -> tuple[Callable[..., Any], Callable[[], tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, list[Tensor]]]]:
        """Return a function that runs the layers of one pass, and one that returns afterwards what was decided.

        What changes from layer to layer is kept in variables of this call, which every exporter can trace.
        """
        skips = resume_from == 0
        asked: list[Tensor] = []
        logits: list[Tensor] = []
        lefts: list[Tensor] = []
        written: list[Tensor] = []
        has_left = torch.zeros_like(skips)  # whether any block was left
        is_passed: Tensor | None = None  # whether the running block was left
        first = torch.zeros_like(inputs[EMBEDS])
        mask = inputs.get(SEEN, inputs.get("attention_mask"))

        def leave(hidden: Tensor, index: int) -> Tensor:
            """Ask the controller of an exit, and let the adapter take the place of what is skipped."""
            nonlocal has_left, is_passed, first
            # Is the controller asked, and does it leave the block?
            number, offset = self._block_of[index]
            controller, adapter = self.heads.controllers[str(index)], self.heads.adapters[str(index)]
            asks = skips & (allow_points[number] <= offset)
            asks = asks if is_passed is None else asks & ~is_passed
            [logit] = torch.cond(asks, lambda h: controller(h, mask), lambda h: h.new_zeros(1), (hidden,))
            leaves = asks & (logit > threshold)
            # Keep what resuming will need, and what was decided.
            first = torch.cond(
                leaves & ~has_left, lambda h, _: h.clone(), lambda _, kept: kept.clone(), (hidden, first)
            )
            has_left = has_left | leaves
            is_passed = leaves if is_passed is None else is_passed | leaves
            asked.append(asks)
            logits.append(logit)
            lefts.append(leaves)
            landed: Tensor = torch.cond(leaves, adapter, lambda h: h.clone(), (hidden,))
            return landed

        def run(index: int, original: Callable[..., Any], hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            """Run a layer, unless its block was left, or a pass that resumes begins later."""
            nonlocal is_passed
            if index not in self._block_of:
                is_passed = None
            elif index in self.exits:
                hidden = leave(hidden, index)
            passes = index < resume_from if is_passed is None else is_passed | (index < resume_from)
            runs, stands_in = self.layer(index, original, arguments, named)
            landed, *others = torch.cond(passes, stands_in, runs, (hidden,))
            written.extend(others)
            return landed

        return run, lambda: (asked, logits, lefts, first, written)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the decoder's layers as conditions in the body. Outside of it, `forward` must not be called.

        This is not done in `forward`, because exporters before torch 2.12 cannot trace it.
        """

        def run(*arguments: Any, **named: Any) -> Any:
            return self._running[-1](*arguments, **named)

        with _replaced(self._layers, run):
            try:
                yield
            finally:
                self._running.clear()


class PrunedDecoder(nn.Module):
    """A decoder's shortest path, to be exported without the layers that it passes.

    Args:
        decoder: A Hugging Face decoder, not attached, whose layers answer a tensor.
        plan: Which layers may be skipped.
        heads: The plan's adapters; the controllers are not used.
        decode: Maps the decoder's output, (1, tokens, hidden), to what the graph returns.

    Raises:
        ConfigError: The decoder has no list of layers of the plan's depth or is attached, or nothing can be skipped.
    """

    def __init__(self, decoder: nn.Module, plan: SkipPlan, heads: SkipHeads, decode: nn.Module) -> None:
        super().__init__()
        self.decoder, self.decode = decoder, decode
        self._layers = _layers_of(decoder, plan)
        self.adapters = nn.ModuleDict({str(layer): heads.adapters[str(layer)] for layer in plan.first_exits})
        self._path = frozenset(plan.shortest_path)
        self._without_cache = _without_cache(decoder)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the decoder's shortest path on its arguments, and return the output of `decode`."""
        answer: Tensor = self.decode(self.decoder(**inputs, **self._without_cache).last_hidden_state)
        return answer

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the shortest path in the body. Outside of it, `forward` runs all layers."""

        def run(index: int, original: Callable[..., Any], hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            if index in self._path:
                return original(hidden, *arguments, **named)
            return self.adapters[str(index)](hidden) if str(index) in self.adapters else hidden

        with _replaced(self._layers, run):
            yield


def _layers_of(decoder: nn.Module, plan: SkipPlan) -> list[nn.Module]:
    """Return the layers of a decoder of which some can be left out.

    Raises:
        ConfigError: It has no list of layers of the plan's depth or is attached, or nothing can be skipped.
    """
    layers = find_layers(decoder, plan.num_layers)
    if MARK in layers.__dict__:
        raise ConfigError("decoder must not be attached yet; detach it first.")
    if not any(plan.exits_of(block) for block in plan.blocks):
        raise ConfigError(f"plan must have an exit after layer 0, which always runs, got {plan}.")
    return list(layers)


def _without_cache(decoder: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(decoder.forward).parameters else {}


@contextmanager
def _replaced(layers: list[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Call `run` with an index, the layer's own forward, and its arguments, in the place of each layer, in the body."""

    def replacing(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: run(index, original, *arguments, **named)

    for index, layer in enumerate(layers):
        layer.forward = replacing(index, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
