"""`dysl train`: from demonstrations on disk to a trained checkpoint.

Opens the dataset, decides from it everything of the policy that data decides (cameras, normalisation, tokenizer),
reads the images into memory and hands over to the trainer in `policies`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla import provenance
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.types import ImageArray, PolicySpec

with needs_extra("policy"):
    import torch

    from dysl_vla.policies.mini_vla import CELL, Crop, MiniVLA, MiniVLAConfig
    from dysl_vla.policies.training import (
        SHIFT,
        STATE_FILE,
        BehaviourCloning,
        OptimizerConfig,
        TrainingArrays,
        normalisation,
        train_tokenizer,
    )

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
    crops: str = ""
    """Part of each camera's image to look at: "corner2=28,44,96,96" (top, left, height, width); else its middle."""
    grids: str = ""
    """Grid tokens a side for each camera, "corner2=4"; as many as fit, at most 4, when empty."""
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
        ConfigError: A value cannot work.
        DatasetError: The demonstrations are damaged.
        CheckpointError: `out` holds another run, or `init` is damaged.
    """
    if not 1 <= config.execute <= config.chunk:
        raise ConfigError(f"execute: {config.execute} is not between 1 and the chunk of {config.chunk}.")
    if config.out.exists() and any(config.out.iterdir()) and not (config.out / STATE_FILE).exists():
        raise ConfigError(f"out: {config.out} is not empty and holds no interrupted training; give a new folder.")
    demonstrations = Demonstrations(config.data)
    if not demonstrations.rows:
        raise DatasetError(f"{config.data}: holds no episodes.")
    columns = demonstrations.columns()
    torch.manual_seed(config.optimizer.seed)
    policy = _warm_start(config.init, demonstrations) if config.init else _new_policy(config, demonstrations, columns)
    policy.provenance = {
        "method": "behaviour cloning",
        **provenance.record(),
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "data": describe(demonstrations),
        "init": policy.provenance or None,
    }
    arrays = TrainingArrays(
        images={
            camera: _store(demonstrations, camera, policy.config.crops[camera]) for camera in policy.config.spec.cameras
        },
        states=columns["states"],
        actions=columns["actions"],
        episode_index=columns["episode_index"],
        task_index=columns["task_index"],
        instructions=demonstrations.instructions,
    )
    identity = json.dumps({**asdict(config), "frames": demonstrations.total_frames}, default=str, sort_keys=True)
    config.out.mkdir(parents=True, exist_ok=True)
    BehaviourCloning(policy, arrays, config.optimizer, config.out, identity).run()
    return config.out


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


def _new_policy(config: TrainConfig, demonstrations: Demonstrations, columns: dict[str, Any]) -> MiniVLA:
    spec = demonstrations.spec
    if not spec.cameras:
        raise DatasetError(f"{demonstrations.root}: has no camera (a video feature observation.images.<camera>).")
    tokenizer = train_tokenizer(demonstrations.instructions)
    longest = max(len(tokenizer.encode(text).ids) for text in demonstrations.instructions)
    crops = _crops(config.crops, dict(spec.cameras))
    return MiniVLA(
        MiniVLAConfig(
            spec=PolicySpec(
                cameras=dict(spec.cameras),
                state_names=spec.state_names,
                action_names=spec.action_names,
                rate_hz=spec.rate_hz,
                chunk_length=config.chunk,
                execute_steps=config.execute,
            ),
            crops=crops,
            grids=_grids(config.grids, crops),
            state=normalisation(columns["states"]),
            action=normalisation(columns["actions"]),
            vocab_size=tokenizer.get_vocab_size(),
            text_tokens=min(longest, LONGEST_INSTRUCTION),
            hidden_size=config.hidden,
            num_layers=config.layers,
        ),
        tokenizer,
    )


def _warm_start(init: str, demonstrations: Demonstrations) -> MiniVLA:
    policy = MiniVLA.from_pretrained(init)
    policy.spec.check_world(demonstrations.spec)
    return policy


def _crops(text: str, cameras: dict[str, tuple[int, int]]) -> dict[str, Crop]:
    """Crops as asked for; else the largest in the middle that is a multiple of two cells."""
    crops = {}
    for name, (height, width) in cameras.items():
        rows, columns = (max(CELL, size // (2 * CELL) * 2 * CELL) for size in (height, width))
        crops[name] = Crop((height - rows) // 2, (width - columns) // 2, rows, columns)
    for name, values in _pairs("crops", text, cameras).items():
        try:
            crops[name] = Crop(*map(int, values.split(",")))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"crops: {values!r} is not of the form top,left,height,width.") from error
    return crops


def _grids(text: str, crops: dict[str, Crop]) -> dict[str, int]:
    grids = {}
    for name, crop in crops.items():
        fitting = [g for g in range(1, 5) if crop.height % (CELL * g) == 0 and crop.width % (CELL * g) == 0]
        grids[name] = max(fitting, default=1)
    for name, value in _pairs("grids", text, crops).items():
        if not value.isdigit():
            raise ConfigError(f"grids: {value!r} is not a number of tokens a side.")
        grids[name] = int(value)
    return grids


def _pairs(field_name: str, text: str, known: Any) -> dict[str, str]:
    pairs = dict(item.split("=", 1) for item in text.split() if "=" in item)
    if len(pairs) != len(text.split()):
        raise ConfigError(f"{field_name}: {text!r} is not of the form camera=value, separated by spaces.")
    for name in pairs:
        if name not in known:
            raise ConfigError(f"{field_name}: the data has no camera {name!r}; it has {', '.join(known)}.")
    return pairs


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
