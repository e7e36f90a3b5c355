"""Tiny random models of the architectures in CONTRIBUTING's table, and the same models with layers removed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan
from dysl_vla.skip_controller.decoders import find_all_layers

DEPTH, WIDTH, VOCABULARY, TOKENS, IMAGE = 6, 32, 64, 9, 60
SPECIAL = list(range(50, VOCABULARY))  # tokens that stand for images and the like, and are not generated
PLAN = SkipPlan(num_layers=DEPTH, static_layers=(0, 3, 5))
COLUMNS = ("bit-identical", "skips", "cache", "generate", "verify", "left padding", "batch rows")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8}
MIXED = ["sliding_attention", "full_attention"] * 3
WINDOWED = {"sliding_window": 4, "layer_types": MIXED}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        name: Its name there.
        make: Makes the model.
        images: Makes the arguments that belong to images, for a number of rows; None: the model sees none.
        refused: Columns in which it is refused, with a word of the reason.
        plan: Which layers may be skipped.
        dtype: The dtype that it computes in.
    """

    name: str
    make: Callable[[], nn.Module]
    images: Callable[[int], dict[str, Tensor]] | None = None
    refused: Mapping[str, str] | None = None
    plan: SkipPlan = PLAN
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self) -> float:
        """Return how far two computations of the same may be apart."""
        return 1e-5 if self.dtype == torch.float32 else 0.05

    def cell(self, column: str) -> str:
        """Return what the table says of a column."""
        return "refused" if column in (self.refused or {}) else "works"


class Int8Linear(nn.Module):
    """A linear layer of eight-bit weights, one scale for each output, as quantisers of weights alone store it."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        scale = like.weight.abs().amax(dim=1) / 127
        rounded = (like.weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype)) * self.scale


def causal(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Make a text model by the name of its classes."""
    config = f"{name}TextConfig" if hasattr(transformers, f"{name}TextConfig") else f"{name}Config"
    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**sizes))


def vision(name: str, **parts: Any) -> Callable[[], nn.Module]:
    """Make a model of images and text by the name of its classes."""
    config = f"{name}Config"
    return lambda: getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, config)(**parts))


def int8() -> nn.Module:
    model = causal("Llama", **SIZES)()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Int8Linear(child))
    return model


