from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

from dysl_vla.deploy.export import ONE_FILE, ExportConfig, export
from dysl_vla.policies.dysl import save_skips
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.operating import SkipStatistics
from tests.conftest import MOCK_INSTRUCTIONS
from tests.policies.test_dysl import make_parts, play


@pytest.fixture(scope="session")
def skipping_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy whose controllers sometimes skip, sometimes not, and which sometimes verifies."""
    folder = tmp_path_factory.mktemp("checkpoint")
    policy, heads, settings = make_parts()
    policy.provenance = {"data": {"instructions": MOCK_INSTRUCTIONS[:1], "origins": []}}
    policy.save_pretrained(folder)
    saved = MiniVLA.from_pretrained(str(folder))
    settings = replace(settings, teacher=saved.fingerprint, skip=0.5)
    save_skips(folder, heads, settings, {})
    from dysl_vla.policies.dysl import load_dysl

    dysl = load_dysl(saved, folder, 1.0)
    outputs = [value for chunk in play(dysl, range(60)) for value in chunk.skips.outputs.values()]
    dysl.close()
    statistics = SkipStatistics.measured(outputs, [0.002, 0.01, 0.03], [-0.1, 1e-6, 1e-6])
    save_skips(folder, heads, replace(settings, statistics=statistics), {})
    return folder


@pytest.fixture(scope="session")
def traced() -> dict[tuple[str, ...], onnx.ModelProto]:
    """The exporter's graphs of the same policy, by the names of their outputs; `bundle_folder` fills it."""
    return {}


@pytest.fixture(scope="session")
def bundle_folder(
    skipping_checkpoint: Path, traced: dict[tuple[str, ...], onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of the same policy, which tests must not write to."""
    export_graph = torch.onnx.export

    def keep(program: Any, *, output_names: list[str], **options: Any) -> Any:
        graph = export_graph(program, output_names=output_names, **options)
        assert graph is not None
        traced[tuple(output_names)] = graph.model_proto
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.onnx.export", keep)
        return export(ExportConfig(tmp_path_factory.mktemp("bundle") / "b", str(skipping_checkpoint)))


@contextmanager
def without_tracing(traced: dict[tuple[str, ...], onnx.ModelProto], one_file: int = ONE_FILE) -> Iterator[None]:
    """Exports in the body write the graphs of `bundle_folder`: tracing takes long, and would give them again."""

    def again(_: Any, *, output_names: list[str], **__: Any) -> Any:
        return torch.onnx.ONNXProgram(onnx_ir.from_proto(traced[tuple(output_names)]), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.export.export", lambda *_, **__: None)
        patch.setattr("torch.onnx.export", again)
        patch.setattr("dysl_vla.deploy.export.ONE_FILE", one_file)
        yield
