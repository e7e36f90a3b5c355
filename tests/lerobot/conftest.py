"""An SO-101 that is not there, for LeRobot's own driver: see `feetech_bus` and `fake_cameras`."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dysl_vla.deploy.lerobot_robot import LeRobotRobot
from dysl_vla.errors import RobotFault
from tests.lerobot.arms import made
from tests.lerobot.feetech_bus import Bus, calibration, running_bus

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
EXAMPLE = REPOSITORY / "launch" / "so101.json"
FRONT, WRIST = 0, 2
"""Numbers of the example's cameras."""

if importlib.util.find_spec("lerobot") is None:  # one module says why it is skipped; the others need not repeat it
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_stand_in.py"]
else:
    # LeRobot reads the port, and then the clock: where others take this process's time in between, an answer that is
    # there counts as missing after 50 ms
    with suppress(OSError):
        os.nice(-15)
    from tests.lerobot.fake_cameras import CAMERAS_VARIABLE, REGISTERS_VARIABLE, CameraFaults, FakeCapture


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """Six servos on a serial port."""
    with running_bus(tmp_path) as running:
        yield running


@pytest.fixture
def cameras(tmp_path: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> CameraFaults:
    """OpenCV's cameras are fake, and show the arm."""
    monkeypatch.setenv(CAMERAS_VARIABLE, str(tmp_path / "cameras"))
    monkeypatch.setenv(REGISTERS_VARIABLE, str(bus.registers_file))
    monkeypatch.setattr("cv2.VideoCapture", FakeCapture)
    return CameraFaults(tmp_path / "cameras")


@pytest.fixture
def command_environment(cameras: CameraFaults) -> dict[str, str]:
    """Environment of commands that are started (`python -m dysl_vla.cli control ...`): their cameras are fake, too."""
    folders = (str(HERE / "site"), str(REPOSITORY), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


@pytest.fixture
def write_robot(tmp_path: Path, bus: Bus, cameras: CameraFaults) -> Callable[..., Path]:
    """Makes launch/so101.json for the stand-in, with other fields if given: of the file, and `robot`'s as a mapping."""

    def write(robot: dict[str, Any] | None = None, **others: Any) -> Path:
        document = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        document["robot"] |= {"port": bus.port, "calibration_dir": str(tmp_path)}
        for camera in document["robot"]["cameras"].values():
            camera["warmup_s"] = 0  # it has frames at once
        document["robot"] |= robot or {}
        calibrated = tmp_path / f"{document['robot']['id']}.json"
        if not calibrated.exists():
            calibrated.write_text(json.dumps(calibration()), encoding="utf-8")
        path = tmp_path / "robot.json"
        path.write_text(json.dumps(document | others), encoding="utf-8")
        return path

    return write


@pytest.fixture
def robot_file(write_robot: Callable[..., Path]) -> Path:
    """launch/so101.json for the stand-in."""
    return write_robot()


@pytest.fixture
def make(bus: Bus, cameras: CameraFaults) -> Iterator[Callable[[Path], LeRobotRobot]]:
    """Makes robots; in the end, faults are switched off and the robots are stopped."""
    robots = []

    def make_one(path: Path) -> LeRobotRobot:
        robots.append(made(path))
        return robots[-1]

    yield make_one
    bus.registers.set_fault("none")
    for camera in (FRONT, WRIST):
        cameras.set_fault(camera, "none")
    for robot in robots:
        with suppress(RobotFault):
            robot.stop()


@pytest.fixture
def robot(make: Callable[[Path], LeRobotRobot], robot_file: Path) -> LeRobotRobot:
    """The example's robot, connected."""
    robot = make(robot_file)
    robot.connect(30.0)
    return robot


@pytest.fixture
def patient(make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path]) -> LeRobotRobot:
    """A robot, connected, that reads the motors again and again where they do not answer, also before each command."""
    robot = make(write_robot({"num_read_retries": 1000, "max_relative_target": 50.0}))
    robot.connect(30.0)
    return robot
