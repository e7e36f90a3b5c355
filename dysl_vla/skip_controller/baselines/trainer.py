"""Training of a baseline on a frozen decoder, a step at a time, as `heads_trainer` trains ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dysl_vla.errors import ConfigError
from dysl_vla.schedule import cosine_with_warmup
from dysl_vla.skip_controller.baselines.running import Baseline, BaselineRunner, Pass
from dysl_vla.skip_controller.heads_trainer import FullModelAnswer, mixed_precision
from dysl_vla.skip_controller.torch_backend import Act, Forward


@dataclass(frozen=True)
class BaselineTrainingConfig:
    """How a baseline is trained.

    Raises:
        ConfigError: A value is out of range.
    """

    steps: int = 50_000
    """Optimizer steps."""
    batch: int = 16
    """Frames of each step."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule."""
    warmup: int = 100
    """Steps of linear warm-up."""
    executed_weight: float = 0.9
    """Share of the loss that counts the executed actions alone; the rest counts the whole chunk."""
    seed: int = 0
    """Seed of weights and batches."""
    threads: int | None = None
    """Threads of PyTorch; one for each core when not given."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above zero and finite, got {self.learning_rate}.")
        if not 0 <= self.executed_weight <= 1:
            raise ConfigError(f"executed_weight must be from 0 to 1, got {self.executed_weight}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}; leave it out for one for each core.")


class BaselineTrainer:
    """Trains a baseline of a decoder, whose own weights must be frozen.

    Args:
        runner: The wrapped decoder.
        act: The policy's `act`.
        execute_steps: Number of actions of a chunk that are executed.
        dial: The dial with which it is trained, where its rule is not soft.
        config: How it is trained.

    Attributes:
        step: Number of steps done.
        parameters: The baseline's parameters by name.
        optimizer: Their optimizer.
    """

    is_first_stage = False

    def __init__(
        self, runner: BaselineRunner, act: Act, execute_steps: int, dial: float, config: BaselineTrainingConfig
    ) -> None:
        self._runner, self._act, self._execute, self._dial, self._config = runner, act, execute_steps, dial, config
        self.step = 0
        self._mixed = mixed_precision(runner.layers)
        baseline: Baseline = runner.baseline
        self.parameters = dict(baseline.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def rng(self, step: int) -> np.random.Generator:
        """Return the random generator of a step."""
        return np.random.default_rng([self._config.seed, step])

    @torch.no_grad()
    def answer(self, batch: tuple[Any, Tensor | None]) -> FullModelAnswer:
        """Compute the full model's answer to a batch."""
        with self._mixed:
            return FullModelAnswer(self._act(batch[0], Forward()), [])

    def update(self, batch: tuple[Any, Tensor | None], answer: FullModelAnswer) -> dict[str, float]:
        """Do one optimizer step.

        Raises:
            ConfigError: The loss is not finite any more, or the batch is padded.
        """
        config = self._config
        if batch[1] is not None and not batch[1].all():
            raise ConfigError("policy must give all observations as many tokens: these methods know no padding.")
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_with_warmup(config.learning_rate, self.step, config.steps, config.warmup)
        with self._mixed, self._runner.running(Pass(self._dial, is_training=True)) as one:
            actions = self._act(batch[0], Forward(needs_gradient=True))
            loss = self._runner.baseline.loss(actions, answer.actions, one, self._distance)
        if not math.isfinite(float(loss.detach())):
            raise ConfigError(f"learning_rate must be lower: the loss is {float(loss)} at step {self.step}.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"loss": float(loss.detach())}

    def _distance(self, actions: Tensor, wanted: Tensor) -> Tensor:
        apart = (actions - wanted).abs()
        share = self._config.executed_weight
        return (1 - share) * apart.mean() + share * apart[:, : self._execute].mean()
