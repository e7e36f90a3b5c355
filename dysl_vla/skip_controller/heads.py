"""Adapters and controllers: the only weights that layer skipping adds to a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.plan import SkipPlan

LARGEST_SHARE = 0.012
"""Largest share of a wide backbone's weights that its adapters and controllers have together."""


@dataclass(frozen=True)
class HeadsConfig:
    """Sizes of adapters and controllers.

    Attributes:
        hidden_size: Width of the decoder.
        adapter_size: Width of an adapter's bottleneck.
        controller_size: Width of a controller's hidden layer.
        follower_sizes: Widths of the decoders that follow this one, which get adapters of their own; empty: they pass
            their hidden states over what they skip.

    Raises:
        ConfigError: A size is below 1.
    """

    hidden_size: int
    adapter_size: int = 88
    controller_size: int = 16
    follower_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("hidden_size", "adapter_size", "controller_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if any(size < 1 for size in self.follower_sizes):
            raise ConfigError(f"follower_sizes must be at least 1, got {list(self.follower_sizes)}.")


class Adapter(nn.Module):
    """Maps the input of a dynamic layer to the input of the static layer that a skip lands on.

    It computes x + W_up silu(W_down x + b) for each token. W_up starts at zero, so that an untrained adapter is the
    identity. It has no norm and no second bias: where a layer takes a quarter of a millisecond, each operation counts.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.adapter_size)
        self.up = nn.Parameter(torch.zeros(config.adapter_size, config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states, (batch, tokens, hidden), to ones of the same shape."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(flat, functional.silu(self.down(flat)), self.up).view_as(hidden)


class Controller(nn.Module):
    """Decides whether to skip at a dynamic layer, from the last (read-out) token and the mean of all."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * config.hidden_size, config.controller_size)
        self.out = nn.Linear(config.controller_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the log-odds of skipping.

        Args:
            hidden: (batch, tokens, hidden).
            mask: (batch, tokens), 1 for tokens and 0 for padding; None: no padding.

        Returns:
            (batch,) log-odds, whose sigmoid is the probability.
        """
        inside = functional.silu(self.hidden(pool(hidden, mask)))
        answer: Tensor = self.out(inside)
        return answer.view(-1)


class SkipHeads(nn.Module):
    """One adapter and one controller for each layer at which a plan lets a block be left, and followers' adapters.

    Args:
        plan: The plan, which names the dynamic layers.
        config: Sizes of adapters and controllers.
    """

    def __init__(self, plan: SkipPlan, config: HeadsConfig) -> None:
        super().__init__()
        self.plan = plan
        self.config = config
        layers = plan.exits or plan.dynamic_layers
        self.adapters = nn.ModuleDict({str(layer): Adapter(config) for layer in layers})
        self.controllers = nn.ModuleDict({str(layer): Controller(config) for layer in layers})
        self.followers = nn.ModuleList(
            nn.ModuleDict({str(layer): Adapter(HeadsConfig(size, config.adapter_size)) for layer in layers})
            for size in config.follower_sizes
        )

    def follower_adapter(self, number: int, layer: int) -> nn.Module | None:
        """Return a follower's adapter at a layer at which a block may be left; None where followers have none."""
        if number >= len(self.followers):
            return None
        adapters = self.followers[number]
        assert isinstance(adapters, nn.ModuleDict)
        return adapters[str(layer)]


def adapted(adapter: Callable[[Tensor], Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
    """Return hidden states, (batch, tokens, hidden), with an adapter's output in some rows."""
    if len(rows) == len(hidden):
        return adapter(hidden).to(hidden.dtype)  # autocast may return another dtype
    chosen = torch.tensor(rows, device=hidden.device)
    return hidden.index_copy(0, chosen, adapter(hidden[chosen]).to(hidden.dtype))


def pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last token and the mean of all, (batch, 2 hidden), of (batch, tokens, hidden)."""
    if mask is None and torch.compiler.is_compiling():  # a traced tensor cannot be kept
        return torch.cat([hidden[:, -1], hidden.mean(dim=1)], dim=1)
    if mask is None:
        shares = _shares(hidden.shape[1], hidden.dtype, hidden.device)
    else:
        weights = mask.float()
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(dim=1)
        is_last = functional.one_hot(last, mask.shape[1]).float()
        shares = torch.stack([is_last, weights / weights.sum(dim=1, keepdim=True)], dim=1).to(hidden.dtype)
    return torch.matmul(shares, hidden).flatten(1)


@lru_cache(maxsize=64)
def _shares(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return each token's weight without padding, (2, tokens): a product is faster than a slice, a mean and a `cat`."""
    with torch.inference_mode(False):
        shares = torch.full((2, tokens), 1 / tokens, dtype=dtype, device=device)
        shares[0] = 0
        shares[0, -1] = 1
    return shares


def forget_shares() -> None:
    """Forget the weights of tokens that are kept between calls."""
    _shares.cache_clear()


def default_adapter_size(
    hidden_size: int, weights: int, exits: int, controller_size: int = HeadsConfig.controller_size
) -> int:
    """Return the width of an adapter's bottleneck: at most 88 beside a narrow backbone, at most 128 beside a wide one.

    Beside a wide one, all adapters and controllers together have at most 1.2 % of its weights, where controllers alone
    have fewer.

    Args:
        hidden_size: Width of the backbone.
        weights: Number of weights of its layers.
        exits: Number of layers that have an adapter and a controller.
        controller_size: Width of a controller's hidden layer.
    """
    if hidden_size <= 1024:
        return min(hidden_size, 88)
    controller = controller_size * (2 * hidden_size + 2) + 1
    size = int((LARGEST_SHARE * weights / exits - controller) / (2 * hidden_size + 1))
    return max(1, min(128, size // 8 * 8 or size))
