from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.policies import load_policy
from dysl_vla.policies.baseline import BaselinePolicy
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.baselines import METHODS, BaselineTrainer, BaselineTrainingConfig
from dysl_vla.training.baselines import BaselineRunConfig, train_baseline
from dysl_vla.training.distill import DistillRunConfig, distill
from tests.conftest import made_once
from tests.policies.test_dysl import observe

BRIEF = BaselineTrainingConfig(steps=30, batch=8, warmup=5, threads=1)


def config(teacher: Path, data: Path, out: Path, method: str = "deer") -> BaselineRunConfig:
    return BaselineRunConfig(method, data, out, 4, str(teacher), frames=60, adapter_size=8, training=BRIEF)


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest, teacher: Path, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return made_once(
        tmp_path_factory, request.param, lambda out: train_baseline(config(teacher, mock_demos, out, request.param))
    )


def test_a_baseline_is_evaluated_like_any_policy_and_runs_fewer_layers(trained: Path, tmp_path: Path) -> None:
    result = evaluate(EvalConfig(tmp_path / "r", str(trained), suite="mock", episodes=2))["variants"]["policy"]
    assert 1 <= result["layers"]["mean"] <= 6
    settings = json.loads((trained / "config.json").read_text())
    assert settings["mean_layers"] <= 4  # as was asked for


def test_a_row_does_not_depend_on_its_neighbours(trained: Path) -> None:
    policy = load_policy(str(trained))
    assert isinstance(policy, BaselinePolicy)
    seen = [observe(seed) for seed in range(3)]
    with closing(policy):
        together = policy.infer(seen, [policy.reset() for _ in seen])
        for observation, chunk in zip(seen, together, strict=True):
            [alone] = policy.infer([observation], [policy.reset()])
            np.testing.assert_array_equal(alone.actions, chunk.actions)


def test_a_training_that_was_stopped_ends_like_one_that_was_not(
    teacher: Path, mock_demos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = json.loads((trained / "config.json").read_text())["sizes"]["method"]
    asked = config(teacher, mock_demos, tmp_path / "p", method)
    update = BaselineTrainer.update

    def stop(self: BaselineTrainer, *arguments: Any) -> dict[str, float]:
        if self.step == 17:
            raise ZeroDivisionError
        return update(self, *arguments)

    monkeypatch.setattr("dysl_vla.training.baselines.SAVE_EVERY", 10)
    with monkeypatch.context() as patched:
        patched.setattr(BaselineTrainer, "update", stop)
        with pytest.raises(ZeroDivisionError):
            train_baseline(asked)
    train_baseline(asked)
    assert load_policy(str(tmp_path / "p")).fingerprint == load_policy(str(trained)).fingerprint
    assert not list((tmp_path / "p").glob("*state*"))
    train_baseline(asked)  # finished: nothing to do
    with pytest.raises(ConfigError, match="another"):
        train_baseline(replace(asked, layers=5))


def test_a_damaged_or_edited_baseline_does_not_start(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(trained, tmp_path / "b"))
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(document | {"dial": 0.7}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_policy(str(copy))
    shutil.copy(trained / "config.json", copy)
    (copy / "baseline.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"baseline\.safetensors"):
        load_policy(str(copy))


def test_what_is_no_baselines_is_refused_by_name(trained: Path, mock_demos: Path, tmp_path: Path) -> None:
    for options in ({"skip": 0.0}, {"variants": "full,dysl"}):
        with pytest.raises(ConfigError, match="skip and variants must be left out"):
            evaluate(EvalConfig(tmp_path / "r", str(trained), suite="mock", episodes=1, **options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="offers no 'layers'"):
        distill(DistillRunConfig(mock_demos, tmp_path / "d", str(trained)))
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "d").exists()


def test_a_policy_that_reads_other_tokens_is_refused(
    teacher: Path, mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MiniVLA, "decode", lambda self, hidden: self.head(hidden[:, 0]).view(len(hidden), 4, 3))
    with pytest.raises(ConfigError, match="its action comes from other tokens than the last"):
        train_baseline(config(teacher, mock_demos, tmp_path / "p"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"augment_images": True}, "augment_images must come with"),
    ],
)
def test_options_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(BaselineRunConfig("deer", Path("d"), Path("o"), 4), **changes)


def test_a_folder_of_something_else_is_left_alone(teacher: Path, mock_demos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds none"):
        train_baseline(config(teacher, mock_demos, tmp_path))
