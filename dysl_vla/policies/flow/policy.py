"""Flow policies: a prefix is read once, then an expert turns noise into actions, in a few steps along a velocity.

A control step has two parts. The prefix's decoder, the leader, reads images, words and (in SmolVLA) the state, and
keeps keys and values at each layer. The expert, its follower, predicts the velocity at which a chunk moves from noise,
at time 1, to actions, at time 0, and is integrated by Euler's method (Lipman et al. 2023, arXiv 2210.02747; the steps
are those of openpi and LeRobot). Layers that the leader skips wrote no keys and values, so the expert skips them, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from dysl_vla.denoising import BEFORE, HOLD, NOISE, STATE, denoise, draw_noise, held_chunk, noise_generator
from dysl_vla.policies.backbone import EMBEDS, MASK, POSITIONS, BackbonePolicy
from dysl_vla.policies.flow.expert import Expert, PrefixMemory, time_embedding
from dysl_vla.skip_controller.torch_backend import Forward
from dysl_vla.types import EpisodeState, Observation, PolicySpec

CAUSAL, LESSON = "causal", "lesson"
"""Parts of an item beside the prefix's embeddings and those of `dysl_vla.denoising`: 1 for the tokens of the prefix
that those before them do not see, (tokens,), and the number of the denoising step that heads are trained on with this
item, ()."""


class FlowPolicy(BackbonePolicy, nn.Module):
    """What flow policies share; a subclass adds how prefix and actions are embedded, and its checkpoint.

    Attributes:
        backbone: The prefix's decoder.
        expert: The action expert.
        steps: Denoising steps of an inference.
        action_width: Width of a noisy action, the embodiment's dimensions and padding.
        periods: The shortest and the longest period of the time's embedding, of which 1 is the whole of the denoising.
        action_in_proj: Maps a noisy action to the expert's width.
        action_time_mlp_in: The first layer of what mixes the time in.
        action_time_mlp_out: The second.
        action_out_proj: Maps the expert's output to a velocity.
    """

    padding_side = "right"
    backbone: Any
    expert: Expert
    steps: int
    action_width: int
    periods: tuple[float, float]
    action_in_proj: nn.Linear
    action_time_mlp_in: nn.Linear
    action_time_mlp_out: nn.Linear
    action_out_proj: nn.Linear

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        raise NotImplementedError

    @property
    def followers(self) -> Sequence[nn.ModuleList]:  # type: ignore[override]
        """Return the expert's layers, which skip what the prefix skips."""
        return (self.expert.layers,)

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """Compute the prefix's embeddings, `CAUSAL`, `MASK` and `STATE` of a batch; see `ExportablePolicy.inputs`."""
        raise NotImplementedError

    def embed_prefix(self, observations: Sequence[Observation]) -> list[dict[str, Tensor]]:
        """Return for each observation the prefix's embeddings, (tokens, width), and `CAUSAL`."""
        raise NotImplementedError

    def embed_actions(self, noisy: Tensor, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed noisy actions for the expert.

        Args:
            noisy: (batch, chunk, action_width).
            time: Times of denoising, (batch,).
            state: Normalised and padded state, (batch, state).

        Returns:
            The expert's tokens, (batch, tokens, width), of which the last `chunk` are the actions'; which of them
            attend to which, (tokens, tokens); what adaptive norms get, (batch, width), or None. Here the time is mixed
            into the actions, and each action attends to those before it.
        """
        actions, when = self.project_actions(noisy, time)
        both = torch.cat([actions, when[:, None].expand_as(actions)], dim=2)
        tokens = self.action_time_mlp_out(functional.silu(self.action_time_mlp_in(both)))
        count = noisy.shape[1]
        return tokens, torch.ones(count, count, dtype=torch.bool, device=noisy.device).tril(), None

    def project_actions(self, noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of noisy actions, (batch, chunk, width), and of the time, (batch, width)."""
        actions = self.action_in_proj(noisy.to(self.action_in_proj.weight))
        return actions, time_embedding(time, self.expert.shape.width, *self.periods).to(actions)

    def decode_velocity(self, hidden: Tensor) -> Tensor:
        """Map the expert's output at the actions' tokens, (batch, chunk, width), to (batch, chunk, action_width)."""
        velocity: Tensor = self.action_out_proj(hidden.to(self.action_out_proj.weight))
        return velocity.float()

    def padded_state(self, observation: Observation) -> Tensor:
        """Return an observation's normalised state with the zeros that it is padded with, (state,)."""
        raise NotImplementedError

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        """Compute everything before the prefix's decoder, and draw the noise; see `SkippablePolicy.encode`."""
        for observation in observations:
            self.spec.check_observation(observation)
        items = self.embed_prefix(observations)
        for item, observation, state in zip(items, observations, states, strict=True):
            embeds = item[EMBEDS]
            item[STATE] = self.padded_state(observation).to(embeds.device)
            # Training keeps a frame's noise, and the denoising step that heads learn from with it, over all epochs.
            rng = noise_generator(observation, state)
            noise = draw_noise(rng, self.spec, self.action_width)
            held = held_chunk(state, self.spec, self.action_width)
            for name, value in zip((NOISE, BEFORE, HOLD), (noise, *held), strict=True):
                item[name] = torch.from_numpy(value).to(embeds.device)
            item[LESSON] = torch.tensor(rng.integers(self.steps), device=embeds.device)
        return items

    @property
    def follower_sizes(self) -> tuple[int, ...]:
        """Return the width of the expert, which gets adapters of its own."""
        return (self.expert.shape.width,)

    def collate(self, items: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Combine items into a batch; prefixes of different lengths are padded at their end."""
        counts = [len(item[EMBEDS]) for item in items]
        longest = max(counts)
        batch: dict[str, Tensor] = {
            name: torch.stack([item[name] for item in items]) for name in items[0] if name not in (EMBEDS, CAUSAL)
        }
        for name in (EMBEDS, CAUSAL):
            batch[name] = torch.stack([self._padded(item[name], longest - len(item[name])) for item in items])
        lengths = torch.tensor(counts, device=batch[EMBEDS].device)
        seen = torch.arange(longest, device=lengths.device) < lengths[:, None]
        batch[MASK] = seen
        return batch, None if min(counts) == longest else seen

    def read_prefix(self, inputs: Mapping[str, Tensor]) -> PrefixMemory:
        """Run the prefix's decoder, and return what it wrote for the expert."""
        cache = DynamicCache()
        self.backbone(
            inputs_embeds=inputs[EMBEDS], **self.decoder_arguments(inputs), past_key_values=cache, use_cache=True
        )
        return self.expert.remember(cache)

    def decoder_arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the prefix's decoder gets beside embeddings: which token attends to which, and positions."""
        embeds, seen = inputs[EMBEDS], inputs[MASK]
        block = inputs[CAUSAL].cumsum(dim=1)
        allowed = (block[:, None, :] <= block[:, :, None]) & seen[:, None, :]
        allowed = allowed | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)  # padding attends to itself
        mask = torch.zeros(allowed.shape, dtype=embeds.dtype, device=embeds.device)
        mask.masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
        return {MASK: mask[:, None], POSITIONS: (seen.cumsum(dim=1) - 1).clamp_min(0)}

    def velocity(self, noisy: Tensor, time: Tensor, memory: PrefixMemory, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity of noisy actions, (batch, chunk, action_width), at times, (batch,)."""
        tokens, causal, condition = self.embed_actions(noisy, time, inputs[STATE])
        weight = next(self.expert.parameters())
        condition = None if condition is None else condition.to(weight)
        hidden = self.expert(tokens.to(weight), memory, inputs[MASK], causal, condition)
        return self.decode_velocity(hidden[:, -self.spec.chunk_length :])

    def act(self, inputs: Mapping[str, Tensor], forward: Forward) -> Tensor:
        """Read the prefix, and integrate the velocity from noise to actions; see `SkippablePolicy.act`.

        In training, the answer is where the velocity at one denoising step, which is drawn for each item, leads to at
        once: then only that step needs a gradient, and each of them counts alike.
        """
        memory = self.read_prefix(inputs)
        noisy = inputs[NOISE]
        count = len(self.spec.action_names)
        if forward.is_training:
            return self._lesson(noisy, memory, inputs)[..., :count]
        actions = self.denoise(noisy, memory, inputs)
        forward.decoder_is_done()
        return actions[..., :count]

    def denoise(self, noisy: Tensor, memory: PrefixMemory, inputs: Mapping[str, Tensor]) -> Tensor:
        """Integrate the velocity from noise to actions, both (batch, chunk, action_width)."""

        def velocity(now: Tensor, time: float) -> Tensor:
            return self.velocity(now, torch.full((len(now),), time, device=now.device), memory, inputs)

        return denoise(noisy, inputs[BEFORE], inputs[HOLD], self.steps, velocity)

    def _lesson(self, noisy: Tensor, memory: PrefixMemory, inputs: Mapping[str, Tensor]) -> Tensor:
        lesson = inputs[LESSON]
        time = 1 - lesson.to(noisy.dtype) / self.steps
        with torch.no_grad():
            for step in range(self.steps - 1):
                now = torch.full_like(time, 1 - step / self.steps)
                after = noisy - self.velocity(noisy, now, memory, inputs) / self.steps
                noisy = torch.where((step < lesson)[:, None, None], after, noisy)
        return noisy - time[:, None, None] * self.velocity(noisy, time, memory, inputs)
