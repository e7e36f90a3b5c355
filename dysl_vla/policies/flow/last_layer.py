"""The last layer of a prefix's decoder: nobody reads its output, only the keys and values that it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


class _KeysAndValues:
    """Overrides a layer's forward with the part of it that writes the cache, which stays the same to the bit."""

    self_attn: Any
    input_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        """Write keys and values, and return the input, (batch, tokens, hidden)."""
        assert position_embeddings is not None
        attention, normed = self.self_attn, self.input_layernorm(hidden_states)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        keys, values = (part(normed).view(shape).transpose(1, 2) for part in (attention.k_proj, attention.v_proj))
        _, keys = apply_rotary_pos_emb(keys, keys, *position_embeddings)
        past_key_values.update(keys, values, attention.layer_idx)
        return hidden_states


class LastLlamaLayer(_KeysAndValues, LlamaDecoderLayer):  # type: ignore[misc,no-untyped-call] # its forward takes others
    """The last layer of SmolVLA's prefix."""


class LastGemmaLayer(_KeysAndValues, GemmaDecoderLayer):  # type: ignore[misc,no-untyped-call]
    """The last layer of pi0's prefix."""
