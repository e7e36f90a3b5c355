"""Training of adapters and controllers against the frozen decoder that they belong to (DySL-VLA, section 3.4).

Stage 1 trains adapters alone: each learns to predict its target's input in the full model, all from one forward of it.
Stage 2 trains adapters and controllers: each block is left at one of its exits, and what counts is the action that
comes out. The paper draws the exit for each block, with probability ~ 1/rank; then all blocks are hardly ever left at
their first layer together, which is what every unimportant action does. So most steps draw one rank for all blocks, and
the others draw as the paper does. Stage 2 has two objectives:
`tolerance` (default): the forward really skips, which costs the layers that run. Adapters get the loss of the action;
a controller learns the probability that leaving at its layer, into a target, keeps the executed actions within a
tolerance of the full model's; the tolerance is a running quantile of the errors themselves.
`mixture`, the paper's: targets get c adapter(x) + (1 - c) layers(x), with lambda (1 - c) (s - i) for what still runs.
The full model's action is the label, so that the action's loss is about e c, with e the error of the skip, and the sum
is least at c = 1 where e < lambda (s - i), at 0 elsewhere: the same question, asked with a fixed tolerance for each
layer and at the price of the full model.

Every step is a function of (seed, step). This module knows no policy, no file and no environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dysl_vla.errors import ConfigError
from dysl_vla.processes import Processes
from dysl_vla.schedule import cosine_with_warmup
from dysl_vla.skip_controller.compatibility import compute_dtype, run_device
from dysl_vla.skip_controller.skipping import Skipper
from dysl_vla.skip_controller.torch_backend import Act, Forward

Batch = tuple[Any, Tensor | None]
"""A policy's inputs, and which tokens of its first forward are not padding, (batch, tokens); None: all."""


@dataclass(frozen=True)
class DistillConfig:
    """How adapters and controllers are trained.

    Raises:
        ConfigError: A value is out of range.
    """

    adapter_steps: int = 500
    """Steps of stage 1, which trains adapters alone; 0 for one-stage training."""
    skip_steps: int = 50_000
    """Steps of stage 2, which trains adapters and controllers."""
    objective: Literal["tolerance", "mixture"] = "tolerance"
    """Objective of stage 2: skip really and learn what stays within a tolerance, or mix and weigh (the paper's)."""
    batch: int = 32
    """Frames in each step."""
    learning_rate: float = 5e-3
    """Peak of each stage's cosine schedule."""
    warmup: int = 100
    """Steps of linear warm-up in each stage."""
    hidden_weight: float = 0.05
    """Weight, in stage 2, of the relative error of the targets' inputs."""
    executed_weight: float = 0.9
    """Share of the action's loss that counts the executed actions alone; the rest counts the whole chunk."""
    joint_exit_prob: float = 0.6
    """Share of stage 2's steps that leave all blocks at exits of one rank, as an unimportant action does."""
    keep_block_prob: float = 0.5
    """Share of blocks that run whole in stage 2's other steps, so that skips are also trained beside exact layers."""
    quantile: float = 0.7
    """With objective `tolerance`, the share of skips whose error counts as harmless."""
    layer_weight: float = 0.004
    """With objective `mixture`, lambda, the price of a layer."""
    seed: int = 0
    """Seed of batches and exits."""
    threads: int | None = None
    """Threads of PyTorch; one for each core when not given."""

    def __post_init__(self) -> None:
        for name in ("adapter_steps", "skip_steps", "warmup", "hidden_weight", "layer_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and not negative, got {getattr(self, name)}.")
        for name in ("batch", "skip_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}; leave it out for one for each core.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above zero and finite, got {self.learning_rate}.")
        if self.objective not in ("tolerance", "mixture"):
            raise ConfigError(f"objective must be tolerance or mixture, got {self.objective!r}.")
        if not 0 <= self.keep_block_prob < 1:
            raise ConfigError(f"keep_block_prob must be from 0 to below 1, got {self.keep_block_prob}.")
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile must be above 0 and below 1, got {self.quantile}.")
        for name in ("joint_exit_prob", "executed_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")

    @property
    def steps(self) -> int:
        """Return the steps of both stages together."""
        return self.adapter_steps + self.skip_steps


@dataclass(frozen=True)
class FullModelAnswer:
    """The full model's answer to a batch.

    Attributes:
        actions: (batch, chunk, action), normalised.
        targets: The input of each block's target in the first forward, (batch, tokens, hidden).
    """

    actions: Tensor
    targets: list[Tensor]


