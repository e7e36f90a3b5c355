"""Logs of the control loop: replayed, viewed, and read where an earlier version wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.cycle_log import read_log
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.replay_log import replay
from dysl_vla.deploy.run_control import ControlConfig, control
from dysl_vla.deploy.view_log import view
from dysl_vla.errors import ConfigError
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
