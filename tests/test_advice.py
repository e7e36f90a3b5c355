"""What is printed names the real reason, and commands that can be typed as they are."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import tyro

from dysl_vla.cli import main
from dysl_vla.deploy.run_control import ControlConfig, control
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.offline import evaluate_offline
from dysl_vla.eval.plot import plot
from dysl_vla.files import check_same_run, write_json
from dysl_vla.training.distill import DistillRunConfig
from dysl_vla.training.tune import TuneConfig, tune
from tests.conftest import MOCK_INSTRUCTIONS, make_tiny_policy


def test_the_next_command_that_calibrate_prints_is_complete(
    teacher: Path, mock_demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--policy {teacher} --data {mock_demos} --out {tmp_path / 'plan'} --frames 20 --static-ratio 0.5"
    assert main(["calibrate", *options.split()]) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed[printed.index("dysl distill") :].splitlines()[0])[2:]
    config = tyro.cli(DistillRunConfig, args=words, config=(tyro.conf.OmitArgPrefixes,))
    assert (config.policy, config.data) == (str(teacher), mock_demos)


def test_a_checkpoint_is_no_bundle(distilled: Path) -> None:
    with pytest.raises(CheckpointError, match="is no bundle but a checkpoint; make a bundle of it with dysl export"):
        Bundle(distilled)


def test_a_shipped_policy_is_copied_before_it_is_tuned(mock_demos: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy must be a folder.*copy .*metaworld-mini"):
        tune(TuneConfig(Path("metaworld-mini"), mock_demos, target_ms=5))


def test_an_evaluation_on_demonstrations_is_drawn_already(distilled: Path, mock_demos: Path, tmp_path: Path) -> None:
    evaluate_offline(EvalConfig(tmp_path / "out", str(distilled), data=mock_demos))
    with pytest.raises(ConfigError, match="evaluation on demonstrations, whose pictures are drawn already"):
        plot(tmp_path / "out")


def test_a_policy_that_changed_is_said_without_its_hashes(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"policies": ["a" * 64], "episodes": 3})
    with pytest.raises(ConfigError, match="its policy is another one, or has been changed since") as error:
        check_same_run(tmp_path / "run.json", {"policies": ["b" * 64], "episodes": 3})
    assert "aaaa" not in str(error.value)


def test_an_instruction_that_was_not_trained_on_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy = make_tiny_policy()
    policy.provenance = {"data": {"instructions": MOCK_INSTRUCTIONS}}
    policy.save_pretrained(tmp_path)
    for instruction, is_said in (("dance a waltz", True), (MOCK_INSTRUCTIONS[0], False)):
        control(ControlConfig("mujoco:mock-reach", policy=str(tmp_path), instruction=instruction, seconds=0.2))
        said = capfd.readouterr().err
        assert ("not trained on instruction 'dance a waltz'" in said) == is_said
        assert not is_said or MOCK_INSTRUCTIONS[1] in said
