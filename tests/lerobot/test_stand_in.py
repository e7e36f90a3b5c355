"""The stand-in is an SO-101 to LeRobot's own driver and recorder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed, it needs Python 3.12: `make test-lerobot` runs these")

import numpy as np
from lerobot.cameras.opencv import OpenCVCameraConfig
from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

from tests.lerobot.conftest import FRONT, WRIST
from tests.lerobot.fake_cameras import CameraFaults
from tests.lerobot.feetech_bus import IDS, TORQUE, Bus, calibration
from tests.lerobot.recorder import INSTRUCTION, record


@pytest.fixture
def arm(tmp_path: Path, bus: Bus, cameras: CameraFaults) -> Iterator[Any]:
    """LeRobot's own robot, connected."""
    (tmp_path / "arm.json").write_text(json.dumps(calibration()))
    config = SO101FollowerConfig(
        id="arm",
        calibration_dir=tmp_path,
        port=bus.port,
        cameras={
            name: OpenCVCameraConfig(index_or_path=number, width=640, height=480, fps=30, warmup_s=0)
            for name, number in (("front", FRONT), ("wrist", WRIST))
        },
    )
    robot = SO101Follower(config)
    try:
        robot.connect(calibrate=False)
        yield robot
    finally:
        cameras.set_fault(FRONT, "none")
        bus.registers.set_fault("none")
        for camera in robot.cameras.values():
            with suppress(ConnectionError):
                camera.disconnect()
        robot.bus.port_handler.closePort()


def test_lerobots_driver_moves_it_and_sees_it_move(arm: Any, bus: Bus) -> None:
    assert arm.is_calibrated
    assert bus.registers.torques() == [1] * 6
    before = arm.get_observation()
    arm.send_action({name: before[name] + 20 for name in arm.action_features})
    deadline = time.perf_counter() + 5
    while len(bus.events("goal")) < 6 or bus.registers.positions() != bus.registers.goals():
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # for a picture of it
    after = arm.get_observation()
    for name in arm.action_features:
        assert after[name] == pytest.approx(before[name] + 20, abs=0.2)
    assert np.abs(after["front"].astype(int) - before["front"]).max() > 100
    assert [event["motor"] for event in bus.events("goal")] == list(IDS)


def test_without_torque_it_stays_and_a_goal_switches_the_torque_on(arm: Any, bus: Bus) -> None:
    arm.bus.disable_torque()
    bus.registers.write(1, (42, 2), 3000)  # not through the bus: no torque
    before = bus.registers.positions()
    time.sleep(0.1)
    assert bus.registers.positions() == before
    arm.bus.sync_write("Goal_Position", {"gripper": 60.0})
    time.sleep(0.05)
    assert bus.registers.torques() == [0, 0, 0, 0, 0, 1]
    assert bus.events("torque")[-1]["torque"] == 1


@pytest.mark.parametrize("fault", ["mute", "corrupt", "refuse"])
def test_a_faulty_motor_is_an_error_of_lerobots(arm: Any, bus: Bus, fault: str) -> None:
    bus.registers.set_fault(fault, motors=[4])
    arm.bus.disable_torque("shoulder_pan")
    with pytest.raises((ConnectionError, RuntimeError)):
        arm.bus.disable_torque("wrist_flex")
    assert bus.registers.read(4, TORQUE) == (fault != "corrupt")  # that one is done, and not understood
    bus.registers.set_fault("none")
    arm.bus.disable_torque("wrist_flex")
    assert bus.registers.read(4, TORQUE) == 0


def test_late_answers_come_late_and_the_port_can_be_opened_again(arm: Any, bus: Bus) -> None:
    bus.registers.set_fault("late", delay_s=0.03)
    began = time.perf_counter()
    arm.bus.read("Present_Position", "gripper")
    assert time.perf_counter() - began >= 0.03
    bus.registers.set_fault("none")
    arm.bus.disconnect()
    arm.bus.connect()
    arm.bus.read("Present_Position", "gripper")


@pytest.mark.parametrize("fault", ["blocks", "fails", "closed"])
def test_a_faulty_camera_is_an_error_of_lerobots(arm: Any, cameras: CameraFaults, fault: str) -> None:
    cameras.set_fault(FRONT, fault)
    time.sleep(0.6)
    with pytest.raises(Exception, match=r"OpenCVCamera\(0\)|not connected"):
        arm.get_observation()


def test_frames_are_new_at_their_rate_unless_it_is_slow_or_frozen(arm: Any, cameras: CameraFaults) -> None:
    def times(seconds: float) -> set[float]:
        seen, end = set(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            seen.add(arm.cameras["front"].latest_timestamp)
            time.sleep(0.002)
        return seen

    assert len(times(0.5)) > 8
    first, second = arm.cameras["wrist"].async_read(), arm.cameras["wrist"].async_read()
    assert (first != second).any()
    cameras.set_fault(FRONT, "frozen")
    time.sleep(0.1)
    first, second = arm.cameras["front"].async_read(), arm.cameras["front"].async_read()
    assert (first == second).all()
    cameras.set_fault(FRONT, "slow")
    time.sleep(0.1)
    assert len(times(1.0)) <= 4


def test_a_command_has_the_cameras_too(command_environment: dict[str, str]) -> None:
    code = "import cv2; print(cv2.VideoCapture('/dev/video2').read()[1].shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=command_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(480, 640, 3)"


def test_the_bus_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.lerobot.feetech_bus import running_bus\n"
        "with running_bus(Path(sys.argv[1])) as bus: print(bus.process.pid, flush=True); import os; os._exit(0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    pid, deadline = int(done.stdout), time.perf_counter() + 5
    while Path(f"/proc/{pid}").exists() and time.perf_counter() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_recorder_writes_lerobots_dataset(tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    root = record(tmp_path / "data", episodes=2, seconds=0.4)
    dataset = LeRobotDataset("local/so101", root=root, video_backend="pyav")
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (2, 24, 30)
    frame = dataset[5]
    assert frame["task"] == INSTRUCTION
    assert tuple(frame["observation.images.front"].shape) == (3, 480, 640)
    assert dataset.features["observation.images.wrist"]["info"]["video.codec"] == "av1"
    assert dataset.features["action"]["names"] == [f"{name}.pos" for name in calibration()]
