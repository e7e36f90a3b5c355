"""The options of `dysl distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.policies import ComputeConfig
from dysl_vla.training.calibrate import CalibrateConfig
from dysl_vla.training.dry_run import Checkpointing

with needs_extra("policy"):
    from dysl_vla.skip_controller.guidance import importance_measures
    from dysl_vla.skip_controller.heads_trainer import DistillConfig

STREAM = {"auto": None, "always": True, "never": False}
"""What `stream` may be, to whether frames are streamed; None: where they do not fit."""


@dataclass(frozen=True)
class DistillRunConfig:
    """Train adapters and controllers for a policy, whose own weights stay as they are. Resumes where it was stopped.

    Raises:
        ConfigError: A value is out of range, or two options contradict each other.
    """

    data: Path
    """Folder of demonstrations, a LeRobotDataset v3."""
    out: Path
    """Folder for the checkpoint, the state, the curves and the TensorBoard log."""
    policy: str = "metaworld-mini"
    """The policy that shall skip layers: a shipped name, a checkpoint's folder or a hub id."""
    plan: Path | None = None
    """A plan written by `dysl calibrate`. When not given, one is calibrated with its defaults."""
    frames: int = 32_000
    """Number of frames to train on, evenly spread."""
    augment_copies: int = 0
    """Number of copies of each frame to train on, too, with images moved by up to 4 pixels."""
    augment_images: bool = False
    """Vary light, colours, contrast and noise of those copies, and cover parts of them, as for a policy that was
    trained with `--augment-images`."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Whether frames are read from the dataset and encoded for each step, in place of once and kept in memory; auto:
    where they do not fit."""
    init_heads: bool = False
    """Start from the heads that the policy comes with, with their plan and without stage 1, instead of new ones."""
    fit_frames: int | None = None
    """Number of frames on which new adapters are set to their best linear maps before they are trained. When not given,
    they begin as the identity."""
    adapter_size: int | None = None
    """Width of an adapter's bottleneck. When not given, 88 beside a narrow backbone, and up to 128 beside a wide one,
    where adapters and controllers together have at most 1.2 % of its weights."""
    controller_size: int = 16
    """Width of a controller's hidden layer."""
    importance: str | None = None
    """What tells important actions: "gripper", its movement, or "continuity", of all motion. When not given, that of
    the initial heads, else the gripper's if there is one that moves."""
    static_ratio: float = CalibrateConfig.static_ratio
    """Share of layers that always run, in the plan that is calibrated when none is given."""
    exits: Literal["first", "all"] = CalibrateConfig.exits
    """Where a block can be left, in the plan that is calibrated when none is given; see `dysl calibrate`."""
    checkpointing: Checkpointing = "auto"
    """Whether backward computes the activations of the backbone's layers again instead of keeping them, which costs a
    third more operations in stage 2 and changes no gradient: on, off, or auto, where memory is too short without."""
    dry_run: bool = False
    """Print where the memory goes, what this machine has, and what the training costs, without loading any weights."""
    training: DistillConfig = field(default_factory=DistillConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("frames", 1),
            ("fit_frames", 1),
            ("augment_copies", 0),
            ("adapter_size", 1),
            ("controller_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if self.augment_images and not self.augment_copies:
            raise ConfigError("augment_images must come with augment_copies, which it varies; add --augment-copies 1.")
        if self.stream not in STREAM:
            raise ConfigError(f"stream must be one of {', '.join(STREAM)}, got {self.stream!r}.")
        if not 0 < self.static_ratio < 1:
            raise ConfigError(f"static_ratio must be above 0 and below 1, got {self.static_ratio}.")
        if self.importance is not None:
            importance_measures.get(self.importance)
        for name in ("plan", "adapter_size", "controller_size", "fit_frames"):
            if self.init_heads and getattr(self, name) != getattr(DistillRunConfig, name):
                raise ConfigError(
                    f"{name} must not be given with init_heads, as the heads of {self.policy} decide it; leave one out."
                )
