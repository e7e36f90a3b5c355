"""Skipping in flow policies: the expert skips what the prefix skips, with adapters of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dysl_vla.policies import ComputeConfig, load_skippable_policy
from dysl_vla.policies.flow.expert import Expert
from dysl_vla.policies.flow.policy import FlowPolicy
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
from dysl_vla.skip_controller.heads_trainer import DistillConfig, HeadsTrainer
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import Skipper, attach
from dysl_vla.skip_controller.torch_backend import Forward
from dysl_vla.training.estimate import Rehearsal
from tests.policies.flow.folders import KINDS, OPTIONS, make_folder, observation

PLAN = SkipPlan(4, (0, 3), (1,))
"""Layers 1 and 2 are skipped together."""


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> FlowPolicy:
    folder = make_folder(request.param, tmp_path / request.param)
    loaded: Any = load_skippable_policy(str(folder), ComputeConfig(policy_options=OPTIONS))
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    return loaded


def inputs_of(policy: FlowPolicy, count: int = 3) -> dict[str, Tensor]:
    given = [{key: value for key, value in observation(n).items() if key != "noise"} for n in range(count)]
    with torch.no_grad():
        inputs, _ = policy.collate(policy.encode(given, [policy.reset() for _ in given]))
    return inputs


def make_heads(policy: FlowPolicy, *, is_random: bool, has_followers: bool = True) -> SkipHeads:
    torch.manual_seed(0)
    heads = SkipHeads(PLAN, HeadsConfig(policy.width, 8, 4, policy.follower_sizes if has_followers else ()))
    if is_random:
        with torch.no_grad():
            for name, value in heads.named_parameters():
                if name.endswith(".up"):
                    value.copy_(0.2 * torch.randn_like(value))
    return heads


@contextmanager
def attached(policy: FlowPolicy, heads: SkipHeads) -> Iterator[Skipper]:
    skipper = attach(policy.layers, PLAN, heads, followers=policy.followers)
    try:
        yield skipper
    finally:
        skipper.detach()


def skip_rows(policy: FlowPolicy, heads: SkipHeads, inputs: dict[str, Tensor], rows: list[int]) -> Tensor:
    points = np.full((len(inputs["noise"]), 1), 2)
    points[rows] = 0
    with attached(policy, heads) as skipper, torch.no_grad(), skipper.step(points, force_skip=True) as step:
        actions = policy.act(inputs, Forward(step))
    assert [list(targets) for targets in step.targets] == [[1] if row in rows else [] for row in range(len(points))]
    return actions


def test_a_row_that_skips_is_the_model_without_those_layers_to_the_bit(policy: FlowPolicy) -> None:
    """With adapters that do nothing."""
    inputs = inputs_of(policy, 1)
    skipped = skip_rows(policy, make_heads(policy, is_random=False), inputs, [0])
    layers: Any = policy.backbone.layers
    policy.backbone.layers = nn.ModuleList([layers[0], layers[3]])
    policy.backbone.config.num_hidden_layers = 2
    layers[3].self_attn.layer_idx = 1
    expert: Expert = policy.expert
    expert.layers = nn.ModuleList([expert.layers[0], expert.layers[3]])
    expert.layers[1].index = 1
    with torch.no_grad():
        np.testing.assert_array_equal(skipped.numpy(), policy.act(inputs, Forward()).numpy())


def test_rows_decide_for_themselves(policy: FlowPolicy) -> None:
    heads, inputs = make_heads(policy, is_random=True), inputs_of(policy)
    mixed = skip_rows(policy, heads, inputs, [1])
    with torch.no_grad():
        full = policy.act(inputs, Forward())
    skipping = skip_rows(policy, heads, inputs, [0, 1, 2])
    np.testing.assert_allclose(mixed[[0, 2]].numpy(), full[[0, 2]].numpy(), atol=1e-5)
    np.testing.assert_allclose(mixed[1].numpy(), skipping[1].numpy(), atol=1e-5)
    assert np.abs((full - skipping).numpy()).max() > 1e-3


def test_the_expert_has_adapters_of_its_own(policy: FlowPolicy) -> None:
    inputs = inputs_of(policy, 1)
    both = make_heads(policy, is_random=True)
    prefix_alone = make_heads(policy, is_random=True, has_followers=False)
    prefix_alone.load_state_dict({name: value for name, value in both.state_dict().items() if "followers" not in name})
    one, other = (skip_rows(policy, heads, inputs, [0]) for heads in (both, prefix_alone))
    assert np.abs((one - other).numpy()).max() > 1e-3


def test_a_verification_gives_the_full_models_actions_with_the_same_noise(policy: FlowPolicy) -> None:
    inputs = inputs_of(policy)
    with torch.no_grad():
        full = policy.act(inputs, Forward())
    with attached(policy, make_heads(policy, is_random=True)) as skipper, torch.no_grad():
        with skipper.step(np.zeros((3, 1), np.int64), force_skip=True) as step:
            policy.act(inputs, Forward(step))
        with skipper.verify(step):
            np.testing.assert_array_equal(policy.act(inputs, Forward()).numpy(), full.numpy())


def test_heads_learn_the_velocity_at_one_denoising_step_of_each_item(policy: FlowPolicy) -> None:
    inputs = inputs_of(policy)
    heads = make_heads(policy, is_random=True)
    with attached(policy, heads) as skipper:
        config = DistillConfig(adapter_steps=0, skip_steps=60, batch=3, warmup=5, learning_rate=5e-3, keep_block_prob=0)
        trainer = HeadsTrainer(skipper, policy.act, policy.spec.execute_steps, config)
        answer = trainer.answer((inputs, None))
        before = {name: value.detach().clone() for name, value in heads.named_parameters()}
        losses = [trainer.update((inputs, None), answer, trainer.rng())["task_loss"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    for name, value in heads.named_parameters():
        if "adapters" in name or "followers" in name:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_estimated_without_weights(kind: str, tmp_path: Path) -> None:
    """What tensors without content say is what a real step on real ones takes."""
    folder = make_folder(kind, tmp_path / kind)
    estimates = []
    for device in ("meta", "cpu"):
        loaded: Any = load_skippable_policy(str(folder), ComputeConfig(device=device, policy_options=OPTIONS))
        heads = HeadsConfig(loaded.width, 8, 4, loaded.follower_sizes)
        seen = loaded.spec.blank_observation("pick up the cube")
        rehearsal = Rehearsal(loaded, PLAN, heads, DistillConfig(batch=4), seen)
        estimates.append(rehearsal.estimate(is_checkpointed=False, is_measured=device == "cpu"))
    guessed, measured = estimates
    assert guessed.backbone == measured.backbone
    assert guessed.trained == measured.trained
    assert guessed.frame == measured.frame
    assert guessed.total == pytest.approx(measured.total, rel=0.1)