def pixels(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    """Make images for each row, of a shape without the rows."""
    return lambda rows: {"pixel_values": random_like(rows, *shape)}


def patches(rows: int) -> dict[str, Tensor]:
    """Make images as Qwen's processors cut them up: one of 4 x 4 patches in each row, merged 2 x 2."""
    return {
        "pixel_values": random_like(rows, 16, 3 * 2 * 8 * 8).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def random_like(rows: int, *shape: int) -> Tensor:
    """Make values of each row that do not depend on the number of rows."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(row)) for row in range(rows)])


MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": WIDTH,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
NO_CACHE = dict.fromkeys(("generate",), "sizes masks")
ARCHITECTURES = [
    Architecture("Llama", causal("Llama", **SIZES)),
    Architecture("Llama, bf16", causal("Llama", **SIZES), dtype=torch.bfloat16),
    Architecture("Llama, int8 weights", int8),
    Architecture("Mistral, window of 4", causal("Mistral", **GROUPED, sliding_window=4)),
    Architecture("Qwen2", causal("Qwen2", **GROUPED)),
    Architecture("Qwen3", causal("Qwen3", **GEMMA)),
    Architecture("Gemma 1", causal("Gemma", **GEMMA)),
    Architecture("Gemma 2", causal("Gemma2", **GEMMA, **WINDOWED), plan=SkipPlan(DEPTH, (0, 1, 3, 5))),
    Architecture("Gemma 3", causal("Gemma3", **GEMMA, **WINDOWED), plan=SkipPlan(DEPTH, (0, 1, 3, 5))),
    Architecture("Gemma 3, first full layer dynamic", causal("Gemma3", **GEMMA, **WINDOWED), refused=NO_CACHE),
    Architecture("Phi-3", causal("Phi3", **GROUPED)),
    Architecture("OLMo-2", causal("Olmo2", **GROUPED)),
    Architecture("GPT-NeoX", causal("GPTNeoX", **SIZES)),
    Architecture("Mixtral", causal("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    Architecture(
        "SmolVLM",
        vision(
            "SmolVLM",
            vision_config=VISION,
            text_config={"model_type": "llama", **GROUPED},
            image_token_id=IMAGE,
            scale_factor=1,
        ),
        pixels(1, 3, 16, 16),
    ),
    Architecture(
        "PaliGemma",
        vision(
            "PaliGemma",
            vision_config={
                "model_type": "siglip_vision_model",
                **VISION,
                "projection_dim": WIDTH,
                "vision_use_head": False,
            },
            text_config={"model_type": "gemma", **GEMMA},
            projection_dim=WIDTH,
            image_token_id=IMAGE,
            hidden_size=WIDTH,
        ),
        pixels(3, 16, 16),
    ),
    Architecture(
        "Qwen2.5-VL",
        vision(
            "Qwen2_5_VL",
            vision_config={**QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            text_config={**GROUPED, "rope_parameters": MROPE},
            **QWEN_TOKENS,
        ),
        patches,
    ),
    Architecture(
        "Qwen3-VL",
        vision(
            "Qwen3VL",
            vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            text_config={**GEMMA, "rope_parameters": MROPE},
            **QWEN_TOKENS,
        ),
        patches,
    ),
    Architecture(
        "Gemma 4",
        causal(
            "Gemma4",
            **GEMMA,
            **WINDOWED,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            global_head_dim=8,
        ),
        plan=SkipPlan(DEPTH, (0, 1, 2, 3, 5)),
    ),
    Architecture(
        "Gemma 3n",
        causal(
            "Gemma3n",
            **{**GEMMA, "intermediate_size": [48] * 6},
            **WINDOWED,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 6,
        ),
        refused=dict.fromkeys(COLUMNS, "several streams"),
        plan=SkipPlan(DEPTH, (0, 1, 2, 3, 5)),
    ),
    Architecture(
        "LFM2", causal("Lfm2", **GROUPED, layer_types=["conv", "full_attention"] * 3), plan=SkipPlan(DEPTH, (0, 1, 4))
    ),
    Architecture(
        "Qwen3-Next",
        causal(
            "Qwen3Next",
            **GEMMA,
            layer_types=["linear_attention", "full_attention"] * 3,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        plan=SkipPlan(DEPTH, (0, 1, 4)),
    ),
    Architecture(
        "MPT",
        lambda: transformers.MptForCausalLM(
            transformers.MptConfig(
                d_model=WIDTH, n_heads=4, n_layers=DEPTH, vocab_size=VOCABULARY, max_seq_len=64, expansion_ratio=2
            )
        ),
    ),
]


@lru_cache(maxsize=64)
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    model = architecture.make().to(architecture.dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                parameter.mul_(4)  # so that layers matter
    return model


def make(architecture: Architecture) -> nn.Module:
    """Make a row's model, the same in each test."""
    return copy.deepcopy(_made(architecture.name))


def make_heads(architecture: Architecture) -> SkipHeads:
    torch.manual_seed(1)
    heads = SkipHeads(architecture.plan, HeadsConfig(WIDTH, adapter_size=8, controller_size=4))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    return heads.to(architecture.dtype).eval()


def inputs_of(architecture: Architecture, rows: int, *, is_padded: bool = False) -> dict[str, Tensor]:
    """Make a model's arguments; padding, if any, is on the left of all rows but each third."""
    ids = torch.randint(3, 50, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if is_padded:
        for row in range(rows):
            mask[row, : row % 3] = 0
    inputs: dict[str, Tensor] = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
    if architecture.images is None:
        return inputs
    inputs["input_ids"][:, 3:7] = IMAGE
    if "Qwen" in architecture.name:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if architecture.name == "PaliGemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs | architecture.images(rows)


def row_of(
    architecture: Architecture, inputs: Mapping[str, Tensor], row: int, *, bare: bool = False
) -> dict[str, Tensor]:
    """Return the arguments of one row, without its padding where asked."""
    one = {}
    first = int((1 - inputs["attention_mask"][row]).sum()) if bare else 0
    for name, value in inputs.items():
        each = len(value) // len(inputs["input_ids"])
        part = value[row * each : (row + 1) * each]
        one[name] = part[:, first:] if part.shape[1:2] == (TOKENS,) and part.ndim == 2 else part
    return one


def jumps_of(plan: SkipPlan, points: list[int]) -> dict[int, int]:
    """Return where a row leaves its blocks by force, and where it lands."""
    jumps = {}
    for block, point in zip(plan.blocks, points, strict=True):
        places = [place for place in plan.exits_of(block) if place >= block.first + point]
        if places:
            jumps[places[0]] = block.target
    return jumps


@contextmanager
def layers_removed(model: nn.Module, heads: SkipHeads, jumps: Mapping[int, int]) -> Iterator[None]:
    """Take layers out of a model by hand: each jump's target gets what the adapter makes of the exit's input."""
    layers = find_all_layers(model)
    answers_tuple: list[bool] = []
    adapted: dict[int, Tensor] = {}

    def absent(index: int, hidden: Tensor, *_: Any, **__: Any) -> Any:
        if index in jumps:
            adapted[jumps[index]] = heads.adapters[str(index)](hidden)
        return (hidden, None) if answers_tuple[0] else hidden

    def look(_: nn.Module, __: Any, output: Any) -> None:
        answers_tuple[:] = [isinstance(output, tuple)]

    def substitute(index: int, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return (adapted[index], *args[1:]), {k: v for k, v in kwargs.items() if args or k != "hidden_states"}

    handles = [layers[0].register_forward_hook(look)]
    removed = [layer for place, target in jumps.items() for layer in range(place, target)]
    for index in removed:
        layers[index].forward = partial(absent, index)
    handles += [
        layers[target].register_forward_pre_hook(partial(substitute, target), with_kwargs=True)
        for target in jumps.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for index in removed:
            del layers[index].__dict__["forward"]


def decode_without_cache(model: nn.Module, inputs: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Decode greedily, and run the whole sequence for each token."""
    grown = dict(inputs)
    for _ in range(tokens):
        last = model(**grown, use_cache=False).logits[:, -1, : SPECIAL[0]].argmax(dim=-1, keepdim=True)
        grown["input_ids"] = torch.cat([grown["input_ids"], last], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 1)):
            if name in grown:
                grown[name] = torch.cat([grown[name], torch.full_like(last, value, dtype=grown[name].dtype)], dim=1)
    return grown["input_ids"]
