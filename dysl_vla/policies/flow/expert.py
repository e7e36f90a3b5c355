"""The action expert of flow policies: a decoder that reads, at each layer, what the prefix's decoder wrote there.

pi0's and pi0.5's layers attend to the prefix's keys and values beside their own (Black et al. 2024, arXiv 2410.24164).
SmolVLA's even ones do, too; its odd ones attend to the prefix alone, by projections of their own of its keys and values
(Shukor et al. 2025, arXiv 2506.01844). Those projections do not depend on the denoising step, and are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

Pair = tuple[Tensor, Tensor]
"""Keys and values, (batch, heads, tokens, width), or cosines and sines of positions, (batch, tokens, width)."""


@dataclass(frozen=True)
class ExpertShape:
    """Sizes and kinds of an expert.

    Attributes:
        width: Width of its hidden states.
        depth: Layers, as many as the prefix's decoder has.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        mlp_width: Width inside of a layer's perceptron.
        norm: Kind of its norms: Llama's, Gemma's, or adaptive ones, which the denoising time scales, shifts and gates.
        activation: Activation of its perceptrons.
        norm_eps: Number that norms add to the variance.
        rope_theta: Base of the rotary positions' periods.
        crossing: Layers that attend to the prefix alone.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm: Literal["llama", "gemma", "adaptive"] = "llama"
    activation: Literal["silu", "gelu"] = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    crossing: tuple[int, ...] = ()


