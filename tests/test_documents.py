"""What README, CONTRIBUTING and the scripts in launch/ tell people to type does what they say.

Python blocks are run, and commands are read by the real parser of their verb, which builds and checks its
configuration; what a command would then do is left out.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tyro

from dysl_vla.cli import VERBS, main
from dysl_vla.skip_controller.guidance import continuity, importance_measures

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/your-own-vla.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SERVER = "ws://127.0.0.1:8000"


class UnderstoodError(Exception):
    """Raised instead of doing what was asked for."""


class Parser:
    """Stands in for `tyro.cli`: parses, and then stops.

    Attributes:
        fills_in: Required options that are left out get a value, as in a sentence about one option.
    """

    def __init__(self) -> None:
        self._cli = tyro.cli
        self.fills_in = False

    def __call__(self, what: Callable[..., Any], *, args: list[str], **options: Any) -> None:
        @wraps(what)
        def instead(*_: object, **__: object) -> None:
            raise UnderstoodError

        config = get_args(what)[0] if get_origin(what) else what  # a configuration with presets
        if not isinstance(config, type):
            self._cli(instead, args=args, **options)
        if self.fills_in and is_dataclass(config):
            required = (f"--{f.name}" for f in fields(config) if f.default is f.default_factory is MISSING)
            args = [*args, *(word for option in required if option not in args for word in (option, "x"))]
        self._cli(what, args=args, **options)
        raise UnderstoodError


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Parser:
    parser = Parser()
    monkeypatch.setattr(tyro, "cli", parser)
    monkeypatch.setitem(importance_measures._parts, "vertical", continuity)  # CONTRIBUTING's example of a measure
    return parser


def blocks(language: str) -> list[str]:
    """Fenced code of a language, "" for shell; Python's of docs/ is one program a document."""
    found: list[str] = []
    for name in DOCUMENTS:
        codes = [code for kind, code in FENCED.findall((ROOT / name).read_text()) if kind == language]
        found += ["\n".join(codes)] if codes and language == "python" and name.startswith("docs/") else codes
    return found


def code_in_sentences() -> list[str]:
    texts = [FENCED.sub("", (ROOT / name).read_text()) for name in DOCUMENTS]
    return list(dict.fromkeys(" ".join(code.split()) for text in texts for code in re.findall(r"`([^`]+)`", text)))


def verb_of(words: list[str]) -> str | None:
    names = (" ".join(words[:length]) for length in (2, 1))
    return next((name for name in names if name in VERBS), None)


def shell_lines() -> list[list[str]]:
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shell_commands() -> list[list[str]]:
    return [words[1:] for words in shell_lines() if Path(words[0]).name == "dysl"]


def commands_in_sentences() -> list[list[str]]:
    """`dysl tune --target-ms 5`, and `eval --variants full,dysl`; not `dysl tune` alone, nor a file or a name."""
    found = []
    for code in code_in_sentences():
        words = shlex.split(code)
        words = words[1:] if words[0] == "dysl" and len(words) > 1 else words
        if code.startswith("dysl ") or (verb_of(words) and any(word.startswith("--") for word in words)):
            found.append(words)
    return found


@pytest.mark.parametrize("command", shell_commands(), ids=" ".join)
def test_a_shell_command_is_understood(command: list[str], parser: Parser) -> None:
    with pytest.raises(UnderstoodError):
        main(command)


@pytest.mark.parametrize("command", commands_in_sentences(), ids=" ".join)
def test_a_command_in_a_sentence_is_understood(command: list[str], parser: Parser) -> None:
    if verb_of(command) == " ".join(command):
        return  # the verb alone
    parser.fills_in = True
    with pytest.raises(UnderstoodError):
        main(command)


def test_an_option_in_a_sentence_exists_and_takes_its_value(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        helps.append((verb, set(re.findall(r"--[\w-]+", capsys.readouterr().out))))
    parser.fills_in = True
    mentioned = [shlex.split(code) for code in code_in_sentences() if code.startswith("--")]
    assert len(mentioned) > 20
    for option, *value in mentioned:
        verbs = [verb for verb, options in helps if option in options]
        assert verbs, option
        assert not value or any(understands(verb, [option, *value]) for verb in verbs), (option, value)


def understands(verb: str, arguments: list[str]) -> bool:
    try:
        main([*verb.split(), *arguments])
    except UnderstoodError:
        return True
    except SystemExit:
        pass
    return False


def test_what_else_is_typed_exists() -> None:
    """Scripts of launch/, targets of make, extras of pip."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    typed = [*map(" ".join, shell_lines()), *code_in_sentences()]
    for script in re.findall(r"launch/[\w.]+", "\n".join(typed)):
        assert (ROOT / script).exists(), script
    for words in (line.split() for line in typed if line.startswith("make ")):
        assert set(words[1:]) <= set(targets[1].split()), words
    found = [
        extra for names in re.findall(r"pip install '\.\[([\w,]+)\]'", "\n".join(typed)) for extra in names.split(",")
    ]
    assert len(found) > 3
    assert set(found) <= set(extras)


def test_modules_and_names_in_a_sentence_exist() -> None:
    """`skip_controller.plan.SkipPlan`, and `skip_controller/plan.py`."""
    parts = {path.stem for path in (ROOT / "dysl_vla").glob("[a-z]*")}
    dotted, files = [], []
    for code in code_in_sentences():
        if re.fullmatch(r"[\w/]+\.(py|sh|json)|[\w/]+/", code) and not code.startswith(("runs/", "videos/")):
            files += [code] if "/" in code else []
        elif re.fullmatch(r"\w+(\.\w+)*\.(?!jsonl)\w+", code) and code.split(".")[0] in parts - {"errors"}:
            dotted.append(code)
    assert len(dotted) > 10
    assert len(files) > 10
    for name in dotted:
        pkgutil.resolve_name(f"dysl_vla.{name}")
    for name in files:
        assert (ROOT / name).exists() or (ROOT / "dysl_vla" / name).exists(), name


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of metaworld-mini, such as README has started on port 8000."""
    command = [sys.executable, "-m", "dysl_vla.cli", "serve", "--policy", "metaworld-mini", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            found = re.search(r"ws://\S+", server.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_a_python_block_runs(code: str, tmp_path: Path, mock_demos: Path, request: pytest.FixtureRequest) -> None:
    shutil.copytree(mock_demos, tmp_path / "demos")
    if SERVER in code:
        code = code.replace(SERVER, request.getfixturevalue("address"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    headings = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for link in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


@pytest.mark.parametrize("script", ["ablations.sh", "demo.sh", "libero_mini.sh", "rivals.sh", "robosuite_mini.sh"])
def test_the_commands_of_a_script_are_understood(script: str, tmp_path: Path, parser: Parser) -> None:
    log, fake = tmp_path / "commands", tmp_path / "dysl"
    fake.write_text(f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> {log}\necho >> {log}\n')
    fake.chmod(0o755)
    arguments = {"ablations.sh": ["demos", "out"], "demo.sh": [], "rivals.sh": ["demos", "out"]}.get(script, ["out"])
    subprocess.run(["bash", ROOT / "launch" / script, *arguments, fake], cwd=tmp_path, check=True)
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
