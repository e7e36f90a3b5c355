from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ActionError, CheckpointError, ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.rollout import EpisodeKey, run_episode
from dysl_vla.eval.runner import check_seed
from dysl_vla.files import locked_dir, read_lines
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.types import ActionChunk
from dysl_vla.video import read_video

PROMISED = {
    *("success_rate", "success_ci95", "per_task", "latency_ms", "episodes", "seed", "policy", "suite", "versions"),
    *("git_commit", "command", "control_rate_hz", "render_ms", "physics_ms", "horizon", "workers", "machine", "config"),
}


def config(out: Path, **changes: object) -> EvalConfig:
    return replace(EvalConfig(out=out, policy="mock", suite="mock", episodes=5), **changes)  # type: ignore[arg-type]


def figures(config: EvalConfig) -> dict[str, Any]:
    """Of an evaluation without variants."""
    return evaluate(config)["variants"]["policy"]


def outcomes(out: Path) -> list[tuple[object, ...]]:
    return [(e["task"], e["episode_index"], e["success"], e["steps"]) for e in read_lines(out / "episodes.jsonl")]


def decisions(out: Path) -> list[object]:
    """The part of a run's steps that does not depend on the clock."""
    return pq.read_table(out / "steps.parquet", columns=["task", "episode_index", "step", "action"]).to_pylist()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def wait_for_lines(process: subprocess.Popen[bytes], path: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") > lines:
            return
        time.sleep(0.002)
    pytest.fail(f"{path} did not grow beyond {lines} lines")


def test_a_result_names_the_suite_and_the_tasks_that_were_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = MockPolicy()
    origins = [{"suite": "mock", "task": "reach", "seed": 0, "episodes": 1}]
    policy.provenance = MappingProxyType({"data": {"origins": origins}})  # type: ignore[assignment]
    monkeypatch.setattr("dysl_vla.eval.config.load_variants", lambda *_: [policy])
    played = figures(config(tmp_path / "r", suite=None, episodes=1))
    assert set(played["per_task"]) == {"reach"}
    assert (played["config"]["suite"], played["config"]["tasks"]) == ("mock", "reach")


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    result = figures(config(tmp_path / "r", video=1))
    assert json.loads((tmp_path / "r/result.json").read_text()) == json.loads(json.dumps(result))
    assert all(name in result for name in PROMISED)
    for part in ("total", "encode", "llm", "decode", "guidance"):
        assert set(result["latency_ms"][part]) == {"mean", "p50", "p95", "p99"}
    assert result["per_task"]["reach"]["episodes"] == 5
    assert "| reach |" in (tmp_path / "r/report.md").read_text()
    assert not (tmp_path / "r/parts").exists()
    videos = sorted((tmp_path / "r/videos").iterdir())
    assert [video.name.rsplit("-", 1)[0] for video in videos] == ["linger-000", "reach-000"]
    assert next(read_video(videos[0])).shape == (256, 256, 3)
    assert Image.open(tmp_path / "r/contact_sheet.png").size[0] > 256


def test_success_in_the_records_is_the_environments(tmp_path: Path) -> None:
    result = figures(config(tmp_path / "r", episodes=20))
    env, policy = MockEnv("reach"), MockPolicy()
    again = [run_episode(env, policy, EpisodeKey("reach", 100_000, index)).success for index in range(20)]
    assert [e[2] for e in outcomes(tmp_path / "r") if e[0] == "reach"] == again
    assert 0 < result["success_rate"] < 1
    assert result["per_task"]["reach"]["success_rate"] == np.mean(again)


def test_latencies_are_those_of_inferences_alone(tmp_path: Path) -> None:
    result = figures(config(tmp_path / "r"))
    rows = pq.read_table(tmp_path / "r/steps.parquet").to_pylist()
    timed = [row["total_ms"] for row in rows if row["total_ms"] is not None]
    assert len(timed) == sum(e["inferences"] for e in read_lines(tmp_path / "r/episodes.jsonl"))
    assert all((row["total_ms"] is not None) == (row["step"] % 2 == 0) for row in rows)
    assert result["latency_ms"]["total"]["mean"] == pytest.approx(np.mean(timed))
    assert result["control_rate_hz"]["p50"] == pytest.approx(2e3 / result["latency_ms"]["total"]["p50"])


def test_workers_change_nothing_but_time(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "one"))
    evaluate(config(tmp_path / "two", workers=2))
    assert sorted(outcomes(tmp_path / "one")) == sorted(outcomes(tmp_path / "two"))
    assert decisions(tmp_path / "one") == decisions(tmp_path / "two")


