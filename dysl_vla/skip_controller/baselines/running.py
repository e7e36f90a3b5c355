"""How another method's rule decides, layer by layer, what of a wrapped decoder runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from dysl_vla.skip_controller.decoders import WrappedLayers, hidden_of


@dataclass
class Pass:
    """One forward of the decoder.

    Attributes:
        dial: The number that decides how many layers run; what it means is the method's.
        is_training: Whether the forward is soft, so that the rule has a gradient.
        layers_run: The layers that ran.
        actions: Normalised actions, (batch, chunk, action), where the method has heads of its own.
        terms: What the method's loss needs of the forward.
        seen: What the rule compared with the dial, in its order.
    """

    dial: float
    is_training: bool = False
    layers_run: list[int] = field(default_factory=list)
    actions: Tensor | None = None
    terms: list[Tensor] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)


class Baseline(nn.Module, ABC):
    """The weights and the rule of a method; a subclass says what a layer becomes."""

    rises: ClassVar[bool] = True
    """Whether more layers run with a larger dial, which is then their number; else fewer do."""
    dials: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """Where fewer run with a larger one: the dials between which all numbers of layers lie."""

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, run: Callable[[], Tensor], one: Pass) -> Tensor:
        """Return what goes on to the next layer, (batch, tokens, hidden).

        Args:
            index: Index of the layer.
            hidden: Its input, (batch, tokens, hidden).
            run: Runs the layer.
            one: The forward, in which the method may keep what it needs.
        """

    @abstractmethod
    def loss(self, actions: Tensor, wanted: Tensor, one: Pass, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the loss of a soft forward.

        Args:
            actions: The policy's normalised actions in that forward, (batch, chunk, action).
            wanted: The full model's.
            one: The forward.
            distance: How far actions are from the full model's.
        """


class BaselineRunner:
    """A decoder whose layers a baseline runs.

    Args:
        layers: The decoder's layers, which stay where they are.
        baseline: The baseline.
    """

    def __init__(self, layers: nn.ModuleList, baseline: Baseline) -> None:
        self.layers, self.baseline = layers, baseline
        self._decoder = WrappedLayers(layers, self._run)
        self._pass: Pass | None = None

    @contextmanager
    def running(self, one: Pass) -> Iterator[Pass]:
        """Let the forward in the body be the baseline's; outside, it is the full model's."""
        self._pass = one
        try:
            yield one
        finally:
            self._pass = None

    def detach(self) -> None:
        """Restore the layers' own forward."""
        self._decoder.restore()

    def _run(self, index: int, *args: Any, **kwargs: Any) -> Any:
        one, decoder = self._pass, self._decoder
        if one is None:
            return decoder.originals[index](*args, **kwargs)
        hidden = decoder.hidden(index, args, kwargs)
        arguments = decoder.arguments(index, args, dict(kwargs))

        def run() -> Tensor:
            one.layers_run.append(index)
            output: Tensor = hidden_of(decoder.run(index, arguments))
            return output

        return decoder.wrap_output(self.baseline.layer(index, hidden, run, one))


def dial_for(layers: float, low: float, high: float, measure: Callable[[float], float]) -> float:
    """Find the smallest dial at which at most so many layers run in the mean, by halving.

    Args:
        layers: The number of layers.
        low: A dial with which more run.
        high: A dial with which as few run as can be.
        measure: A dial to the mean number of layers that run, which falls with it.
    """
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(middle) <= layers else (middle, high)
    return high
