"""Mistakes in the file of a robot of LeRobot are named, and so is what is missing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dysl_vla.deploy.lerobot_robot import LeRobotRobot
from dysl_vla.errors import ConfigError, MissingExtraError, RobotFault
from tests.lerobot.arms import CAMERA, OFF, made
from tests.lerobot.feetech_bus import MIN_LIMIT, Bus


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


@pytest.mark.parametrize(
    ("robot", "others", "message"),
    [
        (
            {"type": "so102_follower"},
            {},
            r"robot\.type must be a known type, got 'so102_follower'; .*so101_follower.*lerobot_robot_so1",
        ),
        (
            {"cameras": {"a": {**CAMERA, "type": "eye"}}},
            {},
            r"robot\.cameras\.a\.type must be a known type, got 'eye'.*opencv.*lerobot_camera",
        ),
        ({"cameras": {"a": {"index_or_path": 0}}}, {}, r"robot\.cameras\.a must be an object with a type"),
        ({"cameras": [CAMERA]}, {}, r"robot\.cameras must be an object with a name"),
        ({"cameras": {"a": {**CAMERA, "widht": 3}}}, {}, r"`cameras\.a`: The fields `widht`"),
        ({"cameras": {"a": {**CAMERA, "width": "wide"}}}, {}, r"`cameras\.a\.width`.*'wide'"),
        ({"cameras": {"a": {**CAMERA, "width": None}}}, {}, "'width' is required"),
        ({"prot": "/dev/x"}, {}, r"so101_follower has no prot; it has .*port"),
        ({"port": None}, {}, r"robot\.port is missing; .*lerobot-find-port"),
        ({"id": None}, {}, r"robot\.id is missing; .*lerobot-calibrate"),
        ({"max_relative_target": "much"}, {}, "`max_relative_target`"),
        ({}, {"rate": 30}, "rate: unknown; the keys are robot, rate_hz"),
        ({}, {"rate_hz": 0}, "rate_hz must be above zero, got 0"),
        ({}, {"rate_hz": "fast"}, "rate_hz must be a finite number, got 'fast'"),
        ({"type": 5}, {}, "robot must be an object with a type"),
        ({}, {"rename": []}, r"rename must map .*got \[\]"),
        ({}, {"rename": {"side": "top"}}, "rename must name .*front, wrist, shoulder_pan.*; got side"),
        ({}, {"action_low": [-1] * 5}, "action_low must have a value for each of shoulder_pan.pos"),
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
    with pytest.raises(ConfigError, match=rf"robot\.{field} is missing; it is the"):
        made(robot_file)


def test_a_damaged_calibration_is_named(robot_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_arm.json").write_text('{"gripper": {"id": "six"}}')
    with pytest.raises(ConfigError, match=r"six.*calibration file"):
        made(robot_file)


def test_a_package_that_a_robot_needs_is_named_with_lerobots_extra(write_robot: Callable[..., Path]) -> None:
    document = {"type": "koch_follower", "port": "/dev/x", "id": "a", "cameras": {}}
    with pytest.raises(MissingExtraError, match=r"'dynamixel-sdk'.*pip install 'lerobot\[dynamixel\]'"):
        made(write_robot(robot=document))
