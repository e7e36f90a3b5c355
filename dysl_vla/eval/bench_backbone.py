"""`dysl bench backbone`: is the time that skipping saves the time of the layers that it skips?

The decoder has random weights, so that any size can be measured; full and skipping passes take turns.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla.checkpoint import CONFIG, SHIPPED, find_checkpoint, read_policy_type
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import read_json
from dysl_vla.policies import OURS, load_skippable_policy

with needs_extra("policy"):
    import torch
    from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

    from dysl_vla.skip_controller.decoders import find_all_layers
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads, default_adapter_size
    from dysl_vla.skip_controller.layer_similarity import choose_static_layers
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the layers that are skipped, a kind of pass each."""
OPENVLA_OFT, OPENVLA_OFT_TOKENS = "openvla-oft", 600
Points = np.ndarray[tuple[int, int], np.dtype[np.int64]]


@dataclass(frozen=True)
class BackboneBenchConfig:
    """Measure full and skipping passes of a randomly initialised decoder, side by side.

    Raises:
        ConfigError: A value is out of range.
    """

    config: str = "24x2048"
    """LAYERSxWIDTH of a Llama, openvla-oft (its Llama at true width, with 4 layers unless --layers says otherwise), a
    policy (its backbone is measured), or the folder or hub id of a Hugging Face decoder's configuration."""
    layers: int | None = None
    """Layers of a decoder with random weights, in place of its configuration's."""
    tokens: int | None = None
    """Tokens of a pass. When not given, 600 for openvla-oft (two images of 256 patches, text and actions), else 64."""
    rounds: int = 10
    """Passes of each kind."""
    threads: int | None = None
    """Threads of PyTorch; one a core when not given."""
    dtype: str = "float32"
    """float32 or bfloat16."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 4), ("tokens", 1), ("rounds", 2), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}.")
        if self.tokens is None:
            object.__setattr__(self, "tokens", OPENVLA_OFT_TOKENS if self.config == OPENVLA_OFT else 64)
        size = _size(self.config)
        if size is not None and (size[0] < 4 or size[1] < 128 or size[1] % 128):
            raise ConfigError(
                f"config must have at least 4 layers and a width that is a multiple of 128, got {self.config}."
            )


@dataclass(frozen=True)
class Pass:
    """A kind of pass, measured.

    Attributes:
        layers_run: Layers of the decoder that ran.
        ideal: All layers over those that ran.
        speed_up: Median time of the full model over this one's.
        p50_ms: Median.
        p99_ms: 99th percentile; of so few rounds it is nearly the slowest.
        heads_share: Time of an adapter and a controller over that of a layer (the full model's over its depth); None
            where none ran.
    """

    layers_run: int
    ideal: float
    speed_up: float
    p50_ms: float
    p99_ms: float
    heads_share: float | None


def bench_backbone(config: BackboneBenchConfig) -> list[Pass]:
    """Measure full and skipping passes in turns.

    Returns:
        The full model, then passes that skip ever more, with the controllers that are asked and the adapters that run.

    Raises:
        ConfigError: The configuration cannot be read, or is no decoder.
    """
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    kinds, depth = _kinds(config)

    # Let the kinds of pass take turns; the first round is warm-up
    layers = [0] * len(kinds)
    times, heads_times = np.zeros((2, config.rounds, len(kinds)))
    with torch.inference_mode(), tqdm(total=(config.rounds + 1) * len(kinds), desc="measuring", unit="pass") as bar:
        for turn in range(-1, config.rounds):
            for kind, run in enumerate(kinds):
                started = time.perf_counter()
                layers[kind], heads_s = run()
                if turn >= 0:
                    times[turn, kind] = time.perf_counter() - started
                    heads_times[turn, kind] = heads_s
                bar.update()

    # Compare each kind with the full model
    p50, p99 = np.percentile(times, [50, 99], axis=0)
    shares = np.median(heads_times, axis=0) / (p50[0] / depth)
    return [
        Pass(
            layers_run=layers[kind],
            ideal=depth / layers[kind],
            speed_up=p50[0] / p50[kind],
            p50_ms=1e3 * p50[kind],
            p99_ms=1e3 * p99[kind],
            heads_share=float(shares[kind]) if kind else None,
        )
        for kind in range(len(kinds))
    ]


def _kinds(config: BackboneBenchConfig) -> tuple[list[Callable[[], tuple[int, float]]], int]:
    """The kinds of pass, the full model first, and the decoder's depth.

    A kind is a function that runs a pass, and returns how many layers ran and the seconds of an adapter and a
    controller.
    """
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    model = _decoder(config, dtype)
    depth = len(find_all_layers(model))
    hidden = int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]
    static = choose_static_layers(
        np.ones(depth), max(0.17, (3 if depth > 4 else 2) / depth), max(2, math.ceil(depth / 3))
    )
    plan = SkipPlan(depth, static)
    weights = sum(p.numel() for p in model.parameters())
    size = default_adapter_size(hidden, weights, len(plan.dynamic_layers))
    heads = SkipHeads(plan, HeadsConfig(hidden, size)).to(dtype).eval()
    skipper = attach(model, plan, heads)
    assert config.tokens is not None  # the configuration has set it
    embeds = torch.randn(1, config.tokens, hidden, dtype=dtype)

    def full() -> tuple[int, float]:
        model(inputs_embeds=embeds, use_cache=False)
        return depth, 0.0

    def skipping(points: Points) -> tuple[int, float]:
        with skipper.step(points, threshold=-1.0) as step:
            model(inputs_embeds=embeds, use_cache=False)
        heads_s = step.adapters_s / len(step.targets[0]) + step.controllers_s / len(step.outputs[0])
        return int(step.layers_run.sum()), heads_s

    counts = sorted({min(max(1, round(share * depth)), len(plan.dynamic_layers)) for share in SHARES})
    skips = [partial(skipping, _points(plan, count)) for count in counts]
    return [full, *skips], depth


def _points(plan: SkipPlan, skipped: int) -> Points:
    """Allow points with which so many layers are skipped, or as many as possible: whole blocks first."""
    points = []
    for block in plan.blocks:
        here = min(skipped, block.length)
        points.append(block.length - here)
        skipped -= here
    return np.array([points], np.int64)


def _decoder(config: BackboneBenchConfig, dtype: torch.dtype) -> torch.nn.Module:
    text = config.config
    if (Path(text) / CONFIG).is_file() or (SHIPPED / text / CONFIG).is_file():
        folder = find_checkpoint(text)
        if "policy_type" in read_json(folder / CONFIG) or read_policy_type(folder) in OURS:
            if config.layers is not None:
                raise ConfigError(f"layers must be left out for {text!r}, whose weights are trained.")
            return _backbone_of(text).to(dtype)
    architecture = _architecture(text)
    if config.layers is not None:
        architecture.num_hidden_layers = config.layers
    model: torch.nn.Module = AutoModel.from_config(architecture, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()


def _size(text: str) -> tuple[int, int] | None:
    """Layers and width of "24x2048"; None for another form."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _backbone_of(name: str) -> torch.nn.Module:
    backbone = getattr(load_skippable_policy(name), "backbone", None)
    if not isinstance(backbone, torch.nn.Module):
        raise ConfigError(f"config: {name} is a policy without a `backbone`; give its decoder's configuration.")
    return backbone


def _architecture(text: str) -> PretrainedConfig:
    if text == OPENVLA_OFT:
        llama = LlamaConfig(vocab_size=32064, num_hidden_layers=4)  # its other sizes are Llama 2's of 7 B
        llama.is_causal = False
        return llama
    size = _size(text)
    if size is not None:
        layers, width = size
        return LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=width * 11 // 4 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
        )
    try:
        architecture = AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config must be LAYERSxWIDTH, a policy or a model's configuration, got {text!r} ({error})."
        ) from error
    decoder: PretrainedConfig = architecture.get_text_config()
    return decoder


def render_backbone(config: BackboneBenchConfig, passes: list[Pass]) -> str:
    """Render the measurement as Markdown."""
    lines = [
        f"{config.config}, {config.tokens} tokens, {config.dtype}, {config.rounds} rounds in turns:",
        "",
        "| layers run | p50 ms | p99 ms | speed-up | ideal | share of the ideal | adapter + controller, of a layer |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {p.layers_run} | {p.p50_ms:.2f} | {p.p99_ms:.2f} | {p.speed_up:.2f}x | {p.ideal:.2f}x "
        f"| {p.speed_up / p.ideal:.3f} | {'-' if p.heads_share is None else f'{100 * p.heads_share:.1f} %'} |"
        for p in passes
    ]
    return "\n".join(lines)
