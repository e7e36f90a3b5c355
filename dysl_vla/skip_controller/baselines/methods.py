"""DeeR-VLA, FlexiDepth and MoLe-VLA, as far as they apply to a frozen decoder that acts from one forward.

What is left out is said at each. All of them may use adapters like ours, since the decoder is frozen, and
are trained to act as the full model does, as ours are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.baselines.running import Baseline, Pass
from dysl_vla.skip_controller.heads import Adapter, Controller, HeadsConfig, pool

EXIT_EVERY, HEAD_SIZE = 2, 256
"""Layers from one exit of DeeR to the next, and the width of an exit's head."""
ROUTER_SIZE = 64
"""Width of MoLe's router."""
SHARPNESS = 1.0
"""Weight of the difference between the layers that run and those that shall, as a share of all, in a loss."""


@dataclass(frozen=True)
class BaselineConfig:
    """The sizes of a baseline.

    Attributes:
        method: A name in `METHODS`.
        num_layers: Depth of the decoder.
        hidden_size: Width of the decoder.
        chunk_length: Number of actions of a chunk.
        action_dim: Number of dimensions of an action.
        execute_steps: Number of actions of a chunk that are executed.
        layers: Number of layers that shall run in the mean.
        adapter_size: Width of an adapter's bottleneck.

    Raises:
        ConfigError: The method is unknown, or so many layers cannot run.
    """

    method: str
    num_layers: int
    hidden_size: int
    chunk_length: int
    action_dim: int
    execute_steps: int
    layers: float
    adapter_size: int = 88

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if not 1 <= self.layers <= self.num_layers:
            raise ConfigError(f"layers must be from 1 to the policy's {self.num_layers}, got {self.layers}.")
        if self.method == "mole" and self.layers != round(self.layers):
            raise ConfigError(f"layers must be a whole number for mole, which picks so many, got {self.layers}.")
        if self.method == "deer" and self.layers < (least := self.exits[min(1, len(self.exits) - 1)] + 1):
            raise ConfigError(f"layers must be at least {least} for deer, which compares two exits, got {self.layers}.")

    @property
    def heads(self) -> HeadsConfig:
        """Return the sizes of adapters and routers."""
        return HeadsConfig(self.hidden_size, self.adapter_size)

    @property
    def exits(self) -> list[int]:
        """Return the layers behind which DeeR has exits."""
        return sorted({*range(1, self.num_layers, EXIT_EVERY), self.num_layers - 1})


