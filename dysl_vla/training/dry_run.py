"""A distillation's estimate beside the memory of this machine: `dysl distill --dry-run`, and the check before it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.policies import ComputeConfig, device_for, size_of
from dysl_vla.policies.compute import free_memory
from dysl_vla.processes import Processes
from dysl_vla.skip_controller.heads_trainer import DistillConfig
from dysl_vla.training.encoding import MEMORY_SHARE
from dysl_vla.training.estimate import ANSWER, STAGE_1, STAGE_2, Estimate, Rehearsal

Checkpointing = Literal["auto", "on", "off"]
SMALL_SHARE = 0.01
"""Share of the free memory below which a policy's files are small."""


@dataclass(frozen=True)
class MemoryUse:
    """How a distillation uses its device's memory.

    Attributes:
        is_checkpointed: Whether backward computes activations again.
        reserve: Bytes that training needs beside the policy's weights, as far as they were estimated: encoded frames
            are kept only in what is left.
    """

    is_checkpointed: bool = False
    reserve: int = 0


@dataclass(frozen=True)
class Budget:
    """An estimate beside what a device has.

    Attributes:
        estimate: What training needs.
        training: How heads are trained.
        frames: Number of frames that are trained on, copies included.
        device: The policy's device.
        free: Its free bytes; None: unknown.
        kept_frames: Bytes of encoded frames that are kept; 0 where they are streamed.
        kept_answers: Bytes of the full model's answers that are kept; 0 where each batch is asked for.
    """

    estimate: Estimate
    training: DistillConfig
    frames: int
    device: torch.device
    free: int | None
    kept_frames: int
    kept_answers: int

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        training: DistillConfig,
        frames: int,
        device: torch.device,
        *,
        free: int | None,
        stream: bool | None = None,
    ) -> Budget:
        """Decide what is kept: frames, then the full model's answers, where they fit beside the training.

        Args:
            estimate: See `Budget`.
            training: See `Budget`.
            frames: See `Budget`.
            device: See `Budget`.
            free: See `Budget`.
            stream: Whether frames are streamed; None: where they do not fit.
        """
        kept = answers = 0
        spare = math.inf if free is None else free - estimate.total
        needed = frames * estimate.frame
        if not stream and (stream is False or needed <= MEMORY_SHARE * spare):
            kept, needed = needed, frames * estimate.answer
            if needed <= MEMORY_SHARE * (spare - kept):
                answers = needed
        return cls(estimate, training, frames, device, free, kept, answers)

    @property
    def needed(self) -> int:
        """Return the bytes of the device at the peak."""
        return self.estimate.total + self.kept_frames + self.kept_answers

    @property
    def fits(self) -> bool:
        """Tell whether the device has enough free memory, as far as it is known."""
        return self.free is None or self.needed <= self.free

    @property
    def advice(self) -> str:
        """Return what would need less memory."""
        options = ["a smaller --batch"] if self.training.batch > 1 else []
        options += [] if self.estimate.is_checkpointed else ["--checkpointing on"]
        options += ["fewer --frames"] if self.kept_frames else []
        options += ["--dtype bfloat16"] if self.estimate.backbone >= 4 * self.estimate.backbone_weights else []
        return ", ".join([*options, "or a device with more memory"])


def budgets(
    rehearse: Callable[[ComputeConfig], tuple[Rehearsal, int]],
    compute: ComputeConfig,
    device: torch.device,
    *,
    checkpointing: Checkpointing = "auto",
    stream: bool | None = None,
    local_count: int = 1,
) -> Iterator[Budget]:
    """Estimate a distillation without reading weights where the policy allows it, else with a real step.

    Args:
        rehearse: Loads the policy somewhere, and returns what to rehearse with it and the number of frames.
        compute: How the policy is loaded.
        device: Where it shall run.
        checkpointing: Whether activations are computed again; with "auto" there is a budget without it, and one with.
        stream: See `Budget.of`.
        local_count: Number of processes that share the memory of a CPU.

    Raises:
        DyslError: The policy, the plan or the demonstrations cannot be used.
    """
    free = free_memory(device, local_count)
    rehearsal, frames = rehearse(replace(compute, device="meta"))
    is_measured = False
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]
    for is_checkpointed in modes:
        try:
            estimate = rehearsal.estimate(is_checkpointed=is_checkpointed, is_measured=is_measured)
        except DyslError:
            if not is_checkpointed or len(modes) == 1:
                raise
            continue  # a decoder that keeps keys and values cannot be checkpointed
        except Exception as error:  # foreign code may need anything that a tensor without content has not
            if is_measured:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"The policy is loaded to measure a step, as it needs its weights ({reason}).", file=sys.stderr)
            is_measured = True
            rehearsal, frames = rehearse(compute)
            estimate = rehearsal.estimate(is_checkpointed=is_checkpointed, is_measured=True)
        yield Budget.of(estimate, rehearsal.training, frames, device, free=free, stream=stream)


