"""`lerobot:FILE.json` with LeRobot's own driver of an SO-101, against the stand-in."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.deploy import lerobot_robot
from dysl_vla.deploy.lerobot_robot import CLOSE_S, FRAME_S, RELEASE_S, TURN_S, LeRobotRobot
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import ConfigError, MissingExtraError, RobotFault
from tests.lerobot.conftest import EXAMPLE, FRONT, WRIST
from tests.lerobot.fake_cameras import CameraFaults
from tests.lerobot.feetech_bus import IDS, MIN_LIMIT, MOTORS, TORQUE, Bus, calibration, running_bus

NAMES = tuple(f"{motor}.pos" for motor in MOTORS)
STOP_S = TURN_S + RELEASE_S + 4 * CLOSE_S + 1.0
"""More than stopping may take; far more than it does where nothing is stuck."""
OFF, ON = [0] * 6, [1] * 6


def made(path: Path) -> LeRobotRobot:
    robot = make_robot(f"lerobot:{path}", {})
    assert isinstance(robot, LeRobotRobot)
    return robot


@pytest.fixture
def make(bus: Bus, cameras: CameraFaults) -> Iterator[Callable[[Path], LeRobotRobot]]:
    """Makes robots; in the end, faults are off and they are stopped."""
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
    """The example's, connected."""
    robot = make(robot_file)
    robot.connect(30.0)
    return robot


@pytest.fixture
def patient(make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path]) -> LeRobotRobot:
    """Connected; reads the motors again and again where they do not answer, also before each command."""
    robot = make(write_robot({"num_read_retries": 1000, "max_relative_target": 50.0}))
    robot.connect(30.0)
    return robot


