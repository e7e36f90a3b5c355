"""Modules of PyTorch as ONNX graphs: traced, checked for size, written whole, and in 8 bits."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write

with needs_extra("export"):
    import onnx
    import onnxscript  # noqa: F401 # torch needs it
    from onnx_ir import external_data
with needs_extra("policy"):
    import torch
    from torch import nn

    from dysl_vla.skip_controller.conditional import ConditionalDecoder, PrunedDecoder

OPSET = 18
ONE_FILE = 1_900_000_000
"""Bytes of weights up to which a graph is one file: a protobuf must be smaller than 2 GiB."""
DATA = ".data"
"""Suffix, after the name of a larger graph's file, of the file of its weights."""
INSIDE = 1024
"""Bytes up to which a larger graph holds a tensor itself: shapes and the like are needed to read it."""


def write_graph(
    module: nn.Module,
    arguments: tuple[Any, ...],
    names: tuple[list[str], list[str]],
    path: Path,
    *,
    has_conditions: bool = False,
) -> None:
    """Trace a module into an ONNX graph, in one file if it fits.

    Conditions need the strict tracer, which otherwise understands less.
    """
    traceable = module.installed() if isinstance(module, (ConditionalDecoder, PrunedDecoder)) else nullcontext()
    with traceable, warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), arguments, strict=has_conditions)
        graph = torch.onnx.export(
            program, dynamo=True, input_names=names[0], output_names=names[1], opset_version=OPSET, verbose=False
        )
    assert graph is not None
    tensors = (value.const_value for part in graph.model.graphs() for value in part.initializers.values())
    is_large = sum(tensor.nbytes for tensor in tensors if tensor is not None) > ONE_FILE
    with _placing(path) as folder:
        if is_large:
            external_data.unload_from_model(graph.model, folder, path.name + DATA, size_threshold_bytes=INSIDE)
        model = graph.model_proto
        _forget_source(model.graph)
        del model.metadata_props[:]
        onnx.save(model, folder / path.name)


@contextmanager
def _placing(path: Path) -> Iterator[Path]:
    """Yield a folder for a graph and its weights, which name each other; at the end both are moved to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        yield Path(name)
        path.with_name(path.name + DATA).unlink(missing_ok=True)
        for file in Path(name).iterdir():
            with atomic_write(path.with_name(file.name)) as temporary:
                file.replace(temporary)


def _forget_source(graph: onnx.GraphProto) -> None:
    """Drop what the exporter notes of each operation: lines of source code, with this machine's paths."""
    del graph.metadata_props[:]
    for value in (*graph.value_info, *graph.input, *graph.output):
        del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _forget_source(attribute.g)


def quantize(path: Path) -> None:
    """Convert the weights of a graph's matrix products to 8 bits, those in conditions included."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_large = path.with_name(path.name + DATA).exists()
    with _placing(path) as folder:
        graph, data = folder / path.name, folder / (path.name + DATA)
        quantize_dynamic(
            path,
            graph,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=is_large,
            extra_options={"EnableSubgraph": True},
        )
        if is_large and data.stat().st_size <= ONE_FILE:
            model = onnx.load(graph)
            data.unlink()
            onnx.save(model, graph)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Show only errors of some loggers: exporters warn of packages that are not needed here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
