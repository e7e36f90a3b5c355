"""MiniFlow is trained by flow matching, and is a policy like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.errors import ConfigError
from dysl_vla.policies import load_policy, load_skippable_policy
from dysl_vla.policies.flow.mini_flow import MiniFlow
from dysl_vla.training.train import TrainConfig
from tests.conftest import made_once
from tests.policies.flow.bundles import acts_as_the_policy_does

SMALL = ("--layers", 4, "--hidden", 32, "--chunk", 4, "--threads", 1, "--warmup", 10, "--ema", 0.9)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        words = ("train", "--data", mock_demos, "--out", out, "--flow", "--steps", 200, "--batch", 16, *SMALL)
        assert main([*map(str, words), "--save-every", "100", "--learning-rate", "2e-3"]) == 0

    return made_once(tmp_path_factory, "mini-flow", make)


def test_its_velocity_gets_better(trained: Path) -> None:
    curve = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    assert curve[-1]["validation_loss"] < 1.3  # without learning, that of actions and noise: about 2


def test_a_chunk_is_near_what_was_demonstrated(trained: Path, mock_demos: Path) -> None:
    policy: Any = load_policy(str(trained))
    assert isinstance(policy, MiniFlow)
    demonstrations = Demonstrations(mock_demos)
    indices = np.arange(0, demonstrations.total_frames, 9)
    seen = [dict(one) for _, one in observations(demonstrations, indices)]
    chunks = policy.infer(seen, [policy.reset() for _ in seen])
    wanted = demonstrations.columns()["actions"][indices]
    apply = policy.spec.action_normalisation.apply
    predicted = apply(np.stack([chunk.actions[0] for chunk in chunks]))
    moving = slice(0, 2)
    assert np.corrcoef(predicted[:, moving].ravel(), apply(wanted)[:, moving].ravel())[0, 1] > 0.2


def test_training_goes_on_from_a_checkpoint(trained: Path, mock_demos: Path, tmp_path: Path) -> None:
    words = ("train", "--init", trained, "--data", mock_demos, "--out", tmp_path / "on", "--steps", 2, "--batch", 4)
    assert main([*map(str, words), "--threads", "1"]) == 0
    assert isinstance(load_policy(str(tmp_path / "on")), MiniFlow)
    with pytest.raises(ConfigError, match="plan must be left out with flow"):
        TrainConfig(mock_demos, tmp_path, flow=True, plan=tmp_path)


def test_its_layers_can_be_skipped_also_in_a_bundle(trained: Path, mock_demos: Path, tmp_path: Path) -> None:
    given = ("--policy", trained, "--data", mock_demos)
    training = ("--adapter-steps", 0, "--skip-steps", 20, "--batch", 4, "--frames", 32, "--warmup", 5, "--threads", 1)
    assert main([*map(str, ("distill", *given, "--static-ratio", 0.5, "--out", tmp_path / "fast", *training))]) == 0
    policy: Any = load_policy(str(tmp_path / "fast"), skip=1)
    [(_, seen)] = observations(Demonstrations(mock_demos), np.arange(1))
    [chunk] = policy.infer([dict(seen)], [policy.reset()])
    assert chunk.skips.layers == 2
    base = load_skippable_policy(str(trained))
    assert [len(follower) for follower in base.followers] == [4]
    assert torch.isfinite(torch.from_numpy(chunk.actions)).all()
    assert main(["export", "--policy", str(tmp_path / "fast"), "--out", str(tmp_path / "bundle")]) == 0
    acts_as_the_policy_does(tmp_path / "bundle", tmp_path / "fast", mock_demos)
    assert main(["export", "--policy", str(tmp_path / "fast"), "--out", str(tmp_path / "x"), "--skip", "1", "--prune"])