def test_a_killed_run_goes_on_and_ends_in_the_same_result(tmp_path: Path) -> None:
    arguments = f"eval --policy mock --suite mock --episodes 120 --out {tmp_path / 'killed'}".split()
    records = tmp_path / "killed/episodes.jsonl"
    for _ in range(2):
        lines = len(read_lines(records))
        process = subprocess.Popen(
            [sys.executable, "-m", "dysl_vla.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_lines(process, records, lines + 10)
        process.kill()
        process.wait()
    assert not (tmp_path / "killed/result.json").exists()
    killed = figures(config(tmp_path / "killed", episodes=120))
    whole = figures(config(tmp_path / "whole", episodes=120))
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert decisions(tmp_path / "killed") == decisions(tmp_path / "whole")
    for name in ("success_rate", "success_ci95", "per_task", "episodes"):
        assert killed[name] == whole[name]


def test_an_interruption_between_records_and_figures_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dysl_vla.eval.records.write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(tmp_path / "r"))
    assert not (tmp_path / "r/result.json").exists()
    parts = sorted((tmp_path / "r/parts").iterdir())
    timed = [row["total_ms"] for part in parts for row in pq.read_table(part).to_pylist() if row["total_ms"]]
    result = figures(config(tmp_path / "r"))
    assert result["latency_ms"]["total"]["mean"] == pytest.approx(np.mean(timed))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with locked_dir(tmp_path / "r"), pytest.raises(ConfigError, match="in use by another process"):
        evaluate(config(tmp_path / "r"))


def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    arguments = f"eval --policy mock --suite mock --episodes 3000 --workers 2 --out {tmp_path / 'r'}".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "dysl_vla.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_lines(process, tmp_path / "r/episodes.jsonl", 10)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    evaluate(config(tmp_path / "r"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    evaluate(config(tmp_path / "r"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")} == before


@pytest.mark.parametrize(
    "changes", [{"seed": 100_001}, {"episodes": 6}, {"tasks": "reach"}, {"workers": 2}, {"video": 3}]
)
def test_a_folder_of_another_run_is_left_alone(tmp_path: Path, changes: dict[str, object]) -> None:
    evaluate(config(tmp_path / "r"))
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"another run: its {next(iter(changes))}"):
        evaluate(config(tmp_path / "r", **changes))
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds no run"):
        evaluate(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": "libero"}, "unknown suite"),
        ({"tasks": "fly"}, "unknown task"),
        ({"policy": "nobody"}, "unknown policy"),
        ({"seed": 5}, "seed must be at least 100000, got 5"),
        ({"episodes": 0}, "episodes"),
        ({"workers": 0}, "workers"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate(config(tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_a_seed_of_the_training_data_is_refused_through_all_its_ancestors() -> None:
    policy = MockPolicy()
    policy.provenance = MappingProxyType(
        {
            "data": {"origins": [{"seed": 100_007}]},
            "init": {"data": {"origins": [{"seed": 100_008}]}, "init": None},
            "skipping": {"data": {"origins": [{"seed": 100_010}]}},
        }
    )
    check_seed(100_009, policy)
    for seed in (100_007, 100_008, 100_010):
        with pytest.raises(ConfigError, match=f"trained on seed {seed}"):
            check_seed(seed, policy)


def test_a_policy_that_answers_nan_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MockPolicy):
        def infer(self, observations, states):  # type: ignore[no-untyped-def]
            [chunk] = super().infer(observations, states)
            return [ActionChunk(chunk.actions * np.nan, chunk.timing)]

    with pytest.raises(ActionError, match="not finite"):
        run_episode(MockEnv("reach"), Broken(), EpisodeKey("reach", 100_000, 0))
    monkeypatch.setattr("dysl_vla.eval.config.load_variants", lambda *_: [Broken()])
    with pytest.raises(ActionError, match="not finite"):
        evaluate(config(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_a_policy_that_changes_while_it_is_evaluated_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MockPolicy, "fingerprint", "before")
    with pytest.raises(CheckpointError, match="was changed while it is in use"):
        evaluate(config(tmp_path / "r", workers=2))  # the workers' own is "mock"


def test_executed_actions_reach_the_episodes_state() -> None:
    seen = []

    class Watching(MockPolicy):
        def infer(self, observations, states):  # type: ignore[no-untyped-def]
            seen.append(len(states[0].executed))
            return super().infer(observations, states)

    rollout = run_episode(MockEnv("reach"), Watching(), EpisodeKey("reach", 100_000, 1))
    assert seen == list(range(0, len(rollout.steps), 2))[: len(seen)]


def test_what_is_remembered_and_recorded_is_what_was_executed() -> None:
    states = []

    class Wild(MockPolicy):
        def infer(self, observations, states_):  # type: ignore[no-untyped-def]
            states.append(states_[0])
            [chunk] = super().infer(observations, states_)
            return [ActionChunk(chunk.actions * 3, chunk.timing)]

    rollout = run_episode(MockEnv("reach"), Wild(), EpisodeKey("reach", 100_000, 1))
    assert max(abs(value) for row in rollout.steps for value in row["action"]) == 1
    assert np.abs(np.stack(states[0].executed)).max() == 1
