"""`dysl bench policy`: where an inference of a flow policy goes, and what skipping and exact savings take off it.

The policies have the geometry of public ones and random weights, so that nothing must be downloaded: times do not
depend on what weights say. All kinds of inference take turns on one observation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.types import LIBERO_ACTIONS, LIBERO_STATE, FloatArray, Normalisation, PolicySpec

with needs_extra("policy"):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch import Tensor, nn
    from transformers import GemmaConfig, LlamaConfig, SiglipVisionConfig
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig, SmolVLMVisionConfig

    from dysl_vla.denoising import NOISE
    from dysl_vla.policies.flow.expert import ExpertAttention, ExpertLayer, ExpertShape
    from dysl_vla.policies.flow.pi0 import Pi0
    from dysl_vla.policies.flow.policy import FlowPolicy
    from dysl_vla.policies.flow.smolvla import SmolVLA
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach

PARTS = ("encode", "prefix", "expert")
INSTRUCTION = "pick up the black bowl and put it on the plate"


@dataclass(frozen=True)
class PolicyBenchConfig:
    """Measure the parts of a flow policy's inference, full and skipping, side by side.

    Raises:
        ConfigError: A value is out of range.
    """

    config: str = "smolvla"
    """smolvla (whole, as lerobot/smolvla_base), or pi0 (at its true width, with 4 layers)."""
    cameras: int = 2
    """Number of cameras."""
    keep: int = 4
    """Layers that always run; between them all are skipped where skipping is measured."""
    rounds: int = 10
    """Inferences of each kind."""
    compile: bool = False
    """Also measure the full model with its decoder and expert compiled, which needs a C++ compiler on a CPU."""
    threads: int | None = None
    """Threads of PyTorch; one a core when not given."""

    def __post_init__(self) -> None:
        if self.config not in POLICIES:
            raise ConfigError(f"config must be one of {', '.join(POLICIES)}, got {self.config!r}.")
        for name, least in (("cameras", 1), ("keep", 2), ("rounds", 2), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class Kind:
    """A kind of inference, measured.

    Attributes:
        name: What it is.
        layers: Layers of the prefix's decoder that run.
        ms: Milliseconds of encoding, prefix and expert, (rounds, 3).
    """

    name: str
    layers: int
    ms: FloatArray


def bench_policy(config: PolicyBenchConfig) -> list[Kind]:
    """Measure each kind of inference in turns.

    Returns:
        The full model first.

    Raises:
        ConfigError: So many layers cannot be kept.
    """
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    policy = POLICIES[config.config](config.cameras).eval()
    depth = len(policy.layers)
    if config.keep >= depth:
        raise ConfigError(f"keep must be below the depth of {depth}, got {config.keep}.")
    static = tuple(np.unique(np.linspace(0, depth - 1, config.keep).round().astype(int)).tolist())
    gaps = [first + 1 for first, second in pairwise(static) if second > first + 1]
    plan = SkipPlan(depth, static, tuple(gaps))
    heads = SkipHeads(plan, HeadsConfig(policy.width, 88, 16, policy.follower_sizes)).eval()
    last = [policy.layers[depth - 1]]
    crossing = [layer.self_attn for layer in policy.expert.layers if isinstance(layer, ExpertLayer) and layer.crosses]
    short = len(plan.shortest_path)
    ways: list[tuple[str, int, Callable[[], Any]]] = [
        ("full", depth, nullcontext),
        ("full, last layer of the prefix whole", depth, lambda: as_class(last, type(policy.layers[0]))),
        ("skipping", short, lambda: _skipping(policy, plan, heads)),
    ]
    if crossing:
        what = "full, prefix's keys and values projected in each step"
        ways.insert(2, (what, depth, lambda: as_class(crossing, Reprojecting)))
    if config.compile:
        compiled = {name: torch.compile(getattr(policy, name), dynamic=False) for name in ("backbone", "expert")}
        ways.append(("full, compiled", depth, lambda: _replaced(policy, compiled)))
    observation = policy.spec.blank_observation(INSTRUCTION)
    times = np.zeros((len(ways), config.rounds, len(PARTS)), np.float32)
    with torch.inference_mode(), tqdm(total=(config.rounds + 1) * len(ways), desc="measuring", unit="pass") as bar:
        for turn in range(-1, config.rounds):  # the first round is warm-up
            for row, (_, _, changed) in enumerate(ways):
                with changed():
                    measured = _measure(policy, observation)
                if turn >= 0:
                    times[row, turn] = measured
                bar.update()
    return [Kind(name, layers, 1e3 * times[row]) for row, (name, layers, _) in enumerate(ways)]


def _measure(policy: FlowPolicy, observation: Mapping[str, Any]) -> list[float]:
    """Run one inference, and return the seconds of its parts."""
    marks = [time.perf_counter()]
    inputs, _ = policy.collate(policy.encode([observation], [policy.reset()]))
    marks.append(time.perf_counter())
    memory = policy.read_prefix(inputs)
    marks.append(time.perf_counter())
    policy.denoise(inputs[NOISE], memory, inputs)
    marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


@contextmanager
def _skipping(policy: FlowPolicy, plan: SkipPlan, heads: SkipHeads) -> Iterator[None]:
    """Skip all that may be skipped, in the body."""
    skipper = attach(policy.layers, plan, heads, followers=policy.followers)
    try:
        with skipper.step(np.zeros((1, len(plan.blocks)), np.int64), force_skip=True):
            yield
    finally:
        skipper.detach()


class Reprojecting(ExpertAttention):
    """Projects the prefix's keys and values anew in each denoising step, as LeRobot's code does."""

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return them as they are."""
        return keys, values

    def forward(
        self, hidden: Tensor, prefix: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """See `ExpertAttention.forward`."""
        return super().forward(hidden, super().read(*prefix), rotary, mask)


@contextmanager
def as_class(modules: Sequence[nn.Module], kind: type[nn.Module]) -> Iterator[None]:
    """Let modules be of another class in the body, whose weights are the same."""
    own = [type(module) for module in modules]
    for module in modules:
        module.__class__ = kind
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            module.__class__ = before


@contextmanager
def _replaced(policy: FlowPolicy, modules: Mapping[str, Any]) -> Iterator[None]:
    """Put other modules into a policy, in the body."""
    own = {name: policy._modules[name] for name in modules}
    policy._modules.update(modules)
    try:
        yield
    finally:
        policy._modules.update(own)


def _tokenizer() -> Tokenizer:
    """Return a tokenizer of the instruction's words."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(INSTRUCTION.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=INSTRUCTION.split(maxsplit=1)[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _spec(cameras: int, size: tuple[int, int]) -> PolicySpec:
    def neutral(names: Sequence[str]) -> Normalisation:
        return Normalisation((0.0,) * len(names), (1.0,) * len(names))

    return PolicySpec(
        cameras={f"camera{number}": size for number in range(cameras)},
        state_names=LIBERO_STATE,
        action_names=LIBERO_ACTIONS,
        state_normalisation=neutral(LIBERO_STATE),
        action_normalisation=neutral(LIBERO_ACTIONS),
        rate_hz=20.0,
        chunk_length=50,
        execute_steps=10,
    )


def make_smolvla(cameras: int) -> SmolVLA:
    """Return SmolVLA with random weights: half of SmolVLM2's 32 layers, images of 512 pixels a side, ten steps."""
    tokenizer = _tokenizer()
    llama = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=16,
        num_attention_heads=15,
        num_key_value_heads=5,
        head_dim=64,
    )
    vision = SmolVLMVisionConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, image_size=512, patch_size=16
    )
    expert = ExpertShape(
        width=720, depth=16, heads=15, kv_heads=5, head_dim=64, mlp_width=2048, crossing=tuple(range(1, 16, 2))
    )
    settings = {
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_steps": 10,
        "min_period": 4e-3,
        "max_period": 4.0,
        "tokenizer_max_length": 48,
        "resize_imgs_with_padding": (512, 512),
    }
    vlm = SmolVLMConfig(text_config=llama, vision_config=vision, scale_factor=4)
    return SmolVLA(vlm, expert, _spec(cameras, (256, 256)), tokenizer, settings)


