"""MiniFlow is trained by flow matching, and is a policy like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.deploy.export import ExportConfig, export
from dysl_vla.deploy.graphs import quantize
from dysl_vla.deploy.onnx_backend import BACKBONE, EXPERT
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import sha256
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


@pytest.fixture(scope="module")
def fast(trained: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        given = ("--policy", trained, "--data", mock_demos, "--static-ratio", 0.5, "--out", out)
        training = ("--adapter-steps", 0, "--skip-steps", 20, "--batch", 4, "--frames", 32, "--warmup", 5)
        assert main([*map(str, ("distill", *given, *training, "--threads", 1))]) == 0

    return made_once(tmp_path_factory, "mini-flow-fast", make)


@pytest.fixture(scope="module")
def bundle(fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "mini-flow-bundle", lambda out: export(ExportConfig(out, str(fast))))


def test_its_layers_can_be_skipped(fast: Path, trained: Path, mock_demos: Path) -> None:
    policy: Any = load_policy(str(fast), skip=1)
    [(_, seen)] = observations(Demonstrations(mock_demos), np.arange(1))
    [chunk] = policy.infer([dict(seen)], [policy.reset()])
    assert chunk.skips.layers == 2
    base = load_skippable_policy(str(trained))
    assert [len(follower) for follower in base.followers] == [4]
    assert torch.isfinite(torch.from_numpy(chunk.actions)).all()


def test_a_bundle_acts_as_it_does(bundle: Path, fast: Path, mock_demos: Path) -> None:
    acts_as_the_policy_does(bundle, fast, mock_demos)


def test_eight_bits_are_smaller_and_close(bundle: Path, tmp_path: Path) -> None:
    """Conditions in conditions included. The encoder is of convolutions, which stay as they are."""
    exact = Bundle(bundle, skip=0)
    sizes = {name: (bundle / name).stat().st_size for name in (BACKBONE, EXPERT)}
    folder = Path(shutil.copytree(bundle, tmp_path / "coarse"))
    for name, size in sizes.items():
        quantize(folder / name)
        assert (folder / name).stat().st_size < 0.9 * size, name
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "precision": "int8"}))
    manifest = {name: sha256(folder / name) for name in json.loads((folder / "manifest.json").read_text())}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seen = exact.spec.blank_observation("move the dot to the mark")
    coarse = Bundle(folder, skip=0)  # which compares its actions with the exact ones
    [mine], [wanted] = (policy.infer([seen], [policy.reset()]) for policy in (coarse, exact))
    assert 0 < np.abs(mine.actions - wanted.actions).max() < 0.05


def test_an_expert_that_is_missing_or_forgotten_is_named(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    (folder / "expert.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"expert\.onnx: is missing"):
        Bundle(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["expert.onnx"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"expert\.onnx"):
        Bundle(folder)


def test_it_is_not_pruned(fast: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prune must be left out for .* whose expert follows its decoder"):
        export(ExportConfig(tmp_path / "x", str(fast), skip=1, prune=True))
    assert not (tmp_path / "x").exists()
