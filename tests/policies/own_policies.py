"""Policies as somebody else would write them, tiny and random: other decoders, memory, and many forwards."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from dysl_vla.checkpoint import Checkpoint, add_weights, canonical, find_checkpoint, load_checkpoint, save_checkpoint
from dysl_vla.policies import policies
from dysl_vla.policies.backbone import BackbonePolicy
from dysl_vla.skip_controller.torch_backend import Forward
from dysl_vla.training.behaviour_cloning import train_tokenizer
from dysl_vla.types import EpisodeState, Normalisation, Observation, PolicySpec
from tests.conftest import MOCK_INSTRUCTIONS

DEPTH, WIDTH, TEXT = 6, 32, 12
SPEC = PolicySpec(
    cameras={"top": (32, 32), "wrist": (16, 16)},
    state_names=("x", "y"),
    action_names=("dx", "dy", "gripper"),
    rate_hz=20.0,
    chunk_length=3,
    execute_steps=2,
    state_normalisation=Normalisation((0.0, 0.0), (1.0, 1.0)),
    action_normalisation=Normalisation((0.0, 0.0, 0.0), (0.5, 0.5, 0.5)),
)
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class OwnConfig:
    """What all of them are made of."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    spec: PolicySpec
    vocab_size: int


class OwnPolicy(BackbonePolicy, nn.Module):
    """Pixels, state and words as tokens; what differs is the decoder, and what is done with it."""

    policy_type: str

    def __init__(self, config: OwnConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.provenance = config, tokenizer, {}
        self.pixels = nn.ModuleDict({name: nn.Linear(3 * 16 * 16, WIDTH) for name in config.spec.cameras})
        self.state = nn.Linear(len(config.spec.state_names), WIDTH)
        self.words = nn.Embedding(config.vocab_size, WIDTH)
        self.spec = config.spec
        self.backbone = self.make_backbone()

    def make_backbone(self) -> nn.Module:
        return LlamaModel(LlamaConfig(vocab_size=8, **SIZES))

    def seen(self, images: Mapping[str, Tensor], state: Tensor) -> Tensor:
        """(batch, tokens, hidden) of the pictures, halved to 16 by 16, and of the state."""
        dtype = self.state.weight.dtype
        tokens = []
        for name, layer in self.pixels.items():
            stride = images[name].shape[1] // 16
            pixels = images[name][:, ::stride, ::stride].flatten(1).to(dtype) / 255
            tokens.append(layer(pixels))
        return torch.stack([*tokens, self.state(state.to(dtype))], dim=1)

    def pictures(self, observations: Sequence[Observation]) -> tuple[dict[str, Tensor], Tensor]:
        for observation in observations:
            self.spec.check_observation(observation)
        images = {
            name: torch.from_numpy(np.stack([o[f"observation.images.{name}"] for o in observations]))
            for name in self.spec.cameras
        }
        return images, torch.from_numpy(np.stack([o["observation.state"] for o in observations])).float()

    @property
    def fingerprint(self) -> str:
        import hashlib

        digest = hashlib.sha256(canonical(self.config).encode())
        add_weights(digest, self.state_dict())
        return digest.hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        checkpoint = Checkpoint(self.policy_type, self.config, tensors, self.tokenizer.to_str(), self.provenance)
        save_checkpoint(folder, checkpoint)

    @classmethod
    def from_pretrained(cls, name: str) -> OwnPolicy:
        checkpoint = load_checkpoint(find_checkpoint(name), cls.policy_type, OwnConfig)
        policy = cls(checkpoint.config, Tokenizer.from_str(checkpoint.tokenizer))
        dtype = next(iter(checkpoint.tensors.values())).dtype
        policy.to(dtype).load_state_dict(checkpoint.tensors)
        policy.provenance = checkpoint.provenance
        return policy.eval()

    @classmethod
    def make(cls, seed: int = 0) -> OwnPolicy:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(MOCK_INSTRUCTIONS)
        policy = cls(OwnConfig(SPEC, tokenizer.get_vocab_size()), tokenizer)
        with torch.no_grad():
            for parameter in policy.backbone.parameters():  # else every layer is nearly the identity
                if parameter.ndim > 1:
                    parameter.mul_(4)
        return policy.eval()


@policies.register("own-oft")
class OftLike(OwnPolicy):
    """One forward of a Qwen2; words padded on the left and hidden by a mask; a token for each action at the end."""

    policy_type = "own-oft"
    resizes: ClassVar[dict[str, tuple[int, int]]] = {}
    crops: ClassVar[dict[str, tuple[int, int, int, int]]] = {"top": (0, 0, 32, 32), "wrist": (0, 0, 16, 16)}

    def __init__(self, config: OwnConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        tokenizer.enable_padding(direction="left", pad_id=0, length=TEXT)
        tokenizer.enable_truncation(TEXT)
        self.head = nn.Linear(WIDTH, len(config.spec.action_names))
        self.slots = nn.Parameter(torch.randn(config.spec.chunk_length, WIDTH))

    def make_backbone(self) -> nn.Module:
        return Qwen2Model(Qwen2Config(vocab_size=8, **SIZES))

    def token_ids(self, instruction: str) -> list[int]:
        return self.tokenizer.encode(instruction).ids

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        seen, slots = self.seen(images, state), self.slots.expand(len(state), -1, -1)
        embeds = torch.cat([self.words(token_ids), seen, slots], dim=1)
        rest = token_ids.new_ones((len(state), embeds.shape[1] - TEXT))
        return {"inputs_embeds": embeds, "attention_mask": torch.cat([(token_ids != 0).long(), rest], dim=1)}

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        token_ids = torch.tensor([self.token_ids(o["task"]) for o in observations])
        inputs = self.inputs(*self.pictures(observations), token_ids)
        return [{name: value[row] for name, value in inputs.items()} for row in range(len(observations))]

    def decode(self, hidden: Tensor) -> Tensor:
        return self.head(hidden[:, -self.spec.chunk_length :])


@policies.register("own-autoregressive")
class Autoregressive(OwnPolicy):
    """A Llama that says one binned number after the other, with a cache; words are padded by batch."""

    policy_type = "own-autoregressive"
    BINS = 8

    def __init__(self, config: OwnConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        tokenizer.no_padding()
        self.said = nn.Linear(WIDTH, self.BINS)
        self.bins = nn.Embedding(self.BINS, WIDTH)

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        seen = self.seen(*self.pictures(observations))
        words = [self.words(torch.tensor(self.tokenizer.encode(o["task"]).ids)) for o in observations]
        return [{"inputs_embeds": torch.cat([text, row])} for text, row in zip(words, seen, strict=True)]

    def act(self, inputs: Mapping[str, Tensor], forward: Forward) -> Tensor:
        values = torch.linspace(-1, 1, self.BINS, dtype=self.bins.weight.dtype)
        embeds, mask = inputs["inputs_embeds"], inputs.get("attention_mask")
        mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
        cache, numbers = None, []
        for _ in range(self.spec.chunk_length * len(self.spec.action_names)):
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
            output = self.backbone(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = self.said(output.last_hidden_state[:, -1])
            if forward.needs_gradient:  # the expectation, which has a gradient; at a low temperature it is the argmax
                shares = (30 * logits).softmax(dim=-1)
            else:
                shares = nn.functional.one_hot(logits.argmax(dim=-1), self.BINS).to(values.dtype)
            numbers.append(shares @ values)
            embeds = (shares @ self.bins.weight)[:, None]
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        return torch.stack(numbers, dim=1).view(len(mask), self.spec.chunk_length, -1)


@policies.register("own-flow")
class FlowMatching(OwnPolicy):
    """A Llama reads once; an expert of the same depth turns noise into actions in four steps, and follows its skips."""

    policy_type = "own-flow"
    STEPS = 4

    def __init__(self, config: OwnConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        tokenizer.enable_padding(direction="right", length=TEXT)
        tokenizer.enable_truncation(TEXT)
        dim = len(config.spec.action_names)
        self.expert = LlamaModel(LlamaConfig(vocab_size=8, **SIZES))
        self.into, self.out = nn.Linear(dim + 1, WIDTH), nn.Linear(WIDTH, dim)

    @property
    def followers(self) -> list[nn.ModuleList]:  # type: ignore[override]
        return [self.expert.layers]

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        seen = self.seen(*self.pictures(observations))
        items = []
        for observation, row in zip(observations, seen, strict=True):
            text = self.words(torch.tensor(self.tokenizer.encode(observation["task"]).ids))
            generator = torch.Generator().manual_seed(zlib.crc32(observation["observation.state"].tobytes()))
            noise = torch.randn(self.spec.chunk_length, len(self.spec.action_names), generator=generator)
            items.append({"inputs_embeds": torch.cat([text, row]), "noise": noise.to(row.dtype)})
        return items

    def act(self, inputs: Mapping[str, Tensor], forward: Forward) -> Tensor:
        actions = inputs["noise"]
        read = self.backbone(inputs_embeds=inputs["inputs_embeds"], use_cache=False).last_hidden_state
        for step in range(self.STEPS):
            time = torch.full((*actions.shape[:2], 1), step / self.STEPS, dtype=actions.dtype)
            tokens = torch.cat([read[:, -2:], self.into(torch.cat([actions, time], dim=2))], dim=1)
            moved = self.expert(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, 2:]
            actions = actions + self.out(moved) / self.STEPS
        return actions


@dataclass
class LstmState(EpisodeState):
    """What the LSTM remembers: its hidden state and its cell."""

    memory: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(WIDTH), torch.zeros(WIDTH)))


@policies.register("own-lstm")
class Recurrent(OwnPolicy):
    """One forward, its tokens pooled, and an LSTM over the inferences of an episode."""

    policy_type = "own-lstm"
    has_memory = True

    def __init__(self, config: OwnConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, config.spec.chunk_length * len(config.spec.action_names))

    def reset(self) -> LstmState:
        return LstmState()

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        seen = self.seen(*self.pictures(observations))
        return [
            {"inputs_embeds": row, "hidden": state.memory[0], "cell": state.memory[1]}  # type: ignore[attr-defined]
            for row, state in zip(seen, states, strict=True)
        ]

    def act(self, inputs: dict[str, Any], forward: Forward) -> Tensor:
        read = self.backbone(inputs_embeds=inputs["inputs_embeds"], use_cache=False).last_hidden_state
        forward.decoder_is_done()
        memory = (inputs["hidden"].to(read.dtype), inputs["cell"].to(read.dtype))
        inputs["next"] = self.lstm(read.amax(dim=1), memory)
        return self.head(inputs["next"][0]).view(len(read), self.spec.chunk_length, -1)

    def remember(self, inputs: Mapping[str, Any], states: Mapping[int, EpisodeState]) -> None:
        for row, state in states.items():
            hidden, cell = inputs["next"]
            state.memory = (hidden[row], cell[row])  # type: ignore[attr-defined]


ALL = [OftLike, Autoregressive, FlowMatching, Recurrent]
