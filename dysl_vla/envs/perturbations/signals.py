"""Perturbations of what goes between the robot and its policy: images, words, actions and time."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.perturbations.base import Perturbation, register
from dysl_vla.envs.perturbations.paraphrases import paraphrase
from dysl_vla.extras import needs_extra
from dysl_vla.types import FloatArray, ImageArray


class ImagePerturbation(Perturbation):
    """One that changes each image."""

    shows = True

    def images(self, images: dict[str, ImageArray]) -> dict[str, ImageArray]:
        """See `Perturbation`."""
        return {camera: self.image(camera, image) for camera, image in images.items()}

    @abstractmethod
    def image(self, camera: str, image: ImageArray) -> ImageArray:
        """Change an image, uint8 (height, width, 3)."""


@register
class Noise(ImagePerturbation):
    """Each pixel has noise of its own, as of a sensor in the dark."""

    name = "noise"
    magnitudes = (5, 10, 20, 35, 50)
    unit = "of 255, the deviation of a pixel"

    def image(self, camera: str, image: ImageArray) -> ImageArray:
        """See `ImagePerturbation`."""
        return _as_image(image + self.rng.normal(0, self.size, image.shape))


@register
class Blur(ImagePerturbation):
    """The lens is out of focus."""

    name = "blur"
    magnitudes = (0.4, 0.8, 1.2, 2.0, 3.0)
    unit = "% of the image's height, the deviation of a point's spread"

    def image(self, camera: str, image: ImageArray) -> ImageArray:
        """See `ImagePerturbation`."""
        with needs_extra("sim"):
            from PIL import Image, ImageFilter

        radius = self.size / 100 * image.shape[0]
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


@register
class Exposure(ImagePerturbation):
    """The cameras expose too long or too short; what is too bright is lost."""

    name = "exposure"
    magnitudes = (0.2, 0.4, 0.7, 1.0, 1.5)
    unit = "stops, each of them twice or half the light"

    def __init__(self, level: int, rng: np.random.Generator) -> None:
        super().__init__(level, rng)
        self._factor = 2.0 ** (self.size * rng.choice((-1.0, 1.0)))

    def image(self, camera: str, image: ImageArray) -> ImageArray:
        """See `ImagePerturbation`."""
        return _as_image(image * self._factor)


@register
class Occlusion(ImagePerturbation):
    """A grey square covers a part of each camera's image that stays the same."""

    name = "occlusion"
    magnitudes = (2, 5, 10, 15, 25)
    unit = "% of the image"

    def __init__(self, level: int, rng: np.random.Generator) -> None:
        super().__init__(level, rng)
        self._places: dict[str, NDArray[np.float64]] = {}

    def image(self, camera: str, image: ImageArray) -> ImageArray:
        """See `ImagePerturbation`."""
        if camera not in self._places:
            self._places[camera] = self.rng.uniform(size=2)
        height, width = image.shape[:2]
        side = min(round((self.size / 100 * height * width) ** 0.5), height, width)
        top, left = (self._places[camera] * (height - side, width - side)).astype(int)
        covered = image.copy()
        covered[top : top + side, left : left + side] = 127
        return covered


@register
class DroppedFrames(Perturbation):
    """An observation shows the images of the one before it."""

    name = "dropped-frames"
    magnitudes = (5, 10, 20, 35, 50)
    unit = "% of the observations"

    def __init__(self, level: int, rng: np.random.Generator) -> None:
        super().__init__(level, rng)
        self._shown: dict[str, ImageArray] | None = None

    def images(self, images: dict[str, ImageArray]) -> dict[str, ImageArray]:
        """See `Perturbation`."""
        is_dropped = self.rng.uniform() < self.size / 100
        if self._shown is None or not is_dropped:
            self._shown = images
        return self._shown


@register
class Instruction(Perturbation):
    """The instruction is put in other words."""

    name = "instruction"
    magnitudes = (1, 2, 3, 4, 5)
    unit = "(1 polite, 2 another verb, 3 other nouns too, 4 as a question, 5 within a longer text)"

    def instruction(self, text: str) -> str:
        """See `Perturbation`; the same words for the same text."""
        return paraphrase(text, self.level)


@register
class ActionNoise(Perturbation):
    """What is executed differs from what was commanded, but for the gripper."""

    name = "action-noise"
    magnitudes = (5, 10, 20, 30, 50)
    unit = "% of the largest action, the deviation of each dimension"

    def action(self, action: FloatArray) -> FloatArray:
        """See `Perturbation`."""
        noise = self.rng.normal(0, self.size / 100, len(action))
        noise[-1] = 0
        return np.asarray(action + noise, np.float32)


@register
class Latency(Perturbation):
    """Actions are executed late; until the first one arrives, the hand rests."""

    name = "latency"
    magnitudes = (1, 2, 3, 4, 5)
    unit = "steps"

    def __init__(self, level: int, rng: np.random.Generator) -> None:
        super().__init__(level, rng)
        self._late: deque[FloatArray] = deque()

    def action(self, action: FloatArray) -> FloatArray:
        """See `Perturbation`."""
        self._late.append(action)
        if len(self._late) <= self.size:
            rest = np.zeros_like(action)
            rest[-1] = self._late[0][-1]
            return rest
        return self._late.popleft()


@register
class Clock(Perturbation):
    """The control loop misses cycles, in which the world goes on with the last action."""

    name = "clock"
    magnitudes = (10, 20, 30, 40, 50)
    unit = "% of the cycles"

    def steps(self) -> int:
        """See `Perturbation`."""
        return 2 if self.rng.uniform() < self.size / (100 - self.size) else 1


def _as_image(values: NDArray[np.float64]) -> ImageArray:
    return np.clip(values, 0, 255).astype(np.uint8)
