from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dysl_vla.checkpoint import add_to_manifest
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies import ComputeConfig, load_policy
from dysl_vla.policies.dysl import DyslPolicy, SkipSettings, load_dysl, save_operating_point, save_skips
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan
from dysl_vla.skip_controller.operating import Ablation, RandomExits, SkipStatistics
from tests.conftest import MOCK_INSTRUCTIONS, make_tiny_policy

PLAN = SkipPlan(6, (0, 3, 5))
STATISTICS = SkipStatistics(outputs=(0.0, 0.5, 1.0), drops=(0.1, 0.2, 0.3), surprises=(-0.1, 0.05, 0.1))


def make_parts(seed: int = 0) -> tuple[MiniVLA, SkipHeads, SkipSettings]:
    policy = make_tiny_policy(seed, num_layers=6)
    torch.manual_seed(1)
    heads = SkipHeads(PLAN, HeadsConfig(16, adapter_size=4, controller_size=4)).eval()
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.data = parameter.data.half().float()  # as they are saved
    return (
        policy,
        heads,
        SkipSettings(PLAN, heads.config, policy.fingerprint, 3, STATISTICS, 2, skip=0.9, mean_layers=4.5),
    )


def make_dysl(**options: Any) -> DyslPolicy:
    return DyslPolicy(*make_parts(), **options)


def observe(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {
        "observation.images.top": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "observation.images.wrist": rng.integers(0, 256, (16, 16, 3), np.uint8),
        "observation.state": rng.normal(size=2).astype(np.float32),
        "task": MOCK_INSTRUCTIONS[0],
    }


def play(policy: Any, numbers: range, executed: float = 0.0) -> list[Any]:
    state = policy.reset()
    chunks = []
    for number in numbers:
        [chunk] = policy.infer([observe(number)], [state])
        chunks.append(chunk)
        for action in chunk.actions[:2]:
            state.executed.append(action + np.float32(executed))
    return chunks


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    policy, heads, settings = make_parts()
    policy.save_pretrained(tmp_path)
    saved = MiniVLA.from_pretrained(str(tmp_path))
    settings = SkipSettings(**{**settings.__dict__, "teacher": saved.fingerprint})
    save_skips(tmp_path, heads, settings, {"made": "here"})
    return tmp_path


def test_skip_0_is_the_full_model(checkpoint: Path) -> None:
    full, named = MiniVLA.from_pretrained(str(checkpoint)), load_policy(str(checkpoint), skip=0)
    assert isinstance(named, MiniVLA)
    for one, other in zip(play(full, range(4)), play(named, range(4)), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert other.skips is None


def test_skip_1_skips_all_that_may_be_skipped() -> None:
    for chunk in play(make_dysl(skip=1), range(6)):
        assert np.flatnonzero(chunk.skips.layers_run).tolist() == [0, 3, 5]
        assert chunk.skips.skips == {1: 3, 4: 5}
        assert not chunk.skips.is_verified


def test_more_skip_runs_no_more_layers() -> None:
    outputs = [value for chunk in play(make_dysl(skip=1), range(40)) for value in chunk.skips.outputs.values()]
    measured = SkipStatistics.measured(outputs, [50.0, 99.0], [50.0, 99.0])
    means = []
    for skip in (0.05, 0.5, 1.0):
        policy, heads, settings = make_parts()
        dysl = DyslPolicy(policy, heads, replace(settings, statistics=measured), skip=skip)
        means.append(np.mean([chunk.skips.layers for chunk in play(dysl, range(40))]))
    assert means[0] >= means[1] >= means[2] == 3
    assert means[0] > 3


TABLES = st.lists(st.floats(0, 10), min_size=2, max_size=9).map(sorted).map(tuple)
SKIPS = st.floats(0.001, 1)


@given(TABLES, TABLES, TABLES, SKIPS, SKIPS)
def test_a_higher_skip_never_asks_for_more_layers(
    outputs: Any, drops: Any, surprises: Any, one: float, other: float
) -> None:
    statistics = SkipStatistics(outputs, drops, surprises)
    less, more = (statistics.point(skip) for skip in sorted((one, other)))
    assert more.threshold <= less.threshold
    assert more.thresholds.eta >= less.thresholds.eta
    assert more.thresholds.eta_verify >= less.thresholds.eta_verify


def test_a_verified_chunk_is_the_full_models_exactly() -> None:
    policy = make_dysl(skip=0.5)
    policy._guidance.update_and_check = lambda *_: True  # type: ignore[method-assign]
    full = make_tiny_policy(num_layers=6)
    verified = [c for c in play(policy, range(30)) if c.skips.is_verified]
    assert verified
    for number, chunk in enumerate(play(policy, range(30))):
        if chunk.skips.is_verified:
            [expected] = full.infer([observe(number)], [full.reset()])
            np.testing.assert_array_equal(chunk.actions, expected.actions)
            assert chunk.skips.layers == chunk.skips.layers_run.sum() + 6 - chunk.skips.resumed_from
            assert chunk.timing.llm_s >= chunk.skips.verify_s > 0


def test_an_ablation_leaves_parts_out() -> None:
    unguided = play(make_dysl(skip=0.9, ablation=Ablation(guidance=False)), range(20), executed=3.0)
    assert all(chunk.skips.allow_points == (0, 0) for chunk in unguided)
    asking = make_dysl(skip=0.5, ablation=Ablation(verification=False))
    asking._guidance.update_and_check = lambda *_: True  # type: ignore[method-assign]
    assert not any(chunk.skips.is_verified for chunk in play(asking, range(20)))
    random = play(make_dysl(ablation=Ablation(False, False, True)), range(400))
    assert all(not chunk.skips.outputs for chunk in random)
    assert np.mean([chunk.skips.layers for chunk in random]) == pytest.approx(4.5, abs=0.15)


def test_rows_of_a_batch_have_their_own_history() -> None:
    policy = make_dysl(skip=0.6)
    alone = [play(policy, range(start, start + 8)) for start in (0, 10, 20)]
    states = [policy.reset() for _ in range(3)]
    for turn in range(8):
        chunks = policy.infer([observe(start + turn) for start in (0, 10, 20)], states)
        for row, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            np.testing.assert_allclose(chunk.actions, alone[row][turn].actions, atol=1e-5)
            assert chunk.skips.skips == alone[row][turn].skips.skips
            assert chunk.skips.allow_points == alone[row][turn].skips.allow_points
            state.executed.extend(chunk.actions[:2])


def test_a_saved_policy_skips_as_before(checkpoint: Path) -> None:
    before = play(make_dysl(skip=0.9), range(5))
    after = play(load_policy(str(checkpoint)), range(5))
    for one, other in zip(before, after, strict=True):
        assert one.skips.skips == other.skips.skips
        np.testing.assert_allclose(one.actions, other.actions, atol=2e-3)  # half precision


def test_an_operating_point_is_kept(checkpoint: Path) -> None:
    before = load_policy(str(checkpoint)).fingerprint
    save_operating_point(checkpoint, 0.4, 5.0, {"by": "test"})
    policy = load_policy(str(checkpoint))
    assert isinstance(policy, DyslPolicy)
    assert (policy.skip, policy.settings.mean_layers) == (0.4, 5.0)
    assert policy.fingerprint != before
    assert json.loads((checkpoint / "skip.json").read_text())["provenance"]["operating_point"] == {"by": "test"}


def test_heads_of_other_weights_are_refused() -> None:
    _, heads, settings = make_parts()
    with pytest.raises(CheckpointError, match="trained for a policy of fingerprint"):
        DyslPolicy(make_parts(seed=5)[0], heads, settings)


def test_a_guidance_for_other_actions_is_refused() -> None:
    policy, heads, settings = make_parts()
    with pytest.raises(ConfigError, match="actions of 7 dimensions"):
        DyslPolicy(policy, heads, SkipSettings(**{**settings.__dict__, "action_dim": 7}))


@pytest.mark.parametrize("skip", [-0.1, 1.1, float("nan")])
def test_a_skip_out_of_range_is_refused(checkpoint: Path, skip: float) -> None:
    with pytest.raises(ConfigError, match="skip"):
        load_policy(str(checkpoint), skip=skip)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", {"num_layers": 6, "static_layers": [0, 2, 5]}),
        ("teacher", "other"),
        ("skip", 2.0),
        ("lookahead", "x"),
        ("importance", "touch"),
    ],
)
def test_an_edited_file_is_refused(checkpoint: Path, field: str, value: object) -> None:
    path = checkpoint / "skip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    policy = make_tiny_policy(num_layers=6)
    with pytest.raises(CheckpointError, match=field):
        load_dysl(policy, checkpoint)
    with pytest.raises(CheckpointError):
        load_policy(str(checkpoint))