class DeeR(Baseline):
    """DeeR-VLA (Yue et al. 2024, arXiv 2411.02359): leave where the actions of two depths agree.

    Each exit has a head of its own, trained on the exit's hidden states, and the rule compares the actions that are
    executed with those of the exit before; the dial is how far apart they may be. Its layer over time is left out, as
    these policies have none, and so is the training of the decoder.
    """

    rises = False
    dials = (0.0, 4.0)

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self._config = config
        self.exits = config.exits
        outputs = config.chunk_length * config.action_dim
        self.heads = nn.ModuleDict(
            {
                str(layer): nn.Sequential(
                    nn.LayerNorm(config.hidden_size),
                    nn.Linear(config.hidden_size, HEAD_SIZE),
                    nn.GELU(),
                    nn.Linear(HEAD_SIZE, outputs),
                )
                for layer in self.exits
            }
        )

    def layer(self, index: int, hidden: Tensor, run: Callable[[], Tensor], one: Pass) -> Tensor:
        """See `Baseline`."""
        if not one.is_training and one.seen and one.seen[-1] < one.dial:
            return hidden
        hidden = run()
        if index not in self.exits:
            return hidden
        config, before = self._config, one.actions
        one.actions = self.heads[str(index)](hidden[:, -1]).view(-1, config.chunk_length, config.action_dim)
        if one.is_training:
            one.terms.append(one.actions)
        elif before is not None:
            apart = (one.actions - before)[:, : config.execute_steps].abs().mean()
            one.seen.append(float(apart))
        return hidden

    def loss(self, actions: Tensor, wanted: Tensor, one: Pass, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Every exit learns the full model's actions."""
        return torch.stack([distance(each, wanted) for each in one.terms]).mean()


class FlexiDepth(Baseline):
    """FlexiDepth (Luo et al. 2025, arXiv 2503.23798): a router and an adapter at every layer but the first.

    A router weighs the layer's output and the adapter's; at inference the layer runs where its weight is above the
    dial. One decision is for all tokens, where the original decides for each: here all tokens are read at once.
    """

    rises = False

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self._config = config
        layers = range(1, config.num_layers)
        self.routers = nn.ModuleDict({str(layer): Controller(config.heads) for layer in layers})
        self.adapters = nn.ModuleDict({str(layer): Adapter(config.heads) for layer in layers})

    def layer(self, index: int, hidden: Tensor, run: Callable[[], Tensor], one: Pass) -> Tensor:
        """See `Baseline`."""
        if index == 0:
            return run()
        weight: Tensor = torch.sigmoid(self.routers[str(index)](hidden))
        if one.is_training:
            one.terms.append(weight)
            return _mixed(weight, run(), self.adapters[str(index)](hidden))
        one.seen.append(float(weight.max()))
        if one.seen[-1] > one.dial:
            return run()
        adapted: Tensor = self.adapters[str(index)](hidden)
        return adapted

    def loss(self, actions: Tensor, wanted: Tensor, one: Pass, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The actions', and how far the number of layers is from what it shall be."""
        run = 1 + torch.stack(one.terms).sum(dim=0).mean()
        depth = self._config.num_layers
        return distance(actions, wanted) + SHARPNESS * ((run - self._config.layers) / depth).abs()


class MoLe(Baseline):
    """MoLe-VLA (Zhang et al. 2025, arXiv 2503.20384): one router, from the decoder's input, picks the layers that run.

    The k layers of the highest scores run, where k is the dial; the choice is straight-through in training. Its
    distillation of a token's features and the training of the decoder are left out.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self._config = config
        self.router = nn.Sequential(
            nn.Linear(2 * config.hidden_size, ROUTER_SIZE), nn.SiLU(), nn.Linear(ROUTER_SIZE, config.num_layers)
        )
        self.adapters = nn.ModuleDict({str(layer): Adapter(config.heads) for layer in range(1, config.num_layers)})

    def layer(self, index: int, hidden: Tensor, run: Callable[[], Tensor], one: Pass) -> Tensor:
        """See `Baseline`."""
        if index == 0:  # it always runs: models count tokens there
            scores = self.router(pool(hidden, None))
            one.terms.append(self._gates(scores, max(1, round(one.dial)), soft=one.is_training))
            return run()
        gate = one.terms[0][:, index]
        if one.is_training:
            return _mixed(gate, run(), self.adapters[str(index)](hidden))
        if bool(gate.max() > 0):
            return run()
        adapted: Tensor = self.adapters[str(index)](hidden)
        return adapted

    def _gates(self, scores: Tensor, count: int, *, soft: bool) -> Tensor:
        """Return 1 for the layers that run, (batch, layers), with the gradient of their soft weights."""
        others = scores[:, 1:]
        chosen = torch.zeros_like(others)
        if count > 1:
            chosen.scatter_(1, others.topk(min(count - 1, others.shape[1]), dim=1).indices, 1.0)
        if soft:
            weights = functional.softmax(others, dim=1) * (count - 1)
            chosen = chosen + weights - weights.detach()
        return torch.cat([torch.ones_like(scores[:, :1]), chosen], dim=1)

    def loss(self, actions: Tensor, wanted: Tensor, one: Pass, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The actions' alone: the number of layers is given."""
        return distance(actions, wanted)


def _mixed(share: Tensor, layer: Tensor, adapter: Tensor) -> Tensor:
    """Mix a layer's and an adapter's output, (batch, tokens, hidden), by the layer's share, (batch,)."""
    wide = share[:, None, None]
    return wide * layer + (1 - wide) * adapter


METHODS: dict[str, Callable[[BaselineConfig], Baseline]] = {"deer": DeeR, "flexidepth": FlexiDepth, "mole": MoLe}
"""Names of the methods."""


def make_baseline(config: BaselineConfig) -> Baseline:
    """Return a method's untrained weights."""
    return METHODS[config.method](config)
