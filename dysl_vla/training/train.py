"""`dysl train`: from demonstrations on disk to a trained checkpoint.

It opens the dataset, decides from it everything of the policy that data decides (cameras, normalisation, tokenizer),
decodes the images once, into files that are mapped into memory, and hands them to the trainer in `behaviour_cloning`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla import provenance
from dysl_vla.checkpoint import MANIFEST
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.options import NUMBER, PLACE, SIZE, camera_options
from dysl_vla.data.selection import check_instructions, split_of
from dysl_vla.data.split import Split
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import (
    check_same_run,
    is_unused,
    locked_dir,
    read_lines,
    write_json,
)
from dysl_vla.training.calibrate import read_plan
from dysl_vla.training.decoded import FRAMES, decode_frames
from dysl_vla.types import FloatArray, PolicySpec

with needs_extra("policy"):
    import torch

    from dysl_vla.checkpoint import find_checkpoint, read_policy_type
    from dysl_vla.policies.flow.mini_flow import MiniFlow
    from dysl_vla.policies.mini_policy import CELL, Crop, FlowSizes, MiniPolicy, MiniVLAConfig
    from dysl_vla.policies.mini_vla import MiniVLA
    from dysl_vla.training.behaviour_cloning import (
        CURVE_FILE,
        STATE_CLIP,
        STATE_FILE,
        BehaviourCloning,
        OptimizerConfig,
        TrainingArrays,
        normalisation,
        train_tokenizer,
    )

RUN_FILE = "training_run.json"
LARGE, SHORTER = 200, 96
"""Pixels of an image's shorter side: above the first, images are resized to about the second."""
MAX_INSTRUCTION = 24
"""Largest number of an instruction's tokens; longer ones are cut."""
CAMERA_OPTIONS = {"resize": (SIZE, "96x128"), "crops": (PLACE, "96x96+28+44"), "grids": (NUMBER, "4")}
"""Options that have a value for each camera, with its form and an example."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a MiniVLA, or a MiniFlow, on demonstrations by behaviour cloning. Resumes exactly where it was interrupted.

    Raises:
        ConfigError: A value is out of range or of another form, or two options contradict each other.
    """

    data: Path
    """Folder of a LeRobotDataset v3, written by LeRobot's own recorder or by `dysl demos collect`."""
    out: Path
    """Folder for the checkpoint, the training state, the curves and the TensorBoard log."""
    init: str | None = None
    """Start from the weights of this checkpoint (for rounds of DAgger) instead of random ones."""
    plan: Path | None = None
    """A plan written by `dysl calibrate`: its static layers, run without the others, are also trained to act as all
    layers do, so that skipping loses less."""
    drop_dynamic: bool = False
    """Keep only the plan's static layers, which makes the policy of --init as shallow before it is trained on: static
    depth, to compare skipping with."""
    cameras: str | None = None
    """Comma-separated cameras that the policy uses; all usable ones when not given."""
    resize: str | None = None
    """Size that each camera's images are resized to first, "front=96x128,wrist=96x128" (height x width). When not
    given, images whose shorter side has more than 200 pixels get about 96 there; smaller ones are not resized."""
    crops: str | None = None
    """Part of each camera's (resized) image that is used, "corner2=96x96+28+44" (height x width + top + left). When not
    given, it is its middle."""
    grids: str | None = None
    """Grid tokens for each side of a camera's image, "corner2=4,gripperPOV=2". When not given, as many as fit, at most
    4."""
    flow: bool = False
    """Train a policy that denoises actions by flow matching, as SmolVLA and pi0 do, in place of one that regresses
    them."""
    layers: int = 24
    """Depth of the backbone, and of the expert with --flow."""
    hidden: int = 128
    """Width of the backbone."""
    chunk: int = 8
    """Actions predicted by one inference."""
    execute: int = 2
    """Actions executed before the next inference."""
    held_out: float | None = None
    """Share of the episodes that are held out from training, to evaluate on (0.1: one in ten). When not given, one in
    twenty, or two of fewer than forty."""
    state_names: str | None = None
    """Comma-separated names for the state's dimensions, for a dataset that has none."""
    action_names: str | None = None
    """Comma-separated names for the action's dimensions, for a dataset that has none."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 1 <= self.execute <= self.chunk:
            raise ConfigError(f"execute must be from 1 to the chunk's {self.chunk} actions, got {self.execute}.")
        for name, form in CAMERA_OPTIONS.items():
            camera_options(name, getattr(self, name) or "", *form)
        if self.drop_dynamic and (self.init is None or self.plan is None):
            raise ConfigError(
                "drop_dynamic must come with init and plan: it keeps the plan's static layers of that policy; add both."
            )
        if self.flow and self.plan is not None:
            raise ConfigError("plan must be left out with flow, which does not learn to act by static layers alone.")
        if self.flow and self.optimizer.compile:
            raise ConfigError("compile must be left out with flow, whose backbone keeps keys and values.")
        for name in ("cameras", "resize", "crops", "grids", "flow", "layers", "hidden", "chunk", "execute"):
            if self.init is not None and getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{name} must not be given with init, as {self.init} decides it; leave one out.")


def train(config: TrainConfig) -> Path:
    """Train a policy.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: A value does not fit the data, or `out` holds something else.
        DatasetError: The demonstrations are damaged.
        CheckpointError: `init` or the training state is damaged.
    """
    if not is_unused(config.out) and not (config.out / RUN_FILE).exists():
        raise ConfigError(f"out must be a new folder or one of a training; {config.out} is not empty and holds none.")
    # The demonstrations, and the policy that they decide.
    demonstrations = _open(config)
    columns = demonstrations.columns()
    check_instructions(demonstrations, columns["task_index"])
    torch.manual_seed(config.optimizer.seed)
    policy, split = _beginning(config, demonstrations, columns)
    path = _shortest_path(config.plan, policy.config.num_layers)
    if config.plan is not None and not isinstance(policy, MiniVLA):
        raise ConfigError(f"plan must be left out for {config.init}, a {policy.kind}; it is for a mini-vla.")
    if config.drop_dynamic and isinstance(policy, MiniVLA):
        policy = policy.with_layers(path)
    # Tell a new run, one that goes on and one that has ended apart.
    settings = json.loads(json.dumps({**asdict(config), **asdict(config.optimizer)}, default=str))
    del settings["optimizer"]
    settings["plan"] = path or None
    identity = {**settings, "frames": demonstrations.total_frames, "initial_weights": policy.fingerprint}
    if _is_finished(config.out, identity):
        shutil.rmtree(config.out / FRAMES, ignore_errors=True)  # a kill may have left them
        return config.out
    policy.provenance = {
        "method": "behaviour cloning",
        **provenance.record(),
        "config": settings,
        "data": {**describe(demonstrations), **_split_and_change(split, columns)},
        "init": policy.provenance or None,
    }
    # Decode the images, and train.
    is_new = not (config.out / RUN_FILE).exists()
    with locked_dir(config.out):
        write_json(config.out / RUN_FILE, identity)
        try:
            arrays = _arrays(config.out, demonstrations, policy.config, split)
        except (ConfigError, DatasetError):
            if is_new:  # a damaged dataset leaves no training behind
                shutil.rmtree(config.out, ignore_errors=True)
            raise
        BehaviourCloning(policy, arrays, config.optimizer, config.out, () if config.drop_dynamic else path).run()
        shutil.rmtree(config.out / FRAMES)
    return config.out


def _arrays(out: Path, demonstrations: Demonstrations, config: MiniVLAConfig, split: Split) -> TrainingArrays:
    """Return the demonstrations as training reads them; their images are decoded into files in `out`."""
    return TrainingArrays(
        decode_frames(demonstrations, config, out),
        **demonstrations.columns(),
        instructions=demonstrations.instructions,
        held_out=_held_out(split, demonstrations),
    )


def _beginning(
    config: TrainConfig, demonstrations: Demonstrations, columns: dict[str, Any]
) -> tuple[MiniPolicy, Split]:
    """Return the policy before training, and which episodes are held out."""
    if not config.init:
        split = split_of(demonstrations, share=config.held_out)
        return _new_policy(config, demonstrations, columns, split), split
    policy = _warm_start(config, demonstrations)
    before = split_of(demonstrations, policy.provenance)
    split = before if config.held_out is None else split_of(demonstrations, share=config.held_out)
    if split != before:
        raise ConfigError(
            f"held_out must be that of {config.init}, which was trained with one episode in {before.every} held out, "
            "and on others that would be held out now; leave it out, or train without --init."
        )
    return policy, split


def _split_and_change(split: Split, columns: dict[str, Any]) -> dict[str, Any]:
    """Return what later commands need of the data: what was held out, and how fast actions change."""
    return {
        "held_out_every": split.every,
        "action_change": action_change(columns["actions"], columns["episode_index"]),
    }


def _held_out(split: Split, demonstrations: Demonstrations) -> NDArray[np.bool_]:
    """Return which frames are of episodes that are held out, (frames,).

    Raises:
        DatasetError: All are, so that there is nothing to train on.
    """
    rows = demonstrations.rows
    held_out = np.repeat([split.is_held_out(row.number) for row in rows], [row.length for row in rows])
    if held_out.all():
        raise DatasetError(f"{demonstrations.root}: {split.explain(len(rows))}: all are held out, none is left.")
    return held_out


def _open(config: TrainConfig) -> Demonstrations:
    """Open the part of the dataset that is asked for, and print which cameras are left out.

    Raises:
        DatasetError: It is damaged, empty, or lacks what is asked for.
    """
    demonstrations = Demonstrations(
        config.data,
        cameras=_listed(config.cameras),
        state_names=_listed(config.state_names),
        action_names=_listed(config.action_names),
    )
    if not demonstrations.rows:
        raise DatasetError(f"{config.data} holds no episodes.")
    if config.cameras is None:
        for camera, reason in demonstrations.left_out.items():
            print(f"Camera {camera} is left out: {reason}", file=sys.stderr)
    return demonstrations


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _is_finished(out: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether this training has ended in a folder.

    Raises:
        ConfigError: The folder holds another training.
    """
    path = out / RUN_FILE
    if not path.exists():
        return False
    check_same_run(path, identity)
    points = read_lines(out / CURVE_FILE)
    reached = points[-1]["step"] if points else 0
    return reached == identity["steps"] and (out / MANIFEST).exists() and not (out / STATE_FILE).exists()


