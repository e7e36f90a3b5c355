"""Frames of demonstrations, decoded once into files from which training reads them in any order."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from dysl_vla.data.augment import SHIFT
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write, available_memory, check_disk
from dysl_vla.images import resized
from dysl_vla.types import ImageArray

with needs_extra("policy"):
    from dysl_vla.policies.mini_policy import MiniVLAConfig

FRAMES = "frames"
"""Folder of the files in that of a training."""


def decode_frames(demonstrations: Demonstrations, config: MiniVLAConfig, out: Path) -> dict[str, ImageArray]:
    """Decode every camera's frames once into files, as training reads them; those of an interrupted run are kept.

    Of each frame the crop is kept, with the margin that the augmentation needs; beyond the image its edge is repeated.

    Raises:
        ConfigError: The disk has not enough space.
        DatasetError: A frame is missing or damaged.
    """
    count = demonstrations.total_frames
    shapes = {
        camera: (count, crop.height + 2 * SHIFT, crop.width + 2 * SHIFT, 3) for camera, crop in config.crops.items()
    }
    missing = {camera: shape for camera, shape in shapes.items() if not (out / FRAMES / f"{camera}.npy").exists()}
    check_disk(out, sum(map(math.prod, missing.values())), f"{count} frames of {len(missing)} cameras")
    memory = available_memory()
    if memory is not None and (needed := sum(map(math.prod, shapes.values()))) > memory:
        print(
            f"The frames, {needed / 1e9:.1f} GB, do not fit into the {memory / 1e9:.1f} GB of memory that are free: "
            "training reads them from the disk, which is slower; --resize makes them smaller.",
            file=sys.stderr,
        )
    for camera, shape in missing.items():
        with atomic_write(out / FRAMES / f"{camera}.npy") as temporary:
            stored: ImageArray = open_memmap(temporary, "w+", np.uint8, shape)  # type: ignore[no-untyped-call]
            _write_frames(demonstrations, camera, config, stored)
    return {camera: np.load(out / FRAMES / f"{camera}.npy", mmap_mode="r") for camera in config.spec.cameras}


def _write_frames(demonstrations: Demonstrations, camera: str, config: MiniVLAConfig, stored: ImageArray) -> None:
    """Decode one camera's frames into an array.

    Raises:
        DatasetError: Not every frame has an image.
    """
    from tqdm import tqdm

    crop, size = config.crops[camera], config.resizes.get(camera)
    height, width = size or demonstrations.spec.cameras[camera]
    rows = np.clip(np.arange(crop.top - SHIFT, crop.top + crop.height + SHIFT), 0, height - 1)
    columns = np.clip(np.arange(crop.left - SHIFT, crop.left + crop.width + SHIFT), 0, width - 1)
    is_there = np.zeros(len(stored), np.bool_)
    frames = demonstrations.frames(camera)
    for episode, frame, image in tqdm(frames, total=len(stored), desc=f"reading {camera}", unit="frame"):
        index = demonstrations.rows[episode].start + frame
        stored[index] = resized(image, size)[rows[:, None], columns]
        is_there[index] = True
    if not is_there.all():
        raise DatasetError(f"{demonstrations.root}: frame {int(is_there.argmin())} of {camera} has no image.")
