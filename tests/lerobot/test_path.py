"""From fifty demonstrations (here ten, and short) that LeRobot recorded to an SO-101 that moves, and always stops.

Every command is run as it is typed, in a process of its own; the arm is LeRobot's driver's, on the stand-in's bus.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.cli import main
from tests.lerobot.arms import eventually
from tests.lerobot.fake_cameras import CameraFaults
from tests.lerobot.feetech_bus import Bus
from tests.lerobot.recorder import INSTRUCTION, record

CONTROL_S = 30.0
SMALL = ["--layers", "6", "--hidden", "32", "--threads", "1", "--warmup", "5", "--batch", "16"]


def dysl(*arguments: object, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it must succeed. It has a process of its own where the environment is another."""
    if environment is None:
        printed = io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(printed):
            assert main([*map(str, arguments)]) == 0, printed.getvalue()
        return printed.getvalue()
    command = [sys.executable, "-m", "dysl_vla.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of someone who has recorded demonstrations."""
    folder = tmp_path_factory.mktemp("work")
    record(folder / "data", episodes=10, seconds=1.0)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """The path from data to a bundle: the command that each command prints as the next one is run next."""
    printed = dysl("demos", "info", "data", cwd=folder)
    assert "10 episodes, 300 frames, 30 Hz" in printed
    assert "camera   front: 480x640, video, av1" in printed
    printed = dysl("train", "--data", "data", "--out", "mini", "--steps", 40, "--save-every", 40, *SMALL, cwd=folder)
    assert "dysl eval --policy mini --data data --out mini-eval" in printed
    printed = dysl("calibrate", "--policy", "mini", "--data", "data", "--out", "plan", cwd=folder)
    assert "dysl distill --policy mini --data data --plan plan/plan.json" in printed
    steps = ["--adapter-steps", 10, "--skip-steps", 30, "--threads", 1]
    distill = ["distill", "--policy", "mini", "--data", "data", "--plan", "plan/plan.json", "--out", "fast"]
    printed = dysl(*distill, *steps, cwd=folder)
    assert "dysl eval --policy fast --data data --out fast-eval --variants full,dysl" in printed
    printed = dysl("eval", "--policy", "fast", "--data", "data", "--out", "fast-eval", cwd=folder)
    assert re.search(r"\| shoulder_pan\.pos \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", printed)
    assert (folder / "fast-eval/episode-004.png").exists()
    printed = dysl("tune", "--policy", "fast", "--data", "data", "--target-action-error", 10, cwd=folder)
    assert "skip 1.0" in printed
    printed = dysl("export", "--policy", "fast", "--out", "bundle", cwd=folder)
    assert "dysl control --bundle bundle --robot lerobot:FILE.json --instruction TEXT" in printed
    return folder / "bundle"


def test_training_data_and_policy_are_of_the_arm(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert config["spec"]["cameras"] == {"front": [480, 640], "wrist": [480, 640]}
    assert config["resizes"] == {"front": [96, 128], "wrist": [96, 128]}
    assert config["skipping"]["importance"] == "gripper"
    assert config["provenance"]["data"]["held_out_every"] == 5


@pytest.fixture(autouse=True)
def hang_ups_count() -> Iterator[None]:
    """Also where the tests themselves run under nohup, whose children ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def control(bundle: Path, robot_file: Path, *options: object) -> list[str]:
    """The command that moves the arm."""
    robot = ["--bundle", bundle, "--robot", f"lerobot:{robot_file}", "--instruction", INSTRUCTION]
    return [sys.executable, "-m", "dysl_vla.cli", "control", *map(str, (*robot, *options))]


def test_the_arm_moves_for_half_a_minute_and_stops(
    bundle: Path, bus: Bus, robot_file: Path, command_environment: dict[str, str], tmp_path: Path
) -> None:
    before = bus.registers.positions()
    command = control(bundle, robot_file, "--seconds", CONTROL_S, "--log", tmp_path / "log", "--stop-after", 60)
    done = subprocess.run(command, env=command_environment, capture_output=True, text=True, check=False, timeout=200)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    stats = json.loads((tmp_path / "log/stats.json").read_text())
    assert stats["cycles"] == 30 * CONTROL_S
    assert stats["stopped"] == ""
    assert stats["missed"] < 90  # none on an idle machine, which this one may not be
    assert bus.registers.torques() == [0] * 6
    assert bus.registers.positions() != before
    # It went from where it stood, at the allowed speed
    lines = [json.loads(line) for line in (tmp_path / "log/cycles.jsonl").read_text().splitlines()]
    sent = np.array([line["action"] for line in lines])
    change = np.abs(np.diff(sent, axis=0))[:, :5]
    assert (change <= np.array(stats["limits"]["max_change"])[:5] + 1e-3).all()
    low, high = [stats["limits"][name] for name in ("low", "high")]
    assert low == high == []
    assert (np.abs(sent[:, 0]) <= 110).all()


@pytest.mark.parametrize("numbers", [("SIGINT",), ("SIGINT", "SIGINT", "SIGTERM"), ("SIGHUP",)])
@pytest.mark.parametrize("fault", ["", "blocked camera", "closed camera", "mute motors"])
def test_the_arm_is_released_when_signalled_to_end_whatever_is_broken(  # noqa: PLR0917 # fixtures
    bundle: Path,
    bus: Bus,
    cameras: CameraFaults,
    robot_file: Path,
    command_environment: dict[str, str],
    fault: str,
    numbers: tuple[str, ...],
) -> None:
    if fault and numbers != ("SIGINT", "SIGINT", "SIGTERM"):
        pytest.skip("one signal is enough for each fault")
    command = control(bundle, robot_file, "--seconds", 60, "--max-age-s", 0.9, "--stop-after", 1000)
    process = subprocess.Popen(command, env=command_environment, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: bus.registers.torques() == [1] * 6 and len(bus.events("goal")) > 20, 60.0)
        break_it(fault, bus, cameras)
        time.sleep(0.1)
        for name in numbers:
            process.send_signal(signal.Signals[name])
            time.sleep(0.02)
        if fault == "mute motors":
            assert process.stderr is not None
            printed = process.stderr.read()
            assert "may still hold torque" in printed
            assert process.wait(timeout=15) == 2
            return
        eventually(lambda: bus.registers.torques() == [0] * 6, 4.0)
        process.wait(timeout=15)
        assert bus.registers.torques() == [0] * 6
    finally:
        process.kill()
        process.wait()


def break_it(fault: str, bus: Bus, cameras: CameraFaults) -> None:
    if fault == "mute motors":
        bus.registers.set_fault("mute")
    elif fault:
        cameras.set_fault(0, "blocks" if fault == "blocked camera" else "closed")


def test_an_arm_whose_cameras_are_called_otherwise_is_renamed_or_refused(
    bundle: Path, bus: Bus, write_robot: Callable[..., Path], command_environment: dict[str, str]
) -> None:
    described: dict[str, Any] = json.loads(write_robot().read_text())["robot"]
    described["cameras"] = {"top": described["cameras"]["front"], "hand": described["cameras"]["wrist"]}
    for rename, words in (({"top": "front"}, "needs camera 'wrist'"), ({"top": "front", "hand": "wrist"}, "")):
        path = write_robot(described, rename=rename)
        command = control(bundle, path, "--seconds", 0.5, "--stop-after", 1000)
        done = subprocess.run(command, env=command_environment, capture_output=True, text=True, check=False, timeout=60)
        assert (words in done.stderr) if words else done.returncode == 0, done.stderr
        assert bus.registers.torques() == [0] * 6
        assert bool(bus.events("goal")) == (not words)
