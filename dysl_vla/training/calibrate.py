"""`dysl calibrate`: the plan of which layers always run, which are those that change the hidden states most."""

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
    """Measure how much each layer changes the hidden states, and plan which always run.

    Raises:
        ConfigError: A value is out of range.
    """

    data: Path
    """Folder of demonstrations, a LeRobotDataset v3; its held-out episodes are used."""
    out: Path
    """Folder for plan.json and similarity.png."""
    policy: str = "metaworld-mini"
    """A shipped name, a checkpoint's folder or a hub id."""
    static_ratio: float = 0.125
    """Share of layers that always run, the first and the last included."""
    longest_block: int | None = None
    """Largest number of layers that may be skipped at once. When not given, the smallest that so many static layers
    allow."""
    exits: Literal["first", "all"] = "first"
    """Where a block can be left: only at its first layer, or at all (as in the paper), which then share training."""
    frames: int = 1024
    """Number of held-out frames to measure on."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if not 0 < self.static_ratio < 1:
            raise ConfigError(f"static_ratio must be above 0 and below 1, got {self.static_ratio}.")
        if self.longest_block is not None and self.longest_block < 1:
            raise ConfigError(
                f"longest_block must be at least 1, got {self.longest_block}; leave it out for the smallest possible."
            )
        if self.frames < 1:
            raise ConfigError(f"frames must be at least 1, got {self.frames}.")


def calibrate(config: CalibrateConfig) -> Path:
    """Measure the layers, and write the plan and a figure.

    Returns:
        The plan's file.

    Raises:
        ConfigError: The policy's layers cannot be skipped so, or `out` holds something else.
        DatasetError: The demonstrations are damaged or too few.
        CheckpointError: The policy is damaged.
    """
    if not is_unused(config.out) and not (config.out / PLAN).exists():
        raise ConfigError(f"out must be a new folder or one of a plan; {config.out} is not empty and holds no plan.")
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


def calibrated_plan(
    policy: SkippablePolicy, demonstrations: Demonstrations, static_ratio: float, exits: str
) -> SkipPlan:
    """Return the plan that `dysl calibrate` would write with these settings, and its defaults for others."""
    measured = measure(policy, demonstrations, CalibrateConfig.frames)
    static = choose_static_layers(measured, static_ratio, CalibrateConfig.longest_block)
    return with_exits(SkipPlan(len(measured), static), exits)


def assumed_plan(depth: int, static_ratio: float, exits: str) -> SkipPlan:
    """Return a plan as it may be calibrated, before anything is measured: its static layers are evenly spread."""
    return with_exits(SkipPlan(depth, choose_static_layers(np.ones(depth), static_ratio)), exits)


def with_exits(plan: SkipPlan, exits: str) -> SkipPlan:
    """Return a plan whose blocks can be left only at their first layers ("first"), or at each of them ("all")."""
    return replace(plan, exits=plan.first_exits if exits == "first" else ())


def measure(policy: SkippablePolicy, demonstrations: Demonstrations, frames: int) -> NDArray[np.float64]:
    """Measure the similarity of each layer's input and output, (layers,)."""
    split = split_of(demonstrations, policy.provenance)
    chosen = choose_frames(demonstrations, frames, split, held_out=True)
    encoded = encode(policy, demonstrations, chosen, "held-out frames")
    bar = tqdm(total=len(encoded), desc="measuring layers", unit="frame")
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
    """Read a plan as `dysl calibrate` writes it, perhaps edited.

    Args:
        path: The file, or the folder that it is in.

    Raises:
        ConfigError: The file holds no plan, or one that cannot work.
    """
    path = path / PLAN if path.is_dir() else path
    document: Any = read_json(path).get("plan")
    if not isinstance(document, dict) or {*document, "exits"} != {"num_layers", "static_layers", "exits"}:
        raise ConfigError(
            f"plan must be a file whose field 'plan' has num_layers, static_layers and perhaps exits; {path} is not."
        )
    try:
        static, exits = (tuple(map(int, document.get(name, ()))) for name in ("static_layers", "exits"))
        return SkipPlan(int(document["num_layers"]), static, exits)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"plan must have whole numbers as layers, {path} has others ({error}).") from error


def draw_similarity(measured: NDArray[np.float64], plan: SkipPlan, path: Path) -> None:
    """Draw a bar for each layer: how far its output is from its input."""
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
