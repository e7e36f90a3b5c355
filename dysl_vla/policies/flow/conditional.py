"""A flow policy that skips as data flow, to be exported: one graph reads the prefix, another does a denoising step.

Both have conditions where a block may be left; see `skip_controller.conditional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dysl_vla.denoising import LEFTS, SEEN, STATE
from dysl_vla.policies.backbone import MASK
from dysl_vla.policies.flow.expert import ExpertAttention, PrefixMemory, normalised
from dysl_vla.policies.flow.policy import FlowPolicy
from dysl_vla.skip_controller.conditional import EMBEDS, ConditionalDecoder
from dysl_vla.skip_controller.heads import SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan


class PrefixEncoder(nn.Module):
    """What comes before the prefix's decoder; its graph returns the decoder's arguments, and what the expert reads.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self._policy = policy

    def forward(self, images: dict[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """Encode one observation; see `ExportablePolicy.inputs`."""
        given = self._policy.inputs(images, state, token_ids)
        arguments = self._policy.decoder_arguments(given)
        return {EMBEDS: given[EMBEDS], **arguments, SEEN: given[MASK], STATE: given[STATE]}


class ConditionalPrefix(ConditionalDecoder):
    """The prefix's decoder; its graph returns what the expert reads of each layer: keys and values, or zeros.

    Args:
        policy: The policy, not attached.
        plan: Which layers may be skipped.
        heads: The plan's adapters and controllers.
    """

    def __init__(self, policy: FlowPolicy, plan: SkipPlan, heads: SkipHeads) -> None:
        super().__init__(policy.backbone, plan, heads, None)
        self.readers = nn.ModuleList(layer.self_attn for layer in policy.expert.layers)  # type: ignore[misc]
        self._shape = policy.expert.shape

    def layer(
        self, index: int, original: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[[Tensor], tuple[Tensor, ...]]]:
        """See `ConditionalDecoder.layer`."""
        reader = self.readers[index]
        assert isinstance(reader, ExpertAttention)
        heads, width = self._shape.kv_heads, self._shape.head_dim

        def runs(hidden: Tensor) -> tuple[Tensor, ...]:
            written = _Written()
            after = original(hidden, *arguments, **{**named, "past_key_values": written})
            return (after.clone(), *(part.contiguous() for part in reader.read(*written.pair)))

        def stands_in(hidden: Tensor) -> tuple[Tensor, ...]:
            nothing = hidden.new_zeros(1, heads, hidden.shape[1], width)
            return hidden.clone(), nothing, nothing.clone()

        return runs, stands_in


class _Written:
    """Takes what one layer would write into a cache."""

    pair: tuple[Tensor, Tensor]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.pair = keys, values
        return keys, values


class ConditionalVelocity(nn.Module):
    """One denoising step.

    Args:
        policy: The policy, not attached.
        plan: Which layers may be skipped.
        heads: The expert's adapters.
    """

    def __init__(self, policy: FlowPolicy, plan: SkipPlan, heads: SkipHeads) -> None:
        super().__init__()
        self.policy, self.heads = policy, heads
        exits = [layer for block in plan.blocks for layer in plan.exits_of(block)]
        self._place = {layer: place for place, layer in enumerate(exits)}
        self._targets = {layer: block.target for block in plan.blocks for layer in plan.exits_of(block)}

    def forward(self, noisy: Tensor, time: Tensor, prefix: Mapping[str, Tensor], pairs: list[Tensor]) -> Tensor:
        """Predict the velocity, (1, chunk, action_width).

        Args:
            noisy: Noisy actions, (1, chunk, action_width).
            time: The time of denoising, (1,).
            prefix: `STATE`, (1, state), `SEEN`, (1, tokens), and `LEFTS`, (exits,), of `dysl_vla.denoising`.
            pairs: What `ConditionalPrefix` returned: keys and values of each layer in turn.
        """
        state, seen, lefts = (prefix[name] for name in (STATE, SEEN, LEFTS))
        policy, expert = self.policy, self.policy.expert
        memory = PrefixMemory(list(zip(pairs[::2], pairs[1::2], strict=True)))
        tokens, causal, condition = policy.embed_actions(noisy, time, state)
        arguments = expert.arguments(tokens, memory, seen, causal, condition)

        def rest(index: int, last: int, hidden: Tensor) -> Tensor:
            """Run layers up to before `last`; a block that is left jumps to its target."""
            while index < last and index not in self._place:
                hidden = expert.layers[index](hidden, **arguments[index])
                index += 1
            if index == last:
                return hidden
            target = self._targets[index]
            adapter = self.heads.follower_adapter(0, index)
            after: Tensor = torch.cond(
                lefts[self._place[index]],
                lambda h: h.clone() if adapter is None else adapter(h),
                lambda h: rest(index + 1, target, expert.layers[index](h, **arguments[index])),
                (hidden,),
            )
            return rest(target, last, after)

        hidden = rest(0, len(expert.layers), tokens)
        return policy.decode_velocity(normalised(expert.norm, hidden, condition)[0][:, -policy.spec.chunk_length :])