class HeadsTrainer:
    """Trains the heads of an attached decoder, a step at a time.

    Args:
        skipper: The decoder, attached with heads; its own weights must be frozen.
        act: The policy's `act`: maps inputs to normalised actions, (batch, chunk, action), by any number of forwards.
        execute_steps: Number of actions of a chunk that are executed.
        config: The training's configuration.
        processes: Processes that each update with their share of every batch, and agree on the result; None: this one
            alone.
        is_checkpointed: Whether stage 2 computes the activations of the decoder's layers again in backward.

    Attributes:
        is_checkpointed: See above.
        step: Number of steps done.
        tolerance: The running quantile of errors.
        parameters: The heads' parameters by name.
        optimizer: Their optimizer.

    Raises:
        ConfigError: The decoder was attached without heads, or nothing can be skipped.
    """

    def __init__(
        self,
        skipper: Skipper,
        act: Act,
        execute_steps: int,
        config: DistillConfig,
        processes: Processes | None = None,
        *,
        is_checkpointed: bool = False,
    ) -> None:
        if skipper.heads is None:
            raise ConfigError("heads must be attached with the decoder; without them there is nothing to train.")
        self._exits = [skipper.plan.exits_of(block) for block in skipper.plan.blocks]
        if not any(self._exits):
            raise ConfigError(f"plan must have an exit after layer 0, which always runs, got {skipper.plan}.")
        if config.objective == "mixture" and len(skipper.heads.followers):
            raise ConfigError(
                "objective must be tolerance for a policy with followers, whose layers mixing would not skip."
            )
        self._skipper, self._act = skipper, act
        self._mixed = mixed_precision(skipper.layers)
        self._heads: nn.Module = skipper.heads
        self._execute = execute_steps
        self._config = config
        self._processes = processes or Processes()
        self.is_checkpointed = is_checkpointed
        self.step = 0
        self.tolerance = 0.0
        self.parameters = dict(self._heads.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def answer(self, batch: Batch) -> FullModelAnswer:
        """Compute the full model's answer to a batch; it is the same for every step, so it can be kept."""
        with self._mixed, self._skipper.record() as forwards:
            actions = self._act(batch[0], Forward(is_lesson=True))
        first = _recorded(forwards)[0]
        return FullModelAnswer(actions, [first[block.target] for block in self._skipper.plan.blocks])

    def rng(self, step: int | None = None) -> np.random.Generator:
        """Return the random generator of a step, or of the coming one; draw the batch, then hand it to `update`."""
        return np.random.default_rng([self._config.seed, self.step if step is None else step])

    @property
    def is_first_stage(self) -> bool:
        """Tell whether the coming step trains adapters alone."""
        return self.step < self._config.adapter_steps

    def update(self, batch: Batch, answer: FullModelAnswer | None, rng: np.random.Generator) -> dict[str, float]:
        """Do one optimizer step.

        Args:
            batch: The policy's inputs, and which tokens of the first forward are not padding.
            answer: The full model's answer to the batch, which stage 2 needs.
            rng: The generator that `rng` returned.

        Returns:
            Losses and other figures by name.

        Raises:
            ConfigError: The loss is not finite any more, or the policy's `act` has no gradient.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        with self._mixed:
            if self.is_first_stage:
                loss, figures = self._adapter_loss(batch)
            else:
                assert answer is not None
                loss, figures = self._skip_loss(batch, answer, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        figures = self._averaged(figures)
        if not math.isfinite(figures["loss"]):
            raise ConfigError(f"learning_rate must be lower: the loss is {figures['loss']} at step {self.step}.")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return figures

    def _averaged(self, figures: dict[str, float]) -> dict[str, float]:
        """Average gradients and figures over the processes, whose shares of a batch are equally large."""
        if self._processes.count == 1:
            return figures
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]  # of the same heads everywhere
        values = gradients[0].new_tensor(list(figures.values()))
        self._processes.average([*gradients, values])
        return dict(zip(figures, values.tolist(), strict=True))

    def _weighted(self, means: list[Tensor], mask: Tensor | None, like: Tensor) -> list[Tensor]:
        """Weight means over tokens by this process's number of tokens, relative to its mean over the processes.

        Their averages over the processes are then the means over the tokens of the whole batch.

        Args:
            means: The means.
            mask: Which tokens are not padding; None: all.
            like: Hidden states, (batch, tokens, hidden).
        """
        if self._processes.count == 1:
            return means
        own = float(like[..., 0].numel() if mask is None else mask.sum())
        average = torch.tensor([own])
        self._processes.average([average])
        return [mean * (own / float(average)) for mean in means]

    def _rate(self) -> float:
        """Return the learning rate: a cosine over each stage, with a warm-up."""
        first, config = self.is_first_stage, self._config
        done = self.step if first else self.step - config.adapter_steps
        total = config.adapter_steps if first else config.skip_steps
        return cosine_with_warmup(config.learning_rate, done, total, config.warmup)

    def _adapter_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Compute each adapter's error, over all forwards of the full model."""
        inputs, mask = batch
        with torch.no_grad(), self._skipper.record() as forwards:
            self._act(inputs, Forward())
        assert self._skipper.heads is not None
        adapters = self._skipper.heads.adapters
        first = _recorded(forwards)[0][0]
        errors = {}
        for block, exits in zip(self._skipper.plan.blocks, self._exits, strict=True):
            for layer in exits:
                parts = [
                    relative_error(adapters[str(layer)](layers[layer]), layers[block.target], None if later else mask)
                    for later, layers in enumerate(forwards)
                ]
                parts[:1] = self._weighted(parts[:1], mask, first)
                errors[layer] = torch.stack(parts).mean()
        loss = torch.stack(list(errors.values())).mean()
        return loss, {"loss": loss.item()} | {f"adapter_error/{layer}": e.item() for layer, e in errors.items()}

    def _skip_loss(
        self, batch: Batch, answer: FullModelAnswer, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        config, plan = self._config, self._skipper.plan
        is_mixture = config.objective == "mixture"
        places = self.draw_exits(rng)
        inputs, mask = batch
        # Act, with every block left at its exit.
        with self._skipper.force_exits(
            places, is_mixture=is_mixture, mask=mask, is_checkpointed=self.is_checkpointed
        ) as forced:
            actions = self._act(inputs, Forward(forced, needs_gradient=True))
        if not actions.requires_grad:
            raise ConfigError(
                "act must return actions with a gradient, which heads learn from; where `forward.needs_gradient` is "
                "set, return what is differentiable (an expectation over bins in place of an argmax)."
            )
        # The adapters' loss: how far the actions, and the inputs of the targets, are from the full model's.
        chosen = list(forced.outputs)
        distance = (actions - answer.actions).abs().mean(dim=2)
        error = distance[:, : self._execute].mean(dim=1)
        task = (1 - config.executed_weight) * distance.mean() + config.executed_weight * error.mean()
        errors = [relative_error(forced.targets[b], answer.targets[b], mask) for b in chosen]
        hidden = torch.stack(self._weighted(errors, mask, answer.targets[0])).mean()
        # The controllers' loss: was it harmless to skip?
        outputs = torch.stack([forced.outputs[b] for b in chosen])  # (blocks, batch)
        if is_mixture:
            kept = outputs.new_tensor([float(plan.blocks[b].target - (places[b] or 0)) for b in chosen])
            controllers = config.layer_weight * ((1 - outputs) * kept[:, None]).sum(dim=0).mean()
        else:
            self._update_tolerance(self._processes.gathered(error.detach()))
            label = (error.detach() < self.tolerance).to(outputs.dtype).expand_as(outputs)
            controllers = nn.functional.binary_cross_entropy(outputs.float(), label.float())
        loss = task + config.hidden_weight * hidden + controllers
        return loss, {
            "loss": loss.item(),
            "task_loss": task.item(),
            "target_error": hidden.item(),
            "controller_loss": controllers.item(),
            "skip_rate": outputs.detach().mean().item(),
            "tolerance": self.tolerance,
        }

    def draw_exits(self, rng: np.random.Generator) -> list[int | None]:
        """Draw where each block is left; at least one is."""
        choices = self._exits
        if rng.random() < self._config.joint_exit_prob:
            rank = _sample_rank(rng, max(map(len, choices)))
            return [layers[rank] if rank < len(layers) else None for layers in choices]  # a shorter one runs whole
        exits = [layers[_sample_rank(rng, len(layers))] if layers else None for layers in choices]
        whole = rng.random(len(exits)) < self._config.keep_block_prob
        whole[rng.choice([block for block, place in enumerate(exits) if place is not None])] = False
        return [None if keep else place for place, keep in zip(exits, whole, strict=True)]

    def _update_tolerance(self, error: Tensor) -> None:
        quantile = float(error.float().quantile(self._config.quantile))
        begun = self.tolerance > 0
        self.tolerance = 0.99 * self.tolerance + 0.01 * quantile if begun else quantile


def _recorded(forwards: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return what `Skipper.record` kept, and refuse a policy that ran no layer."""
    if not forwards:
        raise ConfigError("act must run the policy's `layers`, and ran none; name the decoder's own list of layers.")
    return forwards


def mixed_precision(decoder: nn.Module) -> torch.autocast:
    """Return the context in which heads in float32 are attached to a decoder of fewer bits, and learn.

    Raises:
        ConfigError: The decoder's weights are on the device `meta`, and are not offloaded.
    """
    device, dtype = run_device(decoder, "0") or torch.device("cpu"), compute_dtype(decoder)
    # What a forward without gradients has cast must not be used again by one with them (PyTorch's issue 112583).
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in (None, torch.float32), cache_enabled=False)


def relative_error(predicted: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean distance over tokens, relative to the wanted vectors' length; padding does not count."""
    distance = torch.linalg.vector_norm(predicted - wanted, dim=-1)
    errors: Tensor = distance / torch.linalg.vector_norm(wanted, dim=-1).clamp_min(1e-6)
    return errors.mean() if mask is None else (errors * mask).sum() / mask.sum()


def _sample_rank(rng: np.random.Generator, count: int) -> int:
    """Draw a rank, from 0, among `count` of them, with a probability ~ 1/(rank + 1)."""
    shares = 1 / np.arange(1, count + 1)
    return int(rng.choice(count, p=shares / shares.sum()))
