from __future__ import annotations

import json
from pathlib import Path

import pytest

from dysl_vla.cli import main
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.compare import compare, render_comparison
from dysl_vla.eval.config import EvalConfig
from dysl_vla.files import append_line


def run(out: Path, **changes: object) -> Path:
    evaluate(EvalConfig(**({"out": out, "policy": "mock", "suite": "mock", "episodes": 6} | changes)))  # type: ignore[arg-type]
    return out


def test_a_run_equals_itself(tmp_path: Path) -> None:
    [comparison] = compare([run(tmp_path / "a"), run(tmp_path / "b")])
    assert comparison.success.difference == 0
    assert comparison.success.episodes == 12
    assert comparison.success.mcnemar_p() == 1
    assert comparison.latency_ratio is not None


def test_won_and_lost_episodes_are_counted_by_pair(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    lines = [json.loads(line) for line in (second / "episodes.jsonl").read_text().splitlines()]
    won = next(line for line in lines if not line["success"])
    lost = [line for line in lines if line["success"]][:2]
    for line in (won, *lost):
        line["success"] = not line["success"]
    (second / "episodes.jsonl").unlink()
    for line in reversed(lines):
        append_line(second / "episodes.jsonl", line)
    [comparison] = compare([first, second])
    assert (comparison.success.only_second, comparison.success.only_first) == (1, 2)
    assert "1 : 2" in render_comparison([first, second], [comparison])


@pytest.mark.parametrize(
    ("changes", "words"), [({"seed": 100_001}, "seed"), ({"episodes": 5}, "episodes"), ({"tasks": "reach"}, "episodes")]
)
def test_runs_that_are_not_comparable_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare([run(tmp_path / "a"), run(tmp_path / "b", **changes)])


def test_runs_of_other_simulators_are_refused(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    result = json.loads((second / "result.json").read_text())
    result["versions"]["mujoco"] = "9.9"
    (second / "result.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"mujoco was .* and 9\.9"):
        compare([first, second])
    (second / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no 'suite'"):
        compare([first, second])


def test_latencies_of_parallel_workers_are_not_compared(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", workers=2)]
    comparisons = compare(runs)
    assert comparisons[0].latency_ratio is None
    assert "--workers 1" in render_comparison(runs, comparisons)


def test_unfinished_and_missing_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "compare", str(run(tmp_path / "a")), str(tmp_path / "none")]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "empty")]) == 2
    assert "holds no finished evaluation" in capsys.readouterr().err
    assert main(["eval", "compare", str(tmp_path), str(tmp_path / "a")]) == 2
    assert "holds several runs; name one" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="at least two"):
        compare([tmp_path / "a"])
