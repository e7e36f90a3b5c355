"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844), in the folders that LeRobot saves.

The prefix is images, words and the state: SmolVLM2's vision transformer and the first layers of its decoder, a Llama
with rotary positions of base 10000. The state is the last token, which images and words do not attend to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig, SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

from dysl_vla.checkpoint import CONFIG
from dysl_vla.errors import CheckpointError
from dysl_vla.policies.base import policies
from dysl_vla.policies.flow.expert import Expert, ExpertShape
from dysl_vla.policies.flow.images import padded
from dysl_vla.policies.flow.last_layer import LastLlamaLayer
from dysl_vla.policies.flow.lerobot_folder import FlowOptions, LeRobotFolder, count_layers, read_vlm_config
from dysl_vla.policies.flow.lerobot_policy import LeRobotFlowPolicy
from dysl_vla.types import PolicySpec

HEAD_DIM = 64
"""Width of an attention head of SmolVLM2, of its decoder and its vision transformer, which tensors do not tell."""
VISION_WIDTH = 768
"""Width of SmolVLM2 500M's vision transformer, which has heads of that width."""
ROPE_THETA = 10_000.0
SETTINGS = {
    "max_state_dim": 32,
    "max_action_dim": 32,
    "num_steps": 10,
    "min_period": 4e-3,
    "max_period": 4.0,
    "tokenizer_max_length": 48,
}
"""Numbers of config.json, and LeRobot's defaults."""
RENAMED = (
    ("vlm_with_expert.vlm.model.vision_model.", "vision."),
    ("vlm_with_expert.vlm.model.connector.", "connector."),
    ("vlm_with_expert.vlm.model.text_model.", "backbone."),
    ("vlm_with_expert.lm_expert.", "expert."),
)
"""Beginnings of LeRobot's tensors' names, and of the policy's."""


