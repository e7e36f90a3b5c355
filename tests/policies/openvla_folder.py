"""Writes a tiny OpenVLA-OFT checkpoint with random weights, in exactly the layout of the public ones.

Weights and observations come from the raw bits of NumPy's PCG64, which stay the same in all versions of NumPy and
torch, so that the reference and this package can compute from the same numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
CAMERAS = ("agentview", "robot0_eye_in_hand")
INSTRUCTIONS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "Open the drawer",
    "put the wine bottle on top of the cabinet",
    "turn on the stove",
)
TOKENIZER_CONFIG = {
    **{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    **{"pad_token": "<PAD>", "add_bos_token": True, "add_eos_token": False, "model_max_length": 2048},
}
EMPTY, VOCABULARY = 29871, 32000
"""The token that ends every prompt, "▁", and the number of tokens; the model has 64 more embeddings."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model; the public ones have those of `TRUE`, and more layers."""

    num_layers: int = 8
    hidden: int = 64
    heads: int = 4
    intermediate: int = 112
    vision_layers: tuple[int, int] = (3, 4)
    vision_widths: tuple[int, int] = (64, 96)
    vision_hidden: tuple[int, int] = (128, 180)
    image_size: int = 56
    states: int = 8
    actions: int = 7


TRUE = Geometry(
    2, 4096, 32, 11008, vision_layers=(3, 3), vision_widths=(1024, 1152), vision_hidden=(4096, 4304), image_size=224
)


