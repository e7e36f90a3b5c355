"""Tiny random policies and a mock world: everything that the fast tests run on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock

from dysl_vla.data.collect import CollectConfig, collect
from dysl_vla.policies.mini_policy import Crop, MiniVLAConfig
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.heads_trainer import DistillConfig
from dysl_vla.skip_controller.operating import SkipStatistics
from dysl_vla.training.behaviour_cloning import train_tokenizer
from dysl_vla.training.calibrate import PLAN, CalibrateConfig, calibrate
from dysl_vla.training.distill import DistillRunConfig, distill
from dysl_vla.types import Normalisation, PolicySpec

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run every scene, task and recording, not a sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, for the tests of all of pytest's processes: who comes first makes it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what one that failed has left
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def mock_demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve demonstrations of each task of the mock world. Not to be written to."""
    return made_once(
        tmp_path_factory, "mock-demos", lambda out: collect(CollectConfig(out=out, suite="mock", episodes=12))
    )


TRAINING = DistillConfig(adapter_steps=20, skip_steps=40, batch=8, warmup=5, threads=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "teacher", lambda out: make_tiny_policy(num_layers=6).save_pretrained(out))


@pytest.fixture(scope="session")
def plan(teacher: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        calibrate(CalibrateConfig(mock_demos, out, str(teacher), static_ratio=0.5, longest_block=2, frames=20))

    return made_once(tmp_path_factory, "plan", make) / PLAN


@pytest.fixture(scope="session")
def distilled(teacher: Path, plan: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        distill(DistillRunConfig(mock_demos, out, str(teacher), plan, frames=100, training=TRAINING))

    return made_once(tmp_path_factory, "distilled", make)


@pytest.fixture(scope="session")
def skipping_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy whose controllers sometimes skip, sometimes not, and which sometimes verifies."""
    return made_once(tmp_path_factory, "skipping", make_skipping)


def make_skipping(folder: Path) -> None:
    from dysl_vla.policies.dysl import load_dysl, save_skips
    from tests.policies.test_dysl import make_parts, play

    policy, heads, settings = make_parts()
    policy.provenance = {"data": {"instructions": MOCK_INSTRUCTIONS[:1], "origins": []}}
    policy.save_pretrained(folder)
    saved = MiniVLA.from_pretrained(str(folder))
    settings = replace(settings, teacher=saved.fingerprint, skip=0.5)
    save_skips(folder, heads, settings, {})
    dysl = load_dysl(saved, folder, 1.0)
    outputs = [value for chunk in play(dysl, range(60)) for value in chunk.skips.outputs.values()]
    dysl.close()
    statistics = SkipStatistics.measured(outputs, [0.002, 0.01, 0.03], [-0.1, 1e-6, 1e-6])
    save_skips(folder, heads, replace(settings, statistics=statistics), {})


@pytest.fixture(scope="session")
def bundle_folder(skipping_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the same policy, which tests must not write to. `traced` are the exporter's graphs of it."""
    import onnx

    from dysl_vla.deploy.export import ExportConfig, export

    export_graph = torch.onnx.export

    def make(folder: Path) -> None:
        def keep(program: Any, *, output_names: list[str], **options: Any) -> Any:
            graph = export_graph(program, output_names=output_names, **options)
            assert graph is not None
            onnx.save(graph.model_proto, folder / f"{'+'.join(output_names)}.onnx")
            return graph

        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.onnx.export", keep)
            export(ExportConfig(folder / "bundle", str(skipping_checkpoint)))

    return made_once(tmp_path_factory, "bundle", make) / "bundle"


@pytest.fixture(scope="session")
def traced(bundle_folder: Path) -> dict[tuple[str, ...], Any]:
    """The exporter's graphs of `bundle_folder`, protobufs by the names of their outputs."""
    import onnx

    return {tuple(file.stem.split("+")): onnx.load(file) for file in bundle_folder.parent.glob("*.onnx")}
