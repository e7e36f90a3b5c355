"""`dysl calibrate`: which layers must always run? Those that change the hidden states most."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import choose_frames, demonstrations_for, split_of
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write, is_unused, read_json, write_json
from dysl_vla.policies import ComputeConfig, SkippablePolicy, load_skippable_policy
from dysl_vla.training.encoding import encode

with needs_extra("policy"):
    import torch

    from dysl_vla.skip_controller.layer_similarity import choose_static_layers, similarities
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.torch_backend import Forward
    from dysl_vla.training.check_policy import check_policy

PLAN, PICTURE = "plan.json", "similarity.png"


@dataclass(frozen=True)
class CalibrateConfig:
    """Measure how much each layer changes the hidden states, and plan which always run."""

    data: Path
    """Folder of demonstrations, a LeRobotDataset v3; its held-out episodes are used."""
    out: Path
    """Folder for plan.json and similarity.png."""
    policy: str = "metaworld-mini"
    """A shipped name, a checkpoint's folder or a hub id."""
    static_ratio: float = 0.125
    """Share of layers that always run, the first and the last included."""
    longest_block: int = 0
    """No more layers than that may be skipped at once; 0: as few as so many static layers allow."""
    exits: Literal["first", "all"] = "first"
    """Where a block can be left: at its first layer alone, or at each (the paper's), whose heads share the training."""
    frames: int = 1024
    """Frames to measure on."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def calibrate(config: CalibrateConfig) -> Path:
    """Measure, and write plan and picture.

    Returns:
        The plan's file.

    Raises:
        ConfigError: A value cannot work, or `out` holds something else.
        DatasetError: The demonstrations are damaged or too few.
        CheckpointError: The policy is damaged.
    """
    if config.frames < 1:
        raise ConfigError(f"frames: {config.frames} must be at least 1.")
    if not is_unused(config.out) and not (config.out / PLAN).exists():
        raise ConfigError(f"out: {config.out} is not empty and holds no plan; give a new folder.")
    policy = load_skippable_policy(config.policy, config.compute)
    demonstrations = demonstrations_for(config.data, policy.spec)
    check_policy(policy, demonstrations)
    measured = measure(policy, demonstrations, config.frames)
    static = choose_static_layers(measured, config.static_ratio, config.longest_block)
    plan = with_exits(SkipPlan(len(measured), static), config.exits)
    document = {
        "plan": asdict(plan),
        "similarity": [float(value) for value in measured],
        "config": {**asdict(config), "data": str(config.data), "out": str(config.out)},
        "policy_fingerprint": policy.fingerprint,
        **provenance.record(),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    draw_similarity(measured, plan, config.out / PICTURE)
    write_json(config.out / PLAN, document)
    return config.out / PLAN


def calibrated_plan(policy: SkippablePolicy, demonstrations: Demonstrations) -> SkipPlan:
    """The plan that `dysl calibrate` would write with its defaults."""
    measured = measure(policy, demonstrations, CalibrateConfig.frames)
    static = choose_static_layers(measured, CalibrateConfig.static_ratio, CalibrateConfig.longest_block)
    return with_exits(SkipPlan(len(measured), static), CalibrateConfig.exits)


def with_exits(plan: SkipPlan, exits: str) -> SkipPlan:
    """A plan whose blocks can be left at their first layers alone ("first"), or at each of them ("all")."""
    first = tuple(layers[0] for block in plan.blocks if (layers := plan.exits_of(block)))
    return replace(plan, exits=first if exits == "first" else ())


def measure(policy: SkippablePolicy, demonstrations: Demonstrations, frames: int) -> NDArray[np.float64]:
    """Similarity of each layer's input and output, (layers,)."""
    split = split_of(demonstrations, policy.provenance)
    chosen = choose_frames(demonstrations, frames, split, held_out=True)
    encoded = encode(policy, demonstrations, chosen, "held-out frames")
    bar = tqdm(total=len(encoded.items), desc="measuring layers", unit="frame")
    with torch.inference_mode(), bar:
        sums, count = np.zeros(1), 0
        for rows, items in encoded.batches():
            size = rows.stop - rows.start
            inputs, mask = policy.collate(items)
            sums = sums + size * similarities(policy.layers, partial(policy.act, inputs, Forward()), mask)
            count += size
            bar.update(size)
    return np.asarray(sums / count, np.float64)


def read_plan(path: Path) -> SkipPlan:
    """A plan as `dysl calibrate` writes it, perhaps edited.

    Args:
        path: The file, or the folder that it is in.

    Raises:
        ConfigError: It is no plan, or cannot work.
    """
    path = path / PLAN if path.is_dir() else path
    document: Any = read_json(path).get("plan")
    if not isinstance(document, dict) or {*document, "exits"} != {"num_layers", "static_layers", "exits"}:
        raise ConfigError(f"plan: {path} has no field 'plan' with num_layers, static_layers and, if need be, exits.")
    try:
        static, exits = (tuple(map(int, document.get(name, ()))) for name in ("static_layers", "exits"))
        return SkipPlan(int(document["num_layers"]), static, exits)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plan: {path}: layers must be whole numbers ({error}).") from error


def draw_similarity(measured: NDArray[np.float64], plan: SkipPlan, path: Path) -> None:
    """A bar a layer: how far its output is from its input."""
    with needs_extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(len(measured))
    static = np.isin(layers, plan.static_layers)
    for chosen, colour, label in ((static, "tab:red", "static: always runs"), (~static, "tab:blue", "dynamic")):
        axes.bar(layers[chosen], np.maximum(1 - measured[chosen], 1e-6), color=colour, label=label)
    axes.set(xlabel="layer", ylabel="1 - cosine similarity", yscale="log", title="How much each layer changes")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
