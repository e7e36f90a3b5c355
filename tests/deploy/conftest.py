"""Bundles that differ from `bundle_folder` in files and precision, without another tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

from dysl_vla.deploy.graphs import ONE_FILE


@contextmanager
def without_tracing(traced: dict[tuple[str, ...], onnx.ModelProto], one_file: int = ONE_FILE) -> Iterator[None]:
    """Exports in the body write the graphs of `bundle_folder`: tracing takes long, and would give them again."""

    def again(_: Any, *, output_names: list[str], **__: Any) -> Any:
        return torch.onnx.ONNXProgram(onnx_ir.from_proto(traced[tuple(output_names)]), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.export.export", lambda *_, **__: None)
        patch.setattr("torch.onnx.export", again)
        patch.setattr("dysl_vla.deploy.graphs.ONE_FILE", one_file)
        yield
