"""`dysl distill`: from a policy and demonstrations to a checkpoint that skips layers.

It hands batches of encoded demonstrations to the trainer in `skip_controller`, keeps curves and a state that is resumed
exactly, and writes the policy with its heads, their statistics on held-out demonstrations included. Processes that
`accelerate launch` started share each batch, and the first one writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.checkpoint import MANIFEST, find_checkpoint, has_skips
from dysl_vla.data.augment import Copies
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import choose_frames, demonstrations_for, split_of
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import (
    append_line,
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
from dysl_vla.policies import (
    ComputeConfig,
    SkippablePolicy,
    device_for,
    is_known_as,
    load_skippable_policy,
    original_fingerprint,
)
from dysl_vla.training.calibrate import assumed_plan, calibrated_plan, read_plan
from dysl_vla.training.distill_config import STREAM, DistillRunConfig
from dysl_vla.training.encoding import encode
from dysl_vla.training.importance import choose_importance
from dysl_vla.training.replay import Replay
from dysl_vla.training.train import describe

with needs_extra("policy"):
    import torch
    from torch.utils.tensorboard.writer import SummaryWriter

    from dysl_vla.policies.dysl import HEADS, LOOKAHEAD, DyslPolicy, SkipSettings, load_heads, save_skips
    from dysl_vla.processes import Processes, launched_processes
    from dysl_vla.skip_controller.compatibility import match_heads, run_device
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads, default_adapter_size
    from dysl_vla.skip_controller.heads_trainer import HeadsTrainer, mixed_precision
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach
    from dysl_vla.training.batches import Batches
    from dysl_vla.training.check_policy import check_policy, check_saved
    from dysl_vla.training.dry_run import MemoryUse, budgets, choose_checkpointing, render
    from dysl_vla.training.encoded import Encoded, StreamedFrames, killed_readers
    from dysl_vla.training.estimate import Rehearsal
    from dysl_vla.training.fit import fit_heads
    from dysl_vla.training.heads_state import Progress, restore_heads_state, save_heads_state

RUN_FILE, STATE_FILE, CURVE_FILE = "distill_run.json", "distill_state.safetensors", "distill.jsonl"
REPORT_EVERY = 50
SAVE_EVERY = 500


def distill(config: DistillRunConfig) -> Path:
    """Train adapters and controllers, and write the checkpoint.

    Returns:
        Its folder.

    Raises:
        ConfigError: The policy or the plan cannot work, or `out` holds something else.
        DatasetError: The demonstrations are damaged or too few.
        CheckpointError: The policy or the state is damaged.
    """
    if config.init_heads:
        config = replace(config, training=replace(config.training, adapter_steps=0))
    with launched_processes(config.compute.device) as processes:
        # The main process checks everything first, so that a mistake is reported once, and the others wait.
        parts, decided = None, None
        if processes.is_main:
            _check(config, processes)
            memory = MemoryUse() if _is_finished(config) else _memory_use(config, processes)
            parts = _load(config, processes)
            decided = replace(_decide(config, *parts), memory=memory)
        decided = processes.from_main(decided)
        assert decided is not None
        if decided.is_finished:
            return config.out
        policy, demonstrations, initial = parts or _load(config, processes)
        cores = len(os.sched_getaffinity(0)) // processes.local_count
        torch.set_num_threads(config.training.threads or max(1, cores))
        run = _Run(config, decided, policy, demonstrations, initial=initial, processes=processes)
        with locked_dir(config.out) if processes.is_main else nullcontext():
            if processes.is_main:
                write_json(config.out / RUN_FILE, decided.identity)
                if not (config.out / MANIFEST).exists():
                    # What is kept is the policy as it came, not as it was cast for this training.
                    is_cast = config.compute.dtype is not None and not hasattr(policy, "base")  # that is only named
                    check_saved(load_skippable_policy(config.policy) if is_cast else policy, config.out)
            processes.wait()
            run.run()
    return config.out


@dataclass(frozen=True)
class _Decided:
    """What the main process decides for all.

    Attributes:
        identity: Settings by which the run is known again.
        plan: Which layers may be skipped.
        importance: The importance measure.
        is_finished: Whether the run has been finished before.
        memory: How the policy's memory is used.
    """

    identity: dict[str, Any]
    plan: SkipPlan
    importance: str
    is_finished: bool
    memory: MemoryUse = field(default_factory=MemoryUse)


def _check(config: DistillRunConfig, processes: Processes) -> None:
    if not is_unused(config.out) and not (config.out / RUN_FILE).exists():
        raise ConfigError(
            f"out must be a new folder or one of a distillation; {config.out} is not empty and holds none."
        )
    if config.training.batch % processes.count:
        raise ConfigError(
            f"batch must be a multiple of the {processes.count} processes that share it, got {config.training.batch}."
        )


def _memory_use(config: DistillRunConfig, processes: Processes) -> MemoryUse:
    """Choose how memory is used by a process, which trains on its share of each batch."""
    share = replace(config, training=replace(config.training, batch=config.training.batch // processes.count))
    return choose_checkpointing(
        partial(_rehearsal, share),
        config.policy,
        config.compute,
        config.checkpointing,
        STREAM[config.stream],
        processes=processes,
    )


def _load(
    config: DistillRunConfig, processes: Processes
) -> tuple[SkippablePolicy, Demonstrations, InitialHeads | None]:
    device = processes.own_device(config.compute.device)
    policy = load_skippable_policy(config.policy, replace(config.compute, device=device))
    demonstrations = demonstrations_for(config.data, policy.spec)
    return policy, demonstrations, _initial_heads(config.policy, policy) if config.init_heads else None


def _decide(
    config: DistillRunConfig,
    policy: SkippablePolicy,
    demonstrations: Demonstrations,
    initial: InitialHeads | None,
) -> _Decided:
    settings = json.loads(json.dumps({**asdict(config), **asdict(config.training)}, default=str))
    for name in (
        "training",
        "stream",
        "static_ratio",
        "exits",
        "checkpointing",
        "dry_run",
    ):  # a plan's result is theirs
        del settings[name]
    identity = {**settings, "demonstrated_frames": demonstrations.total_frames, "teacher": policy.fingerprint}
    identity["initial"] = initial and initial.digest
    run_file = config.out / RUN_FILE
    is_begun = run_file.exists()
    if is_begun:  # before a plan is calibrated, which takes a while
        check_same_run(run_file, {**identity, "plan": read_json(run_file).get("plan")})
    else:
        check_policy(policy, demonstrations)
    if initial:
        plan = initial.heads.plan
    else:
        plan = (
            read_plan(config.plan)
            if config.plan
            else calibrated_plan(policy, demonstrations, config.static_ratio, config.exits)
        )
    identity["plan"] = json.loads(json.dumps(asdict(plan)))
    if is_begun:
        check_same_run(run_file, identity)
    importance = config.importance or (initial.importance if initial else None)
    is_finished = is_begun and _is_finished(config)
    if not is_finished:
        importance = choose_importance(importance, demonstrations, policy.spec)
    return _Decided(identity, plan, importance or "", is_finished)


def dry_run(config: DistillRunConfig) -> str:
    """Estimate a distillation, and return the estimate as Markdown.

    Raises:
        ConfigError: The policy or the plan cannot work.
        DatasetError: The demonstrations are damaged.
        CheckpointError: The policy is damaged.
    """
    estimates = budgets(
        partial(_rehearsal, config),
        config.compute,
        device_for(config.policy, config.compute),
        checkpointing=config.checkpointing,
        stream=STREAM[config.stream],
    )
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
        decided: _Decided,
        policy: SkippablePolicy,
        demonstrations: Demonstrations,
        *,
        initial: InitialHeads | None,
        processes: Processes,
    ) -> None:
        plan, self._importance, self._memory = decided.plan, decided.importance, decided.memory
        self._initial, self._processes = initial, processes
        self._progress = Progress()
        self._config, self._policy, self._demonstrations = config, policy, demonstrations
        for parameter in _parameters(policy):
            parameter.requires_grad_(False)
        torch.manual_seed(config.training.seed)
        self._heads = initial.heads if initial else SkipHeads(plan, _heads_config(config, plan, policy))
        self._heads.to(run_device(policy.layers, "0"))
        with mixed_precision(policy.layers):
            self._skipper = attach(policy.layers, plan, self._heads, followers=policy.followers)
        self._trainer = HeadsTrainer(
            self._skipper,
            policy.act,
            policy.spec.execute_steps,
            config.training,
            processes,
            is_checkpointed=decided.memory.is_checkpointed,
        )

    def run(self) -> None:
        config, trainer = self._config, self._trainer
        self._progress = restore_heads_state(config.out / STATE_FILE, trainer)
        if self._processes.is_any(trainer.step != self._processes.from_main(trainer.step)):
            raise ConfigError(
                f"out must be on a disk that all processes share; not all of them find the same state in {config.out}."
            )
        if self._processes.is_main:
            curve = config.out / CURVE_FILE
            write_lines(curve, [point for point in read_lines(curve) if point["step"] <= trainer.step])
        seconds = self._progress.seconds
        if trainer.step < config.training.steps:
            seconds = self._train(seconds)
        if self._processes.is_main:
            self._finish(seconds)

    def _train(self, seconds: float) -> float:
        config, trainer, is_main = self._config, self._trainer, self._processes.is_main
        frames = self._frames()
        if config.fit_frames and trainer.step == 0:
            fit_heads(self._policy, self._skipper, frames, config.fit_frames, self._processes)
        steps = Batches(
            self._policy,
            trainer,
            frames,
            config.training.batch,
            self._processes,
            reserve=self._memory.reserve,
        )
        started = time.monotonic() - seconds
        figures: list[dict[str, float]] = []
        with (
            deferred_interrupt() as interrupt,
            SummaryWriter(str(config.out / "tensorboard"), purge_step=trainer.step + 1)
            if is_main
            else nullcontext() as board,
            closing(steps.until(config.training.steps)) as batches,
            killed_readers(),
            tqdm(
                total=config.training.steps, initial=trainer.step, desc="distilling", unit="step", disable=not is_main
            ) as progress,
        ):
            for batch, answer, rng in batches:
                figures.append(trainer.update(batch, answer, rng))
                progress.update()
                seconds = time.monotonic() - started
                stops = self._processes.is_any(interrupt.is_requested)
                stage_ends = trainer.step in (config.training.adapter_steps, config.training.steps)
                if trainer.step % REPORT_EVERY == 0 or stage_ends:
                    point = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
                    figures.clear()
                    if board is not None:
                        self._report(point, seconds, board)
                    progress.set_postfix({name: f"{value:.4f}" for name, value in point.items() if "/" not in name})
                if is_main and (trainer.step % SAVE_EVERY == 0 or stage_ends or stops):
                    self._save_state(seconds)
                if stops:
                    self._processes.wait()  # the first process to end has the others ended, and one of them is saving
                    raise KeyboardInterrupt
        return seconds

    def _report(self, point: dict[str, float], seconds: float, board: SummaryWriter) -> None:
        step = self._trainer.step
        append_line(self._config.out / CURVE_FILE, {"step": step, **point, "seconds": round(seconds, 1)})
        for name, value in point.items():
            board.add_scalar(name, value, step)

    def _frames(self) -> Encoded:
        config, policy = self._config, self._policy
        stream = self._progress.is_streamed if config.stream == "auto" else STREAM[config.stream]
        split = split_of(self._demonstrations, policy.provenance)
        frames = encode(
            policy,
            self._demonstrations,
            choose_frames(self._demonstrations, config.frames, split, held_out=False),
            "frames",
            copies=Copies(config.augment_copies, config.augment_images),
            stream=stream,
            reserve=self._memory.reserve,
            processes=self._processes,
        )
        self._progress = replace(self._progress, is_streamed=isinstance(frames, StreamedFrames))
        return frames

    def _save_state(self, seconds: float) -> None:
        self._progress = replace(self._progress, seconds=seconds)
        save_heads_state(self._config.out / STATE_FILE, self._trainer, self._progress)

    def _finish(self, seconds: float) -> None:
        config = self._config
        spec = self._policy.spec
        lookahead = min(LOOKAHEAD, spec.chunk_length - spec.execute_steps)
        match_heads(self._heads, self._policy.layers, self._policy.followers)
        replay = Replay(self._policy, self._demonstrations, stream=STREAM[config.stream] or None)
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


def _heads_config(config: DistillRunConfig, plan: SkipPlan, policy: SkippablePolicy) -> HeadsConfig:
    weights = sum(p.numel() for p in policy.layers.parameters())
    size = config.adapter_size or default_adapter_size(
        policy.width, weights, len(plan.exits or plan.dynamic_layers), config.controller_size
    )
    return HeadsConfig(policy.width, size, config.controller_size, getattr(policy, "follower_sizes", ()))


def _parameters(policy: SkippablePolicy) -> Iterator[torch.nn.Parameter]:
    """Yield all parameters of a policy, which must stay as they are."""
    yield from (policy if isinstance(policy, torch.nn.Module) else policy.layers).parameters()
