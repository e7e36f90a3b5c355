"""MiniVLA: a vision-language-action policy small enough to train on a laptop's CPU, and built like the large ones.

Camera images become grid and keypoint tokens, the instruction becomes text tokens, proprioception one token; an
unmodified Hugging Face `LlamaModel` reads them and a last read-out token; a head turns that token's hidden state into a
chunk of continuous actions. `encode`, `backbone` and `decode` are separate, because layer skipping works only on the
middle one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from dysl_vla.checkpoint import Checkpoint, add_weights, canonical, find_checkpoint, load_checkpoint, save_checkpoint
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.images import Place, looked_at
from dysl_vla.policies.backbone import EMBEDS, BackbonePolicy
from dysl_vla.policies.base import policies
from dysl_vla.policies.packed_conv import PackedConv2d, RectifiedConvolutions
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    EpisodeState,
    Observation,
    PolicySpec,
)

POLICY_TYPE = "mini-vla"
CELL = 8
"""Pixels on each side that one cell of a camera's feature map stands for."""


@dataclass(frozen=True)
class Crop:
    """The part of a camera's image that the policy uses, in pixels from the top left."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class MiniVLAConfig:
    """Everything that decides a MiniVLA's shape and its inputs and outputs.

    Attributes:
        spec: Cameras, state, actions, their normalisation, rate and chunk.
        crops: Camera name to the part of its resized image that is used; its sides are multiples of 8 pixels times the
            camera's value in `grids`.
        grids: Camera name to the number of tokens on each side of its grid.
        vocab_size: Size of the tokenizer's vocabulary.
        text_tokens: Number of tokens of an instruction: shorter ones are padded, longer ones cut.
        hidden_size: Width of the backbone.
        num_layers: Depth of the backbone.
        num_heads: Number of attention heads.
        intermediate_size: Width of the feed-forward parts.
        keypoints: Number of keypoints of each camera.
        head_size: Width of the action head.
        resizes: Camera name to the size, (height, width), that its images are resized to first; others are not resized.
        state_clip: Deviations from the demonstrated mean at which the state is clipped; None: it is not clipped.

    Raises:
        ConfigError: A value does not fit; the message names it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    spec: PolicySpec
    crops: Mapping[str, Crop]
    grids: Mapping[str, int]
    vocab_size: int
    text_tokens: int
    hidden_size: int = 128
    num_layers: int = 24
    num_heads: int = 4
    intermediate_size: int = 256
    keypoints: int = 32
    head_size: int = 256
    resizes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    state_clip: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, size in self.spec.cameras.items():
            if name not in self.crops or name not in self.grids:
                raise ConfigError(f"crops and grids must have every camera, and {name!r} is missing.")
            crop, grid = self.crops[name], self.grids[name]
            if name in self.resizes:
                small = self.resizes[name]
                if not all(CELL <= new <= old for new, old in zip(small, size, strict=True)):
                    raise ConfigError(
                        f"resizes.{name} must be from {CELL}x{CELL} pixels to the camera's {size[0]}x{size[1]}, got "
                        f"{small[0]}x{small[1]}."
                    )
                size = small  # noqa: PLW2901 # crops lie in what is left
            if crop.top < 0 or crop.left < 0 or crop.top + crop.height > size[0] or crop.left + crop.width > size[1]:
                raise ConfigError(f"crops.{name} must lie inside the image of {size[0]}x{size[1]} pixels, got {crop}.")
            if grid < 1 or crop.height % (CELL * grid) or crop.width % (CELL * grid):
                raise ConfigError(f"crops.{name} must have sides of multiples of {CELL * grid} pixels, got {crop}.")
        if unknown := sorted(set(self.resizes) - set(self.spec.cameras)):
            raise ConfigError(f"resizes must be of the cameras {', '.join(self.spec.cameras)}, got {unknown[0]!r}.")
        if self.state_clip is not None and not 0 < self.state_clip < math.inf:
            raise ConfigError(f"state_clip must be above zero and finite, got {self.state_clip}.")
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "keypoints", "head_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size must be a multiple of 2 x num_heads ({self.num_heads}), got {self.hidden_size}."
            )


