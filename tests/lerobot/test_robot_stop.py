"""Stopping a robot of LeRobot releases its motors, whatever is broken or under way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.deploy.lerobot_motors import TURN_S
from dysl_vla.deploy.lerobot_robot import LeRobotRobot
from dysl_vla.deploy.stopping import WatchedRobot
from dysl_vla.errors import RobotFault
from tests.lerobot.arms import CAMERA, NAMES, OFF, ON, STOP_S, Call, eventually, stuck, timed
from tests.lerobot.conftest import EXAMPLE, FRONT, WRIST
from tests.lerobot.fake_cameras import CameraFaults
from tests.lerobot.feetech_bus import TORQUE, Bus, calibration, running_bus


@pytest.mark.parametrize("fault", ["closed", "blocks", "fails"])
def test_a_broken_camera_does_not_keep_the_motors_on(
    robot: LeRobotRobot, bus: Bus, cameras: CameraFaults, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cameras.set_fault(FRONT, fault)
    time.sleep(0.1)
    stopping = Call(robot.stop)
    eventually(lambda: bus.registers.torques() == OFF, 1.0)  # before anything waits for the camera
    assert stopping.end() is None
    assert "torque" not in capfd.readouterr().err


def test_motors_that_do_not_answer_are_named_and_the_others_are_released(
    robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    bus.registers.set_fault("mute", motors=[1, 4])
    with pytest.raises(RobotFault, match="shoulder_pan, wrist_flex may still hold torque"):
        robot.stop()
    assert bus.registers.torques() == [1, 0, 0, 1, 0, 0]
    assert not robot._robot.bus.is_connected
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("robot:")]
    assert line.startswith("robot: shoulder_pan, wrist_flex may still hold torque")
    assert line.endswith("switch the arm's power off.")


def test_stopping_again_does_not_forget_motors_that_hold_torque_and_tries_again(robot: LeRobotRobot, bus: Bus) -> None:
    bus.registers.set_fault("mute", motors=[4])
    for _ in range(2):
        with pytest.raises(RobotFault, match="robot: wrist_flex may still hold torque"):
            robot.stop()
    bus.registers.set_fault("none")
    robot.stop()
    assert bus.registers.torques() == OFF
    assert not robot._robot.bus.is_connected


def test_a_robot_that_could_not_be_connected_is_reported_as_holding_torque(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus
) -> None:
    bus.registers.write(2, TORQUE, 1)
    bus.registers.set_fault("mute", motors=[2])
    watched = WatchedRobot(make(robot_file))
    assert "shoulder_lift may still hold torque" in watched.run(lambda: watched.connect(30.0)).problem
    assert "Missing motor IDs" in str(watched.fault)


@pytest.mark.parametrize("fault", ["corrupt", "late", "refuse", "ignore"])
def test_faulty_answers_do_not_keep_motors_on_unless_they_refuse(
    robot: LeRobotRobot, bus: Bus, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bus.registers.set_fault(fault, delay_s=0.2)
    assert timed(robot.stop) < STOP_S
    assert bus.registers.torques() == (ON if fault in ("refuse", "ignore") else OFF)
    if fault == "late":  # all at once, before any answer
        times = [event["t"] for event in bus.events("torque")[-6:]]
        assert max(times) - min(times) < 0.1
    else:
        assert "robot: shoulder_pan, shoulder_lift" in capfd.readouterr().err


def test_motors_are_released_where_the_system_gives_no_more_threads(
    robot: LeRobotRobot, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        robot.stop()
    assert bus.registers.torques() == OFF


def test_a_fault_that_passes_while_stopping_leaves_no_motor_on(
    robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    bus.registers.set_fault("mute")
    stopping = Call(robot.stop)
    time.sleep(TURN_S + 0.5)
    assert bus.registers.torques() == ON
    bus.registers.set_fault("none")
    assert stopping.end() is None
    assert bus.registers.torques() == OFF
    assert "torque" not in capfd.readouterr().err


def test_a_pulled_cable_is_reported(robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]) -> None:
    bus.unplug()
    with pytest.raises(RobotFault, match="could not read"):
        robot.observe(0.0)
    assert timed(robot.stop) < STOP_S
    assert bus.registers.torques() == ON  # they have a supply of their own
    assert (
        "shoulder_pan, shoulder_lift, elbow_flex, wrist_flex, wrist_roll, gripper may still" in capfd.readouterr().err
    )


def test_a_cable_that_is_put_back_while_stopping_leaves_no_motor_on(
    robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    bus.unplug()
    stopping = Call(robot.stop)
    time.sleep(0.3)
    bus.plug()
    assert stopping.end() is None
    assert bus.registers.torques() == OFF
    assert "torque" not in capfd.readouterr().err


def test_a_second_ctrl_c_does_not_keep_the_motors_on(robot: LeRobotRobot, bus: Bus) -> None:
    bus.registers.set_fault("mute")
    interrupt = threading.Timer(TURN_S + 0.2, os.kill, (os.getpid(), signal.SIGINT))
    repair = threading.Timer(TURN_S + 0.6, bus.registers.set_fault, ("none",))
    interrupt.start()
    repair.start()
    robot.stop()
    assert not interrupt.is_alive()
    assert bus.registers.torques() == OFF


def test_stopping_does_not_wait_for_an_observation_that_a_camera_blocks(
    robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    with stuck(robot, "wrist"):
        observing = Call(robot.observe, 0.0)
        eventually(robot._turn.locked)
        stopping = Call(robot.stop)
        eventually(lambda: bus.registers.torques() == OFF, TURN_S + 1.0)
        assert stopping.end() is None
    assert "it was stopped" in str(observing.end())
    assert bus.registers.torques() == OFF
    assert "torque" not in capfd.readouterr().err


def test_stopping_does_not_wait_for_an_observation_of_mute_motors(patient: LeRobotRobot, bus: Bus) -> None:
    bus.registers.set_fault("mute", motors=[6])
    observing = Call(patient.observe, 0.0)
    eventually(patient._turn.locked)
    assert timed(patient.stop) < STOP_S
    assert bus.registers.torques() == [0, 0, 0, 0, 0, 1]
    assert "it was stopped" in str(observing.end())


def test_a_command_that_was_blocked_does_not_move_the_arm_after_stopping(
    patient: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    action = patient.observe(0.0).observation["observation.state"] + np.float32(10)
    bus.registers.set_fault("late", motors=[6], delay_s=0.3)
    acting = Call(patient.act, action)
    eventually(patient._turn.locked)
    stopping = Call(patient.stop)
    time.sleep(TURN_S + 0.3)
    bus.registers.set_fault("none")
    assert stopping.end() is None
    assert "it was stopped" in str(acting.end())
    time.sleep(0.1)
    assert bus.registers.torques() == OFF
    assert not bus.events("goal")
    assert "torque" not in capfd.readouterr().err


@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.3])
def test_a_connection_that_comes_back_after_stopping_is_undone(
    make: Callable[[Path], LeRobotRobot],
    write_robot: Callable[..., Path],
    bus: Bus,
    cameras: CameraFaults,
    seconds: float,
) -> None:
    bus.registers.write(3, TORQUE, 1)  # left over from before
    camera = {"type": "opencv", "width": 640, "height": 480, "fps": 30, "warmup_s": 1}
    path = write_robot({"cameras": {"front": camera | {"index_or_path": 0}, "wrist": camera | {"index_or_path": 2}}})
    robot = make(path)
    shots = list(robot._robot.cameras.values())
    connecting = Call(robot.connect, 30.0)
    time.sleep(seconds)
    assert timed(robot.stop) < STOP_S
    stopped = time.perf_counter()
    assert "it was stopped" in str(connecting.end())
    assert not [event for event in bus.events("torque") if event["torque"] and event["t"] > stopped]
    assert bus.registers.torques() == OFF
    eventually(lambda: not any(shot.is_connected for shot in shots))
    assert not robot._robot.bus.is_connected


def test_what_opens_after_stopping_is_closed_again(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus, cameras: CameraFaults
) -> None:
    cameras.set_fault(WRIST, "opening")
    robot = make(robot_file)
    shots = list(robot._robot.cameras.values())
    connecting = Call(robot.connect, 30.0)
    eventually(lambda: shots[0].is_connected)
    assert timed(robot.stop) < STOP_S
    cameras.set_fault(WRIST, "none")
    assert "it was stopped" in str(connecting.end())
    assert not any(shot.is_connected for shot in shots)
    assert bus.registers.torques() == OFF


def test_a_camera_that_does_not_open_is_reported_and_motors_are_released(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus, cameras: CameraFaults
) -> None:
    bus.registers.write(2, TORQUE, 1)
    cameras.set_fault(WRIST, "closed")
    robot = make(robot_file)
    with pytest.raises(RobotFault, match=r"could not connect \(ConnectionError: Failed to open OpenCVCamera\(2\)"):
        robot.connect(30.0)
    assert bus.registers.torques() == OFF


def test_a_missing_motor_is_reported_and_the_others_are_released(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus
) -> None:
    bus.registers.write(2, TORQUE, 1)
    bus.registers.set_fault("mute", motors=[6])
    with pytest.raises(RobotFault, match="Missing motor IDs: - 6"):
        make(robot_file).connect(30.0)
    assert bus.registers.torques() == OFF


def test_a_port_that_is_not_there_is_reported(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    robot = make(write_robot({"port": "/dev/nothing"}))
    with pytest.raises(RobotFault, match="Could not connect on port '/dev/nothing'"):
        robot.connect(30.0)
    assert "torque" not in capfd.readouterr().err  # none was switched on


def test_motors_keep_their_torque_where_the_file_says_so(
    make: Callable[[Path], LeRobotRobot],
    write_robot: Callable[..., Path],
    bus: Bus,
    capfd: pytest.CaptureFixture[str],
) -> None:
    robot = make(write_robot({"disable_torque_on_disconnect": False}))
    robot.connect(30.0)
    assert "disable_torque_on_disconnect is false: motors keep their torque" in capfd.readouterr().err
    robot.stop()
    assert bus.registers.torques() == ON
    assert capfd.readouterr().err == ""
    assert not robot._robot.bus.is_connected


def test_both_arms_of_a_bimanual_robot_are_released_although_one_does_not_answer(
    make: Callable[[Path], LeRobotRobot],
    tmp_path: Path,
    bus: Bus,
    cameras: CameraFaults,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shot = {**CAMERA, "warmup_s": 0}
    document = json.loads(EXAMPLE.read_text())
    for side in ("left", "right"):
        (tmp_path / f"pair_{side}.json").write_text(json.dumps(calibration()))
    with running_bus(tmp_path, "right") as right:
        document["robot"] = {
            "type": "bi_so_follower",
            "id": "pair",
            "calibration_dir": str(tmp_path),
            "left_arm_config": {"port": bus.port, "cameras": {"wrist": shot}},
            "right_arm_config": {"port": right.port, "cameras": {"wrist": {**shot, "index_or_path": 2}}},
            "cameras": {"front": {**shot, "index_or_path": 4}},
        }
        names = [f"{side}_{name}" for side in ("left", "right") for name in NAMES]
        document |= {"action_low": dict.fromkeys(names, -180), "action_high": dict.fromkeys(names, 180)}
        document["rename"] = {"left_wrist": "hand"}
        path = tmp_path / "robot.json"
        path.write_text(json.dumps(document))
        robot = make(path)
        assert set(robot.embodiment.cameras) == {"hand", "right_wrist", "front"}
        robot.connect(30.0)
        assert bus.registers.torques() == right.registers.torques() == ON
        robot.observe(time.perf_counter())
        cameras.set_fault(WRIST, "blocks")
        time.sleep(0.1)
        with pytest.raises(RobotFault, match="camera right_wrist has shown"):
            robot.observe(time.perf_counter())
        cameras.set_fault(FRONT, "closed")
        bus.registers.set_fault("mute")
        assert timed(robot.stop) < STOP_S
        assert right.registers.torques() == OFF
        assert not robot._robot.left_arm.bus.is_connected
        assert not robot._robot.right_arm.bus.is_connected
        line = capfd.readouterr().err
        assert "left_wrist_roll, left_gripper may still hold" in line
        assert "right" not in line
