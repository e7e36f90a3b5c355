"""What policies that are small enough to train on a laptop's CPU share: encoders, backbone and checkpoint.

Camera images become grid and keypoint tokens, the instruction becomes text tokens, proprioception one token; an
unmodified Hugging Face `LlamaModel` reads them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from dysl_vla.checkpoint import Checkpoint, add_weights, canonical, find_checkpoint, load_checkpoint, save_checkpoint
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.images import Place, looked_at
from dysl_vla.policies.backbone import EMBEDS, BackbonePolicy
from dysl_vla.policies.packed_conv import PackedConv2d, RectifiedConvolutions
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    Observation,
    PolicySpec,
)

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
class FlowSizes:
    """The action expert of a policy that denoises actions; it has the backbone's depth and attention heads.

    Attributes:
        width: Width of its hidden states.
        mlp_width: Width inside of its layers' perceptrons.
        steps: Denoising steps of an inference.

    Raises:
        ConfigError: A size is below 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    width: int = 96
    mlp_width: int = 192
    steps: int = 10

    def __post_init__(self) -> None:
        for name in ("width", "mlp_width", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"flow.{name} must be at least 1, got {getattr(self, name)}.")


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
        flow: Sizes of the action expert of a policy that denoises actions; None for one that regresses them.

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
    flow: FlowSizes | None = field(default=None, repr=False)

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


class MiniPolicy(BackbonePolicy, nn.Module):
    """What small policies share: how they look at images, read words and feel the arm, their backbone and checkpoint.

    Args:
        config: The policy's configuration.
        tokenizer: The tokenizer of instructions.

    Attributes:
        kind: Type of the policy in a checkpoint.

    Raises:
        ConfigError: The tokenizer has another vocabulary than the configuration.
    """

    kind: ClassVar[str]
    backbone: LlamaModel

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
        self._state_mean = torch.tensor(config.spec.state_normalisation.mean)
        self._state_std = torch.tensor(config.spec.state_normalisation.std)
        self._token_ids: dict[str, list[int]] = {}

    @property
    def tokens(self) -> int:
        """Return the number of tokens of words, state and images."""
        config = self.config
        return config.text_tokens + 1 + sum(config.grids[name] ** 2 + 1 for name in config.spec.cameras)

    @property
    def like(self) -> Tensor:
        """Return a weight, which tells the policy's device and type of numbers."""
        weight = self.state_token[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def make_backbone(self) -> LlamaModel:
        """Return a backbone with random weights."""
        config = self.config
        return LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=self.tokens + 1,
                use_cache=False,
            )
        )

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """Compute the decoder's arguments; see `ExportablePolicy.inputs`."""
        raise NotImplementedError

    def parts(
        self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the tokens of words, state and each camera, (batch, tokens, hidden); see `ExportablePolicy.inputs`."""
        dtype = self.like.dtype
        text = self.backbone.embed_tokens(token_ids)
        proprio = self.state_token(self.deviations(state).to(dtype))[:, None]
        views = [
            self.cameras[_module_name(name)]((images[name].permute(0, 3, 1, 2).to(dtype) / 255).sub_(0.5))
            for name in self.config.spec.cameras
        ]
        return text, proprio, views

    def deviations(self, state: Tensor) -> Tensor:
        """Return states, (..., state), normalised, and clipped where the policy was trained so."""
        deviations = (state - self._state_mean.to(state.device)) / self._state_std.to(state.device)
        limit = self.config.state_clip
        return deviations if limit is None else deviations.clamp(-limit, limit)

    def embedded(self, observations: Sequence[Observation]) -> Tensor:
        """Return the decoder's `inputs_embeds` of checked observations, (batch, tokens, hidden)."""
        device = self.like.device
        images = {name: self._images(name, observations).to(device) for name in self.spec.cameras}
        state = torch.from_numpy(np.stack([observation[STATE_KEY] for observation in observations]))
        token_ids = torch.tensor([self.token_ids(observation[TASK_KEY]) for observation in observations])
        return self.inputs(images, state.float().to(device), token_ids.to(device))[EMBEDS]

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

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint: weights in half precision, configuration, tokenizer and provenance."""
        tensors = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_checkpoint(
            folder,
            Checkpoint(self.kind, self.config, tensors, self.tokenizer.to_str(), self.provenance),
        )

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """Load a checkpoint from a shipped name, a folder or a Hugging Face hub id.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, foreign or edited.
        """
        folder = find_checkpoint(name)
        checkpoint = load_checkpoint(folder, cls.kind, MiniVLAConfig)
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
