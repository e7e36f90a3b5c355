"""What an evaluation is asked for is checked when it is asked, and its result is of one kind."""

from __future__ import annotations

from pathlib import Path

import pytest

import dysl_vla
from dysl_vla.errors import ConfigError
from dysl_vla.eval.bench_backbone import BackboneBenchConfig
from dysl_vla.eval.config import EvalConfig
from tests.conftest import make_tiny_policy


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"episodes": 0}, "episodes"),
        ({"workers": -1}, "workers"),
        ({"video": -1}, "video"),
        ({"seed": 99_999}, "seed"),
        ({"skip": 1.01}, "skip"),
        ({"skip": float("nan")}, "skip"),
        ({"held_out": 0.1}, "held_out"),
        ({"variants": ""}, "variants"),
        ({"variants": "full,fast"}, "variants"),
        ({"variants": "full, full"}, "variants"),
        ({"variants": "full,dysl", "skip": 0}, "skip"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} "):
        EvalConfig(out=Path("out"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens": 0}, "tokens"),
        ({"rounds": 1}, "rounds"),
        ({"threads": 0}, "threads"),
        ({"dtype": "int4"}, "dtype"),
        ({"config": "3x128"}, "config"),
        ({"config": "4x0"}, "config"),
        ({"config": "4x130"}, "config"),
    ],
)
def test_a_backbone_that_cannot_be_measured_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be|^{field} must have"):
        BackboneBenchConfig(**changes)  # type: ignore[arg-type]


def test_every_evaluation_has_one_kind_of_result(mock_demos: Path, tmp_path: Path) -> None:
    make_tiny_policy().save_pretrained(tmp_path / "tiny")
    alone = EvalConfig(tmp_path / "alone", "mock", suite="mock", episodes=1)
    named = EvalConfig(tmp_path / "named", "mock", suite="mock", episodes=1, variants="full")
    offline = EvalConfig(tmp_path / "offline", str(tmp_path / "tiny"), data=mock_demos, episodes=1)
    for config, name in ((alone, "policy"), (named, "full"), (offline, "policy")):
        variants = dysl_vla.evaluate(config)["variants"]
        assert list(variants) == [name]
        assert set(variants[name]) > {"layers"}
    assert (tmp_path / "alone/result.json").exists()
    assert (tmp_path / "named/full/result.json").exists()
