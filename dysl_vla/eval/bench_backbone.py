"""`dysl bench backbone`: is the time that skipping saves the time of the layers that it skips?

A decoder with random weights, so that any size can be measured; full and skipping passes take turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla.checkpoint import CONFIG, SHIPPED, find_checkpoint
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import read_json
from dysl_vla.policies import load_skippable_policy

with needs_extra("policy"):
    import torch
    from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

    from dysl_vla.skip_controller.decoders import find_all_layers
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads, default_adapter_size
    from dysl_vla.skip_controller.layer_similarity import choose_static_layers
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of layers that are skipped."""


@dataclass(frozen=True)
class BackboneBenchConfig:
    """Measure full and skipping passes of a randomly initialised decoder, side by side."""

    config: str = "24x2048"
    """LAYERSxWIDTH of a Llama, a policy (its backbone), or the folder or hub id of a Hugging Face decoder's config."""
    tokens: int = 64
    """Tokens of a pass."""
    rounds: int = 10
    """Passes of each kind."""
    threads: int = 0
    """Threads of PyTorch; 0: one a core."""
    dtype: str = "float32"
    """float32 or bfloat16."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rounds < 2 or self.threads < 0:
            raise ConfigError(f"tokens, rounds, threads: {self.tokens}, {self.rounds}, {self.threads} are too few.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype: {self.dtype!r} is neither float32 nor bfloat16.")


@dataclass(frozen=True)
class Pass:
    """A kind of pass, measured.

    Attributes:
        layers_run: Of the decoder's.
        ideal: All layers over those that ran.
        speed_up: Median time of the full model over this one's.
        p50_ms: Median.
        p99_ms: Of so few rounds nearly the slowest.
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
    """Measure; the first row is the full model, the others skip ever more, controllers asked and adapters run.

    Raises:
        ConfigError: The configuration cannot be read, or is no decoder.
    """
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    model = _decoder(config.config, dtype)
    depth = len(find_all_layers(model))
    hidden = int(model.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]
    plan = SkipPlan(depth, choose_static_layers(np.ones(depth), max(0.17, 3 / depth), max(2, depth // 3)))
    weights = sum(p.numel() for p in model.parameters())
    size = default_adapter_size(hidden, weights, len(plan.dynamic_layers))
    heads = SkipHeads(plan, HeadsConfig(hidden, size)).to(dtype).eval()
    skipper = attach(model, plan, heads)
    embeds = torch.randn(1, config.tokens, hidden, dtype=dtype)

    heads_s = 0.0

    def full() -> int:
        model(inputs_embeds=embeds, use_cache=False)
        return int(depth)

    def skipping(points: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Callable[[], int]:
        def run() -> int:
            nonlocal heads_s
            with skipper.step(points, threshold=-1.0) as step:
                model(inputs_embeds=embeds, use_cache=False)
            heads_s = step.adapters_s / len(step.targets[0]) + step.controllers_s / len(step.outputs[0])
            return int(step.layers_run.sum())

        return run

    kinds = [full, *(skipping(_points(plan, max(1, round(share * depth)))) for share in SHARES)]
    times = np.zeros((config.rounds, len(kinds)))
    heads_times = np.zeros_like(times)
    layers = [0] * len(kinds)
    with torch.inference_mode(), tqdm(total=(config.rounds + 1) * len(kinds), desc="measuring", unit="pass") as bar:
        for turn in range(-1, config.rounds):  # the first is warm-up
            for kind, run in enumerate(kinds):
                started = time.perf_counter()
                layers[kind] = run()
                if turn >= 0:
                    times[turn, kind] = time.perf_counter() - started
                    heads_times[turn, kind] = heads_s
                bar.update()
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


def _points(plan: SkipPlan, skipped: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Allow points that leave so many layers out, or as many as can be: whole blocks first."""
    points = []
    for block in plan.blocks:
        here = min(skipped, block.length)
        points.append(block.length - here)
        skipped -= here
    return np.array([points], np.int64)


def _decoder(text: str, dtype: torch.dtype) -> torch.nn.Module:
    if (Path(text) / CONFIG).is_file() or (SHIPPED / text / CONFIG).is_file():
        folder = find_checkpoint(text)
        if "policy_type" in read_json(folder / CONFIG):
            return _backbone_of(text).to(dtype)
    model: torch.nn.Module = AutoModel.from_config(_architecture(text), dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()


def _backbone_of(name: str) -> torch.nn.Module:
    backbone = getattr(load_skippable_policy(name), "backbone", None)
    if not isinstance(backbone, torch.nn.Module):
        raise ConfigError(f"config: {name} is a policy without a `backbone`; give its decoder's configuration.")
    return backbone


def _architecture(text: str) -> PretrainedConfig:
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        layers, width = map(int, parts)
        if layers < 4 or width % 128:
            raise ConfigError(f"config: {text} needs at least 4 layers and a width that is a multiple of 128.")
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
        place = Path(text)
        raise ConfigError(
            f"config: {place} is neither LAYERSxWIDTH, nor a policy, nor a model's configuration ({error})."
        ) from error
    decoder: PretrainedConfig = architecture.get_text_config()
    return decoder


def render_backbone(config: BackboneBenchConfig, passes: list[Pass]) -> str:
    """The measurement as Markdown."""
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
