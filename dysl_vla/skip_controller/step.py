"""The four modes of an attached decoder, one at a time; outside of them, it runs its own forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_numbers = count(1)


@dataclass
class Step:
    """One control step of a batch, while it runs and after.

    Attributes:
        allow_points: (batch, blocks), the number of dynamic layers of each block that must run before skipping is
            allowed.
        threshold: Controllers skip where their output is above it.
        mask: (batch, tokens), 1 for tokens and 0 for padding; None: no padding.
        force_skip: Whether rows skip at their allow points without asking a controller.
        targets: For each row, the layer that each skip jumps to: {layer skipped at: target}.
        outputs: For each row, the controllers' outputs by layer.
        layers_run: Which layers ran in the deciding pass, (batch, layers).
        first_skip: The first layer at which any row skipped; None when none did.
        first_hidden: The input of that layer, (batch, tokens, hidden), which is exactly the full model's.
        controllers_s: Seconds of the host in controllers. It waits for their outputs, so that on an accelerator all
            work that was queued before them is included.
        adapters_s: Seconds of the host in adapters; on an accelerator these queue the work, and do not wait for it.
        cache: Keys and values of the step, where the model keeps them.
        states: The cache's states of the layers before the first skip, as the deciding pass left them.
        is_decided: Whether the deciding pass has ended; later ones keep its decisions.
        is_verified: Whether the full model's output has been computed from it.
        number: A number that no other step of the process has.
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
    controllers_s: float = 0.0
    adapters_s: float = 0.0
    cache: Any = None
    states: list[tuple[type, dict[str, Any]]] = field(default_factory=list)
    is_decided: bool = False
    is_verified: bool = False
    number: int = field(default_factory=_numbers.__next__)


@dataclass
class ForcedExits:
    """Forwards for training: where they skip, and what the first of them computed.

    Attributes:
        exits: For each block, the dynamic layer that it is left at; None: it runs whole.
        is_mixture: Whether targets get c adapter(x) + (1 - c) layers(x) (DySL-VLA, section 3.4) instead of the
            adapter's output alone.
        mask: (batch, tokens) of the first forward; None: no padding.
        layers_run: Which layers run, (layers,).
        has_gradient: Whether the caller computes gradients.
        is_checkpointed: Whether backward computes the activations of layers again.
        outputs: Block to the controller's output at its exit in the first forward, (batch,).
        targets: Block to the input of its target in the first forward, (batch, tokens, hidden).
        adapted: Block to the adapter's output in the running forward, (batch, tokens, hidden).
        is_first: Whether the first forward has not ended yet.
        number: A number that no other step of the process has.
    """

    exits: tuple[int | None, ...]
    is_mixture: bool
    mask: Tensor | None
    layers_run: NDArray[np.bool_]
    has_gradient: bool
    is_checkpointed: bool = False
    outputs: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    adapted: dict[int, Tensor] = field(default_factory=dict)
    is_first: bool = True
    number: int = field(default_factory=_numbers.__next__)


@dataclass
class Verification:
    """A pass that goes on from a step's first skip, with all layers.

    Attributes:
        step: The step that is verified.
    """

    step: Step


@dataclass
class Recording:
    """Forwards of the full model, and the inputs of its layers.

    Attributes:
        forwards: For each forward, the input of each layer, (batch, tokens, hidden).
    """

    forwards: list[list[Tensor]]
