"""What one installs or starts from launch/: as far as that can be tried without installing it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro

from dysl_vla.deploy.run_server import ServeConfig

LAUNCH = Path(__file__).parents[1] / "launch"
UNIT = LAUNCH / "dysl-serve.service"
PROGRAM = "/opt/dysl/venv/bin/dysl"
"""Of the unit; the one path in it that must exist for the unit to be whole."""


def with_key(unit: str) -> str:
    """The unit, changed as its comment says, so that other machines may connect."""
    unit = unit.replace("# LoadCredential=", "LoadCredential=")
    return re.sub(r"^(ExecStart=.*)$", r"\1 --host 0.0.0.0 --api-key-file %d/key", unit, flags=re.MULTILINE)


def complaints(unit: str, folder: Path) -> str:
    """What systemd says of a unit whose program is one that is there."""
    assert unit.count(PROGRAM) == 1
    copy = folder / UNIT.name
    copy.write_text(unit.replace(PROGRAM, str(shutil.which("true"))))
    ran = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    ours = [line for line in (ran.stdout + ran.stderr).splitlines() if UNIT.name in line]
    assert ours or ran.returncode == 0, ran.stderr
    return "\n".join(ours)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze, of systemd, is not installed")
def test_systemd_understands_all_of_the_unit(tmp_path: Path) -> None:
    unit = UNIT.read_text()
    assert complaints(unit, tmp_path) == ""
    assert with_key(unit) != unit
    assert complaints(with_key(unit), tmp_path) == ""
    for right, wrong in (("ProtectSystem=", "ProtectSytem="), ("on-failure", "sometimes"), (" serve", ' "serve')):
        assert right in unit
        assert complaints(unit.replace(right, wrong), tmp_path) != ""


def commands() -> list[list[str]]:
    """What the unit, so and with a key, and the image start."""
    units = re.findall(r"^ExecStart=(.*)$", UNIT.read_text() + with_key(UNIT.read_text()), re.MULTILINE)
    images = re.findall(r"^ENTRYPOINT (.*)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    return [*map(shlex.split, units), *map(json.loads, images)]


def test_what_is_started_is_understood() -> None:
    assert len(commands()) == 3
    for program, verb, *arguments in commands():
        assert (Path(program).name, verb) == ("dysl", "serve")
        assert tyro.cli(ServeConfig, args=arguments).port == 8000


def test_the_image_is_made_of_what_is_there() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert len(copied) == 2
    for name in " ".join(copied).split():
        assert (LAUNCH.parent / name).exists(), name


def test_what_could_not_be_tried_says_so() -> None:
    assert "has never been built" in (LAUNCH / "Dockerfile").read_text()
    assert "has never run under ROS 2" in (LAUNCH / "ros2_control.py").read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_bash_can_read_a_script(script: str) -> None:
    path = LAUNCH / script
    ran = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert path.stat().st_mode & 0o100