def make_pi0(cameras: int) -> Pi0:
    """Return pi0 with random weights and 4 of its 18 layers, at their true width."""
    tokenizer = _tokenizer()
    gemma = GemmaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    expert = ExpertShape(
        width=1024, depth=4, heads=8, kv_heads=1, head_dim=256, mlp_width=4096, norm="gemma", activation="gelu"
    )
    settings = {
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
        "min_period": 4e-3,
        "max_period": 4.0,
        "tokenizer_max_length": 48,
        "image_resolution": (224, 224),
    }
    spec = _spec(cameras, (224, 224))
    return Pi0(vision, gemma, expert, spec, tokenizer=tokenizer, settings=settings)


POLICIES: dict[str, Callable[[int], FlowPolicy]] = {"smolvla": make_smolvla, "pi0": make_pi0}
"""Name of a geometry to the function that makes a policy of it, for a number of cameras."""


def render_policy(config: PolicyBenchConfig, kinds: Sequence[Kind]) -> str:
    """Render the measurement as Markdown."""
    full = np.median(kinds[0].ms, axis=0)
    lines = [
        f"{config.config}, {config.cameras} cameras, {config.rounds} rounds in turns, medians in ms:",
        "",
        "| inference | layers | encode | prefix | expert | all | p99 of all | prefix and expert, times faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in kinds:
        parts, whole = np.median(kind.ms, axis=0), kind.ms.sum(axis=1)
        lines.append(
            f"| {kind.name} | {kind.layers} | {' | '.join(f'{part:.1f}' for part in parts)} | {np.median(whole):.1f} "
            f"| {np.percentile(whole, 99):.1f} | {full[1:].sum() / parts[1:].sum():.2f} |"
        )
    return "\n".join(lines)
