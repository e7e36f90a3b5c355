"""CAN motors count as released when they confirm it, not when LeRobot's driver has sent the command."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dysl_vla.deploy import lerobot_motors
from dysl_vla.deploy.lerobot_motors import Motors
from dysl_vla.deploy.lerobot_robot import LeRobotRobot
from dysl_vla.deploy.stopping import stop_robot
from dysl_vla.errors import RobotFault
from tests.lerobot.can_motors import CanMotors, install

JOINTS = [f"joint_{number}" for number in range(1, 8)] + ["gripper"]
NAMES = [f"{joint}.pos" for joint in JOINTS]


@pytest.fixture(autouse=True)
def short_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Motors that do not answer are given up sooner."""
    monkeypatch.setattr(lerobot_motors, "RELEASE_S", 0.3)


@pytest.fixture
def can_motors(monkeypatch: pytest.MonkeyPatch) -> CanMotors:
    """The motors of an OpenArm."""
    return install(monkeypatch, importlib.import_module("lerobot.motors.damiao.damiao"))


@pytest.fixture
def openarm(make: Callable[[Path], LeRobotRobot], tmp_path: Path, can_motors: CanMotors) -> LeRobotRobot:
    """An OpenArm, not connected."""
    calibration = {"id": 1, "drive_mode": 0, "homing_offset": 0, "range_min": -90, "range_max": 90}
    (tmp_path / "arm.json").write_text(json.dumps(dict.fromkeys(JOINTS, calibration)))
    described = {"type": "openarm_follower", "id": "arm", "port": "can0", "calibration_dir": str(tmp_path)}
    path = tmp_path / "openarm.json"
    bounds = {"action_low": dict.fromkeys(NAMES, -180), "action_high": dict.fromkeys(NAMES, 180)}
    path.write_text(json.dumps({"robot": described, "rate_hz": 30, **bounds}))
    return make(path)


def test_motors_that_confirm_are_released(
    openarm: LeRobotRobot, can_motors: CanMotors, capfd: pytest.CaptureFixture[str]
) -> None:
    openarm.connect(30.0)
    assert can_motors.torques() == [True] * 8
    openarm.stop()
    assert can_motors.torques() == [False] * 8
    assert "torque" not in capfd.readouterr().err
    openarm.stop()  # it has succeeded


@pytest.mark.parametrize("fault", ["is_mute", "is_stubborn"])
def test_a_motor_that_does_not_confirm_may_hold_torque_until_it_does(
    openarm: LeRobotRobot, can_motors: CanMotors, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    openarm.connect(30.0)
    setattr(can_motors.motors[2], fault, True)
    for _ in range(2):
        with pytest.raises(RobotFault, match="robot: joint_2 may still hold torque"):
            openarm.stop()
    assert can_motors.torques() == [False, True, *[False] * 6]
    assert capfd.readouterr().err.count("robot: joint_2 may still hold torque") == 2
    setattr(can_motors.motors[2], fault, False)
    openarm.stop()
    assert can_motors.torques() == [False] * 8
    assert not openarm._robot.bus.is_connected


def test_motors_that_a_failed_handshake_switched_on_are_released(openarm: LeRobotRobot, can_motors: CanMotors) -> None:
    can_motors.motors[8].is_mute = True
    with pytest.raises(RobotFault, match=r"could not connect .*did not respond: \['gripper'\]"):
        openarm.connect(30.0)
    assert can_motors.torques() == [False] * 8
    assert "gripper may still hold torque" in stop_robot(openarm).problem


def test_motors_on_a_bus_that_was_never_opened_are_not_reported(
    openarm: LeRobotRobot, can_motors: CanMotors, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise OSError("No such device")

    module: Any = importlib.import_module("lerobot.motors.damiao.damiao")
    monkeypatch.setattr(module.can, "interface", SimpleNamespace(Bus=refuse))
    with pytest.raises(RobotFault, match=r"could not connect .*No such device"):
        openarm.connect(30.0)
    assert stop_robot(openarm).problem == ""
    assert "torque" not in capfd.readouterr().err


def test_a_robstride_motor_must_answer_after_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("lerobot.motors.robstride.robstride")
    can_motors = install(monkeypatch, module)
    motors = {}
    for number, name in enumerate(("a", "b"), start=1):
        motors[name] = importlib.import_module("lerobot.motors").Motor(number, "O2", "degrees")
        motors[name].recv_id, motors[name].motor_type_str = 16 + number, "O2"
    bus = module.RobstrideMotorsBus("can0", motors)
    bus.connect()
    bus.enable_torque()
    group = Motors("left_", None, bus)
    bus.read("Present_Position", "b")  # what was answered before, and is kept for some time, confirms nothing
    can_motors.answers.append(SimpleNamespace(arbitration_id=18, data=bytes([18, *[0] * 7])))
    can_motors.motors[2].is_mute = True
    group.release()
    assert group.held == ["left_b"]
    assert can_motors.torques()[:2] == [False, True]


def test_a_driver_that_cannot_confirm_leaves_motors_that_may_hold_torque() -> None:
    bus = SimpleNamespace(motors={"a": None}, is_connected=True, disable_torque=lambda motor: None)
    group = Motors("", None, bus)
    began = time.perf_counter()
    group.release()
    assert group.held == ["a"]
    assert "cannot confirm" in group.error
    assert time.perf_counter() - began < 2.0
