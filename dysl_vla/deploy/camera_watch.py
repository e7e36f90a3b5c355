"""Finds cameras that have frozen: they show the very same image for long, although the robot has moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.errors import SafetyStop
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, FloatArray, ImageArray, PolicySpec

MOVED = 0.1
"""Change of the state, in standard deviations of the demonstrated states, that a working camera must show."""


@dataclass(frozen=True)
class LastFrame:
    """The image that a camera shows, when it was first shown, and the normalised state at that time."""

    image: ImageArray
    state: FloatArray
    since: float


class CameraWatch:
    """Watches the cameras of one run.

    Args:
        spec: The policy's specification, which names the cameras.
        frozen_s: Seconds for which a camera may show the very same image while the robot moves.
    """

    def __init__(self, spec: PolicySpec, frozen_s: float) -> None:
        self._spec, self._frozen_s = spec, frozen_s
        self._frames: dict[str, LastFrame] = {}

    def check(self, timed: TimedObservation) -> None:
        """Compare the images with those before.

        Args:
            timed: The latest observation, which fits the policy.

        Raises:
            SafetyStop: A camera has frozen.
        """
        state = self._spec.state_normalisation.apply(timed.observation[STATE_KEY])
        for camera in self._spec.cameras:
            image = timed.observation[IMAGE_PREFIX + camera]
            frame = self._frames.get(camera)
            if frame is None or not np.array_equal(frame.image, image):
                self._frames[camera] = LastFrame(image, state, timed.timestamp)
                continue
            seconds = timed.timestamp - frame.since
            if seconds >= self._frozen_s and np.abs(state - frame.state).max() > MOVED:
                raise SafetyStop(
                    f"{camera}: the camera has shown the very same image for {seconds:.1f} s, and the robot has moved "
                    "meanwhile; check the camera."
                )
