"""Demonstrated images as they might also have been: moved, and seen in other light by worse cameras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dysl_vla.types import IMAGE_PREFIX, ImageArray, Observation

SHIFT = 4
"""Pixels, as the policy gets them, by which images are moved at most."""
AS_IT_IS = 0.25
"""Share of images that `varied` leaves as they are."""
BRIGHTNESS, COLOUR, CONTRAST = 0.8, 0.25, 0.3
"""Largest changes: of all light and of each colour's, as powers of e, and of contrast, as a share."""
NOISE, NOISY = 25.0, 0.5
"""Largest deviation of a pixel's noise, of 255, and the share of images that have any."""
SQUARE, COVERED = 0.45, 0.25
"""Largest side of a square that covers a part, as a share of the image's, and the share of images that have one."""


@dataclass(frozen=True)
class Copies:
    """Copies of each frame, to train on, too.

    Attributes:
        count: Number of copies.
        is_varied: Whether their light, colours and noise vary, too, as `varied` does it; they are moved in any case.
    """

    count: int = 0
    is_varied: bool = False

    def copy(
        self, observation: Observation, resizes: Mapping[str, tuple[int, int]], index: int, number: int
    ) -> Observation:
        """Make one copy, a function of the frame's index and the copy's number.

        Args:
            observation: The frame.
            resizes: Camera to the size, (height, width), at which the policy sees its images.
            index: The frame's index in its dataset.
            number: The copy's number, from 0.
        """
        rng = np.random.default_rng([index, number])
        moved = shifted(observation, resizes, rng)
        if not self.is_varied:
            return moved
        for key, image in moved.items():
            if key.startswith(IMAGE_PREFIX):
                moved[key] = varied(image, rng, resizes.get(key.removeprefix(IMAGE_PREFIX)))
        return moved


def shifted(
    observation: Observation, resizes: Mapping[str, tuple[int, int]], rng: np.random.Generator
) -> dict[str, Any]:
    """Move each camera's image by up to `SHIFT` of the pixels that the policy gets; its edges are repeated."""
    moved = dict(observation)
    for key, image in observation.items():
        if key.startswith(IMAGE_PREFIX):
            seen = resizes.get(key.removeprefix(IMAGE_PREFIX), image.shape[:2])
            shift = round(SHIFT * image.shape[0] / seen[0])
            down, right = rng.integers(-shift, shift + 1, 2)
            rows = np.clip(np.arange(image.shape[0]) + down, 0, image.shape[0] - 1)
            columns = np.clip(np.arange(image.shape[1]) + right, 0, image.shape[1] - 1)
            moved[key] = image[rows[:, None], columns]
    return moved


def varied(image: ImageArray, rng: np.random.Generator, size: tuple[int, int] | None = None) -> ImageArray:
    """Change an image's brightness, colours and contrast, add noise, and cover a part of it; some stay as they are.

    Args:
        image: uint8, (height, width, 3).
        rng: Decides how.
        size: The size, (height, width), at which the policy sees it, and has its noise; None: its own.
    """
    if rng.random() < AS_IT_IS:
        return image
    gain = np.exp(BRIGHTNESS * rng.uniform(-1, 1) + COLOUR * rng.uniform(-1, 1, 3)).astype(np.float32)
    contrast = np.float32(1 + CONTRAST * rng.uniform(-1, 1))
    values = image * gain
    values += (contrast - 1) * (values - values.mean(dtype=np.float32))
    if rng.random() < NOISY:
        height, width = size or image.shape[:2]
        noise = np.float32(NOISE * rng.random()) * rng.standard_normal((height, width, 3), np.float32)
        rows, columns = (np.arange(full) * few // full for full, few in zip(image.shape, (height, width), strict=False))
        values += noise[rows[:, None], columns]
    if rng.random() < COVERED:
        height, width = image.shape[:2]
        side = max(1, round(SQUARE * rng.random() * min(height, width)))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        values[top : top + side, left : left + side] = rng.uniform(0, 255, 3)
    changed: ImageArray = np.clip(values, 0, 255).astype(np.uint8)
    return changed
