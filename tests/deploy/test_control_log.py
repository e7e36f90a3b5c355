"""Logs of the control loop: replayed, viewed, and read where an earlier version wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.cycle_log import read_log
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.replay_log import replay
from dysl_vla.deploy.run_control import ControlConfig, control
from dysl_vla.deploy.view_log import view
from dysl_vla.errors import ConfigError, RobotFault
from dysl_vla.files import read_json, write_json
from tests.deploy.stand_ins import RATE, Counting, FakeRobot


def test_a_log_is_replayed_and_viewed(bundle_folder: Path, tmp_path: Path) -> None:
    config = ControlConfig(
        "mujoco:mock-reach?seed=100001",
        bundle=bundle_folder,
        rate=50.0,
        seconds=1.0,
        log=tmp_path / "log",
        loop=LoopConfig(stop_after=1000),
    )
    stats = control(config)
    assert stats.cycles == 50
    played = replay(tmp_path / "log")
    assert played["sent"] + played["passed"] == sum("action" in line for line in read_log(tmp_path / "log")[1])
    assert played["sent"] > 25
    assert played["robot"]["commands executed"] > 25
    assert played["robot"]["unsafe commands refused"] == 0
    edited = read_json(tmp_path / "log" / "stats.json")
    write_json(tmp_path / "log" / "stats.json", {**edited, "action_names": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="the log has"):
        replay(tmp_path / "log")
    recording = view(tmp_path / "log")
    assert recording.stat().st_size > 1000
    with pytest.raises(ConfigError, match="holds no log"):
        view(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        control(config)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of a robot that must not be made again."""
    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    folder = tmp_path / "log"
    ControlLoop(Counting(), FakeRobot(), RATE, Limits(), config, log=folder, robot_name="x:y").run(0.2)

    def refuse(*_: object) -> None:
        raise AssertionError("the robot was made before the log was checked")

    monkeypatch.setattr("dysl_vla.deploy.replay_log.make_robot", refuse)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limits": {"lowest": [0.0]}}, r"stats\.json: limits must have known names, got lowest"),
        ({"limits": {"low": ["a"]}}, r"stats\.json: limits: "),
        ({"limits": {"gripper_rate": "fast"}}, r"stats\.json: limits: "),
        ({"limits": {"on_breach": "ask"}}, r"stats\.json: limits: on_breach must be clamp or refuse, got 'ask'"),
        ({"limits": None}, r"stats\.json: limits must be an object, got None"),
        ({"cameras": None}, r"stats\.json: cameras must be an object with a height and a width .*, got None"),
        ({"cameras": {"top": [32]}}, r"stats\.json: cameras must be"),
        ({"rate_hz": 0}, r"stats\.json: rate_hz must be a number above zero, got 0"),
        ({"action_names": "dx"}, r"stats\.json: action_names must be a list of names, got 'dx'"),
        ({"robot_name": 5}, "robot: the log in .* does not name one"),
    ],
)
def test_a_log_with_a_wrong_field_is_refused_before_anything_is_opened(
    log: Path, change: dict[str, Any], words: str
) -> None:
    write_json(log / "stats.json", read_json(log / "stats.json") | change)
    with pytest.raises(ConfigError, match=words):
        replay(log)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"action": [0, 0, 0]}, "line 3: due_s must be a finite number, got None"),
        ({"due_s": "soon"}, "line 3: due_s must be a finite number, got 'soon'"),
        ({"due_s": 0.02, "action": [0, 0]}, "line 3: action must be 3 finite numbers, one for each of dx, dy, gripper"),
        ({"due_s": 0.02, "action": [0, 0, float("nan")]}, "line 3: action must be 3 finite"),
        ([1], "line 3: it must be an object"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_before_anything_is_opened(log: Path, line: Any, words: str) -> None:
    lines = (log / "cycles.jsonl").read_text().splitlines()
    lines[2] = json.dumps(line)
    (log / "cycles.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"cycles\.jsonl: {words}"):
        replay(log)


@pytest.mark.parametrize("reported", [float("nan"), [float("inf")], {(1, 2): 3}])
def test_what_a_robot_reports_does_not_hide_why_it_was_stopped(tmp_path: Path, reported: Any) -> None:
    class Reporting(FakeRobot):
        def act(self, action: Any) -> None:
            raise OSError("the cable is broken")

        def report(self) -> dict[str, Any]:
            return {"load": reported}

    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    with pytest.raises(RobotFault, match="the cable is broken"):
        ControlLoop(Counting(), Reporting(), RATE, Limits(), config, log=tmp_path / "log").run(0.2)
    if not isinstance(reported, dict):
        assert read_json(tmp_path / "log/stats.json")["robot"] in ({"load": None}, {"load": [None]})


def test_a_log_whose_statistics_have_their_earlier_name_is_read_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    ControlLoop(Counting(), FakeRobot(), RATE, Limits(), config, log=folder, robot_name="x:y").run(0.2)
    (folder / "stats.json").rename(folder / "account.json")
    assert read_log(folder)[0]["cycles"] == 20
    monkeypatch.setattr("dysl_vla.deploy.replay_log.make_robot", lambda *_: FakeRobot())
    assert replay(folder)["sent"] > 0
    (folder / "account.json").unlink()
    assert read_log(folder)[0] == {}
    with pytest.raises(ConfigError, match="of a killed run cannot be replayed"):
        replay(folder)
