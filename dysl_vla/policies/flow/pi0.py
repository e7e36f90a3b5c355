"""pi0 (Black et al. 2024, arXiv 2410.24164) and pi0.5 (2025, arXiv 2504.16054), in the folders that LeRobot saves.

The prefix is images and words: PaliGemma's SigLIP and its Gemma, which attends in both directions. In pi0 the state is
the expert's first token; in pi0.5 it is written into the words, in 256 steps from -1 to 1, and the time of denoising
drives the expert's norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GemmaConfig, GemmaModel, SiglipVisionConfig, SiglipVisionModel

from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies.base import policies
from dysl_vla.policies.flow.expert import Expert, ExpertShape
from dysl_vla.policies.flow.images import padded
from dysl_vla.policies.flow.last_layer import LastGemmaLayer
from dysl_vla.policies.flow.lerobot_folder import FlowOptions, LeRobotFolder, count_layers
from dysl_vla.policies.flow.lerobot_policy import LeRobotFlowPolicy
from dysl_vla.types import STATE_KEY, TASK_KEY, Observation, PolicySpec

TOKENIZER_OF = "google/paligemma-3b-pt-224"
"""The repository whose tokenizer pi0's policies use."""
VISION_HEAD_DIM, IMAGE_SIZE = 72, 224
"""Width of an attention head of SigLIP, which tensors do not tell, and LeRobot's default size of images."""
EPS = 1e-6
BEGIN = "<bos>"
"""PaliGemma's first token of a text."""
BINS = 256
"""Steps that pi0.5 writes a dimension of the state in."""
PALIGEMMA = "paligemma_with_expert.paligemma."
RENAMED = (
    (f"{PALIGEMMA}model.vision_tower.vision_model.", "vision."),
    (f"{PALIGEMMA}model.vision_tower.", "vision."),
    (f"{PALIGEMMA}model.multi_modal_projector.linear.", "projector."),
    (f"{PALIGEMMA}model.language_model.", "backbone."),
    ("paligemma_with_expert.gemma_expert.model.", "expert."),
    ("time_mlp_", "action_time_mlp_"),
)
"""Beginnings of LeRobot's tensors' names, and of the policy's."""
WORDS = "backbone.embed_tokens.weight"
UNUSED = ("paligemma_with_expert.gemma_expert.lm_head.", "expert.embed_tokens.")
"""Beginnings of tensors that a folder may have and the policy does not need."""
SETTINGS: dict[str, float] = {
    "max_state_dim": 32,
    "max_action_dim": 32,
    "num_inference_steps": 10,
    "min_period": 4e-3,
    "max_period": 4.0,
}
"""Numbers of config.json, and LeRobot's defaults."""


