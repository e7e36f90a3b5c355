"""`dysl train`: from demonstrations on disk to a trained checkpoint.

Opens the dataset, decides from it everything of the policy that data decides (cameras, normalisation, tokenizer),
reads the images into memory and hands over to the trainer in `policies`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla import provenance
from dysl_vla.checkpoint import MANIFEST
from dysl_vla.data.calibrating import read_plan
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.options import NUMBER, PLACE, camera_options
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import check_same_run, claimed, is_unused, read_lines, write_json
from dysl_vla.types import ImageArray, PolicySpec

with needs_extra("policy"):
    import torch

    from dysl_vla.policies.mini_vla import CELL, Crop, MiniVLA, MiniVLAConfig
    from dysl_vla.policies.training import (
        CURVE_FILE,
        SHIFT,
        STATE_FILE,
        BehaviourCloning,
        OptimizerConfig,
        TrainingArrays,
        normalisation,
        train_tokenizer,
    )

RUN_FILE = "training_run.json"
LONGEST_INSTRUCTION = 24
"""Tokens. What is longer is cut."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a MiniVLA on demonstrations by behaviour cloning. Resumes exactly where it was interrupted."""

    data: Path
    """Folder of a LeRobotDataset v3."""
    out: Path
    """Folder for the checkpoint, the training state, the curves and the TensorBoard log."""
    init: str | None = None
    """Start from the weights of this checkpoint (for rounds of DAgger) instead of random ones."""
    plan: Path | None = None
    """A plan written by `dysl calibrate`: its static layers, run without the others, also learn to act as all layers
    do, so that skipping loses less."""
    crops: str = ""
    """Part of each camera's image to look at, "corner2=96x96+28+44" (height x width + top + left); else its middle."""
    grids: str = ""
    """Grid tokens a side for each camera, "corner2=4,gripperPOV=2"; as many as fit, at most 4, when empty."""
    layers: int = 24
    """Depth of the backbone."""
    hidden: int = 128
    """Width of the backbone."""
    chunk: int = 8
    """Actions predicted by one inference."""
    execute: int = 2
    """Actions executed before the next inference."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def train(config: TrainConfig) -> Path:
    """Train a policy.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: A value cannot work, or `out` holds something else.
        DatasetError: The demonstrations are damaged.
        CheckpointError: `init` or the training state is damaged.
    """
    if not is_unused(config.out) and not (config.out / RUN_FILE).exists():
        raise ConfigError(f"out: {config.out} is not empty and holds no training; give a new folder.")
    demonstrations = Demonstrations(config.data)
    if not demonstrations.rows:
        raise DatasetError(f"{config.data}: holds no episodes.")
    columns = demonstrations.columns()
    torch.manual_seed(config.optimizer.seed)
    policy = _warm_start(config, demonstrations) if config.init else _new_policy(config, demonstrations, columns)
    shortest_path = _shortest_path(config.plan, policy.config.num_layers)
    settings = json.loads(json.dumps({**asdict(config), **asdict(config.optimizer)}, default=str))
    del settings["optimizer"]
    settings["plan"] = shortest_path or None
    identity = {**settings, "frames": demonstrations.total_frames, "initial_weights": policy.fingerprint}
    if _is_finished(config.out, identity):
        return config.out
    policy.provenance = {
        "method": "behaviour cloning",
        **provenance.record(),
        "config": settings,
        "data": describe(demonstrations),
        "init": policy.provenance or None,
    }
    arrays = TrainingArrays(
        images={name: _store(demonstrations, name, policy.config.crops[name]) for name in policy.spec.cameras},
        states=columns["states"],
        actions=columns["actions"],
        episode_index=columns["episode_index"],
        task_index=columns["task_index"],
        instructions=demonstrations.instructions,
    )
    with claimed(config.out):
        write_json(config.out / RUN_FILE, identity)
        BehaviourCloning(policy, arrays, config.optimizer, config.out, shortest_path).run()
    return config.out


def _is_finished(out: Path, identity: Mapping[str, Any]) -> bool:
    """Has this very training ended in a folder?

    Raises:
        ConfigError: The folder holds another one.
    """
    path = out / RUN_FILE
    if not path.exists():
        return False
    check_same_run(path, identity)
    points = read_lines(out / CURVE_FILE)
    reached = points[-1]["step"] if points else 0
    return reached == identity["steps"] and (out / MANIFEST).exists() and not (out / STATE_FILE).exists()


def describe(demonstrations: Demonstrations) -> dict[str, Any]:
    """What a dataset holds: totals, and the episodes of every (suite, task, seed, actor)."""
    origins = [row.origin for row in demonstrations.rows]
    counted = Counter((o.suite, o.task, o.seed, o.actor) for o in origins if o is not None)
    return {
        "episodes": len(demonstrations.rows),
        "frames": demonstrations.total_frames,
        "instructions": demonstrations.instructions,
        "origins": [
            {"suite": suite, "task": task, "seed": seed, "actor": actor, "episodes": count}
            for (suite, task, seed, actor), count in sorted(counted.items())
        ],
    }


def _shortest_path(path: Path | None, depth: int) -> list[int]:
    if path is None:
        return []
    plan = read_plan(path)
    if plan.num_layers != depth:
        raise ConfigError(f"plan: {path} is for {plan.num_layers} layers, the policy has {depth}.")
    return list(plan.shortest_path)


def _new_policy(config: TrainConfig, demonstrations: Demonstrations, columns: dict[str, Any]) -> MiniVLA:
    spec = demonstrations.spec
    if not spec.cameras:
        raise DatasetError(f"{demonstrations.root}: has no camera (a video feature observation.images.<camera>).")
    tokenizer = train_tokenizer(demonstrations.instructions)
    longest = max(len(tokenizer.encode(text).ids) for text in demonstrations.instructions)
    crops = _crops(config.crops, spec.cameras)
    return MiniVLA(
        MiniVLAConfig(
            spec=PolicySpec(
                cameras=dict(spec.cameras),
                state_names=spec.state_names,
                action_names=spec.action_names,
                rate_hz=spec.rate_hz,
                chunk_length=config.chunk,
                execute_steps=config.execute,
                state_normalisation=normalisation(columns["states"]),
                action_normalisation=normalisation(columns["actions"]),
            ),
            crops=crops,
            grids=_grids(config.grids, crops),
            vocab_size=tokenizer.get_vocab_size(),
            text_tokens=min(longest, LONGEST_INSTRUCTION),
            hidden_size=config.hidden,
            num_layers=config.layers,
        ),
        tokenizer,
    )


def _warm_start(config: TrainConfig, demonstrations: Demonstrations) -> MiniVLA:
    assert config.init is not None
    for name in ("crops", "grids", "layers", "hidden", "chunk", "execute"):
        if getattr(config, name) != TrainConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"{name}: {config.init} decides it; leave it out, or train without --init.")
    policy = MiniVLA.from_pretrained(config.init)
    policy.spec.check_world(demonstrations.spec)
    return policy


def _crops(text: str, cameras: Mapping[str, tuple[int, int]]) -> dict[str, Crop]:
    """Crops as asked for; else the largest in the middle whose sides are multiples of two cells."""
    crops = {}
    for name, (height, width) in cameras.items():
        rows, columns = (max(CELL, size // (2 * CELL) * 2 * CELL) for size in (height, width))
        crops[name] = Crop(top=(height - rows) // 2, left=(width - columns) // 2, height=rows, width=columns)
    for name, values in camera_options("crops", text, PLACE, "96x96+28+44", cameras).items():
        height, width, top, left = values
        crops[name] = Crop(top=top, left=left, height=height, width=width)
    return crops


def _grids(text: str, crops: Mapping[str, Crop]) -> dict[str, int]:
    grids = {}
    for name, crop in crops.items():
        fitting = [g for g in range(1, 5) if crop.height % (CELL * g) == 0 and crop.width % (CELL * g) == 0]
        grids[name] = max(fitting, default=1)
    return grids | {name: value for name, (value,) in camera_options("grids", text, NUMBER, "4", crops).items()}


def _store(demonstrations: Demonstrations, camera: str, crop: Crop) -> ImageArray:
    """Keep of each frame the crop and the margin that the augmentation needs; beyond the image its edge is repeated."""
    from tqdm import tqdm

    height, width = demonstrations.spec.cameras[camera]
    rows = np.clip(np.arange(crop.top - SHIFT, crop.top + crop.height + SHIFT), 0, height - 1)
    columns = np.clip(np.arange(crop.left - SHIFT, crop.left + crop.width + SHIFT), 0, width - 1)
    count = demonstrations.total_frames
    stored = np.empty((count, len(rows), len(columns), 3), np.uint8)
    frames = demonstrations.frames(camera)
    for episode, frame, image in tqdm(frames, total=count, desc=f"reading {camera}", unit="frame"):
        stored[demonstrations.rows[episode].start + frame] = image[rows[:, None], columns]
    return stored
