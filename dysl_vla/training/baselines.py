"""`dysl baseline`: train another method on the frames and the frozen policy that ours is distilled on, to compare."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.checkpoint import MANIFEST
from dysl_vla.data.augment import Copies
from dysl_vla.data.selection import choose_frames, demonstrations_for, split_of
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import append_line, check_same_run, is_unused, locked_dir, read_lines, write_json, write_lines
from dysl_vla.interrupts import deferred_interrupt
from dysl_vla.policies import ComputeConfig, SkippablePolicy, load_skippable_policy
from dysl_vla.training.train import describe

with needs_extra("policy"):
    import torch

    from dysl_vla.policies.baseline import BaselinePolicy, save_baseline, settings_for
    from dysl_vla.processes import Processes
    from dysl_vla.skip_controller.baselines import (
        METHODS,
        Baseline,
        BaselineConfig,
        BaselineRunner,
        BaselineTrainer,
        BaselineTrainingConfig,
        make_baseline,
    )
    from dysl_vla.skip_controller.baselines.running import dial_for
    from dysl_vla.skip_controller.compatibility import compute_dtype, run_device
    from dysl_vla.training.batches import Batches
    from dysl_vla.training.check_policy import check_policy
    from dysl_vla.training.encoding import encode
    from dysl_vla.training.heads_state import Progress, restore_heads_state, save_heads_state

RUN_FILE, STATE_FILE, CURVE_FILE = "baseline_run.json", "baseline_state.safetensors", "baseline.jsonl"
SAVE_EVERY, REPORT_EVERY = 500, 50
DIAL_FRAMES = 400
"""Held-out frames on which the dial is chosen."""


@dataclass(frozen=True)
class BaselineRunConfig:
    """Train another method that runs fewer layers on a policy, to compare ours with. Resumes where it was stopped.

    Raises:
        ConfigError: A value is out of range.
    """

    method: str
    """deer (DeeR-VLA), flexidepth (FlexiDepth) or mole (MoLe-VLA), as far as they apply to a frozen policy."""
    data: Path
    """Folder of demonstrations, a LeRobotDataset v3."""
    out: Path
    """Folder for the checkpoint."""
    layers: float
    """Mean number of layers that shall run; what decides it is chosen on held-out demonstrations."""
    policy: str = "metaworld-mini"
    """The policy: a shipped name, a checkpoint's folder or a hub id."""
    frames: int = 32_000
    """Number of frames to train on, evenly spread."""
    augment_copies: int = 0
    """Number of copies of each frame to train on, too, with images moved by up to 4 pixels."""
    augment_images: bool = False
    """Vary light, colours, contrast and noise of those copies, and cover parts of them."""
    adapter_size: int = 88
    """Width of an adapter's bottleneck."""
    training: BaselineTrainingConfig = field(default_factory=BaselineTrainingConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        for name, least in (("frames", 1), ("augment_copies", 0), ("adapter_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.augment_images and not self.augment_copies:
            raise ConfigError("augment_images must come with augment_copies, which it varies; add --augment-copies 1.")


def train_baseline(config: BaselineRunConfig) -> Path:
    """Train a baseline, choose its dial, and write the checkpoint.

    Returns:
        Its folder.

    Raises:
        ConfigError: The method cannot work on the policy, or `out` holds something else.
        DatasetError: The demonstrations are damaged or too few.
        CheckpointError: The policy or the state is damaged.
    """
    if not is_unused(config.out) and not (config.out / RUN_FILE).exists():
        raise ConfigError(f"out must be a new folder or one of a baseline; {config.out} is not empty and holds none.")
    policy = load_skippable_policy(config.policy, config.compute)
    demonstrations = demonstrations_for(config.data, policy.spec)
    sizes = _sizes(config, policy)
    identity = {
        **json.loads(json.dumps(asdict(config), default=str)),
        "demonstrated_frames": demonstrations.total_frames,
        "teacher": policy.fingerprint,
    }
    if (config.out / RUN_FILE).exists():
        check_same_run(config.out / RUN_FILE, identity)
        if (config.out / MANIFEST).exists():
            return config.out
    else:
        check_policy(policy, demonstrations)
        _check_fits(policy)
    split = split_of(demonstrations, policy.provenance)
    held_out = choose_frames(demonstrations, DIAL_FRAMES, split, held_out=True)
    chosen = choose_frames(demonstrations, config.frames, split, held_out=False)
    with locked_dir(config.out):
        write_json(config.out / RUN_FILE, identity)
        torch.set_num_threads(config.training.threads or len(os.sched_getaffinity(0)))
        torch.manual_seed(config.training.seed)
        for parameter in (policy if isinstance(policy, torch.nn.Module) else policy.layers).parameters():
            parameter.requires_grad_(False)
        # Train.
        baseline = make_baseline(sizes).to(run_device(policy.layers, "0"))
        copies = Copies(config.augment_copies, config.augment_images)
        frames = encode(policy, demonstrations, chosen, "frames", copies=copies, stream=False)
        runner = BaselineRunner(policy.layers, baseline)
        trainer = BaselineTrainer(runner, policy.act, policy.spec.execute_steps, config.layers, config.training)
        seconds = _train(config, trainer, Batches(policy, trainer, frames, config.training.batch, Processes()))
        runner.detach()
        # Choose its dial.
        items = encode(policy, demonstrations, held_out, "held-out frames", stream=False).rows(np.arange(len(held_out)))
        record = {
            "method": config.method,
            **provenance.record(),
            "config": identity,
            "data": describe(demonstrations),
            "seconds": round(seconds, 1),
        }
        baseline.to(compute_dtype(policy.layers))
        untuned = settings_for(policy, sizes, config.policy, config.layers, config.layers)
        with closing(BaselinePolicy(policy, baseline, untuned, record)) as one:
            dial, mean = choose_dial(one, baseline, config.layers, items)
        save_baseline(config.out, baseline, settings_for(policy, sizes, config.policy, dial, mean), record)
        (config.out / STATE_FILE).unlink(missing_ok=True)
    return config.out


def _sizes(config: BaselineRunConfig, policy: SkippablePolicy) -> BaselineConfig:
    spec = policy.spec
    return BaselineConfig(
        config.method,
        len(policy.layers),
        policy.width,
        spec.chunk_length,
        len(spec.action_names),
        spec.execute_steps,
        config.layers,
        adapter_size=config.adapter_size,
    )


def _check_fits(policy: SkippablePolicy) -> None:
    """Refuse a policy that these methods are not for.

    Raises:
        ConfigError: Its action comes from more than the last token of one forward.
    """
    decode = getattr(policy, "decode", None)
    reason = None
    if policy.has_memory or policy.followers or decode is None:
        reason = "it has a memory, followers or more than one forward"
    else:
        hidden = torch.randn(1, 8, policy.width).to(run_device(policy.layers, "0"), compute_dtype(policy.layers))
        other = torch.cat([torch.randn_like(hidden[:, :-1]), hidden[:, -1:]], dim=1)
        try:
            reads_last = torch.equal(decode(hidden), decode(other))
        except (RuntimeError, IndexError):  # it expects tokens of its own
            reads_last = False
        reason = None if reads_last else "its action comes from other tokens than the last"
    if reason is not None:
        raise ConfigError(f"policy must act by the last token of one forward for these methods, and {reason}.")


def _train(config: BaselineRunConfig, trainer: BaselineTrainer, steps: Batches) -> float:
    """Train to the end, and return the seconds that it took in all."""
    seconds = restore_heads_state(config.out / STATE_FILE, trainer).seconds
    curve = config.out / CURVE_FILE
    write_lines(curve, [point for point in read_lines(curve) if point["step"] <= trainer.step])
    started, losses = time.monotonic() - seconds, []
    total = config.training.steps
    with (
        deferred_interrupt() as interrupt,
        closing(steps.until(total)) as batches,
        tqdm(total=total, initial=trainer.step, desc="training", unit="step") as progress,
    ):
        for batch, answer, _ in batches:
            assert answer is not None
            losses.append(trainer.update(batch, answer)["loss"])
            progress.update()
            seconds = time.monotonic() - started
            if trainer.step % REPORT_EVERY == 0 or trainer.step == total:
                point = {"step": trainer.step, "loss": float(np.mean(losses)), "seconds": round(seconds, 1)}
                append_line(curve, point)
                progress.set_postfix(loss=f"{point['loss']:.4f}")
                losses.clear()
            if trainer.step % SAVE_EVERY == 0 or interrupt.is_requested:
                save_heads_state(config.out / STATE_FILE, trainer, Progress(seconds))
            if interrupt.is_requested:
                raise KeyboardInterrupt
    return seconds


def choose_dial(policy: BaselinePolicy, baseline: Baseline, layers: float, items: list[object]) -> tuple[float, float]:
    """Find the dial at which at most so many layers run in the mean.

    Args:
        policy: The policy, which gets the dial.
        baseline: Its baseline.
        layers: The number of layers.
        items: Encoded held-out frames.

    Returns:
        The dial, and the mean number of layers that run with it.
    """

    def measure(dial: float) -> float:
        policy.set_dial(dial)
        traces = [policy.infer_encoded(item).skips for item in items]
        return float(np.mean([trace.layers for trace in traces if trace is not None]))

    dial = float(round(layers)) if baseline.rises else dial_for(layers, *baseline.dials, measure)
    return dial, measure(dial)
