"""What tests of LeRobot's robots share: making them, calling them on threads, waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dysl_vla.deploy.lerobot_motors import RELEASE_S, TURN_S
from dysl_vla.deploy.lerobot_robot import CLOSE_S, LeRobotRobot
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import RobotFault
from tests.lerobot.feetech_bus import MOTORS

CAMERA = {"type": "opencv", "index_or_path": 0, "width": 640, "height": 480, "fps": 30}


NAMES = tuple(f"{motor}.pos" for motor in MOTORS)
STOP_S = TURN_S + RELEASE_S + 4 * CLOSE_S + 1.0
"""More than stopping may take, and far more than it takes where nothing is stuck."""
OFF, ON = [0] * 6, [1] * 6


def made(path: Path) -> LeRobotRobot:
    robot = make_robot(f"lerobot:{path}", {})
    assert isinstance(robot, LeRobotRobot)
    return robot


def eventually(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.perf_counter() + seconds
    while not is_so():
        assert time.perf_counter() < end
        time.sleep(0.005)


class Call:
    """A call that is made on a thread of its own."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.error: Exception | None = None

        def work() -> None:
            try:
                call(*arguments)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def end(self) -> Exception | None:
        self.thread.join(10.0)
        assert not self.thread.is_alive()
        return self.error


@contextmanager
def stuck(robot: LeRobotRobot, camera: str) -> Iterator[None]:
    """LeRobot waits for this camera's image without end."""
    with robot._robot.cameras[camera].frame_lock:
        yield


def timed(call: Callable[[], object]) -> float:
    """Duration of a call, even if it raises in the end that motors may still hold torque."""
    began = time.perf_counter()
    with suppress(RobotFault):
        call()
    return time.perf_counter() - began