def choose_checkpointing(
    rehearse: Callable[[ComputeConfig], tuple[Rehearsal, int]],
    name: str,
    compute: ComputeConfig,
    checkpointing: Checkpointing,
    stream: bool | None,
    *,
    processes: Processes | None = None,
) -> MemoryUse:
    """Choose whether backward computes activations again, and refuse a distillation that does not fit into memory.

    A policy whose weights are small beside the memory is not estimated: that would take longer than it is worth.

    Args:
        rehearse: See `budgets`.
        name: The policy's name.
        compute: See `budgets`.
        checkpointing: What was asked for.
        stream: See `budgets`.
        processes: Processes that each train so, of which those of one machine share the memory of its CPU.

    Raises:
        ConfigError: The memory is too small.
    """
    device = device_for(name, compute)
    local_count = processes.local_count if processes else 1
    free = free_memory(device, local_count)
    if free is None or size_of(name, compute) < SMALL_SHARE * free:
        return MemoryUse(is_checkpointed=checkpointing == "on")
    budget = None
    for budget in budgets(
        rehearse, compute, device, checkpointing=checkpointing, stream=stream, local_count=local_count
    ):
        if budget.fits:
            estimate = budget.estimate
            return MemoryUse(estimate.is_checkpointed, estimate.total - estimate.backbone - estimate.rest)
    assert budget is not None
    assert budget.free is not None
    raise ConfigError(
        f"memory: distilling needs {budget.needed / 1e9:.1f} GB on {budget.device} and {budget.free / 1e9:.1f} are "
        f"free; give {budget.advice}. --dry-run shows where the memory goes."
    )


def render(name: str, choices: list[Budget]) -> str:
    """Render budgets as Markdown: where the memory goes, and what the training costs.

    Args:
        name: The policy's name.
        choices: Budgets that differ in checkpointing.
    """
    chosen = next((budget for budget in choices if budget.fits), choices[-1])
    estimate = chosen.estimate
    batch, tokens, hidden = estimate.shape
    title = f"{name} on {chosen.device}: batch {batch}, {tokens} tokens of width {hidden}"
    if estimate.is_measured:
        title += ", measured with the policy's weights"
    return "\n".join([title + ".", "", *_memory(choices), "", *_operations(chosen), "", _verdict(chosen)])


def _memory(choices: list[Budget]) -> Iterator[str]:
    columns = ["with checkpointing" if budget.estimate.is_checkpointed else "without" for budget in choices]
    yield f"| memory at its peak, GB | {' | '.join(columns)} |"
    yield "|---|" + "---:|" * len(choices)
    for part in choices[0].estimate.parts:
        yield f"| {part} | {_cells(budget.estimate.parts[part] for budget in choices)} |"
    frame = choices[0].estimate.frame
    yield f"| frames, {frame / 1e6:.2f} MB each | {_cells((b.kept_frames for b in choices), 'streamed')} |"
    yield f"| full model's answers to all frames | {_cells((b.kept_answers for b in choices), 'not kept')} |"
    yield f"| **needed** | {_cells(b.needed for b in choices)} |"
    yield f"| at its peak in | {' | '.join(b.estimate.largest.name for b in choices)} |"
    if choices[0].free is not None:
        yield f"| free | {_cells(b.free or 0 for b in choices)} |"


def _cells(values: Iterator[int], zero: str | None = None) -> str:
    return " | ".join(zero if not value and zero else f"{value / 1e9:.2f}" for value in values)


def _operations(budget: Budget) -> Iterator[str]:
    """Yield a row for each part of the training, and their sum."""
    estimate, training = budget.estimate, budget.training
    answer, first, second = (estimate.phase(name) for name in (ANSWER, STAGE_1, STAGE_2))
    assert answer is not None
    assert second is not None
    batches = -(-budget.frames // training.batch)
    encoded = budget.frames if budget.kept_frames else training.steps * training.batch
    rows = [("encoding, a frame", encoded, estimate.encoding)]
    if first is not None:
        rows.append(("stage 1: full model, forward", training.adapter_steps, answer.forward))
        adapters = first.forward - answer.forward + first.backward
        rows.append(("stage 1: adapters, forward and backward", training.adapter_steps, adapters))
    asked = batches if budget.kept_answers else training.skip_steps
    rows.append(("stage 2: full model, forward", asked, answer.forward))
    rows.append(("stage 2: skipping model, forward", training.skip_steps, second.forward))
    rows.append(("stage 2: skipping model, backward", training.skip_steps, second.backward))
    yield "| floating-point operations (FLOP) | times | each | in all |"
    yield "|---|---:|---:|---:|"
    for name, times, each in rows:
        yield f"| {name} | {times} | {_short(each)} | {_short(times * each)} |"
    total = sum(times * each for _, times, each in rows)
    yield f"| **{training.steps} steps** | | | **{_short(total)}** |"


def _short(count: float) -> str:
    """Return a count of operations with a metric prefix."""
    power = next((power for power in (18, 15, 12, 9) if count >= 10**power), 6)
    return f"{count / 10**power:.3g} { {18: 'E', 15: 'P', 12: 'T', 9: 'G', 6: 'M'}[power] }FLOP"


def _verdict(budget: Budget) -> str:
    estimate = budget.estimate
    share = estimate.trained / estimate.backbone_weights
    trained = f"{estimate.trained / 1e6:.2f} M weights are trained, {100 * share:.2f} % of the backbone's."
    how = "with checkpointing" if estimate.is_checkpointed else "without checkpointing"
    if budget.fits:
        return f"{trained} It fits {how}."
    return f"{trained} It does not fit, even {how}: give {budget.advice}."