def describe(demonstrations: Demonstrations) -> dict[str, Any]:
    """Describe a dataset: totals, and the number of episodes of every (suite, task, seed, actor)."""
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


def evaluation(policy: Path, data: Path) -> str:
    """Return the command that evaluates a policy trained on some data: in its suite, or offline where it has none."""
    is_simulated = any(row.origin is not None for row in Demonstrations(data).rows)
    offline = "" if is_simulated else f" --data {data}"
    return f"dysl eval --policy {policy}{offline} --out {policy}-eval"


def action_change(actions: FloatArray, episode_index: NDArray[np.int64]) -> list[float]:
    """Measure how fast actions change: 99.9 % of the changes from one to the next are at most as large as the result.

    Args:
        actions: Demonstrated actions, (frames, action).
        episode_index: The frames' episodes, (frames,).

    Returns:
        A value for each dimension, in the actions' units.
    """
    within = episode_index[1:] == episode_index[:-1]
    change = np.abs(np.diff(actions, axis=0))[within]
    return [float(value) for value in np.quantile(change, 0.999, axis=0)] if len(change) else [0.0] * actions.shape[1]


def _shortest_path(path: Path | None, depth: int) -> list[int]:
    if path is None:
        return []
    plan = read_plan(path)
    if plan.num_layers != depth:
        raise ConfigError(f"plan must be for the policy's {depth} layers; {path} is for {plan.num_layers}.")
    return list(plan.shortest_path)


