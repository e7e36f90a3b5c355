"""The estimate of a distillation is what the distillation then needs, without weights having been read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from dysl_vla.cli import main
from dysl_vla.errors import ConfigError
from dysl_vla.policies import ComputeConfig, load_skippable_policy
from dysl_vla.policies.backbone import BackbonePolicy
from dysl_vla.skip_controller.heads import Controller, HeadsConfig, SkipHeads, default_adapter_size
from dysl_vla.skip_controller.heads_trainer import DistillConfig, HeadsTrainer
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import attach
from dysl_vla.training import dry_run as dry_run_module
from dysl_vla.training.calibrate import assumed_plan
from dysl_vla.training.distill import DistillRunConfig, distill, dry_run
from dysl_vla.training.dry_run import Budget, budgets, render
from dysl_vla.training.estimate import STAGE_1, STAGE_2, Estimate, Rehearsal, _layers, worst_exits
from tests.policies.own_policies import ALL, Autoregressive, OwnPolicy

CHUNK, ACTIONS = 8, 7
CPU = torch.device("cpu")


class Toy(BackbonePolicy, nn.Module):
    """A Llama of any size, whose observations are as many tokens as are wanted."""

    def __init__(self, tokens: int, **sizes: int) -> None:
        super().__init__()
        self.tokens, self.spec = tokens, SimpleNamespace(execute_steps=CHUNK)
        self.backbone = LlamaModel(LlamaConfig(use_cache=False, **sizes))
        width = sizes["hidden_size"]
        self.into, self.out = nn.Linear(8, width), nn.Linear(width, CHUNK * ACTIONS)

    def encode(self, observations: Sequence[Any], states: Sequence[Any]) -> list[dict[str, Tensor]]:
        rows = torch.zeros(len(observations), self.tokens, 8, dtype=self.into.weight.dtype)
        return [{"inputs_embeds": row} for row in self.into(rows)]

    def decode(self, hidden: Tensor) -> Tensor:
        return self.out(hidden[:, -1]).view(len(hidden), CHUNK, ACTIONS)


MEDIUM = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
}
BIG = {
    "vocab_size": 32_064,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TINY = {**MEDIUM, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
BATCH = 8


def rehearsal(policy: Any, static_ratio: float = 0.5, **changes: Any) -> Rehearsal:
    depth, width = len(policy.layers), policy.width
    plan = assumed_plan(depth, static_ratio, "all")
    weights = sum(p.numel() for p in policy.layers.parameters())
    size = default_adapter_size(width, weights, len(plan.dynamic_layers))
    training = replace(DistillConfig(adapter_steps=500, skip_steps=6200, batch=BATCH), **changes)
    return Rehearsal(policy, plan, HeadsConfig(width, size), training, {})


def on_meta(tokens: int, sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> Toy:
    with torch.device("meta"):
        return Toy(tokens, **sizes).to(dtype)


def phase(estimate: Estimate, name: str) -> Estimate:
    return replace(estimate, phases=tuple(phase for phase in estimate.phases if phase.name == name))


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))


def peaks(tokens: int, sizes: dict[str, int]) -> list[int]:
    """The peaks of a process that trains, above what it had before there was a model."""
    before = resident("VmRSS")
    policy = Toy(tokens, **sizes).requires_grad_(False)
    one = rehearsal(policy)
    skipper = attach(policy.layers, one.plan, SkipHeads(one.plan, one.heads))
    trainer = HeadsTrainer(skipper, policy.act, CHUNK, one.training)
    trainer.draw_exits = lambda _: list(worst_exits(one.plan, one.training))  # type: ignore[method-assign]
    with torch.no_grad():
        batch = policy.collate(policy.encode([{}] * BATCH, []))
    found = []
    for is_first, trainer.is_checkpointed in ((True, False), (False, False), (False, True)):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
        for _ in range(2):
            trainer.step = 0 if is_first else one.training.adapter_steps
            trainer.update(batch, None if is_first else trainer.answer(batch), trainer.rng())
        found.append(resident("VmHWM") - before)
    return found


def test_a_training_needs_what_was_estimated() -> None:
    # In a process of its own, in which freed memory goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    code = "from tests.training.test_estimate import *; peaks(8, TINY); print(*peaks(256, MEDIUM))"  # loads all code
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second, checkpointed = map(int, ran.stdout.split())
    without, with_it = (
        rehearsal(on_meta(256, MEDIUM)).estimate(is_checkpointed=is_checkpointed) for is_checkpointed in (False, True)
    )
    assert phase(without, STAGE_1).total == pytest.approx(first, rel=0.15)
    assert phase(without, STAGE_2).total == pytest.approx(second, rel=0.15)
    assert phase(with_it, STAGE_2).total == pytest.approx(checkpointed, rel=0.15)
    assert checkpointed < 0.5 * second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["tolerance", "mixture"])
def test_tensors_without_content_need_what_real_ones_need(objective: str, dtype: torch.dtype) -> None:
    for is_checkpointed in (False, True):
        faked = rehearsal(on_meta(16, TINY, dtype), objective=objective).estimate(is_checkpointed=is_checkpointed)
        real = rehearsal(Toy(16, **TINY).to(dtype), objective=objective)
        measured = real.estimate(is_checkpointed=is_checkpointed, is_measured=True)
        for one, other in zip(faked.phases, measured.phases, strict=True):
            assert one.peak == pytest.approx(other.peak, rel=0.05)
            assert (one.forward, one.backward) == (other.forward, other.backward)
        assert faked.total == pytest.approx(measured.total, rel=0.05)


def test_an_estimate_leaves_nothing_behind() -> None:
    tokens = 17  # which no controller has seen yet
    rehearsal(on_meta(tokens, TINY)).estimate(is_checkpointed=False)
    controller, hidden = Controller(HeadsConfig(32)), torch.randn(2, tokens, 32)
    torch.testing.assert_close(controller(hidden), controller(hidden, torch.ones(2, tokens)))


def test_operations_are_those_of_the_exits_that_are_drawn_on_average() -> None:
    tolerance, mixture = (
        rehearsal(on_meta(64, TINY), objective=objective).estimate(is_checkpointed=False).phase(STAGE_2)
        for objective in ("tolerance", "mixture")
    )
    assert tolerance is not None
    assert mixture is not None
    assert 0.6 * mixture.forward < tolerance.forward < 0.95 * mixture.forward
    assert tolerance.backward < 0.95 * mixture.backward


@pytest.mark.parametrize(("keep", "joint"), [(0.5, 0.6), (0.0, 0.0), (0.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("objective", ["tolerance", "mixture"])
def test_no_draw_keeps_more_layers_than_the_worst(objective: str, keep: float, joint: float) -> None:
    plan = SkipPlan(12, (0, 2, 6, 11))
    training = DistillConfig(objective=objective, keep_block_prob=keep, joint_exit_prob=joint)
    policy = Toy(4, **MEDIUM)
    trainer = HeadsTrainer(attach(policy.layers, plan, SkipHeads(plan, HeadsConfig(256))), policy.act, 1, training)
    draws = [trainer.draw_exits(np.random.default_rng(seed)) for seed in range(300)]
    is_mixture = objective == "mixture"
    most = max(_layers(plan, exits, is_mixture)[1] for exits in draws)
    assert _layers(plan, worst_exits(plan, training), is_mixture)[1] == most


def test_the_dry_run_of_a_7b_policy_says_where_the_memory_goes_and_what_it_costs() -> None:
    one = rehearsal(on_meta(600, BIG, torch.bfloat16), static_ratio=0.2)
    [chosen] = [Budget.of(one.estimate(is_checkpointed=True), one.training, 32_000, CPU, free=24 * 10**9)]
    text = render("openvla-7b-oft", [chosen])
    figures = chosen.estimate
    assert 12.9e9 < figures.backbone < 13e9  # 32 layers of 202 M weights in bfloat16
    assert figures.shape == (8, 600, 4096)
    assert figures.trained <= 0.012 * figures.backbone_weights
    assert chosen.kept_frames == 0  # 157 GB
    assert chosen.fits
    answer = figures.phase("the full model's answer")
    linear, attention = 2 * 4800 * figures.backbone_weights, 4 * 8 * 600**2 * 4096 * 32
    assert answer is not None
    assert answer.forward == pytest.approx(linear + attention, rel=0.01)
    for part in ("| backbone | 12.95 |", "| frames, 4.92 MB each | streamed |", "**6700 steps**", "It fits with"):
        assert part in text


def test_frames_are_kept_where_they_fit_beside_the_training() -> None:
    one = rehearsal(on_meta(16, TINY))
    estimate = one.estimate(is_checkpointed=False)
    room = estimate.total + 10 * estimate.frame
    assert Budget.of(estimate, one.training, 1000, CPU, free=room).kept_frames == 0
    assert Budget.of(estimate, one.training, 1000, CPU, free=room, stream=False).kept_frames == 1000 * estimate.frame
    kept = Budget.of(estimate, one.training, 1000, CPU, free=room + 1250 * (estimate.frame + estimate.answer))
    assert kept.kept_frames == 1000 * estimate.frame
    assert kept.fits
    assert Budget.of(estimate, one.training, 1000, CPU, free=None, stream=True).kept_frames == 0


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.exhaustive if kind is Autoregressive else ()) for kind in ALL],
    ids=lambda kind: kind.policy_type,
)
def test_policies_of_others_are_estimated_without_their_weights(kind: type[OwnPolicy]) -> None:
    def rehearse(compute: ComputeConfig) -> tuple[Rehearsal, int]:
        policy = kind.make().to(compute.device)
        one = rehearsal(policy, batch=2)
        return replace(one, observation=policy.spec.blank_observation("push the red cube")), 100

    found = list(budgets(rehearse, ComputeConfig(), CPU, checkpointing="off"))
    assert found
    assert all(budget.estimate.total > 0 and not budget.estimate.is_measured for budget in found)


def test_a_policy_that_needs_its_weights_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    class Stubborn(Toy):
        def encode(self, observations: Sequence[Any], states: Sequence[Any]) -> list[dict[str, Tensor]]:
            self.into.bias.numpy(force=True).sum()
            if self.into.bias.is_meta:
                raise RuntimeError("no content")
            return super().encode(observations, states)

    asked = []

    def rehearse(compute: ComputeConfig) -> tuple[Rehearsal, int]:
        asked.append(compute.device)
        return rehearsal(Stubborn(16, **TINY).to(compute.device or "cpu")), 100

    found = list(budgets(rehearse, ComputeConfig(), CPU))
    assert asked == ["meta", None]
    assert [budget.estimate.is_measured for budget in found] == [True, True]
    assert "is loaded to measure a step" in capsys.readouterr().err
    assert "measured with the policy's weights" in render("stubborn", found)


def test_a_dry_run_reads_no_video_and_writes_nothing(
    teacher: Path, mock_demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["distill", "--policy", str(teacher), "--data", str(mock_demos), "--out", str(out), "--dry-run"]
    assert main([*words, "--batch", "4", "--augment-copies", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| backbone |" in printed
    assert "batch 4," in printed
    assert "It fits without checkpointing." in printed
    assert not out.exists()


def test_too_little_memory_is_one_error_before_weights_are_loaded(
    teacher: Path, mock_demos: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillRunConfig(mock_demos, tmp_path / "out", str(teacher), plan, frames=100)
    devices = []

    def load(name: str, compute: ComputeConfig) -> Any:
        devices.append(compute.device)
        return load_skippable_policy(name, compute)

    monkeypatch.setattr("dysl_vla.training.distill.load_skippable_policy", load)
    monkeypatch.setattr(dry_run_module, "free_memory", lambda *_: 100_000)
    with pytest.raises(ConfigError, match=r"memory: distilling needs .* are free; give a smaller --batch, "):
        distill(config)
    assert devices == ["meta"]
    assert not (tmp_path / "out").exists()
    assert "It does not fit" in dry_run(config)


def test_checkpointing_is_chosen_where_memory_is_too_short_without(
    teacher: Path, mock_demos: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillRunConfig(mock_demos, tmp_path / "out", str(teacher), plan, frames=1)
    text = dry_run(config)
    [row] = [line for line in text.splitlines() if line.startswith("| **needed**")]
    assert row.count("|") == 4  # without, and with it
    short = [budget.needed for budget in budgets(lambda _: (rehearsal(on_meta(256, TINY)), 1), ComputeConfig(), CPU)]
    assert short[1] < short[0]
    monkeypatch.setattr(dry_run_module, "free_memory", lambda *_: short[1])
    monkeypatch.setattr(dry_run_module, "SMALL_SHARE", 0.0)
    for asked, chosen in (("auto", True), ("on", True)):
        rehearse = lambda _: (rehearsal(on_meta(256, TINY)), 1)  # noqa: E731
        found = dry_run_module.choose_checkpointing(rehearse, str(teacher), ComputeConfig(), asked, None)
        assert found.is_checkpointed is chosen
        assert found.reserve > 0
    with pytest.raises(ConfigError, match="--checkpointing on"):
        dry_run_module.choose_checkpointing(rehearse, str(teacher), ComputeConfig(), "off", None)
