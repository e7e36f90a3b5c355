"""Robots of packages that are not installed here, against stand-ins for those packages' interfaces."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.deploy.lerobot_robot import LeRobotRobot
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import ConfigError, MissingExtraError, RobotFault
from tests.conftest import make_tiny_policy

NAMES = ("shoulder.pos", "elbow.pos", "gripper.pos")


class LeRobotArm:
    """The part of LeRobot's `Robot` that is used."""

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.calls: list[Any] = []
        self.is_connected = False
        self.breaks = False
        self.observation_features = {**dict.fromkeys(NAMES, float), "front": (48, 64, 3)}
        self.action_features = dict.fromkeys(NAMES, float)

    def connect(self, calibrate: bool = True) -> None:
        assert not calibrate
        self.is_connected = True

    def get_observation(self) -> dict[str, Any]:
        if self.breaks:
            raise ConnectionError("no status packet")
        return {"front": np.zeros((48, 64, 3), np.uint8), **dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True))}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(action)
        return action

    def disconnect(self) -> None:
        self.is_connected = False
        self.calls.append("disconnect")


def test_a_robot_of_lerobot_is_read_commanded_and_let_go() -> None:
    arm = LeRobotArm()
    robot = LeRobotRobot(arm, 30.0, (-100.0,) * 3, (100.0,) * 3)
    assert robot.world.cameras == {"front": (48, 64)}
    assert robot.world.state_names == robot.world.action_names == NAMES
    with pytest.raises(ConfigError, match="30 actions a second"):
        robot.connect(20.0)
    robot.connect(30.0)
    assert robot.hold(None) is None
    after = time.perf_counter() + 0.02
    reading = robot.observe(after)
    assert reading.taken_at >= after
    assert reading.observation["observation.state"].tolist() == [1, 2, 3]
    held = robot.hold(None)
    assert held is not None
    assert held.tolist() == [1, 2, 3]
    robot.act(np.array([4, 5, 6], np.float32))
    assert arm.calls == [dict(zip(NAMES, (4.0, 5.0, 6.0), strict=True))]
    arm.breaks = True
    with pytest.raises(RobotFault, match="no status packet"):
        robot.observe(0.0)
    robot.stop()
    robot.stop()
    assert arm.calls[1:] == ["disconnect"]
    with pytest.raises(ConfigError, match="action_low"):
        LeRobotRobot(arm, 30.0, (-1.0,), (1.0,))


def test_a_robot_of_lerobot_is_made_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arm.json"
    document = {
        "robot": {"type": "arm", "port": "/dev/x"},
        "rate_hz": 30,
        "action_low": [-1] * 3,
        "action_high": [1] * 3,
    }
    path.write_text(json.dumps(document))
    with pytest.raises(MissingExtraError, match="pip install lerobot"):
        make_robot(f"lerobot:{path}", {})
    robots = types.ModuleType("lerobot.robots")
    robots.RobotConfig = types.SimpleNamespace(get_choice_class=lambda kind: kind)  # type: ignore[attr-defined]
    robots.make_robot_from_config = LeRobotArm  # type: ignore[attr-defined]
    draccus = types.ModuleType("draccus")
    draccus.decode = lambda kind, values: (kind, values)  # type: ignore[attr-defined]
    for name, module in {"lerobot": types.ModuleType("lerobot"), "lerobot.robots": robots, "draccus": draccus}.items():
        monkeypatch.setitem(sys.modules, name, module)
    robot: Any = make_robot(f"lerobot:{path}", {})
    assert robot._robot.config == ("arm", {"port": "/dev/x"})
    path.write_text(json.dumps({**document, "rate_hz": "fast"}))
    with pytest.raises(ConfigError, match="ValueError"):
        make_robot(f"lerobot:{path}", {})


def ros2() -> Any:
    path = Path(__file__).parents[2] / "launch" / "ros2_control.py"
    spec = importlib.util.spec_from_file_location("ros2_control", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Node:
    """The part of rclpy's node that is used."""

    def __init__(self) -> None:
        self.callbacks: dict[str, Any] = {}
        self.published: list[Any] = []

    def get_clock(self) -> Any:
        return types.SimpleNamespace(now=lambda: types.SimpleNamespace(nanoseconds=time.time_ns()))

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return types.SimpleNamespace(publish=lambda message: self.published.append((topic, message.data)))

    def create_subscription(self, kind: Any, topic: str, callback: Any, depth: int) -> None:
        self.callbacks[topic] = callback


def test_the_ros_2_example_turns_topics_into_readings_and_actions_into_messages() -> None:
    module, node = ros2(), Node()
    spec = make_tiny_policy().spec
    messages = dict.fromkeys(("Image", "JointState"), object) | {"Float64MultiArray": types.SimpleNamespace}
    topics = {"top": "/top", "wrist": "/wrist", "state": "/joints", "action": "/act"}
    robot = module.Ros2Robot(node, messages, topics, spec, ((-1.0,) * 3, (1.0,) * 3))
    with pytest.raises(RobotFault, match="nothing of"):
        robot.connect(20.0)

    def header(age: float = 0.0) -> Any:
        seconds, rest = divmod(time.time_ns() - int(1e9 * age), 1_000_000_000)
        return types.SimpleNamespace(stamp=types.SimpleNamespace(sec=seconds, nanosec=rest))

    def image(height: int, width: int, value: int, encoding: str = "rgb8", age: float = 0.0) -> Any:
        data = np.full((height, width * 3 + 4), value, np.uint8).tobytes()
        step = width * 3 + 4
        return types.SimpleNamespace(
            header=header(age), height=height, width=width, step=step, encoding=encoding, data=data
        )

    node.callbacks["/top"](image(32, 32, 7))
    node.callbacks["/wrist"](image(16, 16, 9))
    node.callbacks["/joints"](types.SimpleNamespace(header=header(), name=["y", "z", "x"], position=[2.0, 3.0, 1.0]))
    node.callbacks["/joints"](types.SimpleNamespace(header=header(), name=["x", "y"], position=[]))
    node.callbacks["/top"](image(32, 32, 7, age=0.2))
    reading = robot.observe(0.0)
    assert 0.2 <= time.perf_counter() - reading.taken_at < 0.4
    with pytest.raises(ConfigError, match="rate_hz"):
        robot.connect(50.0)
    spec.check_observation(reading.observation)
    assert reading.observation["observation.state"].tolist() == [1, 2]
    assert reading.observation["observation.images.wrist"].max() == 9
    now = time.perf_counter()
    node.callbacks["/top"](image(32, 32, 8, "bgr8"))
    with pytest.raises(RobotFault, match=r"observation\.images\.top"):
        robot.observe(now)
    robot.act(np.array([0.5, 0, 1], np.float32))
    robot.stop()
    assert node.published == [("/act", [0.5, 0, 1]), ("/act", [0, 0, 1])]
    with pytest.raises(ConfigError, match="'wrist'"):
        module.Ros2Robot(node, messages, {"top": "/top"}, spec, ((-1.0,) * 3, (1.0,) * 3))