def _new_policy(
    config: TrainConfig, demonstrations: Demonstrations, columns: dict[str, Any], split: Split
) -> MiniPolicy:
    spec = demonstrations.spec
    is_trained_on = ~_held_out(split, demonstrations)
    if not spec.cameras:
        raise DatasetError(f"{demonstrations.root} has no camera (a video feature observation.images.<camera>).")
    tokenizer = train_tokenizer(demonstrations.instructions)
    longest = max(len(tokenizer.encode(text).ids) for text in demonstrations.instructions)
    resizes = _resizes(config.resize, spec.cameras)
    crops = _crops(config.crops, {**spec.cameras, **resizes})
    return (MiniFlow if config.flow else MiniVLA)(
        MiniVLAConfig(
            spec=PolicySpec(
                cameras=dict(spec.cameras),
                state_names=spec.state_names,
                action_names=spec.action_names,
                rate_hz=spec.rate_hz,
                chunk_length=config.chunk,
                execute_steps=config.execute,
                state_normalisation=normalisation(columns["states"][is_trained_on], spec.state_names),
                action_normalisation=normalisation(columns["actions"][is_trained_on], spec.action_names),
                rendering=demonstrations.rendering,
            ),
            crops=crops,
            grids=_grids(config.grids, crops),
            vocab_size=tokenizer.get_vocab_size(),
            text_tokens=min(longest, MAX_INSTRUCTION),
            hidden_size=config.hidden,
            num_layers=config.layers,
            resizes=resizes,
            state_clip=STATE_CLIP,
            flow=FlowSizes(width=3 * config.hidden // 4, mlp_width=3 * config.hidden // 2) if config.flow else None,
        ),
        tokenizer,
    )


def _warm_start(config: TrainConfig, demonstrations: Demonstrations) -> MiniPolicy:
    assert config.init is not None
    is_flow = read_policy_type(find_checkpoint(config.init)) == MiniFlow.kind
    policy: MiniPolicy = (MiniFlow if is_flow else MiniVLA).from_pretrained(config.init)
    policy.spec.check_embodiment(demonstrations.spec)
    if policy.spec.rendering != demonstrations.rendering:
        raise ConfigError(
            f"data: rendering must be that of {config.init}, {policy.spec.rendering or 'fast'}, got "
            f"{demonstrations.rendering or 'fast'}; take demonstrations that look the same, or train without --init."
        )
    return policy


def _resizes(text: str | None, cameras: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the sizes as asked for, else those of large images, whose sides become multiples of two cells."""
    if text is not None:
        asked = camera_options("resize", text, *CAMERA_OPTIONS["resize"], cameras)
        return {name: (height, width) for name, (height, width) in asked.items() if (height, width) != cameras[name]}
    resizes = {}
    for name, (height, width) in cameras.items():
        if min(height, width) > LARGE:
            scale = SHORTER / min(height, width)
            rows, columns = (max(1, round(side * scale / (2 * CELL))) * 2 * CELL for side in (height, width))
            resizes[name] = rows, columns
    return resizes


def _crops(text: str | None, cameras: Mapping[str, tuple[int, int]]) -> dict[str, Crop]:
    """Return the crops as asked for, else the largest in the middle whose sides are multiples of two cells."""
    crops = {}
    for name, (height, width) in cameras.items():
        rows, columns = (max(CELL, size // (2 * CELL) * 2 * CELL) for size in (height, width))
        crops[name] = Crop(top=(height - rows) // 2, left=(width - columns) // 2, height=rows, width=columns)
    for name, values in camera_options("crops", text or "", *CAMERA_OPTIONS["crops"], cameras).items():
        height, width, top, left = values
        crops[name] = Crop(top=top, left=left, height=height, width=width)
    return crops


def _grids(text: str | None, crops: Mapping[str, Crop]) -> dict[str, int]:
    grids = {}
    for name, crop in crops.items():
        fitting = [g for g in range(1, 5) if crop.height % (CELL * g) == 0 and crop.width % (CELL * g) == 0]
        grids[name] = max(fitting, default=1)
    asked = camera_options("grids", text or "", *CAMERA_OPTIONS["grids"], crops)
    return grids | {name: value for name, (value,) in asked.items()}