def test_a_policy_without_heads_cannot_be_told_to_skip() -> None:
    with pytest.raises(ConfigError, match="dysl distill"):
        load_policy("mock", skip=0.5)
    assert load_policy("mock", skip=0).fingerprint == "mock"


def test_random_exits_run_so_many_layers_and_can_be_repeated() -> None:
    for plan, wanted in (
        (SkipPlan(24, (7, 15, 23)), 8.0),
        (SkipPlan(24, (0, 12, 23)), 5.0),
        (SkipPlan(24, (0, 12, 23), exits=(1, 13)), 5.0),
        (SkipPlan(24, (23,)), 12.0),
    ):
        exits = RandomExits(plan, wanted)
        draws = np.array([exits.draw(seed) for seed in range(20_000)])
        static = plan.num_layers - len(plan.dynamic_layers)
        assert draws.sum(axis=1).mean() + static == pytest.approx(wanted, rel=0.03)
        assert exits.draw(3) == draws[3].tolist()


def test_heads_follow_their_policy_to_other_numbers(checkpoint: Path) -> None:
    policy = load_policy(str(checkpoint), compute=ComputeConfig(dtype="bfloat16"))
    assert isinstance(policy, DyslPolicy)
    assert next(policy.heads.parameters()).dtype == torch.bfloat16
    before, after = play(load_policy(str(checkpoint), skip=1), range(3)), play(policy, range(3))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=0.1)


def test_a_checkpoint_of_version_0_1_skips_as_it_did(checkpoint: Path) -> None:
    """It has other names, and knows its policy by the fingerprint of before."""
    now = play(load_policy(str(checkpoint), skip=0.9), range(6))
    former = MiniVLA.from_pretrained(str(checkpoint)).former_fingerprint
    path = checkpoint / "skip.json"
    document = json.loads(path.read_text()) | {"teacher": former}
    document |= {"foresight": document.pop("lookahead"), "signal": document.pop("importance")}
    document["statistics"]["falls"] = document["statistics"].pop("drops")
    path.write_text(json.dumps(document))
    with safe_open(checkpoint / "skip.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    made_for = json.loads(metadata["made_for"]) | {"teacher": former}
    save_file(tensors, checkpoint / "skip.safetensors", metadata=metadata | {"made_for": json.dumps(made_for)})
    add_to_manifest(checkpoint, ("skip.safetensors",))
    for one, other in zip(now, play(load_policy(str(checkpoint), skip=0.9), range(6)), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.skips.skips == other.skips.skips