class SmolVLA(LeRobotFlowPolicy):
    """The policy that this module describes, as a `SkippablePolicy`.

    Args:
        vlm: Configuration of the vision transformer, the connector and the decoder.
        expert: Sizes of the expert.
        spec: Cameras, state, actions, their normalisation, rate and chunk.
        tokenizer: The tokenizer of instructions.
        settings: Numbers of LeRobot's config.json: `max_state_dim`, `max_action_dim`, `num_steps`, `min_period`,
            `max_period`, `tokenizer_max_length`, and `resize_imgs_with_padding`, (width, height), or None.
    """

    kind = "smolvla"
    backbone: LlamaModel

    def __init__(
        self,
        vlm: SmolVLMConfig,
        expert: ExpertShape,
        spec: PolicySpec,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        llama: Any = vlm.text_config
        seen: Any = vlm.vision_config
        self.vision = SmolVLMVisionTransformer(seen)
        self.connector: nn.Module = SmolVLMConnector(vlm)  # type: ignore[no-untyped-call]
        self.backbone = LlamaModel(llama)
        last = llama.num_hidden_layers - 1
        self.backbone.layers[last] = LastLlamaLayer(llama, last)
        self.expert = Expert(expert)
        self.state_proj = nn.Linear(settings["max_state_dim"], llama.hidden_size)
        self.action_in_proj = nn.Linear(settings["max_action_dim"], expert.width)
        self.action_out_proj = nn.Linear(expert.width, settings["max_action_dim"])
        self.action_time_mlp_in = nn.Linear(2 * expert.width, expert.width)
        self.action_time_mlp_out = nn.Linear(expert.width, expert.width)
        self._spec, self.settings = spec, dict(settings)
        self.take_tokenizer(tokenizer)
        self.steps, self.action_width = int(settings["num_steps"]), int(settings["max_action_dim"])
        self.periods = settings["min_period"], settings["max_period"]
        self.provenance: dict[str, Any] = {}

    def see(self, images: Tensor) -> Tensor:
        """See `LeRobotFlowPolicy.see`."""
        weight = next(self.vision.parameters())
        pixels = images.permute(0, 3, 1, 2).float() / 255
        size = self.settings.get("resize_imgs_with_padding")
        pixels = padded(pixels, int(size[1]), int(size[0]), is_centred=False) if size else 2 * pixels - 1
        seen = self.vision(pixel_values=pixels.to(weight.dtype)).last_hidden_state
        answer: Tensor = self.connector(seen.to(next(self.connector.parameters())))
        return answer * math.sqrt(self.width)

    def words(self, token_ids: Tensor) -> Tensor:
        """See `LeRobotFlowPolicy.words`."""
        answer: Tensor = self.backbone.embed_tokens(token_ids)
        return answer * math.sqrt(self.width)

    def assembled(self, views: Sequence[Tensor], words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of which the state is the last; see `LeRobotFlowPolicy.assembled`."""
        embeds, causal = super().assembled(views, words, state)
        last = self.state_proj(state.to(self.state_proj.weight))[..., None, :].to(words)
        return torch.cat([embeds, last], dim=-2), functional.pad(causal, (0, 1), value=1)

    @classmethod
    def of_folder(cls, folder: LeRobotFolder, options: FlowOptions) -> SmolVLA:
        """See `LeRobotFlowPolicy.of_folder`."""
        model = str(folder.config.get("vlm_model_name"))
        tokenizer = folder.tokenizer(options, model)
        vlm, expert = read_sizes(folder, read_vlm_config(options, model))
        settings: dict[str, Any] = {name: folder.number(name, default) for name, default in SETTINGS.items()}
        settings["num_steps"] = options.steps or settings["num_steps"]
        settings["resize_imgs_with_padding"] = folder.config.get("resize_imgs_with_padding")
        if folder.config.get("add_image_special_tokens"):
            raise CheckpointError(f"{folder.folder / CONFIG}: add_image_special_tokens is not supported.")
        return cls(vlm, expert, folder.spec(options), tokenizer, settings)

    @staticmethod
    def renamed(name: str) -> str | None:
        """See `LeRobotFlowPolicy.renamed`."""
        if name.startswith("vlm_with_expert.vlm.lm_head.") or name.endswith("rotary_emb.inv_freq"):
            return None
        return _renamed(name)


def read_sizes(folder: LeRobotFolder, stated: Mapping[str, Any]) -> tuple[SmolVLMConfig, ExpertShape]:
    """Return the sizes of a checkpoint.

    Args:
        folder: Its files, whose tensors tell most of it.
        stated: The configuration of the vision-language model, for the rest; SmolVLM2's numbers are the defaults.

    Raises:
        CheckpointError: A tensor is missing or of an impossible shape.
    """
    shapes = {_renamed(name): shape for name, shape in folder.shapes.items()}

    def size(name: str, dimension: int = 0) -> int:
        if name not in shapes:
            raise CheckpointError(f"{folder.folder} has no tensor {name!r}, as a SmolVLA has; get it again.")
        return shapes[name][dimension]

    text, seen = stated.get("text_config", {}), stated.get("vision_config", {})
    head_dim = int(text.get("head_dim") or HEAD_DIM)
    layer, depth = "backbone.layers.0.", count_layers(shapes, "backbone.layers.")
    llama = LlamaConfig(
        vocab_size=size("backbone.embed_tokens.weight"),
        hidden_size=size("backbone.embed_tokens.weight", 1),
        intermediate_size=size(f"{layer}mlp.up_proj.weight"),
        num_hidden_layers=depth,
        num_attention_heads=size(f"{layer}self_attn.q_proj.weight") // head_dim,
        num_key_value_heads=size(f"{layer}self_attn.k_proj.weight") // head_dim,
        head_dim=head_dim,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    patches = size("vision.embeddings.position_embedding.weight")
    patch = size("vision.embeddings.patch_embedding.weight", 3)
    width = size("vision.embeddings.patch_embedding.weight")
    if "num_attention_heads" not in seen and width != VISION_WIDTH:
        raise CheckpointError(
            f"{folder.folder} was made from another vision-language model than SmolVLM2 500M, whose tensors do not "
            "tell all of its sizes; give the folder of its config.json by --policy-options vlm=FOLDER."
        )
    vision = SmolVLMVisionConfig(
        hidden_size=width,
        intermediate_size=size("vision.encoder.layers.0.mlp.fc1.weight"),
        num_hidden_layers=count_layers(shapes, "vision.encoder.layers."),
        num_attention_heads=int(seen.get("num_attention_heads") or width // HEAD_DIM),
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=float(seen.get("layer_norm_eps", 1e-6)),
    )
    shuffled = size("connector.modality_projection.proj.weight", 1)
    vlm = SmolVLMConfig(text_config=llama, vision_config=vision, scale_factor=math.isqrt(shuffled // width))
    if (present := count_layers(shapes, "expert.layers.")) != depth:
        raise CheckpointError(
            f"{folder.folder}: num_expert_layers must be the {depth} layers of the prefix, got {present}; an expert "
            "with fewer is not supported."
        )
    first = "expert.layers.0."
    among = int(folder.number("self_attn_every_n_layers", 2))
    crosses = "cross" in str(folder.config.get("attention_mode", "cross_attn"))
    expert = ExpertShape(
        width=size(f"{first}self_attn.q_proj.weight", 1),
        depth=depth,
        heads=size(f"{first}self_attn.q_proj.weight") // head_dim,
        kv_heads=size(f"{first}self_attn.k_proj.weight") // head_dim,
        head_dim=head_dim,
        mlp_width=size(f"{first}mlp.up_proj.weight"),
        norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=ROPE_THETA,
        crossing=tuple(one for one in range(depth) if crosses and not (among > 0 and one % among == 0)),
    )
    return vlm, expert


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


policies.register(SmolVLA.kind)(SmolVLA)
