"""`lerobot:FILE.json` with LeRobot's own driver of an SO-101, against the stand-in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.deploy import lerobot_file
from dysl_vla.deploy.lerobot_motors import TURN_S
from dysl_vla.deploy.lerobot_robot import FRAME_S, LeRobotRobot
from dysl_vla.errors import ConfigError, RobotFault
from tests.lerobot.arms import CAMERA, NAMES, OFF, ON, STOP_S, Call, eventually, made, stuck, timed
from tests.lerobot.conftest import EXAMPLE, FRONT
from tests.lerobot.fake_cameras import CameraFaults
from tests.lerobot.feetech_bus import IDS, Bus


def test_the_example_of_the_documentation_is_the_file_and_an_so101(
    tmp_path: Path, write_robot: Callable[..., Path]
) -> None:
    text = lerobot_file.__doc__ or ""
    document = json.loads(text[text.index("    {\n") : text.index("\n    }\n") + 6])
    assert document == json.loads(EXAMPLE.read_text())
    (tmp_path / "documented.json").write_text(json.dumps(document))
    for path in (tmp_path / "documented.json", EXAMPLE, write_robot()):
        embodiment = made(path).embodiment
        assert embodiment.cameras == {"front": (480, 640), "wrist": (480, 640)}
        assert embodiment.state_names == embodiment.action_names == NAMES
        assert (embodiment.action_low[3], embodiment.action_high[5], embodiment.rate_hz) == (-100.0, 100.0, 30.0)


def test_it_is_read_commanded_and_stopped_without_torque(robot: LeRobotRobot, bus: Bus) -> None:
    assert bus.registers.torques() == ON
    assert robot.hold(None) is None
    after = time.perf_counter()
    timed_observation = robot.observe(after)
    assert after < timed_observation.timestamp < time.perf_counter()
    state = timed_observation.observation["observation.state"]
    assert state.tolist() == pytest.approx([0, 0, 0, 0, 0, 50], abs=0.1)
    assert timed_observation.observation["observation.images.front"].shape == (480, 640, 3)
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
    with pytest.raises(ConfigError, match=r"rate must be the 30 actions a second .*got 20"):
        make(robot_file).connect(20.0)


def test_a_command_does_not_wait_for_a_blocked_observation(robot: LeRobotRobot) -> None:
    action = robot.observe(0.0).observation["observation.state"]
    with stuck(robot, "front"):
        observing = Call(robot.observe, 0.0)
        eventually(robot._turn.locked)
        began = time.perf_counter()
        with pytest.raises(RobotFault, match="could not command: it is still busy with the call to read"):
            robot.act(action)
        assert time.perf_counter() - began < TURN_S + 0.3
    assert observing.end() is None
    robot.act(action)


def test_a_command_does_not_wait_for_a_frame(robot: LeRobotRobot, cameras: CameraFaults) -> None:
    action = robot.observe(0.0).observation["observation.state"]
    cameras.set_fault(FRONT, "blocks")
    observing = Call(robot.observe, time.perf_counter() + 0.1)
    time.sleep(0.05)
    assert timed(lambda: robot.act(action)) < 0.1
    assert "camera front" in str(observing.end())


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


def test_velocities_are_not_held_and_torques_cannot_be(robot: LeRobotRobot) -> None:
    robot.observe(0.0)
    kinds = ("position", "velocity", "position", "position", "position", "position")
    robot.embodiment = replace(robot.embodiment, action_kinds=kinds)
    last = np.full(6, 20, np.float32)
    for held in (robot.hold(None), robot.hold(last)):
        assert held is not None
        assert held[1] == 0
    robot.embodiment = replace(robot.embodiment, action_kinds=("torque",) * 6)
    for given in (None, last):
        with pytest.raises(ConfigError, match=r"shoulder_pan\.pos, .* are torques, .*`hold` of its own"):
            robot.hold(given)


def test_names_are_changed_for_the_policy_alone(
    make: Callable[[Path], LeRobotRobot], write_robot: Callable[..., Path], bus: Bus
) -> None:
    robot = make(write_robot(rename={"front": "top", "shoulder_pan.pos": "j1", "gripper.pos": "gripper"}))
    expected = ("j1", *NAMES[1:5], "gripper")
    assert robot.embodiment.state_names == robot.embodiment.action_names == expected
    assert set(robot.embodiment.cameras) == {"top", "wrist"}
    robot.connect(30.0)
    timed_observation = robot.observe(time.perf_counter())
    assert set(timed_observation.observation) == {
        "observation.images.top",
        "observation.images.wrist",
        "observation.state",
        "task",
    }
    held = robot.hold(None)
    assert held is not None
    robot.act(held)
    eventually(lambda: [event["motor"] for event in bus.events("goal")] == list(IDS))


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


def test_a_plugins_robot_that_cannot_disconnect_may_hold_until_it_can(
    make: Callable[[Path], LeRobotRobot], hand_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot = make(hand_made)
    robot.connect(10.0)

    def refuse() -> None:
        raise import_module("lerobot.utils.errors").DeviceNotConnectedError("the arm does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(robot._robot, "disconnect", refuse)
        for _ in range(2):
            with pytest.raises(RobotFault, match=r"could not disconnect \(the arm does not answer\): it may"):
                robot.stop()
    robot.stop()
    assert hand_made.with_name("torque").read_text() == "off"
