"""Vision transformers with the names of timm's tensors, as DINOv2 and SigLIP have them, for foreign checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision transformer.

    Attributes:
        image_size: Pixels on each side of an image.
        patch_size: Pixels on each side of a patch.
        width: Width of the hidden states.
        layers: Number of layers that are computed.
        heads: Number of attention heads.
        hidden: Width of the feed-forward parts.
        registers: Number of register tokens after the class token; None: there is no class token either.
        is_scaled: Whether each layer's parts are scaled (LayerScale).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    registers: int | None
    is_scaled: bool

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nn.Module):
    """Attention between all tokens of an image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """The feed-forward part of a layer, with an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Scale(nn.Module):
    """A factor for each dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return x * self.scale_factor


class Layer(nn.Module):
    """One layer of a vision transformer."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = Attention(shape.width, shape.heads)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = FeedForward(shape.width, shape.hidden)
        self.ls1, self.ls2 = (Scale(shape.width) if shape.is_scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A vision transformer that returns the patches' hidden states after its last layer, without a norm."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, shape.width, shape.patch_size, stride=shape.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.patches, shape.width))
        self.extra = 0
        if shape.registers is not None:
            self.extra = 1 + shape.registers
            self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
            self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        self.blocks = nn.Sequential(*(Layer(shape) for _ in range(shape.layers)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised images, (batch, 3, height, width), to (batch, patches, width)."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.extra:  # these have no position
            extra = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([extra.expand(len(x), -1, -1), x], dim=1)
        return self.blocks(x)[:, self.extra :]  # type: ignore[no-any-return]