def bits(seed: int, name: str, count: int) -> NDArray[np.uint64]:
    """Random numbers of 64 bits that depend on the seed and the name."""
    return np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(count)


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers from -1 to 1, of 24 bits."""
    numbers = bits(seed, name, int(np.prod(shape))) >> np.uint64(40)
    return (numbers.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def vision_shapes(name: str, geometry: Geometry, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of DINOv2 (0) or SigLIP (1), with timm's names but for `scale_factor`."""
    width, hidden = geometry.vision_widths[index], geometry.vision_hidden[index]
    yield f"{name}.patch_embed.proj.weight", (width, 3, 14, 14)
    yield f"{name}.patch_embed.proj.bias", (width,)
    yield f"{name}.pos_embed", (1, (geometry.image_size // 14) ** 2, width)
    if index == 0:
        yield f"{name}.cls_token", (1, 1, width)
        yield f"{name}.reg_token", (1, 4, width)
    for layer in range(geometry.vision_layers[index]):
        block = f"{name}.blocks.{layer}"
        yield from norm(f"{block}.norm1", width)
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield from norm(f"{block}.norm2", width)
        yield from linear(f"{block}.mlp.fc1", hidden, width)
        yield from linear(f"{block}.mlp.fc2", width, hidden)
        if index == 0:
            yield f"{block}.ls1.scale_factor", (width,)
            yield f"{block}.ls2.scale_factor", (width,)
    yield from norm(f"{name}.norm", width)
    if index == 1:
        yield f"{name}.attn_pool.latent", (1, 1, width)
        yield from linear(f"{name}.attn_pool.q", width, width)
        yield from linear(f"{name}.attn_pool.kv", 2 * width, width)
        yield from linear(f"{name}.attn_pool.proj", width, width)
        yield from norm(f"{name}.attn_pool.norm", width)
        yield from linear(f"{name}.attn_pool.mlp.fc1", hidden, width)
        yield from linear(f"{name}.attn_pool.mlp.fc2", width, hidden)


def model_shapes(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of the safetensors shards."""
    hidden, vision = geometry.hidden, sum(geometry.vision_widths)
    yield from vision_shapes("vision_backbone.featurizer", geometry, 0)
    yield from vision_shapes("vision_backbone.fused_featurizer", geometry, 1)
    yield from linear("projector.fc1", 4 * vision, vision)
    yield from linear("projector.fc2", hidden, 4 * vision)
    yield from linear("projector.fc3", hidden, hidden)
    yield "language_model.model.embed_tokens.weight", (VOCABULARY + 64, hidden)
    for layer in range(geometry.num_layers):
        block = f"language_model.model.layers.{layer}"
        for part in "qkvo":
            yield f"{block}.self_attn.{part}_proj.weight", (hidden, hidden)
        for part in ("gate", "up"):
            yield f"{block}.mlp.{part}_proj.weight", (geometry.intermediate, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, geometry.intermediate)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (VOCABULARY + 64, hidden)


def head_shapes(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, actions = geometry.hidden, geometry.actions
    yield from norm("model.layer_norm1", actions * hidden)
    yield from linear("model.fc1", hidden, actions * hidden)
    for block in (0, 1):
        yield from norm(f"model.mlp_resnet_blocks.{block}.ffn.0", hidden)
        yield from linear(f"model.mlp_resnet_blocks.{block}.ffn.1", hidden, hidden)
    yield from norm("model.layer_norm2", hidden)
    yield from linear("model.fc2", actions, hidden)


def proprio_shapes(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from linear("fc1", geometry.hidden, geometry.states)
    yield from linear("fc2", geometry.hidden, geometry.hidden)


def weight(seed: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor's weights, of a size that keeps the signal's."""
    values = uniform(seed, name, shape)
    if name.endswith("scale_factor"):
        values = np.float32(0.3) + np.float32(0.2) * values
    elif name.endswith("bias"):
        values *= np.float32(0.1)
    elif "norm" in name or "ffn.0" in name:
        values = np.float32(1) + np.float32(0.2) * values
    elif len(shape) in (2, 4) and "embed_tokens" not in name:
        values *= np.float32((3 / np.prod(shape[1:])) ** 0.5)
    if "embed" in name or name.endswith("_token") or name.startswith(("projector.fc3", "fc2")):
        values *= np.float32(0.05)  # as small as trained ones, so that the norms' epsilons matter
    if name == "model.fc2.bias":
        values[-1] += np.float32(0.5)  # the gripper opens and closes at half
    return torch.from_numpy(values).to(dtype)


def tokenizer_text() -> str:
    """Text of a tokenizer.json like Llama 2's, with letters as tokens, and "▁" where Llama 2 has it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    words = ["▁the", "▁t", "he", "▁p", "in", "on", "▁to", "▁a", "ro", "bot"]
    merges = ["▁ t", "h e", "▁t he", "▁ p", "i n", "o n", "▁t o", "▁ a", "r o", "b o", "bo t"]
    vocabulary |= {word: 300 + index for index, word in enumerate([*words, "bo"])}
    letters = "▁etaoinsrhldcumpfgwybvkxqjzETAOINSRHLDCUMPFGWYBVKXQJZ0123456789?:.,'-"
    vocabulary |= {letter: EMPTY + index for index, letter in enumerate(letters)}
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{index}>": index for index in range(VOCABULARY) if index not in taken}
    special = [("<unk>", 0), ("<s>", 1), ("</s>", 2), ("<PAD>", VOCABULARY)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": content, **flags} for content, index in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(document)


def statistics(seed: int, states: int = 8, actions: int = 7) -> dict[str, Any]:
    """Content of dataset_statistics.json; the last action is a gripper."""
    low, high = -1 + 0.5 * uniform(seed, "low", (states,)), 1 + 0.5 * uniform(seed, "high", (states,))
    arm = actions - 1
    action = {
        "q01": [*map(float, low[:arm]), 0.0],
        "q99": [*map(float, high[:arm]), 1.0],
        "mask": [True] * arm + [False],
    }
    proprio = {"q01": [*map(float, low)], "q99": [*map(float, high)]}
    for group in (action, proprio):
        size = len(group["q01"])
        group |= {"min": group["q01"], "max": group["q99"], "mean": [0.0] * size, "std": [1.0] * size}
    return {
        "libero_spatial_no_noops": {
            "action": action,
            "proprio": proprio,
            "num_transitions": 52970,
            "num_trajectories": 432,
        }
    }


def write_openvla_folder(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int | None = None,
    hidden: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    geometry: Geometry | None = None,
    shards: int = 2,
    step: int = 150000,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: The folder, which may exist.
        seed: Seed of the weights.
        num_layers: Layers of the language model, where the geometry's is not wanted.
        hidden: Width of the language model, likewise.
        image_size: Pixels on each side of the images that the vision transformers take, a multiple of 14; likewise.
        dtype: Type of the weights.
        geometry: All sizes; None: a tiny model of 8 layers.
        shards: Number of safetensors files.
        step: Training step in the names of the head's and the projector's files.
    """
    sizes = geometry or Geometry()
    given = {"num_layers": num_layers, "hidden": hidden, "image_size": image_size}
    sizes = Geometry(**{**vars(sizes), **{name: value for name, value in given.items() if value is not None}})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(sizes, dtype))
    write_json(folder / "dataset_statistics.json", statistics(seed, sizes.states, sizes.actions))
    write_json(folder / "preprocessor_config.json", preprocessor(sizes.image_size))
    (folder / "tokenizer.json").write_text(tokenizer_text(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    shapes = list(model_shapes(sizes))
    cut = -(-len(shapes) // shards)
    places: dict[str, str] = {}
    total = 0
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {key: weight(seed, key, shape, dtype) for key, shape in shapes[index * cut : (index + 1) * cut]}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    for part, part_shapes in (("action_head", head_shapes), ("proprio_projector", proprio_shapes)):
        tensors = {f"module.{key}": weight(seed, key, shape, dtype) for key, shape in part_shapes(sizes)}
        torch.save(tensors, folder / f"{part}--{step}_checkpoint.pt")
    return folder


def config(sizes: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json; the public ones leave the language model's sizes to LlamaConfig's defaults."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "timm_model_ids": list(TIMM_IDS),
        "timm_override_act_layers": [None, None],
        "image_sizes": [sizes.image_size] * 2,
        "image_resize_strategy": "resize-naive",
        "n_action_bins": 256,
        "pad_token_id": VOCABULARY,
        "pad_to_multiple_of": 64,
        "torch_dtype": name,
        "text_config": {
            "model_type": "llama",
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.heads,
            "pad_token_id": VOCABULARY,
            "torch_dtype": name,
            "vocab_size": VOCABULARY + 64,
        },
        "norm_stats": {"bridge_orig": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
    }


def preprocessor(size: int) -> dict[str, Any]:
    """Content of preprocessor_config.json: DINOv2's normalisation was written as rounded to bfloat16."""
    rounded = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, size, size], [3, size, size]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [[0.485, 0.456, 0.406], half["mean"]],
        "stds": [[0.229, 0.224, 0.225], half["std"]],
        "tvf_normalize_params": [{"inplace": False, **rounded}, {"inplace": False, **half}],
    }


def make_observation(seed: int, index: int, *, size: int = 256) -> dict[str, Any]:
    """An observation of coloured squares and noise, with a state that may lie outside the statistics' range."""
    observation: dict[str, Any] = {"task": INSTRUCTIONS[index % len(INSTRUCTIONS)]}
    for camera in CAMERAS:
        squares = (bits(seed, f"{camera}{index}", 192) >> np.uint64(56)).astype(np.int64).reshape(8, 8, 3)
        noise = (bits(seed, f"noise{camera}{index}", size * size * 3) >> np.uint64(60)).astype(np.int64)
        rows = np.arange(size) * 8 // size
        image = squares[rows][:, rows] + noise.reshape(size, size, 3) * (index % 4)
        observation[f"observation.images.{camera}"] = image.clip(0, 255).astype(np.uint8)
    observation["observation.state"] = np.float32(1.3) * uniform(seed, f"state{index}", (8,))
    return observation


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
