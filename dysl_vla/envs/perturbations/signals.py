"""Perturbations of what goes between the robot and its policy: images, words, actions and time."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.perturbations.base import Draw, Perturbation, register
from dysl_vla.envs.perturbations.paraphrases import paraphrase
from dysl_vla.extras import needs_extra
from dysl_vla.types import FloatArray, ImageArray


class ImagePerturbation(Perturbation):
    """One that changes each image."""

    shows = True

    def images(self, images: dict[str, ImageArray], step: int) -> dict[str, ImageArray]:
        """See `Perturbation`."""
        return {camera: self.image(image, camera, step) for camera, image in images.items()}

    @abstractmethod
    def image(self, image: ImageArray, camera: str, step: int) -> ImageArray:
        """Change a camera's image at a step, uint8 (height, width, 3)."""


@register
class Noise(ImagePerturbation):
    """Each pixel has noise of its own, of such a deviation of 255, as of a sensor in the dark."""

    name = "noise"
    magnitudes = (5, 10, 20, 35, 50)

    def image(self, image: ImageArray, camera: str, step: int) -> ImageArray:
        """See `ImagePerturbation`."""
        return _as_image(image + self.draw(f"{camera} {step}").normal(0, self.size, image.shape))


@register
class Blur(ImagePerturbation):
    """The lens is out of focus: a point spreads with a deviation of so many per cent of the image's height."""

    name = "blur"
    magnitudes = (0.4, 0.8, 1.2, 2.0, 3.0)

    def image(self, image: ImageArray, camera: str, step: int) -> ImageArray:
        """See `ImagePerturbation`."""
        with needs_extra("sim"):
            from PIL import Image, ImageFilter

        radius = self.size / 100 * image.shape[0]
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


@register
class Exposure(ImagePerturbation):
    """The cameras expose so many stops too long or too short (each is twice or half the light)."""

    name = "exposure"
    magnitudes = (0.2, 0.4, 0.7, 1.0, 1.5)

    def __init__(self, level: int, draw: Draw) -> None:
        super().__init__(level, draw)
        self._factor = 2.0 ** (self.size * self.rng.choice((-1.0, 1.0)))

    def image(self, image: ImageArray, camera: str, step: int) -> ImageArray:
        """See `ImagePerturbation`."""
        return _as_image(image * self._factor)


@register
class Occlusion(ImagePerturbation):
    """A grey square covers so many per cent of each camera's image, always the same part."""

    name = "occlusion"
    magnitudes = (2, 5, 10, 15, 25)

    def image(self, image: ImageArray, camera: str, step: int) -> ImageArray:
        """See `ImagePerturbation`."""
        height, width = image.shape[:2]
        side = min(round((self.size / 100 * height * width) ** 0.5), height, width)
        top, left = (self.draw(camera).uniform(size=2) * (height - side, width - side)).astype(int)
        covered = image.copy()
        covered[top : top + side, left : left + side] = 127
        return covered


@register
class DroppedFrames(Perturbation):
    """So many per cent of the observations show the images of the one before."""

    name = "dropped-frames"
    magnitudes = (5, 10, 20, 35, 50)

    def __init__(self, level: int, draw: Draw) -> None:
        super().__init__(level, draw)
        self._shown: dict[str, ImageArray] | None = None

    def images(self, images: dict[str, ImageArray], step: int) -> dict[str, ImageArray]:
        """See `Perturbation`."""
        is_dropped = self.draw(f"{step}").uniform() < self.size / 100
        if self._shown is None or not is_dropped:
            self._shown = images
        return self._shown


@register
class Instruction(Perturbation):
    """The instruction is put in other words; see `paraphrase`."""

    name = "instruction"
    magnitudes = (1, 2, 3, 4, 5)

    def instruction(self, text: str) -> str:
        """See `Perturbation`; the same words for the same text."""
        return paraphrase(text, self.level)


@register
class ActionNoise(Perturbation):
    """What is executed differs from the command by a deviation of so many per cent of the largest action.

    The gripper, the last dimension, does as commanded.
    """

    name = "action-noise"
    magnitudes = (5, 10, 20, 30, 50)

    def action(self, action: FloatArray, step: int) -> FloatArray:
        """See `Perturbation`."""
        noise = self.draw(f"{step}").normal(0, self.size / 100, len(action))
        noise[-1] = 0
        return np.asarray(action + noise, np.float32)


@register
class Latency(Perturbation):
    """Actions are executed so many steps late.

    Until the first arrives, the others are zero, at which a hand that moves relatively rests, and the last dimension,
    the gripper, is that of the first.
    """

    name = "latency"
    magnitudes = (1, 2, 3, 4, 5)

    def __init__(self, level: int, draw: Draw) -> None:
        super().__init__(level, draw)
        self._late: deque[FloatArray] = deque()

    def action(self, action: FloatArray, step: int) -> FloatArray:
        """See `Perturbation`."""
        self._late.append(action)
        if len(self._late) <= self.size:
            rest = np.zeros_like(action)
            rest[-1] = self._late[0][-1]
            return rest
        return self._late.popleft()


@register
class Clock(Perturbation):
    """The control loop misses so many per cent of its cycles, in which the world goes on with the last action."""

    name = "clock"
    magnitudes = (10, 20, 30, 40, 50)

    def repeats(self, step: int) -> int:
        """See `Perturbation`."""
        return 2 if self.draw(f"{step}").uniform() < self.size / (100 - self.size) else 1


def _as_image(values: NDArray[np.float64]) -> ImageArray:
    return np.clip(values, 0, 255).astype(np.uint8)