class AdaptiveNorm(nn.Module):
    """Root mean square normalisation whose scale, shift and gate come from a condition (pi0.5's AdaRMS)."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.width, 3 * shape.width)
        nn.init.zeros_(self.dense.weight)
        self._eps = shape.norm_eps

    def forward(self, hidden: Tensor, condition: Tensor) -> Pair:
        """Return the normalised hidden states, (batch, tokens, width), and the gate of what is made of them."""
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        variance = hidden.float().square().mean(dim=-1, keepdim=True)
        normed = hidden * torch.rsqrt(variance + self._eps)
        return (normed * (1 + scale.float()) + shift.float()).to(hidden.dtype), gate.to(hidden.dtype)


class ExpertAttention(nn.Module):
    """Attention to the prefix, and, where the layer does not cross, among the expert's own tokens."""

    def __init__(self, shape: ExpertShape, crosses: bool) -> None:
        super().__init__()
        inner, outer = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
        read = inner if crosses else shape.width
        self.q_proj = nn.Linear(shape.width, outer, bias=False)
        self.k_proj = nn.Linear(read, inner, bias=False)
        self.v_proj = nn.Linear(read, inner, bias=False)
        self.o_proj = nn.Linear(outer, shape.width, bias=False)
        self._shape, self._crosses = shape, crosses

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:2], -1, self._shape.head_dim).transpose(1, 2)

    def read(self, keys: Tensor, values: Tensor) -> Pair:
        """Return what the layer attends to of the prefix: its keys and values, or its own projections of them.

        They are brought to the expert's type of numbers, which may be more exact than the prefix's.
        """
        keys, values = keys.to(self.o_proj.weight.dtype), values.to(self.o_proj.weight.dtype)
        if not self._crosses:
            return keys, values
        flat_keys, flat_values = (part.transpose(1, 2).flatten(2) for part in (keys, values))
        return self._heads(self.k_proj(flat_keys)), self._heads(self.v_proj(flat_values))

    def forward(self, hidden: Tensor, prefix: Pair, rotary: Pair, mask: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape; `mask`, (batch, 1, tokens, attended), is true where allowed."""
        query, (keys, values) = self._heads(self.q_proj(hidden)), prefix
        if self._crosses:
            query, _ = apply_rotary_pos_emb(query, query, *rotary)
        else:
            query, own = apply_rotary_pos_emb(query, self._heads(self.k_proj(hidden)), *rotary)
            keys = torch.cat([keys, own], dim=2)
            values = torch.cat([values, self._heads(self.v_proj(hidden))], dim=2)
        answer = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        projected: Tensor = self.o_proj(answer.transpose(1, 2).flatten(2))
        return projected


class Perceptron(nn.Module):
    """The gated perceptron of Llama and Gemma."""

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)
        self._is_gelu = shape.activation == "gelu"

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        gate = self.gate_proj(hidden)
        gate = functional.gelu(gate, approximate="tanh") if self._is_gelu else functional.silu(gate)
        answer: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return answer


class ExpertLayer(nn.Module):
    """A layer of the expert."""

    def __init__(self, shape: ExpertShape, index: int) -> None:
        super().__init__()
        self.index, self.crosses = index, index in shape.crossing
        self.self_attn = ExpertAttention(shape, self.crosses)
        self.mlp = Perceptron(shape)
        self.input_layernorm = make_norm(shape)
        self.post_attention_layernorm = make_norm(shape)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: PrefixMemory,
        position_embeddings: Pair,
        attention_mask: Tensor,
        adarms_cond: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (batch, tokens, width).
            past_key_values: What the prefix wrote.
            position_embeddings: Cosines and sines of the tokens' positions, each (batch, tokens, head_dim).
            attention_mask: True where a token attends, (batch, 1, tokens, attended).
            adarms_cond: What adaptive norms get, (batch, width).
        """
        normed, gate = normalised(self.input_layernorm, hidden_states, adarms_cond)
        prefix = past_key_values.at(self.index)
        hidden_states = _added(hidden_states, self.self_attn(normed, prefix, position_embeddings, attention_mask), gate)
        normed, gate = normalised(self.post_attention_layernorm, hidden_states, adarms_cond)
        return _added(hidden_states, self.mlp(normed), gate)


class PrefixMemory:
    """What an expert reads of a prefix: keys and values by layer, of the rows in which that layer ran.

    Args:
        pairs: For each layer what `ExpertAttention.read` returned; None where no row ran it.
    """

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        self._pairs = pairs

    def at(self, index: int) -> Pair:
        """Return what a layer reads."""
        pair = self._pairs[index]
        assert pair is not None, f"the prefix has not written layer {index}"
        return pair


class Expert(nn.Module):
    """The layers of an expert, and their final norm.

    Args:
        shape: Sizes and kinds.
    """

    def __init__(self, shape: ExpertShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(shape, index) for index in range(shape.depth))
        self.norm = make_norm(shape)
        self.shape = shape

    def remember(self, cache: Any) -> PrefixMemory:
        """Read a prefix's cache, one of transformers, once for all denoising steps."""
        pairs: list[Pair | None] = [None] * len(self.layers)
        for index, (layer, state) in enumerate(zip(self.layers, cache.layers, strict=False)):
            keys = getattr(state, "keys", None)
            if isinstance(layer, ExpertLayer) and keys is not None and keys.numel() > 0:
                pairs[index] = layer.self_attn.read(keys, state.values)
        return PrefixMemory(pairs)

    def forward(
        self, hidden: Tensor, memory: PrefixMemory, seen: Tensor, causal: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Run all layers.

        Args:
            hidden: (batch, tokens, width).
            memory: What the prefix wrote.
            seen: Which of the prefix's tokens are not padding, (batch, prefix).
            causal: Which of the expert's tokens attend to which, (tokens, tokens).
            condition: What adaptive norms get, (batch, width).
        """
        for layer, arguments in zip(self.layers, self.arguments(hidden, memory, seen, causal, condition), strict=True):
            hidden = layer(hidden, **arguments)
        return normalised(self.norm, hidden, condition)[0]

    def arguments(
        self, hidden: Tensor, memory: PrefixMemory, seen: Tensor, causal: Tensor, condition: Tensor | None
    ) -> list[dict[str, Any]]:
        """Return what each layer gets beside hidden states; see `forward`."""
        batch, tokens = hidden.shape[:2]
        first = seen.sum(dim=1, keepdim=True)
        steps = torch.arange(tokens, device=hidden.device)
        absolute = rotary_positions(first + steps, self.shape, hidden.dtype)
        relative = rotary_positions(steps.expand(batch, -1), self.shape, hidden.dtype)
        to_prefix = seen[:, None, None, :].expand(batch, 1, tokens, -1)
        to_all = torch.cat([to_prefix, causal.expand(batch, 1, tokens, tokens)], dim=-1)
        places = {True: (relative, to_prefix), False: (absolute, to_all)}
        return [
            {
                "past_key_values": memory,
                "position_embeddings": positions,
                "attention_mask": mask,
                "adarms_cond": condition,
            }
            for positions, mask in (places[getattr(layer, "crosses", False)] for layer in self.layers)
        ]


def rotary_positions(positions: Tensor, shape: ExpertShape, dtype: torch.dtype) -> Pair:
    """Return cosines and sines of rotary positions, (batch, tokens, head_dim) each, for positions, (batch, tokens)."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=positions.device) / shape.head_dim
    angles = positions[..., None].float() * (1.0 / shape.rope_theta**half)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Embed times of denoising, (batch,), by sines and cosines of geometric periods, (batch, width)."""
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** share
    angles = 2 * math.pi * time.double()[:, None] / period
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def make_norm(shape: ExpertShape) -> nn.Module:
    """Return a norm of an expert's kind."""
    if shape.norm == "adaptive":
        return AdaptiveNorm(shape)
    kind = GemmaRMSNorm if shape.norm == "gemma" else LlamaRMSNorm
    return kind(shape.width, eps=shape.norm_eps)


def normalised(norm: nn.Module, hidden: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return normalised hidden states, and the gate of what is made of them, which only adaptive norms have."""
    if not isinstance(norm, AdaptiveNorm):
        return norm(hidden), None
    assert condition is not None
    return norm(hidden, condition)  # type: ignore[no-any-return]


def _added(hidden: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    return hidden + (change if gate is None else change * gate)
