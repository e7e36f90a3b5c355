"""A checkpoint of OpenVLA-OFT at its true size whose weights are holes in sparse files, for what reads no weights."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import torch

from tests.policies.openvla_folder import (
    TRUE,
    Geometry,
    head_shapes,
    model_shapes,
    proprio_shapes,
    write_openvla_folder,
)

WHOLE = Geometry(**{**vars(TRUE), "num_layers": 32, "vision_layers": (24, 27)})
"""The sizes of the public checkpoints: 7.5 billion weights."""
TINY = Geometry(1, 8, 1, 8, vision_layers=(2, 2), vision_widths=(64, 64), vision_hidden=(8, 8), image_size=28)


def write_hollow_folder(folder: Path, geometry: Geometry = WHOLE) -> Path:
    """Write the files of a checkpoint without its tensors' contents: 15 GB that take no space on the disk."""
    write_openvla_folder(folder, geometry=replace(TINY, states=geometry.states, actions=geometry.actions))
    for name in ("config.json", "preprocessor_config.json"):
        document = json.loads((folder / name).read_text())
        if name == "config.json":
            sizes = {
                "hidden_size": geometry.hidden,
                "intermediate_size": geometry.intermediate,
                "num_hidden_layers": geometry.num_layers,
                "num_attention_heads": geometry.heads,
                "num_key_value_heads": geometry.heads,
            }
            document["text_config"] |= sizes
            document["image_sizes"] = [geometry.image_size] * 2
        (folder / name).write_text(json.dumps(document))
    for path in folder.glob("model*"):
        path.unlink()
    header, end = {}, 0
    for key, shape in model_shapes(geometry):
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    for part, shapes in (("action_head", head_shapes(geometry)), ("proprio_projector", proprio_shapes(geometry))):
        zero = torch.zeros(1, dtype=torch.bfloat16)
        hollow = {f"module.{key}": zero.expand(shape) for key, shape in shapes}  # one number is stored
        torch.save(hollow, folder / f"{part}--150000_checkpoint.pt")
    return folder
