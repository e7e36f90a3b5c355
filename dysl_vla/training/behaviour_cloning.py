"""Behaviour cloning of a MiniVLA on arrays of demonstrations.

Every batch and every random shift is a function of (seed, step), and the state on disk holds weights, moving average
and optimizer, so that a run that was killed goes on as if nothing had happened: same batches, same weights at the end.
This module reads no datasets: it gets arrays of demonstrations.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from dysl_vla.data.augment import SHIFT, varied
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import append_line, atomic_write, read_lines, write_lines
from dysl_vla.interrupts import deferred_interrupt
from dysl_vla.policies.flow.mini_flow import MiniFlow
from dysl_vla.policies.mini_policy import MiniPolicy
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.schedule import cosine_with_warmup
from dysl_vla.training.optimizer_state import optimizer_tensors, restore_optimizer
from dysl_vla.types import FloatArray, ImageArray, Normalisation

STATE_FILE = "training_state.safetensors"
CURVE_FILE = "training.jsonl"
VALIDATION_FRAMES = 2048
FLOOR = 0.02
"""Smallest standard deviation of a dimension, as a share of the range of its kind (all joints, say)."""
POSITION = ".pos"
STATE_CLIP = 10.0
"""Deviations from the demonstrated mean at which the state is clipped, as a policy has not been trained beyond."""


@dataclass(frozen=True)
class TrainingArrays:
    """Demonstrations in memory.

    Attributes:
        images: Camera name to uint8, (frames, crop height + 2 SHIFT, crop width + 2 SHIFT, 3); may be on disk.
        states: (frames, state).
        actions: (frames, action).
        episode_index: (frames,), rising.
        task_index: (frames,), into `instructions`.
        instructions: Distinct instructions.
        held_out: Which frames are for validation, (frames,).
    """

    images: Mapping[str, ImageArray]
    states: FloatArray
    actions: FloatArray
    episode_index: NDArray[np.int64]
    task_index: NDArray[np.int64]
    instructions: Sequence[str]
    held_out: NDArray[np.bool_]


@dataclass(frozen=True)
class OptimizerConfig:
    """How a MiniVLA is optimised.

    Raises:
        ConfigError: A value is out of range, or there is no compiler.
    """

    steps: int = 10_000
    """Optimizer steps."""
    batch: int = 64
    """Samples in each step."""
    learning_rate: float = 6e-4
    """Peak of the cosine schedule."""
    warmup: int = 300
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    augment_images: bool = False
    """Vary light, colours, contrast and noise of the images, and cover parts of them, so that the policy bears it where
    it is used; images are moved by up to 4 pixels in any case."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what is validated and saved."""
    seed: int = 0
    """Seed of initial weights, batches and augmentation."""
    save_every: int = 500
    """Steps between validations, each followed by saving checkpoint and training state."""
    threads: int | None = None
    """Threads of PyTorch; one for each core when not given."""
    device: str | None = None
    """Device on which training runs, as PyTorch names it: cpu, cuda, cuda:1. It is the CPU when not given."""
    compile: bool = False
    """Compile the backbone, which takes a minute and makes a step shorter; on a CPU it needs a C++ compiler."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}; leave it out for one for each core.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above zero and finite, got {self.learning_rate}.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be from 0 to below 1, got {self.ema}.")
        if self.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            raise ConfigError("compile must be left out without a C++ compiler; leave it out, or apt-get install g++.")


def train_tokenizer(instructions: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that has the instructions' words whole and can still spell any other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(instructions) * 2, trainer)
    return tokenizer


def normalisation(values: FloatArray, names: Sequence[str]) -> Normalisation:
    """Compute the mean and standard deviation of each dimension.

    In a dimension that hardly moves (a parked joint) a small displacement would be very many deviations. So a deviation
    is at least `FLOOR` of the largest range among the dimensions of its kind: LeRobot's positions of motors
    ("shoulder_pan.pos", "gripper.pos"), whose units are alike. For all others, whose units may differ, it is at least
    that share of their own range. A dimension of a kind that never moves keeps its scale.

    Args:
        values: Demonstrated values, (frames, dimension).
        names: A name for each dimension.
    """
    std = values.std(axis=0, dtype=np.float64)
    span = values.max(axis=0).astype(np.float64) - values.min(axis=0)
    kinds = np.array([POSITION if name.endswith(POSITION) else name for name in names])
    floor = np.array([FLOOR * span[kinds == kind].max() for kind in kinds])
    return Normalisation(
        mean=tuple(map(float, values.mean(axis=0, dtype=np.float64))),
        std=tuple(float(s) if s > 1e-4 else 1.0 for s in np.maximum(std, floor)),
    )


class BehaviourCloning:
    """Trains a policy; see the module.

    Args:
        policy: The policy, with its initial weights.
        arrays: Demonstrations.
        optimizer: How the policy is optimised.
        out: Folder for the checkpoint, the training state and the curves. A state in it is continued.
        shortest_path: Layers that, run without the others, also learn the whole backbone's actions (inplace
            distillation, Yu & Huang 2019, arXiv 1903.05134), so that skipping loses less; when empty, there is no such
            loss.

    Attributes:
        step: Number of steps done.

    Raises:
        ConfigError: The device cannot be used.
    """

    def __init__(
        self,
        policy: MiniPolicy,
        arrays: TrainingArrays,
        optimizer: OptimizerConfig,
        out: Path,
        shortest_path: Sequence[int] = (),
    ) -> None:
        torch.set_num_threads(optimizer.threads or len(os.sched_getaffinity(0)))
        policy.cameras.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # as safetensors needs
        self._short = _shortened(policy.backbone, shortest_path) if shortest_path else None
        if optimizer.compile and isinstance(policy, MiniVLA):  # another's keeps keys and values
            policy.backbone.compile(dynamic=False)
        try:
            self._policy = policy.to(optimizer.device).train()
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device must be one of this machine's, got {optimizer.device!r} ({error}).") from error
        self._device = next(policy.parameters()).device
        self._arrays = arrays
        self._config = optimizer
        self._out = out
        self._parameters = dict(policy.named_parameters())
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._adam = torch.optim.AdamW(
            self._parameters.values(),
            lr=optimizer.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._token_ids = torch.tensor([policy.token_ids(text) for text in arrays.instructions]).to(self._device)
        chunk = policy.spec.chunk_length
        self._targets = torch.from_numpy(policy.spec.action_normalisation.apply(arrays.actions)).to(self._device)
        last = np.searchsorted(arrays.episode_index, arrays.episode_index, side="right")
        self._remaining = np.minimum(last - np.arange(len(last)), chunk)
        self._training = np.flatnonzero(~arrays.held_out)
        validation = np.flatnonzero(arrays.held_out)
        self._validation = validation[:: max(1, len(validation) // VALIDATION_FRAMES)]
        self.step = 0
        self._seconds = 0.0

    def run(self) -> None:
        """Train to the end, saving on the way.

        Raises:
            CheckpointError: The training state is damaged.
            ConfigError: The loss is not finite any more.
        """
        self._resume()
        board = SummaryWriter(str(self._out / "tensorboard"), purge_step=self.step + 1)
        losses: list[float] = []
        started = time.monotonic() - self._seconds
        with (
            deferred_interrupt() as interrupt,
            tqdm(total=self._config.steps, initial=self.step, desc="training", unit="step") as progress,
        ):
            while self.step < self._config.steps:
                losses.append(self._update())
                progress.update()
                if self.step % 50 == 0:
                    progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
                self._seconds = time.monotonic() - started
                if self.step % self._config.save_every == 0 or self.step == self._config.steps:
                    progress.write(self._report(losses, board))
                    self._save()
                    losses.clear()
                if interrupt.is_requested:
                    self._save()
                    raise KeyboardInterrupt
        board.close()
        (self._out / STATE_FILE).unlink()

    def _report(self, losses: Sequence[float], board: SummaryWriter) -> str:
        """Validate, write a point of the curve, and return it as a line for people."""
        validation, short = self._validate()
        point = {
            "step": self.step,
            "loss": float(np.mean(losses)),
            "validation_loss": validation,
            "validation_short_loss": short,
            "learning_rate": self._rate(self.step - 1),
            "seconds": round(self._seconds, 1),
        }
        append_line(self._out / CURVE_FILE, point)
        for name, value in point.items():
            if name != "step" and value is not None:
                board.add_scalar(name, value, self.step)
        held_out = "" if validation is None else f", held-out {validation:.4f}"
        if short is not None:
            held_out += f", shortest path {short:.4f} from it"
        return f"step {self.step}: training loss {point['loss']:.4f}{held_out}"

    def _rate(self, step: int) -> float:
        return cosine_with_warmup(self._config.learning_rate, step, self._config.steps, self._config.warmup)

    def _update(self) -> float:
        rng = np.random.default_rng([self._config.seed, self.step])
        chosen = self._training[rng.integers(0, len(self._training), self._config.batch)]
        for group in self._adam.param_groups:
            group["lr"] = self._rate(self.step)
        loss, short = self._losses(chosen, rng)
        total = loss if short is None else loss + short
        value = float(total.detach())
        if not math.isfinite(value):
            raise ConfigError(
                f"learning_rate must be lower: the loss is {value} at step {self.step}, with a rate of "
                f"{self._rate(self.step):.1e}; start again with a lower one."
            )
        self._adam.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._adam.step()
        with torch.no_grad():
            average: list[Tensor] = list(self._average.values())
            present: list[Tensor] = list(self._parameters.values())
            # Early on the average must not remember the initial weights.
            decay = min(self._config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(average, present, 1 - decay)
        self.step += 1
        return float(loss.detach())

    def _losses(self, frames: NDArray[np.int64], rng: np.random.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Compute two L1 losses of normalised actions: from the demonstrated chunks, and that of the shortest path.

        The first counts the demonstrated actions that exist. The second compares with the whole backbone's chunks; half
        of it counts only the executed actions, the rest all. A policy that denoises has the squared error of its
        velocity in place of the first, and no second.
        """
        policy = self._policy
        chunk = policy.spec.chunk_length
        images = {name: self._crop(name, frames, rng) for name in self._arrays.images}
        state = torch.from_numpy(self._arrays.states[frames]).to(self._device)
        token_ids = self._token_ids[torch.from_numpy(self._arrays.task_index[frames])]
        steps = np.arange(chunk)
        exists = steps < self._remaining[frames][:, None]
        positions = np.minimum(frames[:, None] + steps, len(self._targets) - 1)
        embeds = policy.inputs(images, state, token_ids)["inputs_embeds"]
        targets = self._targets[torch.from_numpy(positions)]
        if isinstance(policy, MiniFlow):
            predicted = None
            error = policy.flow_loss(embeds, targets, np.random.default_rng(0) if rng is None else rng)
        else:
            assert isinstance(policy, MiniVLA)
            predicted = policy.decode(policy.backbone(inputs_embeds=embeds).last_hidden_state)
            error = (predicted - targets).abs()
        weight = torch.from_numpy(exists).unsqueeze(-1).float().to(self._device)
        loss: Tensor = (error * weight).sum() / (weight.sum() * error.shape[-1])
        if self._short is None or predicted is None:
            return loss, None
        assert isinstance(policy, MiniVLA)
        distance = (policy.decode(self._short(inputs_embeds=embeds).last_hidden_state) - predicted.detach()).abs()
        return loss, (distance.mean() + distance[:, : policy.spec.execute_steps].mean()) / 2

    def _crop(self, camera: str, frames: NDArray[np.int64], rng: np.random.Generator | None) -> Tensor:
        stored = self._arrays.images[camera]
        height, width = stored.shape[1] - 2 * SHIFT, stored.shape[2] - 2 * SHIFT
        corners = np.full((len(frames), 2), SHIFT) if rng is None else rng.integers(0, 2 * SHIFT + 1, (len(frames), 2))
        crops = np.empty((len(frames), height, width, 3), np.uint8)
        for row, (frame, (top, left)) in enumerate(zip(frames, corners, strict=True)):
            crop = stored[frame, top : top + height, left : left + width]
            crops[row] = varied(crop, rng) if rng is not None and self._config.augment_images else crop
        return torch.from_numpy(crops).to(self._device)

    def _validate(self) -> tuple[float | None, float | None]:
        """Compute the averaged weights' losses on held-out episodes; None without episodes, or without that loss."""
        as_is = torch.compiler.set_stance("force_eager") if self._config.compile else nullcontext()
        with self._averaged(), torch.inference_mode(), as_is:  # else every length of a batch would be compiled
            batches = [self._validation[i : i + 256] for i in range(0, len(self._validation), 256)]
            if not batches:
                return None, None
            sizes = [len(batch) for batch in batches]
            losses, short = zip(*(self._losses(batch, None) for batch in batches), strict=True)
            loss = float(np.average(losses, weights=sizes))
            return loss, None if self._short is None else float(np.average(short, weights=sizes))

    def _averaged(self) -> _Swapped:
        return _Swapped(self._parameters, self._average)

    def _save(self) -> None:
        with self._averaged():
            self._policy.save_pretrained(self._out)
        state = {f"weights.{name}": p.detach() for name, p in self._parameters.items()}
        state |= {f"average.{name}": value for name, value in self._average.items()}
        state |= optimizer_tensors(self._parameters, self._adam)
        with atomic_write(self._out / STATE_FILE) as temporary:
            save_file(state, temporary, metadata={"step": str(self.step), "seconds": str(self._seconds)})

    @torch.no_grad()
    def _resume(self) -> None:
        path = self._out / STATE_FILE
        if not path.exists():
            self._drop_curve_after(0)
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                step, self._seconds = int(metadata["step"]), float(metadata["seconds"])
                for name, parameter in self._parameters.items():
                    parameter.copy_(file.get_tensor(f"weights.{name}"))
                    self._average[name].copy_(file.get_tensor(f"average.{name}"))
                restore_optimizer(self._parameters, self._adam, file)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it to train from the start.") from error
        self.step = step
        self._drop_curve_after(step)

    def _drop_curve_after(self, step: int) -> None:
        path = self._out / CURVE_FILE
        write_lines(path, [point for point in read_lines(path) if point["step"] <= step])
        if step == 0:
            shutil.rmtree(self._out / "tensorboard", ignore_errors=True)


def _shortened(backbone: torch.nn.Module, layers: Sequence[int]) -> torch.nn.Module:
    """Return a backbone of the same modules with fewer layers: what one learns, both have."""
    all_layers: Any = backbone.layers
    kept: dict[int, Any] = {id(module): module for module in backbone.children()}  # a deep copy takes them as copied
    kept[id(all_layers)] = torch.nn.ModuleList(all_layers[layer] for layer in layers)
    return copy.deepcopy(backbone, kept)


class _Swapped:
    """Puts other values into parameters, and puts their own back at the end."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> None:
        self._parameters, self._values = parameters, values

    def __enter__(self) -> None:
        self._own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self._values)

    def __exit__(self, *_: object) -> None:
        self._put(self._own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
