"""`dysl distill`: from a policy and demonstrations to a checkpoint that skips layers.

It encodes the demonstrations once, hands batches to the trainer in `skip_controller`, keeps curves and a state that is
resumed exactly, and writes the policy with its heads, their statistics on held-out demonstrations included.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.checkpoint import MANIFEST, find_checkpoint
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import choose_frames, demonstrations_for, split_of
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import (
    append_line,
    atomic_write,
    check_memory,
    check_same_run,
    is_unused,
    locked_dir,
    read_json,
    read_lines,
    sha256,
    write_json,
    write_lines,
)
from dysl_vla.interrupts import deferred_interrupt
from dysl_vla.policies import ComputeConfig, SkippablePolicy, is_known_as, load_skippable_policy, original_fingerprint
from dysl_vla.training.calibrate import CalibrateConfig, assumed_plan, calibrated_plan, read_plan
from dysl_vla.training.encoding import Encoded, encode
from dysl_vla.training.importance import choose_importance
from dysl_vla.training.replay import Replay
from dysl_vla.training.train import describe

with needs_extra("policy"):
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from torch.utils.tensorboard.writer import SummaryWriter

    from dysl_vla.policies.dysl import HEADS, LOOKAHEAD, DyslPolicy, SkipSettings, has_skips, load_heads, save_skips
    from dysl_vla.skip_controller.guidance import importance_measures
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads, default_adapter_size
    from dysl_vla.skip_controller.heads_trainer import DistillConfig, FullModelAnswer, HeadsTrainer, mixed_precision
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach
    from dysl_vla.training.check_policy import check_policy, check_saved
    from dysl_vla.training.dry_run import Checkpointing, budgets, choose_checkpointing, render
    from dysl_vla.training.estimate import Rehearsal
    from dysl_vla.training.optimizer_state import optimizer_tensors, restore_optimizer

RUN_FILE, STATE_FILE, CURVE_FILE = "distill_run.json", "distill_state.safetensors", "distill.jsonl"
REPORT_EVERY = 50
SAVE_EVERY = 500


@dataclass(frozen=True)
class DistillRunConfig:
    """Train adapters and controllers for a policy, whose own weights stay as they are. Resumes where it was stopped.

    Raises:
        ConfigError: A value is out of range, or two options contradict each other.
    """

    data: Path
    """Folder of demonstrations, a LeRobotDataset v3."""
    out: Path
    """Folder for the checkpoint, the state, the curves and the TensorBoard log."""
    policy: str = "metaworld-mini"
    """The policy that shall skip layers: a shipped name, a checkpoint's folder or a hub id."""
    plan: Path | None = None
    """A plan written by `dysl calibrate`. When not given, one is calibrated with its defaults."""
    frames: int = 32_000
    """Number of frames to train on, evenly spread; they are kept encoded in memory."""
    augment_copies: int = 0
    """Number of copies of each frame to train on, too, with images moved by up to 4 pixels; also kept in memory."""
    init_heads: bool = False
    """Start from the heads that the policy comes with, with their plan and without stage 1, instead of new ones."""
    adapter_size: int | None = None
    """Width of an adapter's bottleneck. When not given, 88 beside a narrow backbone, and up to 128 beside a wide one,
    where adapters and controllers together have at most 1.2 % of its weights."""
    controller_size: int = 16
    """Width of a controller's hidden layer."""
    importance: str | None = None
    """What tells important actions: "gripper", its movement, or "continuity", of all motion. When not given, that of
    the initial heads, else the gripper's if there is one that moves."""
    static_ratio: float = CalibrateConfig.static_ratio
    """Share of layers that always run, in the plan that is calibrated when none is given."""
    exits: Literal["first", "all"] = CalibrateConfig.exits
    """Where a block can be left, in the plan that is calibrated when none is given; see `dysl calibrate`."""
    checkpointing: Checkpointing = "auto"
    """Whether backward computes the activations of the backbone's layers again instead of keeping them, which costs a
    third more operations in stage 2 and changes no gradient: on, off, or auto, where memory is too short without."""
    dry_run: bool = False
    """Print where the memory goes, what this machine has, and what the training costs, without loading any weights."""
    training: DistillConfig = field(default_factory=DistillConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("augment_copies", 0), ("adapter_size", 1), ("controller_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if not 0 < self.static_ratio < 1:
            raise ConfigError(f"static_ratio must be above 0 and below 1, got {self.static_ratio}.")
        if self.importance is not None:
            importance_measures.get(self.importance)
        for name in ("plan", "adapter_size", "controller_size"):
            if self.init_heads and getattr(self, name) != getattr(DistillRunConfig, name):
                raise ConfigError(
                    f"{name} must not be given with init_heads, as the heads of {self.policy} decide it; leave one out."
                )


def distill(config: DistillRunConfig) -> Path:
    """Train adapters and controllers, and write the checkpoint.

    Returns:
        Its folder.

    Raises:
        ConfigError: The policy or the plan cannot work, or `out` holds something else.
        DatasetError: The demonstrations are damaged or too few.
        CheckpointError: The policy or the state is damaged.
    """
    if not is_unused(config.out) and not (config.out / RUN_FILE).exists():
        raise ConfigError(
            f"out must be a new folder or one of a distillation; {config.out} is not empty and holds none."
        )
    if config.init_heads:
        config = replace(config, training=replace(config.training, adapter_steps=0))
    is_checkpointed = choose_checkpointing(
        partial(_rehearsal, config), config.compute, find_checkpoint(config.policy), config.checkpointing
    )
    policy = load_skippable_policy(config.policy, config.compute)
    demonstrations = demonstrations_for(config.data, policy.spec)
    settings = json.loads(json.dumps({**asdict(config), **asdict(config.training)}, default=str))
    for name in ("training", "static_ratio", "exits", "checkpointing", "dry_run"):  # they change no result of a plan
        del settings[name]
    identity = {**settings, "demonstrated_frames": demonstrations.total_frames, "teacher": policy.fingerprint}
    initial = _initial_heads(config.policy, policy) if config.init_heads else None
    identity["initial"] = initial and initial.digest
    if not (config.out / RUN_FILE).exists():
        check_policy(policy, demonstrations)
    if (config.out / RUN_FILE).exists():  # before a plan is calibrated, which takes a while
        check_same_run(config.out / RUN_FILE, {**identity, "plan": read_json(config.out / RUN_FILE).get("plan")})
    if initial:
        plan = initial.heads.plan
    else:
        plan = (
            read_plan(config.plan)
            if config.plan
            else calibrated_plan(policy, demonstrations, config.static_ratio, config.exits)
        )
    identity["plan"] = json.loads(json.dumps(asdict(plan)))
    if (config.out / RUN_FILE).exists():
        check_same_run(config.out / RUN_FILE, identity)
        if _is_finished(config):
            return config.out
    torch.set_num_threads(config.training.threads or len(os.sched_getaffinity(0)))
    importance = choose_importance(
        config.importance or (initial.importance if initial else None), demonstrations, policy.spec
    )
    run = _Run(
        config,
        plan,
        policy,
        demonstrations,
        initial=initial,
        importance=importance,
        is_checkpointed=is_checkpointed,
    )
    with locked_dir(config.out):
        write_json(config.out / RUN_FILE, identity)
        if not (config.out / MANIFEST).exists():
            # What is kept is the policy as it came, not as it was cast for this training.
            check_saved(load_skippable_policy(config.policy) if config.compute.dtype else policy, config.out)
        run.run()
    return config.out


def dry_run(config: DistillRunConfig) -> str:
    """Estimate a distillation, and return the estimate as Markdown.

    Raises:
        ConfigError: The policy or the plan cannot work.
        DatasetError: The demonstrations are damaged.
        CheckpointError: The policy is damaged.
    """
    estimates = budgets(partial(_rehearsal, config), config.compute, checkpointing=config.checkpointing)
    return render(config.policy, list(estimates))


def _rehearsal(config: DistillRunConfig, compute: ComputeConfig) -> tuple[Rehearsal, int]:
    """Return what is estimated with a policy loaded somewhere, and the number of frames."""
    policy = load_skippable_policy(config.policy, compute)
    demonstrations = demonstrations_for(config.data, policy.spec)
    if config.init_heads:
        initial = _initial_heads(config.policy, policy).heads
        plan, heads = initial.plan, initial.config
    else:
        depth = len(policy.layers)
        plan = read_plan(config.plan) if config.plan else assumed_plan(depth, config.static_ratio, config.exits)
        heads = _heads_config(config, plan, policy)
    longest = max(demonstrations.instructions, key=len, default="")
    frames = min(config.frames, demonstrations.total_frames) * (1 + config.augment_copies)
    observation = policy.spec.blank_observation(longest)
    return Rehearsal(policy, plan, heads, config.training, observation), frames


def _is_finished(config: DistillRunConfig) -> bool:
    points = read_lines(config.out / CURVE_FILE)
    reached = points[-1]["step"] if points else 0
    return reached == config.training.steps and has_skips(config.out) and not (config.out / STATE_FILE).exists()


@dataclass(frozen=True)
class InitialHeads:
    """Heads that training starts from.

    Attributes:
        heads: The heads as their checkpoint holds them.
        digest: SHA-256 of their file.
        importance: The importance measure that they came with.
        provenance: How they were made.
    """

    heads: SkipHeads
    digest: str
    importance: str
    provenance: dict[str, Any]


def _initial_heads(name: str, policy: SkippablePolicy) -> InitialHeads:
    folder = find_checkpoint(name)
    if not has_skips(folder):
        raise ConfigError(f"init_heads must be left out: {name} has no heads yet; distill without --init-heads.")
    heads, settings, made = load_heads(folder)
    if not is_known_as(policy, settings.teacher):
        raise CheckpointError(f"{folder} has heads that were trained for other weights; distill without --init-heads.")
    return InitialHeads(heads, sha256(folder / HEADS), settings.importance, made)


class _Run:
    """One distillation, from its demonstrations to its checkpoint."""

    def __init__(
        self,
        config: DistillRunConfig,
        plan: SkipPlan,
        policy: SkippablePolicy,
        demonstrations: Demonstrations,
        *,
        initial: InitialHeads | None,
        importance: str,
        is_checkpointed: bool,
    ) -> None:
        self._importance = importance
        self._initial = initial
        self._config, self._policy, self._demonstrations = config, policy, demonstrations
        for parameter in _parameters(policy):
            parameter.requires_grad_(False)
        torch.manual_seed(config.training.seed)
        self._heads = initial.heads if initial else SkipHeads(plan, _heads_config(config, plan, policy))
        self._heads.to(next(policy.layers.parameters()).device)
        with mixed_precision(policy.layers):
            self._skipper = attach(policy.layers, plan, self._heads, followers=policy.followers)
        self._trainer = HeadsTrainer(
            self._skipper,
            policy.act,
            policy.spec.execute_steps,
            config.training,
            is_checkpointed=is_checkpointed,
        )

    def run(self) -> None:
        config, trainer = self._config, self._trainer
        seconds = self._resume()
        if trainer.step < config.training.steps:
            seconds = self._train(seconds)
        self._finish(seconds)

    def _train(self, seconds: float) -> float:
        config, trainer = self._config, self._trainer
        split = split_of(self._demonstrations, self._policy.provenance)
        chosen = choose_frames(self._demonstrations, config.frames, split, held_out=False)
        frames = encode(self._policy, self._demonstrations, chosen, "frames", augment_copies=config.augment_copies)
        answers: FullModelAnswer | None = None
        are_asked = False  # whether the full model's answers to all frames have been computed
        board = SummaryWriter(str(config.out / "tensorboard"), purge_step=trainer.step + 1)
        started = time.monotonic() - seconds
        figures: list[dict[str, float]] = []
        with (
            deferred_interrupt() as interrupt,
            tqdm(total=config.training.steps, initial=trainer.step, desc="distilling", unit="step") as progress,
        ):
            while trainer.step < config.training.steps:
                if not are_asked and not trainer.is_first_stage:
                    answers, are_asked = self._answers(frames), True
                figures.append(self._update(frames, answers))
                progress.update()
                seconds = time.monotonic() - started
                stage_ends = trainer.step in (config.training.adapter_steps, config.training.steps)
                if trainer.step % REPORT_EVERY == 0 or stage_ends:
                    point = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
                    figures.clear()
                    append_line(config.out / CURVE_FILE, {"step": trainer.step, **point, "seconds": round(seconds, 1)})
                    for name, value in point.items():
                        board.add_scalar(name, value, trainer.step)
                    progress.set_postfix({name: f"{value:.4f}" for name, value in point.items() if "/" not in name})
                if trainer.step % SAVE_EVERY == 0 or stage_ends or interrupt.is_requested:
                    self._save_state(seconds)
                if interrupt.is_requested:
                    raise KeyboardInterrupt
        board.close()
        return seconds

    def _update(self, frames: Encoded, answers: FullModelAnswer | None) -> dict[str, float]:
        """One step on a batch of frames."""
        trainer = self._trainer
        rng = trainer.rng()
        rows = np.sort(rng.integers(0, len(frames.items), self._config.training.batch))
        batch = self._policy.collate(frames.rows(rows))
        answer: FullModelAnswer | None = None
        if not trainer.is_first_stage:  # where items are padded, the answer depends on the batch
            answer = trainer.answer(batch) if answers is None else _rows(answers, rows)
        return trainer.update(batch, answer, rng)

    def _answers(self, frames: Encoded) -> FullModelAnswer | None:
        """Compute the full model's answer to every frame once; None where batches are padded, each in its own way."""
        everything: FullModelAnswer | None = None
        count = len(frames.items)
        with tqdm(total=count, desc="asking the full model", unit="frame") as progress:
            for rows, items in frames.batches():
                batch = self._policy.collate(items)
                if batch[1] is not None and not batch[1].all():
                    return None
                answer = self._trainer.answer(batch)
                parts = [answer.actions, *answer.targets]
                if everything is None:
                    needed = sum(part[0].nbytes for part in parts) * count
                    check_memory(needed, f"{count} answers of the full model", "give fewer --frames")
                    actions, *targets = [part.new_empty((count, *part.shape[1:])) for part in parts]
                    everything = FullModelAnswer(actions, targets)
                pairs = zip(everything.targets, answer.targets, strict=True)
                if any(kept.shape[1:] != part.shape[1:] for kept, part in pairs):
                    return None
                for kept, part in zip([everything.actions, *everything.targets], parts, strict=True):
                    kept[rows] = part
                progress.update(rows.stop - rows.start)
        return everything

    def _finish(self, seconds: float) -> None:
        config = self._config
        spec = self._policy.spec
        lookahead = min(LOOKAHEAD, spec.chunk_length - spec.execute_steps)
        self._heads.to(next(self._policy.layers.parameters()).dtype)
        replay = Replay(self._policy, self._demonstrations)
        statistics = replay.statistics(self._skipper, lookahead, self._importance)
        self._skipper.detach()
        settings = SkipSettings(
            plan=self._heads.plan,
            heads=self._heads.config,
            teacher=original_fingerprint(self._policy),
            action_dim=len(spec.action_names),
            statistics=statistics,
            lookahead=lookahead,
            importance=self._importance,
        )
        policy = DyslPolicy(self._policy, self._heads.eval(), settings)
        settings = replace(settings, mean_layers=replay.play(policy).mean_layers)
        policy.close()
        record = {
            "method": "dynamic-static layer skipping",
            **provenance.record(),
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "data": describe(self._demonstrations),
            "seconds": round(seconds, 1),
            "init": self._initial.provenance if self._initial else None,
        }
        save_skips(config.out, self._heads, settings, record)
        (config.out / STATE_FILE).unlink(missing_ok=True)

    def _save_state(self, seconds: float) -> None:
        trainer = self._trainer
        state = {f"weights.{name}": p.detach() for name, p in trainer.parameters.items()}
        state |= optimizer_tensors(trainer.parameters, trainer.optimizer)
        metadata = {
            "step": str(trainer.step),
            "seconds": str(seconds),
            "tolerance": trainer.tolerance.hex(),
        }
        with atomic_write(self._config.out / STATE_FILE) as temporary:
            save_file(state, temporary, metadata=metadata)

    @torch.no_grad()
    def _resume(self) -> float:
        """Read the state, if there is one, and return the seconds that were spent so far."""
        path, trainer = self._config.out / STATE_FILE, self._trainer
        seconds = 0.0
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
                    for name, parameter in trainer.parameters.items():
                        parameter.copy_(file.get_tensor(f"weights.{name}"))
                    restore_optimizer(trainer.parameters, trainer.optimizer, file)
                trainer.step = int(metadata["step"])
                trainer.tolerance = float.fromhex(metadata["tolerance"])
                seconds = float(metadata["seconds"])
            except (SafetensorError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); remove it to train from the start.") from error
        curve = self._config.out / CURVE_FILE
        write_lines(curve, [point for point in read_lines(curve) if point["step"] <= trainer.step])
        return seconds


def _heads_config(config: DistillRunConfig, plan: SkipPlan, policy: SkippablePolicy) -> HeadsConfig:
    weights = sum(p.numel() for p in policy.layers.parameters())
    size = config.adapter_size or default_adapter_size(
        policy.width, weights, len(plan.dynamic_layers), config.controller_size
    )
    return HeadsConfig(policy.width, size, config.controller_size)


def _parameters(policy: SkippablePolicy) -> Iterator[torch.nn.Parameter]:
    """Yield all parameters of a policy, which must stay as they are."""
    yield from (policy if isinstance(policy, torch.nn.Module) else policy.layers).parameters()


def _rows(answer: FullModelAnswer, rows: Any) -> FullModelAnswer:
    chosen = torch.from_numpy(rows)
    return FullModelAnswer(answer.actions[chosen], [target[chosen] for target in answer.targets])