class CameraEncoder(nn.Module):
    """The encoder of one camera's images: a grid tells what is where, and keypoints tell exactly where.

    Args:
        crop: The crop, which decides the input's size.
        grid: Number of tokens on each side of the grid.
        keypoints: Number of keypoints, whose coordinates make one more token (spatial soft-argmax, Levine et al. 2016).
        hidden_size: Width of a token.
    """

    def __init__(self, crop: Crop, grid: int, keypoints: int, hidden_size: int) -> None:
        super().__init__()
        self.stem = RectifiedConvolutions(
            PackedConv2d(3, 32, 5, stride=2, padding=2), PackedConv2d(32, 64, 3, stride=2, padding=1)
        )
        self.trunk = RectifiedConvolutions(
            PackedConv2d(64, 96, 3, stride=2, padding=1), PackedConv2d(96, 96, 3, padding=1)
        )
        rows, columns = crop.height // CELL // grid, crop.width // CELL // grid
        self.patches = PackedConv2d(96, hidden_size, (rows, columns), stride=(rows, columns))
        self.heatmaps = PackedConv2d(64, keypoints, 3, padding=1)
        y = torch.linspace(-1, 1, crop.height // 4)
        x = torch.linspace(-1, 1, crop.width // 4)
        coordinates = torch.stack([g.reshape(-1) for g in torch.meshgrid(y, x, indexing="ij")], dim=1)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.keypoint_token = nn.Linear(2 * keypoints, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.position = nn.Parameter(0.02 * torch.randn(grid * grid + 1, hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (batch, 3, height, width) in [-0.5, 0.5].

        Returns:
            Tokens, (batch, grid * grid + 1, hidden).
        """
        features = self.stem(images)
        patches = self.patches(self.trunk(features)).flatten(2).transpose(1, 2)
        weights = self.heatmaps(features).flatten(2).softmax(dim=-1)
        keypoints = self.keypoint_token((weights @ self.coordinates).flatten(1))
        tokens: Tensor = self.norm(torch.cat([patches, keypoints[:, None]], dim=1)) + self.position
        return tokens


class MiniVLA(BackbonePolicy, nn.Module):
    """The policy that this module describes, as an `ExportablePolicy`.

    Args:
        config: The policy's configuration.
        tokenizer: The tokenizer of instructions.

    Raises:
        ConfigError: The tokenizer has another vocabulary than the configuration.
    """

    backbone: LlamaModel
    _positions: Tensor
    _mask: Tensor

    def __init__(self, config: MiniVLAConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.get_vocab_size() != config.vocab_size:
            raise ConfigError(
                f"vocab_size must be the tokenizer's {tokenizer.get_vocab_size()}, got {config.vocab_size}."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer.enable_padding(length=config.text_tokens)
        self.tokenizer.enable_truncation(config.text_tokens)
        self.provenance: dict[str, Any] = {}
        hidden = config.hidden_size
        self.cameras = nn.ModuleDict(
            {
                _module_name(name): CameraEncoder(config.crops[name], config.grids[name], config.keypoints, hidden)
                for name in config.spec.cameras
            }
        )
        self.state_token = nn.Sequential(nn.Linear(len(config.spec.state_names), hidden), nn.LayerNorm(hidden))
        self.read_out = nn.Parameter(0.02 * torch.randn(hidden))
        cameras_tokens = sum(config.grids[name] ** 2 + 1 for name in config.spec.cameras)
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=hidden,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=config.text_tokens + cameras_tokens + 2,
                use_cache=False,
            )
        )
        actions = config.spec.chunk_length * len(config.spec.action_names)
        self.head = nn.Sequential(nn.Linear(hidden, config.head_size), nn.GELU(), nn.Linear(config.head_size, actions))
        tokens = config.text_tokens + 1 + cameras_tokens + 1
        self.register_buffer("_positions", torch.arange(tokens)[None], persistent=False)
        self.register_buffer("_mask", torch.ones(1, tokens, dtype=torch.bool), persistent=False)
        self._state_mean = torch.tensor(config.spec.state_normalisation.mean)
        self._state_std = torch.tensor(config.spec.state_normalisation.std)
        self._token_ids: dict[str, list[int]] = {}

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        """Compute everything before the decoder; see `SkippablePolicy.encode`."""
        for observation in observations:
            self.spec.check_observation(observation)
        device = self.read_out.device
        images = {name: self._images(name, observations).to(device) for name in self.spec.cameras}
        state = torch.from_numpy(np.stack([observation[STATE_KEY] for observation in observations]))
        token_ids = torch.tensor([self.token_ids(observation[TASK_KEY]) for observation in observations])
        embeds = self.inputs(images, state.float().to(device), token_ids.to(device))[EMBEDS]
        return [{EMBEDS: row} for row in embeds]

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], None]:
        """Combine items into one batch of the decoder's arguments; see `SkippablePolicy.collate`."""
        embeds = torch.stack([item[EMBEDS] for item in items])
        inputs = {  # the backbone would compute all but the first itself, in a tenth of a millisecond
            EMBEDS: embeds,
            "position_ids": self._positions.expand(len(embeds), -1),
            "attention_mask": self._mask.expand(len(embeds), -1),
        }
        return inputs, None

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """Compute the decoder's arguments; see `ExportablePolicy.inputs`. The read-out token is the last."""
        dtype = self.read_out.dtype
        text = self.backbone.embed_tokens(token_ids)
        deviations = (state - self._state_mean.to(state.device)) / self._state_std.to(state.device)
        if self.config.state_clip is not None:
            deviations = deviations.clamp(-self.config.state_clip, self.config.state_clip)
        proprio = self.state_token(deviations.to(dtype))[:, None]
        views = [
            self.cameras[_module_name(name)]((images[name].permute(0, 3, 1, 2).to(dtype) / 255).sub_(0.5))
            for name in self.config.spec.cameras
        ]
        read_out = self.read_out.expand(len(state), 1, -1)
        return {EMBEDS: torch.cat([text, proprio, *views, read_out], dim=1)}

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the backbone's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""
        actions: Tensor = self.head(hidden[:, -1])
        return actions.view(len(actions), self.config.spec.chunk_length, -1)

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self.config.spec

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the actions: configuration, tokenizer and weights."""
        return self._digest(canonical(self.config))

    @property
    def former_fingerprint(self) -> str:
        """Return version 0.1's fingerprint, of the configuration's repr, by which its heads name their policy.

        The fields that came last are not part of that repr, and are added where they are used.
        """
        config = self.config
        is_new = config.resizes or config.state_clip is not None
        return self._digest(f"{config}", f"{dict(config.resizes)}{config.state_clip}" if is_new else "")

    def _digest(self, config: str, added: str = "") -> str:
        digest = hashlib.sha256(f"{config}{self.tokenizer.to_str()}{added}".encode())
        add_weights(digest, self.state_dict())
        return digest.hexdigest()

    @property
    def resizes(self) -> Mapping[str, tuple[int, int]]:
        """Return the size that a camera's images are resized to; see `ExportablePolicy`."""
        return self.config.resizes

    @property
    def crops(self) -> dict[str, Place]:
        """Return the part of a camera's resized image that is used; see `ExportablePolicy`."""
        return {name: (c.top, c.left, c.height, c.width) for name, c in self.config.crops.items()}

    def _images(self, name: str, observations: Sequence[Observation]) -> Tensor:
        place, size = self.crops[name], self.resizes.get(name)
        views = [looked_at(observation[IMAGE_PREFIX + name], size, place) for observation in observations]
        return torch.from_numpy(np.stack(views))

    def token_ids(self, instruction: str) -> list[int]:
        """Return an instruction's token ids, `config.text_tokens` of them."""
        if instruction not in self._token_ids:
            if len(self._token_ids) > 1000:
                self._token_ids.clear()
            self._token_ids[instruction] = self.tokenizer.encode(instruction).ids
        return self._token_ids[instruction]

    def with_layers(self, layers: Sequence[int]) -> MiniVLA:
        """Return a shallower policy, of some of the backbone's layers in their order and all other weights.

        Args:
            layers: Indices of the layers that it has, rising.
        """
        shallow = MiniVLA(replace(self.config, num_layers=len(layers)), Tokenizer.from_str(self.tokenizer.to_str()))
        tensors = self.state_dict()
        prefix = "backbone.layers."
        kept = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
        for new, old in enumerate(layers):
            own = f"{prefix}{old}."
            kept |= {
                f"{prefix}{new}.{name.removeprefix(own)}": value
                for name, value in tensors.items()
                if name.startswith(own)
            }
        shallow.load_state_dict(kept)
        shallow.provenance = self.provenance
        return shallow.eval()

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint: weights in half precision, configuration, tokenizer and provenance."""
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_checkpoint(
            folder,
            Checkpoint(POLICY_TYPE, self.config, tensors, self.tokenizer.to_str(), self.provenance),
        )

    @classmethod
    def from_pretrained(cls, name: str) -> MiniVLA:
        """Load a checkpoint from a shipped name, a folder or a Hugging Face hub id.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, foreign or edited.
        """
        folder = find_checkpoint(name)
        checkpoint = load_checkpoint(folder, POLICY_TYPE, MiniVLAConfig)
        try:
            policy = cls(checkpoint.config, Tokenizer.from_str(checkpoint.tokenizer))
        except ConfigError as error:
            raise CheckpointError(f"{folder}/config.json: {error}") from error
        expected = policy.state_dict()
        for tensor, value in expected.items():
            if tensor not in checkpoint.tensors:
                raise CheckpointError(
                    f"{folder}/model.safetensors must have a tensor {tensor!r}; get the checkpoint again."
                )
            if checkpoint.tensors[tensor].shape != value.shape:
                raise CheckpointError(
                    f"{folder}/model.safetensors: {tensor} must be {tuple(value.shape)} as in config.json, got "
                    f"{tuple(checkpoint.tensors[tensor].shape)}."
                )
        unknown = sorted(set(checkpoint.tensors) - set(expected))
        if unknown:
            raise CheckpointError(
                f"{folder}/model.safetensors has an unknown tensor {unknown[0]!r}; get the checkpoint again."
            )
        policy.load_state_dict({tensor: value.float() for tensor, value in checkpoint.tensors.items()})
        policy.provenance = checkpoint.provenance
        policy.cameras.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # images come so; faster
        return policy.eval()


def _module_name(camera: str) -> str:
    """Return a module's name for a camera: torch allows no dots in it."""
    return camera.replace(".", "_")


policies.register(POLICY_TYPE)(MiniVLA)
