"""OpenVLA-OFT (Kim et al. 2025, "Fine-Tuning Vision-Language-Action Models"), for the authors' public checkpoints.

Two vision transformers encode each camera's image, and a projector makes one token of each patch; one more token is
proprioception. An unmodified Hugging Face `LlamaModel` with attention in both directions reads them, the instruction
and one empty placeholder for each number of the chunk; a head maps the placeholders' hidden states to the actions.
`openvla_images` prepares the images, and `openvla_checkpoint` reads the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel
from transformers import __version__ as TRANSFORMERS  # noqa: N812 # it is a constant
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dysl_vla.checkpoint import CONFIG, canonical, read_document
from dysl_vla.errors import CheckpointError, ConfigError, DyslError
from dysl_vla.policies.backbone import EMBEDS, BackbonePolicy
from dysl_vla.policies.base import policies
from dysl_vla.policies.base_reference import Base, find_base, save_reference
from dysl_vla.policies.compute import ComputeConfig, check_device_memory, set_attention
from dysl_vla.policies.openvla_checkpoint import OpenVLAFiles, OpenVLAOptions, read_spec
from dysl_vla.policies.openvla_images import prepared
from dysl_vla.policies.vit import VisionShape, VisionTransformer
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EpisodeState, Observation, PolicySpec

POLICY_TYPE = "openvla-oft"
PROMPT = "In: What action should the robot take to {}?\nOut:"
BEGIN, END, EMPTY = 1, 2, 29871
"""Tokens of Llama 2: the first of a prompt, the last of a sequence, and "▁", which ends every prompt."""
VISION_HEADS = {"vit_large_patch14_reg4_dinov2": 16, "vit_so400m_patch14_siglip_224": 16}
"""Name of a vision transformer in timm to its number of attention heads, which its tensors do not tell."""


class Perceptron(nn.Module):
    """Linear layers `fc1`, `fc2` and so on, with an exact GELU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for index in range(self.depth):
            self.add_module(f"fc{index + 1}", nn.Linear(widths[index], widths[index + 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., first width) to (..., last width)."""
        for index in range(self.depth):
            x = getattr(self, f"fc{index + 1}")(functional.gelu(x) if index else x)
        return x


class ResidualBlock(nn.Module):
    """One block of the action head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return x + self.ffn(x)  # type: ignore[no-any-return]


class ResidualPerceptron(nn.Module):
    """The action head, which maps the hidden states of one action's placeholders, side by side, to the action."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        x = self.mlp_resnet_blocks(functional.relu(self.fc1(self.layer_norm1(x))))
        return self.fc2(self.layer_norm2(x))  # type: ignore[no-any-return]


class OpenVLAOFT(BackbonePolicy, nn.Module):
    """The policy that this module describes, as a `SkippablePolicy`.

    Args:
        vision: The vision transformers, of DINOv2 first, then of SigLIP.
        llama: Configuration of the decoder.
        head: Width of the action head, and its number of residual blocks.
        spec: Cameras, state, actions, their normalisation, rate and chunk.
        use_proprio: Whether proprioception is a token.
        pixel_means: Mean of the three colours, from 0 to 1, for each vision transformer.
        pixel_deviations: Their standard deviations.
        tokenizer: The tokenizer of instructions.
    """

    takes_compute = True
    backbone: LlamaModel
    base: Base
    files_dtype: torch.dtype

    def __init__(
        self,
        vision: Sequence[VisionShape],
        llama: LlamaConfig,
        head: tuple[int, int],
        spec: PolicySpec,
        *,
        use_proprio: bool,
        pixel_means: Sequence[Sequence[float]],
        pixel_deviations: Sequence[Sequence[float]],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        hidden, self.actions = int(llama.hidden_size), len(spec.action_names)
        widths = sum(shape.width for shape in vision)
        self.vision = nn.ModuleList(VisionTransformer(shape) for shape in vision)
        self.projector = Perceptron(widths, 4 * widths, hidden, hidden)
        self.proprio_projector = Perceptron(len(spec.state_names), hidden, hidden) if use_proprio else None
        self.backbone = LlamaModel(llama)
        self.head = ResidualPerceptron(hidden * self.actions, head[0], self.actions, head[1])
        self.spec = spec
        self.image_size = vision[0].image_size
        self.pixel_means, self.pixel_deviations = pixel_means, pixel_deviations
        self.tokenizer = tokenizer
        self.provenance: dict[str, Any] = {}
        self._token_ids: dict[str, list[int]] = {}

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        """Compute everything before the decoder; see `SkippablePolicy.encode`."""
        for observation in observations:
            self.spec.check_observation(observation)
        images = [
            prepared(observation[IMAGE_PREFIX + camera], self.image_size)
            for observation in observations
            for camera in self.spec.cameras
        ]
        seen = self.projector(self.see(torch.from_numpy(np.stack(images))))
        seen = seen.reshape(len(observations), -1, seen.shape[-1])
        if self.proprio_projector is not None:
            state = np.stack([observation[STATE_KEY] for observation in observations]).astype(np.float32)
            state = np.clip(self.spec.state_normalisation.apply(state), -1, 1)
            proprio = self.proprio_projector(torch.from_numpy(state).to(seen))
            seen = torch.cat([seen, proprio[:, None]], dim=1)
        return [{EMBEDS: self._sequence(o[TASK_KEY], row)} for o, row in zip(observations, seen, strict=True)]

    def see(self, images: Tensor) -> Tensor:
        """Encode prepared images, (images, size, size, 3) uint8, to (images, patches, both widths)."""
        weight = self.head.fc2.weight
        pixels = images.to(weight.device).permute(0, 3, 1, 2).float() / 255
        views = []
        for transformer, mean, deviation in zip(self.vision, self.pixel_means, self.pixel_deviations, strict=True):
            normalised = (pixels - _channels(mean, pixels)) / _channels(deviation, pixels)
            views.append(transformer(normalised.to(weight.dtype)))
        return torch.cat(views, dim=2)

    def _sequence(self, instruction: str, seen: Tensor) -> Tensor:
        """Combine an instruction and what was seen, (tokens, hidden), to the decoder's input, (tokens, hidden)."""
        ids = torch.tensor([*self.token_ids(instruction), END], device=seen.device)
        words = self.backbone.embed_tokens(ids)
        placeholders = seen.new_zeros((self.spec.chunk_length * self.actions, seen.shape[-1]))
        return torch.cat([words[:1], seen, words[1:-1], placeholders, words[-1:]])

    def token_ids(self, instruction: str) -> list[int]:
        """Return the token ids of the prompt with an instruction."""
        if instruction not in self._token_ids:
            if len(self._token_ids) > 1000:
                self._token_ids.clear()
            ids = self.tokenizer.encode(PROMPT.format(instruction.lower())).ids
            ids = ids if ids[:1] == [BEGIN] else [BEGIN, *ids]
            self._token_ids[instruction] = ids if ids[-1] == EMPTY else [*ids, EMPTY]
        return self._token_ids[instruction]

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the backbone's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action).

        The reference was trained to read each number one token before its placeholder, from the prompt's last token on.
        Where the gripper is a sign, the head's is 1 to open and 0 to close, and LIBERO's is -1 and 1.
        """
        count = self.spec.chunk_length * self.actions
        read = hidden[:, -count - 2 : -2].reshape(len(hidden), self.spec.chunk_length, -1)
        actions: Tensor = self.head(read).float()
        if not self.spec.action_normalisation.signs:
            return actions
        return torch.cat([actions[..., :-1], 1 - 2 * actions[..., -1:]], dim=-1)

    @property
    def fingerprint(self) -> str:
        """Return a digest of the checkpoint's files, the options and the type of numbers."""
        return self._fingerprint(self.head.fc2.weight.dtype)

    @property
    def known_as(self) -> tuple[str, ...]:
        """Return the fingerprint with the checkpoint's own type of numbers, which heads are trained for."""
        return (self._fingerprint(self.files_dtype),)

    def _fingerprint(self, dtype: torch.dtype) -> str:
        settings = f"{canonical(self.spec)}{self.proprio_projector is not None}"
        return hashlib.sha256(f"{self.base.fingerprint}{settings}{dtype}".encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that refers to the base's files, which are too large to copy."""
        save_reference(folder, POLICY_TYPE, self.base, self.provenance)

    @classmethod
    def from_pretrained(cls, name: str, compute: ComputeConfig | None = None) -> OpenVLAOFT:
        """Load a checkpoint from a folder or a Hugging Face hub id, or one that refers to it.

        Args:
            name: The checkpoint.
            compute: Device, type of numbers, attention and options. On the device "meta" no weights are read.

        Raises:
            CheckpointError: A file or tensor is missing, damaged or unknown, or the checkpoint is of another kind.
            ConfigError: An option is unknown or does not fit the checkpoint.
        """
        compute = compute or ComputeConfig()
        if tuple(map(int, TRANSFORMERS.split(".")[:2])) < (5, 2):  # older ones do not know `is_causal`, without a word
            raise ConfigError(f"transformers must be 5.2 or later to attend in both directions, got {TRANSFORMERS}.")
        folder, base = find_base(name, compute.options)
        options = OpenVLAOptions.parse(base.options)
        device = compute.torch_device(is_large=True)
        files = OpenVLAFiles(folder, device, use_proprio=options.use_proprio)
        dtype = compute.torch_dtype() or files.dtype
        # The modules are made without memory and take the files' tensors, so that the weights exist once.
        with torch.device("meta"):
            policy = cls._of_sizes(files, options).to(dtype)
        if compute.attention is not None:
            set_attention(name, policy, compute.attention)
        expected = policy.state_dict()
        files.check(expected)
        size = sum(value.nbytes for value in expected.values())
        check_device_memory(device, size, "the policy's weights", "give --dtype bfloat16, or another --device")
        if device.type != "meta":
            policy.load_state_dict(dict(files.weights(expected.keys(), dtype)), assign=True)
        with device:
            policy.backbone.rotary_emb = LlamaRotaryEmbedding(policy.backbone.config)  # no checkpoint stores it
        policy.base, policy.files_dtype = base, files.dtype
        policy.provenance = {"base": asdict(base)}
        return policy.eval()

    @classmethod
    def _of_sizes(cls, files: OpenVLAFiles, options: OpenVLAOptions) -> OpenVLAOFT:
        """Make a policy of the sizes that config.json has, for the decoder, and the tensors, for the rest."""
        path = files.folder / CONFIG
        config = read_document(path)
        spec, tokenizer = read_spec(files.folder, options), files.tokenizer()
        means, deviations = files.pixel_statistics()
        head = (files.shape("head.fc1.bias")[0], files.count("head.mlp_resnet_blocks."))
        try:
            text = dict(config["text_config"])
            if text.get("model_type", "llama") != "llama" or "quantization_config" in {*text, *config}:
                raise ValueError("text_config must be that of a Llama which is not quantised")
            for name in ("attn_implementation", "_attn_implementation", "return_dict"):
                text.pop(name, None)  # how it is computed is decided here
            llama = LlamaConfig(**{**text, "is_causal": False, "use_cache": False})
            vision = [
                _vision_shape(files, f"vision.{index}.", config["timm_model_ids"][index], config["image_sizes"][index])
                for index in (0, 1)
            ]
            if vision[0].image_size != vision[1].image_size:
                raise ValueError("image_sizes must be the same for both vision transformers")
            return cls(
                vision,
                llama,
                head,
                spec,
                use_proprio=options.use_proprio,
                pixel_means=means,
                pixel_deviations=deviations,
                tokenizer=tokenizer,
            )
        except DyslError:
            raise
        except Exception as error:  # transformers' errors for a wrong value are many
            raise CheckpointError(f"{path} does not describe an OpenVLA-OFT ({error!r}); get it again.") from error


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a value for each colour as a tensor that fits (images, 3, height, width)."""
    return torch.tensor(values, device=like.device)[:, None, None]


def _vision_shape(files: OpenVLAFiles, prefix: str, name: str, image_size: int) -> VisionShape:
    """Return the sizes of a vision transformer; the states before its last layer are taken."""
    short = name.partition(".")[0]
    if short not in VISION_HEADS:
        raise CheckpointError(
            f"{files.folder / CONFIG}: timm_model_ids must be among {', '.join(VISION_HEADS)}, got {name!r}."
        )
    width, _, patch_size, _ = files.shape(f"{prefix}patch_embed.proj.weight")
    registers = f"{prefix}reg_token"
    return VisionShape(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=files.count(f"{prefix}blocks.") - 1,
        heads=VISION_HEADS[short],
        hidden=files.shape(f"{prefix}blocks.0.mlp.fc1.bias")[0],
        registers=files.shape(registers)[1] if registers in files.shapes else None,
        is_scaled=f"{prefix}blocks.0.ls1.scale_factor" in files.shapes,
    )


policies.register(POLICY_TYPE)(OpenVLAOFT)
