"""A tiny random policy that was taught to skip layers, for every test of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from dysl_vla.data.calibrating import CalibrateConfig, calibrate
from dysl_vla.data.distilling import DistillRunConfig, distill
from dysl_vla.skip_controller.distill import DistillConfig
from tests.conftest import make_tiny_policy

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
