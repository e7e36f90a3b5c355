"""A world without a simulator: a dot on a plane that must reach, or push against, a mark.

It speaks everything that a real environment speaks (cameras, state, instruction, expert, success), in microseconds, so
that tests exercise the whole package without MuJoCo. It is not for measuring any method.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dysl_vla.envs.base import ManipulationEnv, check_cameras
from dysl_vla.errors import ConfigError
from dysl_vla.types import EmbodimentSpec, FloatArray, ImageArray

TASKS = {"reach": "move the dot to the mark", "linger": "move the dot to the mark and stay there"}
HORIZON = 40
DEFAULT_CAMERAS = {"top": (32, 32), "wrist": (16, 16)}
STEP = 0.1
REACHED = 0.15
LINGER_STEPS = 3


class MockEnv(ManipulationEnv):
    """One task of the mock world.

    Args:
        task: "reach" or "linger".
        cameras: Camera name, `top` or `wrist`, to (height, width).
        render_mode: See `ManipulationEnv`.

    Raises:
        ConfigError: The task or a camera is unknown.
    """

    def __init__(
        self, task: str, cameras: Mapping[str, tuple[int, int]] | None = None, *, render_mode: str = "rgb_array"
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"unknown mock task {task!r}; there are: {', '.join(TASKS)}.")
        sizes = dict(cameras or DEFAULT_CAMERAS)
        check_cameras(sizes, tuple(DEFAULT_CAMERAS))
        spec = EmbodimentSpec(
            cameras=sizes,
            state_names=("x", "y"),
            action_names=("dx", "dy", "gripper"),
            action_low=(-1.0,) * 3,
            action_high=(1.0,) * 3,
            rate_hz=20.0,
        )
        super().__init__(task, TASKS[task], spec, HORIZON, render_mode)
        self._dot = np.zeros(2)
        self._mark = np.zeros(2)
        self._lingered = 0

    def _reset_world(self, rng: np.random.Generator) -> None:
        self._dot, self._mark = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        self._lingered = 0

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        self._dot = np.clip(self._dot + STEP * action[:2], -1, 1)
        distance = float(np.linalg.norm(self._dot - self._mark))
        self._lingered = self._lingered + 1 if distance < REACHED else 0
        return -distance, self._lingered >= (1 if self.task == "reach" else LINGER_STEPS)

    def _state(self) -> FloatArray:
        return self._dot.astype(np.float32)

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        image = np.full((height, width, 3), 40, np.uint8)
        centre = self._dot if camera == "wrist" else np.zeros(2)
        for point, channel in ((self._mark, 0), (self._dot, 1)):
            row, column = (((point - centre) + 1) / 2 * (np.array([height, width]) - 1)).round().astype(int)
            image[max(row - 1, 0) : max(row + 2, 0), max(column - 1, 0) : max(column + 2, 0), channel] = 255
        return image

    def expert_action(self) -> FloatArray:
        """The action that moves the dot straight to the mark."""
        return np.clip(np.array([*((self._mark - self._dot) / STEP), -1.0], np.float32), -1, 1)
