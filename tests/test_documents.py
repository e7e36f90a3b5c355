"""What README and the scripts in launch/ tell people to type is understood by the command line."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import tyro

from dysl_vla.cli import main

ROOT = Path(__file__).parents[1]


class UnderstoodError(Exception):
    """Raised instead of doing what was asked for."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = tyro.cli

    def stop(what: Callable[..., Any], **options: Any) -> None:
        @wraps(what)
        def instead(*_: object, **__: object) -> None:
            raise UnderstoodError

        if not isinstance(what, type):
            parse(instead, **options)
        parse(what, **options)
        raise UnderstoodError

    monkeypatch.setattr(tyro, "cli", stop)


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    fenced = "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ").splitlines()
    inline = [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [line for line in fenced + inline if re.match(r"dysl \S+ .*-", line)]


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_is_understood(command: str, only_parse: None) -> None:
    with pytest.raises(UnderstoodError):
        main(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("script", ["ablations.sh", "demo.sh", "robosuite_mini.sh"])
def test_the_commands_of_a_script_are_understood(script: str, tmp_path: Path, only_parse: None) -> None:
    log, fake = tmp_path / "commands", tmp_path / "dysl"
    fake.write_text(f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> {log}\necho >> {log}\n')
    fake.chmod(0o755)
    arguments = {"ablations.sh": ["demos", "out", fake], "demo.sh": [fake], "robosuite_mini.sh": ["out", fake]}
    subprocess.run(["bash", ROOT / "launch" / script, *arguments[script]], cwd=tmp_path, check=True)
    commands = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    assert len(commands) >= 2
    for command in commands:
        with pytest.raises(UnderstoodError):
            main(command)


def test_a_training_script_does_nothing_twice(tmp_path: Path) -> None:
    log, fake = tmp_path / "commands", tmp_path / "dysl"
    fake.write_text(f'#!/bin/sh\necho "$1" >> {log}\n[ "$1" != calibrate ] || [ -e {tmp_path}/ready ]\n')
    fake.chmod(0o755)
    command = ["bash", ROOT / "launch/robosuite_mini.sh", tmp_path / "out", fake]
    assert subprocess.run(command, check=False).returncode != 0
    before = log.read_text().splitlines()
    (tmp_path / "ready").touch()
    subprocess.run(command, check=True)
    assert before[-1] == "calibrate"
    rest = "calibrate distill demos demos calibrate train distill demos demos train distill eval"
    assert log.read_text().splitlines()[len(before) :] == rest.split()