def eventually(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.perf_counter() + seconds
    while not is_so():
        assert time.perf_counter() < end
        time.sleep(0.005)


class Call:
    """One that is made on a thread of its own."""

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
    """LeRobot waits for this camera's picture without end."""
    with robot._robot.cameras[camera].frame_lock:
        yield


def timed(call: Callable[[], object]) -> float:
    """How long it takes, also where it says in the end that motors may still hold torque."""
    began = time.perf_counter()
    with suppress(RobotFault):
        call()
    return time.perf_counter() - began


def test_the_example_of_the_documentation_is_the_file_and_an_so101(
    tmp_path: Path, write_robot: Callable[..., Path]
) -> None:
    text = lerobot_robot.__doc__ or ""
    document = json.loads(text[text.index("    {\n") : text.index("\n    }\n") + 6])
    assert document == json.loads(EXAMPLE.read_text())
    (tmp_path / "documented.json").write_text(json.dumps(document))
    for path in (tmp_path / "documented.json", EXAMPLE, write_robot()):
        embodiment = made(path).world
        assert embodiment.cameras == {"front": (480, 640), "wrist": (480, 640)}
        assert embodiment.state_names == embodiment.action_names == NAMES
        assert (embodiment.action_low[3], embodiment.action_high[5], embodiment.rate_hz) == (-100.0, 100.0, 30.0)


def test_it_is_read_commanded_and_stopped_without_torque(robot: LeRobotRobot, bus: Bus) -> None:
    assert bus.registers.torques() == ON
    assert robot.hold(None) is None
    after = time.perf_counter()
    reading = robot.observe(after)
    assert after < reading.timestamp < time.perf_counter()
    state = reading.observation["observation.state"]
    assert state.tolist() == pytest.approx([0, 0, 0, 0, 0, 50], abs=0.1)
    assert reading.observation["observation.images.front"].shape == (480, 640, 3)
    held = robot.hold(None)
    assert held is not None
    assert held.tolist() == state.tolist()
    robot.act(state + np.float32(10))
    eventually(lambda: len(bus.events("goal")) == 6 and bus.registers.positions() == bus.registers.goals())
    moved = robot.observe(time.perf_counter()).observation["observation.state"]
    assert moved.tolist() == pytest.approx((state + 10).tolist(), abs=0.2)
    assert timed(robot.stop) < STOP_S
    assert bus.registers.torques() == OFF
    robot.stop()


def test_a_stopped_robot_refuses_everything_and_writes_nothing(robot: LeRobotRobot, bus: Bus) -> None:
    action = robot.observe(0.0).observation["observation.state"]
    robot.stop()
    for call in (lambda: robot.act(action), lambda: robot.observe(0.0), lambda: robot.connect(30.0)):
        with pytest.raises(RobotFault, match="it was stopped"):
            call()
    time.sleep(0.05)
    assert bus.registers.torques() == OFF
    assert not bus.events("goal")


def test_a_robot_that_was_never_connected_is_stopped_and_left_alone(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    robot = make(robot_file)
    robot.stop()
    with pytest.raises(RobotFault, match="it was stopped"):
        robot.connect(30.0)
    assert not bus.events("torque")
    assert capfd.readouterr().err == ""


def test_another_rate_is_refused(make: Callable[[Path], LeRobotRobot], robot_file: Path) -> None:
    with pytest.raises(ConfigError, match="30 actions a second"):
        make(robot_file).connect(20.0)


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


def test_motors_that_do_not_answer_are_named_and_the_others_let_go(
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


def test_motors_let_go_where_the_system_gives_no_more_threads(
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


def test_a_pulled_cable_is_said(robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]) -> None:
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
    mend = threading.Timer(TURN_S + 0.6, bus.registers.set_fault, ("none",))
    interrupt.start()
    mend.start()
    robot.stop()
    assert not interrupt.is_alive()
    assert bus.registers.torques() == OFF


def test_stopping_does_not_wait_for_a_reading_that_a_camera_blocks(
    robot: LeRobotRobot, bus: Bus, capfd: pytest.CaptureFixture[str]
) -> None:
    with stuck(robot, "wrist"):
        reading = Call(robot.observe, 0.0)
        eventually(robot._turn.locked)
        stopping = Call(robot.stop)
        eventually(lambda: bus.registers.torques() == OFF, TURN_S + 1.0)
        assert stopping.end() is None
    assert "it was stopped" in str(reading.end())
    assert bus.registers.torques() == OFF
    assert "torque" not in capfd.readouterr().err


def test_stopping_does_not_wait_for_a_reading_of_mute_motors(patient: LeRobotRobot, bus: Bus) -> None:
    bus.registers.set_fault("mute", motors=[6])
    reading = Call(patient.observe, 0.0)
    eventually(patient._turn.locked)
    assert timed(patient.stop) < STOP_S
    assert bus.registers.torques() == [0, 0, 0, 0, 0, 1]
    assert "it was stopped" in str(reading.end())


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


def test_a_command_does_not_wait_for_a_blocked_reading(robot: LeRobotRobot) -> None:
    action = robot.observe(0.0).observation["observation.state"]
    with stuck(robot, "front"):
        reading = Call(robot.observe, 0.0)
        eventually(robot._turn.locked)
        began = time.perf_counter()
        with pytest.raises(RobotFault, match="could not command: it is still busy with the call to read"):
            robot.act(action)
        assert time.perf_counter() - began < TURN_S + 0.3
    assert reading.end() is None
    robot.act(action)


def test_a_command_does_not_wait_for_a_frame(robot: LeRobotRobot, cameras: CameraFaults) -> None:
    action = robot.observe(0.0).observation["observation.state"]
    cameras.set_fault(FRONT, "blocks")
    reading = Call(robot.observe, time.perf_counter() + 0.1)
    time.sleep(0.05)
    assert timed(lambda: robot.act(action)) < 0.1
    assert "camera front" in str(reading.end())


@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.3])
def test_a_connection_that_comes_back_after_stopping_is_undone(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], bus: Bus, cameras: CameraFaults, seconds: float
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


def test_a_camera_that_does_not_open_is_said_and_motors_are_let_go(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus, cameras: CameraFaults
) -> None:
    bus.registers.write(2, TORQUE, 1)
    cameras.set_fault(WRIST, "closed")
    robot = make(robot_file)
    with pytest.raises(RobotFault, match=r"could not connect \(ConnectionError: Failed to open OpenCVCamera\(2\)"):
        robot.connect(30.0)
    assert bus.registers.torques() == OFF


def test_a_missing_motor_is_said_and_the_others_are_let_go(
    make: Callable[[Path], LeRobotRobot], robot_file: Path, bus: Bus
) -> None:
    bus.registers.write(2, TORQUE, 1)
    bus.registers.set_fault("mute", motors=[6])
    with pytest.raises(RobotFault, match="Missing motor IDs: - 6"):
        make(robot_file).connect(30.0)
    assert bus.registers.torques() == OFF


def test_a_port_that_is_not_there_is_said(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    robot = make(write_robot({"port": "/dev/nothing"}))
    with pytest.raises(RobotFault, match="Could not connect on port '/dev/nothing'"):
        robot.connect(30.0)
    assert "torque" not in capfd.readouterr().err  # none was switched on


@pytest.mark.parametrize("reason", ["motors", "file"])
def test_another_calibration_is_refused_with_the_command_that_makes_one(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], tmp_path: Path, bus: Bus, reason: str
) -> None:
    robot_file = write_robot({"id": "my left arm", "use_degrees": True})
    if reason == "motors":
        bus.registers.write(2, MIN_LIMIT, 0)
    else:
        (tmp_path / "my left arm.json").unlink()
    robot = make(robot_file)
    with pytest.raises(RobotFault, match="not calibrated") as raised:
        robot.connect(30.0)
    command = shlex.split(str(raised.value).split("calibrate it with: ")[1])
    assert command[0] == "lerobot-calibrate"
    assert set(command[1:]) == {
        "--robot.type=so101_follower",
        f"--robot.port={bus.port}",
        "--robot.id=my left arm",
        f"--robot.calibration_dir={tmp_path}",
        "--robot.use_degrees=true",
    }
    assert bus.registers.torques() == OFF
    if reason == "motors":
        program = Path(sys.executable).with_name(command[0])
        # Enter: the file's calibration is written to the motors.
        subprocess.run([program, *command[1:]], input="\n", text=True, capture_output=True, check=True)
        make(robot_file).connect(30.0)


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


def test_a_slow_cameras_frames_are_as_old_as_they_are(robot: LeRobotRobot, cameras: CameraFaults) -> None:
    cameras.set_fault(FRONT, "slow")
    time.sleep(0.6)
    ages, end = [], time.perf_counter() + 1.2
    while time.perf_counter() < end:
        ages.append(time.perf_counter() - robot.observe(0.0).timestamp)
    assert max(ages) > 0.3
    after = time.perf_counter()
    assert robot.observe(after).timestamp > after


@pytest.mark.parametrize("fault", ["closed", "blocks", "fails"])
def test_a_camera_that_shows_nothing_new_is_named(robot: LeRobotRobot, cameras: CameraFaults, fault: str) -> None:
    robot.observe(0.0)
    cameras.set_fault(FRONT, fault)
    time.sleep(0.1)
    began = time.perf_counter()
    with pytest.raises(RobotFault, match="camera front has shown nothing new"):
        robot.observe(began)
    assert time.perf_counter() - began < FRAME_S + 0.3
    if fault == "closed":  # of which LeRobot only says that the robot is not connected
        with pytest.raises(RobotFault, match="not open: camera front"):
            robot.observe(0.0)


def test_names_are_changed_for_the_policy_alone(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], bus: Bus
) -> None:
    robot = make(write_robot(rename={"front": "top", "shoulder_pan.pos": "j1", "gripper.pos": "gripper"}))
    expected = ("j1", *NAMES[1:5], "gripper")
    assert robot.embodiment.state_names == robot.embodiment.action_names == expected
    assert set(robot.embodiment.cameras) == {"top", "wrist"}
    robot.connect(30.0)
    reading = robot.observe(time.perf_counter())
    assert set(reading.observation) == {
        "observation.images.top",
        "observation.images.wrist",
        "observation.state",
        "task",
    }
    held = robot.hold(None)
    assert held is not None
    robot.act(held)
    eventually(lambda: [event["motor"] for event in bus.events("goal")] == list(IDS))


