"""Cameras for LeRobot's own `OpenCVCamera`, in place of `cv2.VideoCapture`: 480x640 at 30 frames a second.

An image depends on the time and, where a register file of `feetech_bus` is given, on where the arm is. Faults are
switched on while cameras run, through a file that processes share (`CameraFaults`). A process uses the cameras after
`install()`; one that is started as a command does so by itself where this folder's `site` is on PYTHONPATH and
CAMERAS_VARIABLE is set. A camera is named by the digits at the end of its index or path.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

if __package__:
    from tests.lerobot.feetech_bus import RESOLUTION, Registers
else:  # from `site`
    from feetech_bus import RESOLUTION, Registers

CAMERAS_VARIABLE, REGISTERS_VARIABLE = "FAKE_CAMERAS", "FAKE_CAMERAS_REGISTERS"
"""Paths of the file of `CameraFaults` and, optionally, of the arm's registers."""
HEIGHT, WIDTH, FPS = 480, 640, 30
SLOW_S = 0.48
FAULTS = ("none", "blocks", "fails", "slow", "closed", "frozen", "opening")
"""Frames as they should be; reading never returns; reading fails; there is a frame every 480 ms; the camera is not open
(before connecting: cannot be opened); the frame is always the same; opening takes until the fault is over."""
COUNT = 64
SETTINGS = {cv2.CAP_PROP_FRAME_WIDTH: WIDTH, cv2.CAP_PROP_FRAME_HEIGHT: HEIGHT, cv2.CAP_PROP_FPS: FPS}
JOINT_COLOURS = ((40, 40, 230), (40, 200, 40), (230, 90, 30), (30, 210, 230), (220, 40, 200), (240, 240, 240))


class CameraFaults:
    """The cameras' faults, in a file that processes share.

    Args:
        path: The file, which is made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(COUNT))
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), COUNT)

    def set_fault(self, camera: int, fault: str) -> None:
        """Switch on a fault of `FAULTS`; "none" switches it off."""
        self._bytes[camera] = FAULTS.index(fault)

    def fault(self, camera: int) -> str:
        """The fault that a camera has now."""
        return FAULTS[self._bytes[camera]]


def picture(camera: int, seconds: float, positions: Sequence[int]) -> NDArray[np.uint8]:
    """The image of a camera, without noise.

    Args:
        camera: Number of the camera.
        seconds: Time, with which a small square goes round.
        positions: Positions of the joints, in encoder steps; each is the height of a bar.

    Returns:
        (480, 640, 3) uint8, blue, green, red.
    """
    image = _background(camera).copy()
    for joint, position in enumerate(positions):
        left = 40 + 95 * joint
        top = round(440 - 400 * min(max(position / RESOLUTION, 0.0), 1.0))
        image[top:460, left : left + 60] = JOINT_COLOURS[joint % len(JOINT_COLOURS)]
    x, y = 300 + round(250 * math.cos(seconds)), 220 + round(180 * math.sin(seconds))
    image[y : y + 24, x : x + 24] = (20, 20, 20)
    return image


@cache
def _background(camera: int) -> NDArray[np.uint8]:
    ramp = np.linspace(60, 150, WIDTH)[None, :, None] + (25 * (camera % 4), 10, -20)
    return np.broadcast_to(ramp, (HEIGHT, WIDTH, 3)).astype(np.uint8)


class Noise:
    """Noise like a camera sensor's; it is drawn once, and each frame uses another part of it, which costs little."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._drawn = self._random.integers(0, 7, HEIGHT * WIDTH * 3 + 65536, np.uint8)

    def add(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A noisy copy, up to 6 brighter."""
        start = int(self._random.integers(65536))
        return cv2.add(image, self._drawn[start : start + image.size].reshape(image.shape))


class FakeCapture:
    """What `cv2.VideoCapture` does for LeRobot; no subclass of it: freeing one's instance breaks the memory."""

    def __init__(self, source: int | str | Path, backend: int = 0) -> None:
        digits = re.search(r"\d+$", str(source))
        self._camera = int(digits[0]) if digits else 0
        self._faults = CameraFaults(Path(os.environ[CAMERAS_VARIABLE]))
        registers = os.environ.get(REGISTERS_VARIABLE)
        self._registers = Registers(Path(registers)) if registers else None
        self._noise = Noise(self._camera)
        while self._faults.fault(self._camera) == "opening":
            time.sleep(0.01)
        self._opened_at = time.perf_counter()
        self._is_open = self._faults.fault(self._camera) != "closed"
        self._last: NDArray[np.uint8] | None = None

    def isOpened(self) -> bool:  # noqa: N802 # OpenCV's name
        return self._is_open and self._faults.fault(self._camera) != "closed"

    def release(self) -> None:
        self._is_open = False

    def getBackendName(self) -> str:  # noqa: N802
        return "FAKE"

    def set(self, prop: int, value: float) -> bool:
        return SETTINGS.get(prop, value) == value

    def get(self, prop: int) -> float:
        return float(SETTINGS.get(prop, 0))

    def read(self, image: Any = None) -> tuple[bool, NDArray[np.uint8] | None]:
        """Wait for the next frame, which comes at its time whether someone reads it or not."""
        fault = self._faults.fault(self._camera)
        period = SLOW_S if fault == "slow" else 1 / FPS
        time.sleep(period - (time.perf_counter() - self._opened_at) % period)
        while fault == "blocks":  # also after it was released, as in some drivers
            time.sleep(0.01)
            fault = self._faults.fault(self._camera)
        if fault in ("fails", "closed") or not self._is_open:
            return False, None
        if fault != "frozen" or self._last is None:
            positions = self._registers.positions() if self._registers else ()
            self._last = self._noise.add(picture(self._camera, time.perf_counter(), positions))
        return True, self._last.copy()


def install() -> None:
    """Use `FakeCapture` in this process."""
    cv2.VideoCapture = FakeCapture
