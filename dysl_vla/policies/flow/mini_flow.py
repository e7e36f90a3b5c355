"""MiniFlow: SmolVLA's architecture at a size that a laptop's CPU can train.

MiniVLA's tokens of words, images and state make the prefix, the state last; a Llama reads them in both directions, and
an expert of the same depth denoises a chunk of actions. It is trained by flow matching as pi0 is (Black et al. 2024,
arXiv 2410.24164): the expert learns the velocity, noise minus actions, at points between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from dysl_vla.denoising import STATE
from dysl_vla.errors import ConfigError
from dysl_vla.policies.backbone import EMBEDS, MASK
from dysl_vla.policies.base import policies
from dysl_vla.policies.flow.expert import Expert, ExpertShape
from dysl_vla.policies.flow.last_layer import LastLlamaLayer
from dysl_vla.policies.flow.policy import CAUSAL, FlowPolicy
from dysl_vla.policies.mini_policy import MiniPolicy, MiniVLAConfig
from dysl_vla.types import STATE_KEY, Observation, PolicySpec

POLICY_TYPE = "mini-flow"
PERIODS = 4e-3, 4.0
"""Shortest and longest period of a time's embedding, as in openpi."""
TIME_ALPHA, TIME_BETA, TIME_SCALE, TIME_OFFSET = 1.5, 1.0, 0.999, 0.001
"""The distribution of times in training, a beta's scaled and moved, as in openpi: more noise than actions."""


class MiniFlow(FlowPolicy, MiniPolicy):
    """The policy that this module describes, as a `SkippablePolicy`.

    Args:
        config: The policy's configuration, with `flow`.
        tokenizer: The tokenizer of instructions.

    Raises:
        ConfigError: The configuration has no sizes of an expert, or another vocabulary than the tokenizer.
    """

    kind = POLICY_TYPE

    def __init__(self, config: MiniVLAConfig, tokenizer: Tokenizer) -> None:
        if config.flow is None:
            raise ConfigError("flow must be given for a mini-flow policy: the sizes of its expert.")
        super().__init__(config, tokenizer)
        self.backbone = self.make_backbone()
        last = config.num_layers - 1
        self.backbone.layers[last] = LastLlamaLayer(self.backbone.config, last)
        head_dim = config.hidden_size // config.num_heads
        shape = ExpertShape(
            width=config.flow.width,
            depth=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=head_dim,
            mlp_width=config.flow.mlp_width,
            crossing=tuple(range(1, config.num_layers, 2)),
        )
        self.expert = Expert(shape)
        self.steps, self.action_width = config.flow.steps, len(config.spec.action_names)
        self.periods = PERIODS
        self.action_in_proj = nn.Linear(self.action_width, shape.width)
        self.action_out_proj = nn.Linear(shape.width, self.action_width)
        self.action_time_mlp_in = nn.Linear(2 * shape.width, shape.width)
        self.action_time_mlp_out = nn.Linear(shape.width, shape.width)

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self.config.spec

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """See `FlowPolicy.inputs`. The state is the prefix's last token."""
        text, proprio, views = self.parts(images, state, token_ids)
        embeds = torch.cat([text, *views, proprio], dim=1)
        return {
            EMBEDS: embeds,
            CAUSAL: self._causal(embeds),
            MASK: torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device),
            STATE: self.deviations(state),
        }

    def embed_prefix(self, observations: Sequence[Observation]) -> list[dict[str, Tensor]]:
        """See `FlowPolicy.embed_prefix`."""
        return [{EMBEDS: row, CAUSAL: self._causal(row)} for row in self.embedded(observations)]

    def _causal(self, embeds: Tensor) -> Tensor:
        places = torch.arange(embeds.shape[-2], device=embeds.device)
        return (places == embeds.shape[-2] - 1).long().expand(embeds.shape[:-1])

    def padded_state(self, observation: Observation) -> Tensor:
        """See `FlowPolicy.padded_state`."""
        return self.deviations(torch.from_numpy(np.asarray(observation[STATE_KEY], np.float32)))

    def flow_loss(self, embeds: Tensor, actions: Tensor, rng: np.random.Generator) -> Tensor:
        """Compute the squared error of the velocity at one random point for each sample, (batch, chunk, action).

        Args:
            embeds: The prefix's embeddings, (batch, tokens, hidden).
            actions: Normalised demonstrated actions, (batch, chunk, action).
            rng: Draws noise and times.
        """
        noise = torch.from_numpy(rng.standard_normal(actions.shape, np.float32)).to(actions)
        drawn = TIME_SCALE * rng.beta(TIME_ALPHA, TIME_BETA, len(actions)) + TIME_OFFSET
        time = torch.from_numpy(drawn.astype(np.float32)).to(actions.device)
        seen = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        inputs = {EMBEDS: embeds, MASK: seen, CAUSAL: self._causal(embeds), STATE: noise[:, 0]}
        between = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        velocity = self.velocity(between, time, self.read_prefix(inputs), inputs)
        return (velocity - (noise - actions)).square()


policies.register(POLICY_TYPE)(MiniFlow)
