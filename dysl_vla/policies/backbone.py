"""The base of policies whose action comes from one forward of a Hugging Face decoder, as in MiniVLA and OpenVLA-OFT."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dysl_vla.skip_controller.decoders import find_all_layers
from dysl_vla.skip_controller.torch_backend import Forward, to_numpy, wait_for_gpu
from dysl_vla.types import ActionChunk, EpisodeState, InferenceTiming, Observation

if TYPE_CHECKING:
    from dysl_vla.policies.base import SkippablePolicy

EMBEDS, MASK, POSITIONS = "inputs_embeds", "attention_mask", "position_ids"


@torch.inference_mode()
def infer_full(
    policy: SkippablePolicy, observations: Sequence[Observation], states: Sequence[EpisodeState]
) -> list[ActionChunk]:
    """Infer with all layers, for any policy that offers the four steps; see `Policy.infer`."""
    started = time.perf_counter()
    inputs, _ = policy.collate(policy.encode(observations, states))
    wait_for_gpu(inputs)
    encode_s = time.perf_counter() - started
    forward = Forward(timed=inputs)
    actions = policy.spec.action_normalisation.undo(to_numpy(policy.act(inputs, forward)))
    llm_s, decode_s = forward.times()
    policy.remember(inputs, dict(enumerate(states)))
    timing = InferenceTiming(encode_s=encode_s, llm_s=llm_s, decode_s=decode_s)
    return [ActionChunk(actions=row, timing=timing) for row in actions]


class BackbonePolicy:
    """Base of a policy around one forward of a decoder; a subclass adds `encode`, `decode` and the checkpoint.

    An item of `encode` is a dictionary of the decoder's arguments for one episode, without the batch:
    `inputs_embeds`, (tokens, hidden), and others whose first dimension is its tokens. Items of different lengths are
    padded in a batch, and hidden from the decoder by its `attention_mask`.

    Attributes:
        backbone: The decoder, with one list of layers; its forward returns `last_hidden_state`.
        padding_side: Where shorter items are padded, "left" or "right". If `decode` reads the last token, it must stay
            the last, so that a policy with a read-out token pads on the left.
        followers: See `SkippablePolicy.followers`.
        has_memory: See `SkippablePolicy.has_memory`.
    """

    backbone: nn.Module
    padding_side = "left"
    followers: Sequence[nn.ModuleList] = ()
    has_memory = False

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder's layers."""
        return find_all_layers(self.backbone)

    @property
    def width(self) -> int:
        """Return the width of the decoder's hidden states."""
        config: Any = self.backbone.config
        return int(config.get_text_config().hidden_size)

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the decoder's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""
        raise NotImplementedError(f"{type(self).__name__} must define decode, or an act of its own.")

    def collate(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Combine items into one batch of the decoder's arguments; see `SkippablePolicy.collate`."""
        lengths = [len(item[EMBEDS]) for item in items]
        longest = max(lengths)
        if min(lengths) == longest:
            batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            return batch, batch.get(MASK)
        batches: dict[str, list[Tensor]] = {}
        for item, length in zip(items, lengths, strict=True):
            ones = torch.ones(length, dtype=torch.long, device=item[EMBEDS].device)
            for name, value in {MASK: ones, **item}.items():
                batches.setdefault(name, []).append(self._padded(value, longest - length))
        stacked = {name: torch.stack(values) for name, values in batches.items()}
        if POSITIONS not in stacked and POSITIONS in signature(self.backbone.forward).parameters:
            stacked[POSITIONS] = (stacked[MASK].cumsum(dim=1) - 1).clamp_min(0)  # those that a row has alone
        return stacked, stacked[MASK]

    def _padded(self, value: Tensor, missing: int) -> Tensor:
        """Fill a tensor's first dimension, its tokens, up with zeros."""
        zeros = value.new_zeros((missing, *value.shape[1:]))
        return torch.cat([zeros, value] if self.padding_side == "left" else [value, zeros])

    def act(self, inputs: Mapping[str, Tensor], forward: Forward) -> Tensor:
        """Run one forward of the decoder, and decode its output; see `SkippablePolicy.act`."""
        hidden = self.backbone(**self._for_training(inputs) if forward.needs_gradient else inputs).last_hidden_state
        forward.decoder_is_done()
        return self.decode(hidden)

    def _for_training(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with which the decoder keeps no keys and values: checkpointed layers would write them twice."""
        has_cache = "use_cache" in signature(self.backbone.forward).parameters
        return {"use_cache": False, **inputs} if has_cache else dict(inputs)

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""
        return EpisodeState()

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch; see `Policy.infer`."""
        return infer_full(cast("SkippablePolicy", self), observations, states)

    def remember(self, inputs: Any, states: Mapping[int, EpisodeState]) -> None:
        """Keep nothing: these policies depend only on the observation."""
