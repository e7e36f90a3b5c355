"""Tiny random policies and a mock world: everything that the fast tests run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dysl_vla.data.collect import CollectConfig, collect
from dysl_vla.policies.mini_vla import Crop, MiniVLA, MiniVLAConfig
from dysl_vla.skip_controller.heads_trainer import DistillConfig
from dysl_vla.training.behaviour_cloning import train_tokenizer
from dysl_vla.training.calibrate import CalibrateConfig, calibrate
from dysl_vla.training.distill import DistillRunConfig, distill
from dysl_vla.types import Normalisation, PolicySpec

torch.set_num_threads(1)

MOCK_INSTRUCTIONS = ["move the dot to the mark", "move the dot to the mark and stay there"]


def make_tiny_policy(seed: int = 0, **changes: object) -> MiniVLA:
    """A MiniVLA for the mock world with random weights."""
    tokenizer = train_tokenizer(MOCK_INSTRUCTIONS)
    values: dict[str, object] = {
        "spec": PolicySpec(
            cameras={"top": (32, 32), "wrist": (16, 16)},
            state_names=("x", "y"),
            action_names=("dx", "dy", "gripper"),
            rate_hz=20.0,
            chunk_length=4,
            execute_steps=2,
            state_normalisation=Normalisation((0.0, 0.0), (1.0, 1.0)),
            action_normalisation=Normalisation((0.0, 0.0, 0.0), (0.5, 0.5, 0.5)),
        ),
        "crops": {"top": Crop(0, 0, 32, 32), "wrist": Crop(0, 0, 16, 16)},
        "grids": {"top": 2, "wrist": 1},
        "vocab_size": tokenizer.get_vocab_size(),
        "text_tokens": 9,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 32,
        "keypoints": 4,
        "head_size": 16,
    }
    torch.manual_seed(seed)
    return MiniVLA(MiniVLAConfig(**(values | changes)), tokenizer).eval()  # type: ignore[arg-type]


@pytest.fixture
def tiny_policy() -> MiniVLA:
    return make_tiny_policy()


@pytest.fixture(scope="session")
def mock_demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve demonstrations of each task of the mock world. Not to be written to."""
    out = tmp_path_factory.mktemp("demos") / "mock"
    collect(CollectConfig(out=out, suite="mock", episodes=12))
    return out


TRAINING = DistillConfig(adapter_steps=20, skip_steps=40, batch=8, warmup=5, threads=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_tiny_policy(num_layers=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plan(teacher: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan"
    return calibrate(CalibrateConfig(mock_demos, out, str(teacher), static_ratio=0.5, longest_block=2, frames=20))


@pytest.fixture(scope="session")
def distilled(teacher: Path, plan: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "out"
    return distill(DistillRunConfig(mock_demos, out, str(teacher), plan, frames=100, training=TRAINING))