class Pi0(LeRobotFlowPolicy):
    """pi0, as a `SkippablePolicy`.

    Args:
        vision: Configuration of the vision transformer.
        gemma: Configuration of the prefix's decoder.
        expert: Sizes of the expert.
        spec: Cameras, state, actions, their normalisation, rate and chunk.
        tokenizer: The tokenizer of instructions.
        settings: The numbers in `SETTINGS`, `tokenizer_max_length`, and `image_resolution`, (height, width).
    """

    kind = "pi0"
    max_tokens: ClassVar[int] = 48
    has_state_token: ClassVar[bool] = True
    backbone: GemmaModel

    def __init__(
        self,
        vision: SiglipVisionConfig,
        gemma: GemmaConfig,
        expert: ExpertShape,
        spec: PolicySpec,
        *,
        tokenizer: Tokenizer,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        siglip = SiglipVisionModel(vision)
        self.vision = getattr(siglip, "vision_model", siglip)  # transformers once had it one level deeper
        self.projector = nn.Linear(vision.hidden_size, gemma.hidden_size)
        self.backbone = GemmaModel(gemma)
        last = gemma.num_hidden_layers - 1
        self.backbone.layers[last] = LastGemmaLayer(gemma, last)
        self.expert = Expert(expert)
        width, actions = expert.width, int(settings["max_action_dim"])
        self.action_in_proj, self.action_out_proj = nn.Linear(actions, width), nn.Linear(width, actions)
        self.action_time_mlp_in = nn.Linear(2 * width if self.has_state_token else width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.state_proj = nn.Linear(int(settings["max_state_dim"]), width) if self.has_state_token else None
        self._spec, self.settings = spec, dict(settings)
        self.take_tokenizer(tokenizer)
        self.steps, self.action_width = int(settings["num_inference_steps"]), actions
        self.periods = settings["min_period"], settings["max_period"]
        self.provenance: dict[str, Any] = {}

    def see(self, images: Tensor) -> Tensor:
        """See `LeRobotFlowPolicy.see`."""
        weight = next(self.vision.parameters())
        pixels = images.permute(0, 3, 1, 2).float() / 255
        height, width = self.settings["image_resolution"]
        pixels = padded(pixels, int(height), int(width), is_centred=True)
        seen = self.vision(pixel_values=pixels.to(weight.dtype)).last_hidden_state
        answer: Tensor = self.projector(seen.to(self.projector.weight))
        return answer

    def words(self, token_ids: Tensor) -> Tensor:
        """See `LeRobotFlowPolicy.words`."""
        weight = self.backbone.embed_tokens.weight
        return functional.embedding(token_ids, weight) * torch.tensor(math.sqrt(self.width)).to(weight)

    def ids(self, observation: Observation) -> list[int]:
        """Return the token ids of an observation's prompt, cut where there are too many."""
        ids, begin = super().ids(observation), self.tokenizer.token_to_id(BEGIN)
        if begin is not None and ids[:1] != [begin]:
            ids = [begin, *ids]
        return list(ids[: int(self.settings["tokenizer_max_length"])])

    def embed_actions(self, noisy: Tensor, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed the state, and noisy actions with the time; see `FlowPolicy.embed_actions`.

        Actions attend to the state and to one another, the state to itself.
        """
        tokens, _, _ = super().embed_actions(noisy, time, state)
        assert self.state_proj is not None
        first = self.state_proj(state.to(self.state_proj.weight))[:, None]
        allowed = torch.ones(noisy.shape[1] + 1, noisy.shape[1] + 1, dtype=torch.bool, device=noisy.device)
        allowed[0, 1:] = False
        return torch.cat([first, tokens], dim=1), allowed, None

    @classmethod
    def of_folder(cls, folder: LeRobotFolder, options: FlowOptions) -> Self:
        """See `LeRobotFlowPolicy.of_folder`."""
        vision, gemma, expert = read_sizes(folder, cls)
        settings: dict[str, Any] = {name: folder.number(name, default) for name, default in SETTINGS.items()}
        settings["num_inference_steps"] = options.steps or settings["num_inference_steps"]
        settings["tokenizer_max_length"] = folder.number("tokenizer_max_length", cls.max_tokens)
        settings["image_resolution"] = folder.config.get("image_resolution") or [IMAGE_SIZE, IMAGE_SIZE]
        tokenizer = folder.tokenizer(options, TOKENIZER_OF)
        return cls(vision, gemma, expert, folder.spec(options), tokenizer=tokenizer, settings=settings)

    @staticmethod
    def renamed(name: str) -> str | None:
        """See `LeRobotFlowPolicy.renamed`."""
        if name == f"{PALIGEMMA}lm_head.weight":
            return WORDS  # the same tensor, which is saved under one name or both
        for old, new in RENAMED:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        return None if name.startswith(UNUSED) or name.endswith(("rotary_emb.inv_freq", "position_ids")) else name

    def make_buffers(self) -> None:
        """See `LeRobotFlowPolicy.make_buffers`."""
        super().make_buffers()
        embeddings: Any = next(module for module in self.vision.modules() if hasattr(module, "position_embedding"))
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]


class Pi05(Pi0):
    """pi0.5, as a `SkippablePolicy`; see `Pi0`."""

    kind = "pi05"
    max_tokens = 200
    has_state_token = False

    def token_ids(self, instruction: str) -> list[int]:
        """Refuse to be exported.

        Raises:
            ConfigError: Its words are not a function of the instruction.
        """
        raise ConfigError(
            "policy must read no words but the instruction to be exported, and pi0.5 reads the state, too; run it with "
            "PyTorch: dysl serve --policy or dysl control --policy."
        )

    def prompt(self, observation: Observation) -> str:
        """Return the text that the policy reads of an observation, with the state in steps from 0 to 255."""
        state = self.spec.state_normalisation.apply(np.asarray(observation[STATE_KEY], np.float32))
        steps = np.digitize(state, np.linspace(-1, 1, BINS + 1)[:-1]) - 1
        instruction = str(observation[TASK_KEY]).strip().replace("_", " ").replace("\n", " ")
        return f"Task: {instruction}, State: {' '.join(map(str, steps))};\nAction: "

    def embed_actions(self, noisy: Tensor, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed noisy actions, which all attend to one another; the time is the norms' condition."""
        actions, when = self.project_actions(noisy, time)
        condition = functional.silu(self.action_time_mlp_out(functional.silu(self.action_time_mlp_in(when))))
        allowed = torch.ones(noisy.shape[1], noisy.shape[1], dtype=torch.bool, device=noisy.device)
        return actions, allowed, condition


def read_sizes(folder: LeRobotFolder, kind: type[Pi0]) -> tuple[SiglipVisionConfig, GemmaConfig, ExpertShape]:
    """Return the sizes of a checkpoint, from its tensors; keys and values have one head, as in every Gemma of pi0.

    Raises:
        CheckpointError: A tensor is missing.
    """
    shapes = {new: shape for name, shape in folder.shapes.items() if (new := kind.renamed(name)) is not None}

    def size(name: str, dimension: int = 0) -> int:
        if name not in shapes:
            raise CheckpointError(f"{folder.folder} has no tensor {name!r}, as a {folder.kind} has; get it again.")
        return shapes[name][dimension]

    depth = count_layers(shapes, "backbone.layers.")
    layer, first = "backbone.layers.0.", "expert.layers.0."
    head_dim = size(f"{layer}self_attn.k_proj.weight")
    gemma = GemmaConfig(
        vocab_size=size(WORDS),
        hidden_size=size(WORDS, 1),
        intermediate_size=size(f"{layer}mlp.up_proj.weight"),
        num_hidden_layers=depth,
        num_attention_heads=size(f"{layer}self_attn.q_proj.weight") // head_dim,
        num_key_value_heads=1,
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        rms_norm_eps=EPS,
    )
    width = size("vision.embeddings.patch_embedding.weight")
    patch = size("vision.embeddings.patch_embedding.weight", 3)
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=size("vision.encoder.layers.0.mlp.fc1.weight"),
        num_hidden_layers=count_layers(shapes, "vision.encoder.layers."),
        num_attention_heads=max(1, width // VISION_HEAD_DIM),
        image_size=math.isqrt(size("vision.embeddings.position_embedding.weight")) * patch,
        patch_size=patch,
        vision_use_head=False,
    )
    expert = ExpertShape(
        width=size(f"{first}self_attn.q_proj.weight", 1),
        depth=depth,
        heads=size(f"{first}self_attn.q_proj.weight") // head_dim,
        kv_heads=1,
        head_dim=head_dim,
        mlp_width=size(f"{first}mlp.up_proj.weight"),
        norm="gemma" if kind.has_state_token else "adaptive",
        activation="gelu",
        norm_eps=EPS,
    )
    return vision, gemma, expert


for _kind in (Pi0, Pi05):
    policies.register(_kind.kind)(_kind)