CAMERA = {"type": "opencv", "index_or_path": 0, "width": 640, "height": 480, "fps": 30}


@pytest.mark.parametrize(
    ("robot", "others", "message"),
    [
        (
            {"type": "so102_follower"},
            {},
            r"robot\.type: 'so102_follower' is unknown; .*so101_follower.*lerobot_robot_so1",
        ),
        (
            {"cameras": {"a": {**CAMERA, "type": "eye"}}},
            {},
            r"robot\.cameras\.a\.type: 'eye'.*opencv.*lerobot_camera",
        ),
        ({"cameras": {"a": {"index_or_path": 0}}}, {}, r"robot\.cameras\.a: .* must be an object with a type"),
        ({"cameras": [CAMERA]}, {}, r"robot\.cameras: .* must be an object"),
        ({"cameras": {"a": {**CAMERA, "widht": 3}}}, {}, r"`cameras\.a`: The fields `widht`"),
        ({"cameras": {"a": {**CAMERA, "width": "wide"}}}, {}, r"`cameras\.a\.width`.*'wide'"),
        ({"cameras": {"a": {**CAMERA, "width": None}}}, {}, "'width' is required"),
        ({"prot": "/dev/x"}, {}, r"so101_follower has no prot; it has .*port"),
        ({"port": None}, {}, r"robot\.port: is missing; .*lerobot-find-port"),
        ({"id": None}, {}, r"robot\.id: is missing; .*lerobot-calibrate"),
        ({"max_relative_target": "much"}, {}, "`max_relative_target`"),
        ({}, {"rate": 30}, "rate: unknown; there are robot, rate_hz"),
        ({}, {"rate_hz": 0}, "rate_hz: 0 must be above zero"),
        ({}, {"rate_hz": "fast"}, "rate_hz: 'fast' must be a finite number"),
        ({"type": 5}, {}, "robot: .* must be an object with a type"),
        ({}, {"rename": []}, r"rename: \[\] must map"),
        ({}, {"rename": {"side": "top"}}, "rename: side is unknown; this robot has: front, wrist, shoulder_pan"),
        ({}, {"action_low": [-1] * 5}, "action_low: must have a value for each of shoulder_pan.pos"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    write_robot: Callable[..., Path], robot: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    path = write_robot(robot, **others)
    with pytest.raises(ConfigError, match=message) as raised:
        made(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["port", "id"])
def test_a_field_that_is_missing_is_named(robot_file: Path, field: str) -> None:
    document = json.loads(robot_file.read_text())
    del document["robot"][field]
    robot_file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=rf"robot\.{field}: is missing; it is the"):
        made(robot_file)


def test_a_damaged_calibration_is_named(robot_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_arm.json").write_text('{"gripper": {"id": "six"}}')
    with pytest.raises(ConfigError, match=r"calibration file .*six"):
        made(robot_file)


def test_a_package_that_a_robot_needs_is_named_with_lerobots_extra(write_robot: Callable[..., Path]) -> None:
    document = {"type": "koch_follower", "port": "/dev/x", "id": "a", "cameras": {}}
    with pytest.raises(MissingExtraError, match=r"'dynamixel-sdk'.*pip install 'lerobot\[dynamixel\]'"):
        made(write_robot(robot=document))


def test_both_arms_of_a_bimanual_robot_let_go_although_one_does_not_answer(
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


PLUGIN = """
from dataclasses import dataclass, field
from pathlib import Path
from lerobot.cameras import CameraConfig, make_cameras_from_configs
from lerobot.robots import Robot, RobotConfig
from lerobot.utils.errors import DeviceNotConnectedError

@RobotConfig.register_subclass("hand_made")
@dataclass
class HandMadeConfig(RobotConfig):
    torque_file: Path
    cameras: dict[str, CameraConfig] = field(default_factory=dict)

class HandMade(Robot):
    config_class, name = HandMadeConfig, "hand_made"
    is_calibrated = True
    def __init__(self, config):
        super().__init__(config)
        self.config, self.cameras = config, make_cameras_from_configs(config.cameras)
    observation_features = {"a.pos": float, "b.pos": float, "eye": (480, 640, 3), "eye_depth": (480, 640, 1)}
    action_features = {"a.pos": float, "grip": float}
    @property
    def is_connected(self):
        return self.config.torque_file.exists() and all(camera.is_connected for camera in self.cameras.values())
    def connect(self):
        for camera in self.cameras.values():
            camera.connect()
        self.config.torque_file.write_text("on")
    def calibrate(self): pass
    def configure(self): pass
    def get_observation(self):
        return {"a.pos": 1.0, "b.pos": 2.0, "eye": self.cameras["eye"].read_latest(), "eye_depth": None}
    def send_action(self, action):
        self.config.torque_file.write_text("moving")
    def disconnect(self):
        if not all(camera.is_connected for camera in self.cameras.values()):
            raise DeviceNotConnectedError("a camera is closed")
        self.config.torque_file.write_text("off")
"""


@pytest.fixture
def hand_made(tmp_path: Path, cameras: CameraFaults, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of a plug-in's robot, without a bus that anyone knows; `torque` beside it says what it did last."""
    (tmp_path / "lerobot_robot_hand_made.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    described = {
        "type": "hand_made",
        "id": "a",
        "calibration_dir": str(tmp_path),
        "torque_file": str(tmp_path / "torque"),
        "cameras": {"eye": {**CAMERA, "warmup_s": 0}},
    }
    path = tmp_path / "hand_made.json"
    path.write_text(json.dumps({"robot": described, "rate_hz": 10, "action_low": [0, 0], "action_high": [1, 1]}))
    return path


def test_a_plugins_robot_is_found_and_disconnected_its_own_way_also_with_a_closed_camera(
    make: Callable[[Path], LeRobotRobot],
    hand_made: Path,
    cameras: CameraFaults,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torque = hand_made.with_name("torque")
    make(hand_made).stop()  # never connected
    assert not torque.exists()
    robot = make(hand_made)
    assert robot.embodiment.cameras == {"eye": (480, 640)}
    robot.connect(10.0)
    assert robot.observe(time.perf_counter()).observation["observation.state"].tolist() == [1, 2]
    assert robot.hold(None) is None  # nobody knows where its gripper is
    cameras.set_fault(FRONT, "closed")
    robot.stop()
    assert torque.read_text() == "off"
    [line] = capfd.readouterr().err.splitlines()
    assert "left to its own driver" in line


def test_a_command_that_waited_for_its_turn_is_not_sent_after_stopping(
    make: Callable[[Path], LeRobotRobot], hand_made: Path
) -> None:
    robot = make(hand_made)
    robot.connect(10.0)
    with robot._turn:
        acting = Call(robot.act, np.zeros(2, np.float32))
        stopping = Call(robot.stop)
        eventually(lambda: robot._is_stopped)
    assert stopping.end() is None
    assert acting.end() is not None
    assert hand_made.with_name("torque").read_text() == "off"
