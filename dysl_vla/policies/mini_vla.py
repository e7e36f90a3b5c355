"""MiniVLA: a vision-language-action policy small enough to train on a laptop's CPU, and built like the large ones.

Behind the tokens of words, state and images (`mini_policy`) stands a read-out token, whose hidden state behind the
backbone a head turns into a chunk of continuous actions. `encode`, `backbone` and `decode` are separate, because layer
skipping works only on the middle one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dysl_vla.policies.backbone import EMBEDS
from dysl_vla.policies.base import policies
from dysl_vla.policies.mini_policy import MiniPolicy, MiniVLAConfig
from dysl_vla.types import EpisodeState, Observation

POLICY_TYPE = "mini-vla"


class MiniVLA(MiniPolicy):
    """The policy that this module describes, as an `ExportablePolicy`.

    Args:
        config: The policy's configuration.
        tokenizer: The tokenizer of instructions.

    Raises:
        ConfigError: The tokenizer has another vocabulary than the configuration.
    """

    kind = POLICY_TYPE
    _positions: Tensor
    _mask: Tensor

    def __init__(self, config: MiniVLAConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        hidden = config.hidden_size
        self.read_out = nn.Parameter(0.02 * torch.randn(hidden))
        self.backbone = self.make_backbone()
        actions = config.spec.chunk_length * len(config.spec.action_names)
        self.head = nn.Sequential(nn.Linear(hidden, config.head_size), nn.GELU(), nn.Linear(config.head_size, actions))
        tokens = self.tokens + 1
        self.register_buffer("_positions", torch.arange(tokens)[None], persistent=False)
        self.register_buffer("_mask", torch.ones(1, tokens, dtype=torch.bool), persistent=False)

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        """Compute everything before the decoder; see `SkippablePolicy.encode`."""
        for observation in observations:
            self.spec.check_observation(observation)
        return [{EMBEDS: row} for row in self.embedded(observations)]

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
        text, proprio, views = self.parts(images, state, token_ids)
        read_out = self.read_out.expand(len(state), 1, -1)
        return {EMBEDS: torch.cat([text, proprio, *views, read_out], dim=1)}

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the backbone's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""
        actions: Tensor = self.head(hidden[:, -1])
        return actions.view(len(actions), self.config.spec.chunk_length, -1)

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


policies.register(POLICY_TYPE)(MiniVLA)
