"""`--preset paper` replaces defaults, and what is given beside it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dysl_vla.cli import main
from dysl_vla.skip_controller.guidance import WINDOW
from dysl_vla.skip_controller.heads_trainer import DistillConfig
from dysl_vla.training import calibrate as calibrate_module
from dysl_vla.training import distill as distill_module
from dysl_vla.training.calibrate import CalibrateConfig
from dysl_vla.training.distill import DistillRunConfig


class StoppedError(Exception):
    """What ends a command when its options have been read."""


def parsed(monkeypatch: pytest.MonkeyPatch, verb: str, *words: str) -> Any:
    def stop(config: Any) -> None:
        seen.append(config)
        raise StoppedError

    seen: list[Any] = []
    monkeypatch.setattr({"distill": distill_module, "calibrate": calibrate_module}[verb], verb, stop)
    with pytest.raises(StoppedError):
        main([verb, "--data", "demos", "--out", "out", *words])
    return seen[0]


def test_the_papers_regime_is_one_option(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(monkeypatch, "calibrate", "--preset", "paper")
    assert (config.static_ratio, config.exits) == (0.2, "all")
    config = parsed(monkeypatch, "distill", "--preset", "paper")
    assert (config.static_ratio, config.exits) == (0.2, "all")
    training = config.training
    assert training.steps == 6700
    assert training.adapter_steps > 0
    assert (training.objective, config.importance, WINDOW) == ("mixture", "continuity", 5)
    assert (training.joint_exit_prob, training.keep_block_prob, training.hidden_weight) == (0, 0, 0)
    assert (training.batch, training.learning_rate) == (DistillConfig.batch, DistillConfig.learning_rate)


def test_without_it_the_defaults_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "calibrate") == CalibrateConfig(Path("demos"), Path("out"))
    assert parsed(monkeypatch, "distill") == DistillRunConfig(Path("demos"), Path("out"))


@pytest.mark.parametrize("is_last", [False, True])
def test_what_is_given_beats_the_preset_even_where_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch, *, is_last: bool
) -> None:
    words = ["--objective", "tolerance", "--adapter-steps", "700", "--exits", "first", "--batch", "4"]
    words = [*words, "--preset", "paper"] if is_last else ["--preset", "paper", *words]
    config = parsed(monkeypatch, "distill", *words)
    training = config.training
    assert (training.objective, config.exits, training.batch) == ("tolerance", "first", 4)
    assert (training.adapter_steps, training.skip_steps) == (700, 6000)
    assert (config.importance, config.static_ratio) == ("continuity", 0.2)
    assert parsed(monkeypatch, "calibrate", "--preset", "paper", "--static-ratio", "0.125").static_ratio == 0.125


@pytest.mark.parametrize("verb", ["distill", "calibrate"])
def test_help_explains_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert "--preset {None,paper}" in printed
    assert "--static-ratio" in printed
    assert "--data" in printed
