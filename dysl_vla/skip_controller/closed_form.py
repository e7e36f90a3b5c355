"""Adapters by least squares: the best linear map to the input of a block's target, in one pass over some frames.

An adapter computes x + W_up silu(W_down x + b). As silu(z) - silu(-z) = z, two of its units make one linear one, so
that an adapter of n units is exactly a linear map of rank n / 2. Of that rank, the one with the smallest squared error
is that of reduced-rank regression (Izenman 1975): the full one, projected on the directions in which its predictions
vary most. Training goes on from there, and begins close to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.heads import Adapter
from dysl_vla.skip_controller.heads_trainer import mixed_precision
from dysl_vla.skip_controller.skipping import Skipper
from dysl_vla.skip_controller.torch_backend import Forward

RIDGE = 1e-4
"""Share of the mean variance of an input that is added to all of them, so that few frames suffice."""


class _Moments:
    """Sums over tokens from which a linear map follows: of inputs, with a one, and of what an adapter adds to them."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.inputs = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=like.device)
        self.products = torch.zeros(size + 1, size, dtype=torch.float64, device=like.device)

    def add(self, inputs: Tensor, targets: Tensor, mask: Tensor | None) -> None:
        """Add the tokens of one forward, (batch, tokens, hidden)."""
        rows, wanted = (value.flatten(0, 1).double() for value in (inputs, targets - inputs))
        if mask is not None:
            kept = mask.flatten().bool()
            rows, wanted = rows[kept], wanted[kept]
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self.inputs.addmm_(rows.T, rows)
        self.products.addmm_(rows.T, wanted)

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best map of a rank as two factors, (hidden + 1, rank) and (rank, hidden)."""
        ridge = RIDGE * self.inputs.diagonal()[:-1].mean()
        padded = self.inputs + ridge * torch.eye(len(self.inputs), dtype=torch.float64, device=self.inputs.device)
        padded[-1, -1] -= ridge  # the constant is free
        full = torch.linalg.solve(padded, self.products)
        _, _, directions = torch.linalg.svd(torch.linalg.cholesky(padded).T @ full, full_matrices=False)
        kept = directions[:rank]
        return full @ kept.T, kept


@torch.no_grad()
def fit_adapters(
    skipper: Skipper,
    act: Callable[[object, Forward], Tensor],
    batches: Iterable[tuple[object, Tensor | None]],
) -> None:
    """Set the adapters of an attached decoder to their best linear maps, of the rank that their size allows.

    Args:
        skipper: The decoder, attached with heads.
        act: The policy's `act`.
        batches: The policy's inputs, and which tokens of the first forward are not padding (None: all).

    Raises:
        ConfigError: The policy's `act` ran no layer.
    """
    assert skipper.heads is not None
    adapters, plan = skipper.heads.adapters, skipper.plan
    pairs = {layer: block.target for block in plan.blocks for layer in plan.exits_of(block)}
    moments: dict[int, _Moments] = {}
    for inputs, mask in batches:
        with mixed_precision(skipper.layers), skipper.record() as forwards:
            act(inputs, Forward())
        if not forwards:
            raise ConfigError("act must run the policy's `layers`, and ran none; name the decoder's own list.")
        for number, layers in enumerate(forwards):
            for layer, target in pairs.items():
                found = moments.setdefault(layer, _Moments(layers[layer].shape[-1], layers[layer]))
                found.add(layers[layer], layers[target], None if number else mask)
    for layer, found in moments.items():
        adapter = adapters[str(layer)]
        assert isinstance(adapter, Adapter)
        _set_linear(adapter, found)


def _set_linear(adapter: Adapter, moments: _Moments) -> None:
    units = len(adapter.up)
    rank = min(units // 2, adapter.up.shape[1])
    down, up = moments.solve(rank)
    scale = down[:-1].norm(dim=0).clamp_min(1e-12)  # both factors of a size, as an optimizer likes them
    scale = (scale / up.norm(dim=1).clamp_min(1e-12)).sqrt()
    down, up = down / scale, up * scale[:, None]
    adapter.up.zero_()  # units that are left over stay as they begin
    for sign, start in ((1, 0), (-1, rank)):
        part = slice(start, start + rank)
        adapter.down.weight[part] = sign * down[:-1].T.to(adapter.down.weight)
        adapter.down.bias[part] = sign * down[-1].to(adapter.down.bias)
        adapter.up[part] = sign * up.to(adapter.up)
