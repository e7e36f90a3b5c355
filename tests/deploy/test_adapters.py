"""Robots of packages that are not installed here: what can be known without them; ROS 2 against a stand-in.

LeRobot's are in tests/lerobot, with LeRobot.
"""

from __future__ import annotations

import importlib.util
import json
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.deploy.lerobot_file import ordered_bounds, renamed
from dysl_vla.deploy.robot import make_robot
from dysl_vla.errors import ConfigError, MissingExtraError, RobotFault
from tests.conftest import make_tiny_policy

NAMES = ("shoulder.pos", "elbow.pos", "gripper.pos")
DOCUMENT = {"robot": {"type": "arm"}, "rate_hz": 30, "action_low": [-1] * 3, "action_high": [1] * 3}
names = st.text("abcdef", min_size=1, max_size=3)


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="tests/lerobot are for where it is")
def test_where_lerobot_is_not_installed_the_error_says_how_to(tmp_path: Path) -> None:
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(DOCUMENT))
    with pytest.raises(MissingExtraError, match=r"launch/lerobot_env\.sh .*Python 3\.12"):
        make_robot(f"lerobot:{path}", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 30}, "rate: unknown; the keys are robot, rate_hz"),
        ({"robot": []}, r"robot must be an object with a type, .*got \[\]"),
        ({"robot": {}}, r"robot must be an object with a type, .*got \{\}"),
    ],
)
def test_a_mistake_in_a_robots_file_is_named_before_lerobot_is_needed(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(ConfigError, match=message):
        make_robot(f"lerobot:{path}", {})
    path.write_text(json.dumps({"robot": {"type": "arm"}, "rate_hz": 30}))
    with pytest.raises(ConfigError, match="action_low, action_high: missing"):
        make_robot(f"lerobot:{path}", {})


@given(st.lists(names, unique=True, min_size=1), st.dictionaries(names, names))
def test_renaming_is_one_to_one_or_refused_by_name(known: list[str], rename: dict[str, str]) -> None:
    """`known` are a robot's cameras and state; the first half are actions, too."""
    actions = known[: len(known) // 2]
    unknown = [name for name in rename if name not in known]
    wanted = [rename.get(name, name) for name in known]
    twice = {name for name in wanted if wanted.count(name) > 1}
    if not unknown and not twice:
        new = renamed(rename, known, actions)
        assert [new[name] for name in known] == wanted
        return
    with pytest.raises(ConfigError, match=r"^rename[: ]") as raised:
        renamed(rename, known, actions)
    if unknown:
        assert str(raised.value).endswith(f"; got {', '.join(unknown)}.")
    else:
        assert any(f"would both be called {name}." in str(raised.value) for name in twice)


numbers = st.one_of(st.floats(), st.integers(), st.sampled_from((True, "1", None, 10**400)))


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3), st.booleans())
def test_bounds_are_finite_and_in_order_or_refused_by_name(pairs: list[tuple[Any, Any]], by_name: bool) -> None:
    low, high = ([pair[side] for pair in pairs] for side in (0, 1))
    given_low: Any = dict(zip(NAMES, low, strict=True)) if by_name else low
    fine = [
        all(type(value) in (int, float) and abs(value) < 3.4e38 for value in pair)
        and np.float32(pair[0]) < np.float32(pair[1])
        for pair in pairs
    ]
    if all(fine):
        assert ordered_bounds(NAMES, given_low, high) == (tuple(map(float, low)), tuple(map(float, high)))
        return
    with pytest.raises(ConfigError, match=r"^action_(low|high)\.") as raised:
        ordered_bounds(NAMES, given_low, high)
    assert any(name in str(raised.value) for name, is_fine in zip(NAMES, fine, strict=True) if not is_fine)


@given(st.dictionaries(st.sampled_from((*NAMES, "elbow", "x")), st.just(-1)))
def test_bounds_for_other_actions_are_refused_by_name(low: dict[str, float]) -> None:
    if set(low) == set(NAMES):
        assert ordered_bounds(NAMES, low, [1] * 3)[0] == (-1.0,) * 3
        return
    wrong = set(NAMES) - set(low) or set(low) - set(NAMES)
    with pytest.raises(ConfigError, match=r"^action_low must") as raised:
        ordered_bounds(NAMES, low, [1] * 3)
    assert all(name in str(raised.value) for name in wrong)


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


def test_the_ros_2_example_turns_topics_into_observations_and_actions_into_messages() -> None:
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
    timed = robot.observe(0.0)
    assert 0.2 <= time.perf_counter() - timed.timestamp < 0.4
    with pytest.raises(ConfigError, match="rate_hz"):
        robot.connect(50.0)
    spec.check_observation(timed.observation)
    assert timed.observation["observation.state"].tolist() == [1, 2]
    assert timed.observation["observation.images.wrist"].max() == 9
    now = time.perf_counter()
    node.callbacks["/top"](image(32, 32, 8, "bgr8"))
    with pytest.raises(RobotFault, match=r"observation\.images\.top"):
        robot.observe(now)
    robot.act(np.array([0.5, 0, 1], np.float32))
    robot.stop()
    assert node.published == [("/act", [0.5, 0, 1]), ("/act", [0, 0, 1])]
    with pytest.raises(ConfigError, match="'wrist'"):
        module.Ros2Robot(node, messages, {"top": "/top"}, spec, ((-1.0,) * 3, (1.0,) * 3))


def test_the_ros_2_example_holds_joints_where_they_are_before_the_first_command() -> None:
    module, node = ros2(), Node()
    names = ("wheel_vel", "j1", "gripper")
    spec = replace(make_tiny_policy().spec, cameras={}, state_names=("j1", "gripper"), action_names=names)
    messages = dict.fromkeys(("Image", "JointState"), object) | {"Float64MultiArray": types.SimpleNamespace}
    robot = module.Ros2Robot(node, messages, {"state": "/joints", "action": "/act"}, spec, ((-1.0,) * 3, (1.0,) * 3))
    assert robot.hold(None) is None
    header = types.SimpleNamespace(stamp=types.SimpleNamespace(sec=time.time_ns() // 10**9, nanosec=0))
    node.callbacks["/joints"](types.SimpleNamespace(header=header, name=["gripper", "j1"], position=[0.25, 0.5]))
    assert robot.hold(None).tolist() == [0, 0.5, 0.25]
    robot.stop()  # it was never moved
    assert node.published == []
    robot.act(np.array([0.5, 0.75, 1], np.float32))
    robot.stop()
    assert node.published[-1] == ("/act", [0, 0.75, 1])
