"""Adapters by least squares: the best linear map to the input of a block's target, in one pass over some frames.

An adapter computes x + W_up silu(W_down x + b). As silu(z) - silu(-z) = z, two of its units make one linear one, so
that an adapter of n units is exactly a linear map of rank n / 2. Of that rank, the one with the smallest squared error
is that of reduced-rank regression (Izenman 1975): the full one, projected on the directions in which its predictions
vary most. Training goes on from there, and begins close to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.heads import Adapter, Controller
from dysl_vla.skip_controller.heads_trainer import mixed_precision
from dysl_vla.skip_controller.skipping import Skipper
from dysl_vla.skip_controller.torch_backend import Forward

RIDGE = 1e-4
"""Share of the mean variance of an input that is added to all of them, so that few frames suffice."""


FIT_STEPS, FIT_DECAY = 300, 1e-4
"""Steps in which controllers are fitted to all frames at once, and the decay of their weights."""


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


@torch.no_grad()
def fit_controllers(
    skipper: Skipper,
    act: Callable[[object, Forward], Tensor],
    execute_steps: int,
    batches: Sequence[tuple[object, Tensor | None]],
) -> None:
    """Fit controllers to how far a skip takes the executed actions from the full model's, on all frames at once.

    A controller's log-odds become those of a skip that is less harmful than most: minus the deviation of the error's
    logarithm from its mean. So controllers of all exits are of one scale, and a threshold means one error.

    Args:
        skipper: The decoder, attached with heads whose adapters are ready.
        act: The policy's `act`.
        execute_steps: Number of actions of a chunk that are executed.
        batches: The policy's inputs, and which tokens of the first forward are not padding (None: all).
    """
    assert skipper.heads is not None
    controllers = skipper.heads.controllers
    seen: dict[str, list[Tensor]] = {name: [] for name in controllers}
    errors: dict[str, list[Tensor]] = {name: [] for name in controllers}
    handles = [
        controller.hidden.register_forward_pre_hook(lambda _, given, kept=seen[name]: kept.append(given[0].float()))
        for name, controller in controllers.items()
        if isinstance(controller, Controller)
    ]
    try:
        for inputs, mask in batches:
            wanted = act(inputs, Forward())
            for exits in _configurations(skipper):
                with skipper.force_exits(exits, mask=mask) as forced:
                    actions = act(inputs, Forward(forced))
                error = (actions - wanted)[:, :execute_steps].abs().mean(dim=(1, 2)).float()
                for place in exits:
                    if place is not None:
                        errors[str(place)].append(error)
    finally:
        for handle in handles:
            handle.remove()
    logs = torch.cat([part for parts in errors.values() for part in parts]).clamp_min(1e-9).log()
    mean, deviation = logs.mean(), logs.std().clamp_min(1e-6)
    for name, controller in controllers.items():
        if errors[name]:
            wanted = (mean - torch.cat(errors[name]).clamp_min(1e-9).log()) / deviation
            assert isinstance(controller, Controller)
            _fit(controller, torch.cat(seen[name]), wanted)


def _configurations(skipper: Skipper) -> list[list[int | None]]:
    """Return where blocks are left: all at their exits of one rank, and each alone."""
    exits = [skipper.plan.exits_of(block) for block in skipper.plan.blocks]
    together = [
        [layers[rank] if rank < len(layers) else None for layers in exits] for rank in range(max(map(len, exits)))
    ]
    alone = [
        [place if number == block else None for number in range(len(exits))]
        for block, layers in enumerate(exits)
        for place in layers
    ]
    return together + (alone if len(exits) > 1 else [])


@torch.enable_grad()
def _fit(controller: Controller, seen: Tensor, wanted: Tensor) -> None:
    """Fit a controller's output to wanted values, (frames,), from what its first layer reads, (frames, 2 hidden)."""
    mean, deviation = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
    scaled = (seen - mean) / deviation
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(controller.hidden.weight.shape, generator=generator) / seen.shape[1] ** 0.5
    weights = [
        first.to(seen).requires_grad_(),
        torch.zeros_like(controller.hidden.bias, dtype=seen.dtype, requires_grad=True),
        torch.zeros_like(controller.out.weight[0], dtype=seen.dtype, requires_grad=True),
        torch.zeros(1, dtype=seen.dtype, device=seen.device, requires_grad=True),
    ]
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=FIT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        inside = nn.functional.silu(scaled @ weights[0].T + weights[1])
        loss = nn.functional.mse_loss(inside @ weights[2] + weights[3], wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        hidden = weights[0] / deviation
        controller.hidden.weight.copy_(hidden)
        controller.hidden.bias.copy_(weights[1] - hidden @ mean)
        controller.out.weight[0] = weights[2].to(controller.out.weight)
        controller.out.bias.copy_(weights[3])
