"""Episodes of several instructions: how they are run, recorded, summarised, filmed and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dysl_vla.envs import suites
from dysl_vla.envs.mock import MockEnv
from dysl_vla.envs.suites import Suite
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.chains import average_difference, chain_figures
from dysl_vla.eval.compare import compare, render_comparison
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.contact_sheet import CAPTION, draw_caption
from dysl_vla.eval.records import STEP_SCHEMA
from dysl_vla.eval.rollout import EpisodeKey, run_episode
from dysl_vla.eval.statistics import PairedSuccess
from dysl_vla.files import read_lines
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.types import FloatArray
from dysl_vla.video import read_video

LENGTH, MARK_STEPS = 3, 30


class MarksEnv(MockEnv):
    """Three marks, one after the other, each with its own instruction and 30 steps."""

    def __init__(self, task: str, cameras: Mapping[str, tuple[int, int]] | None = None) -> None:
        super().__init__("reach", cameras)
        self.task, self.horizon = task, LENGTH * MARK_STEPS
        self.instructions = tuple(f"move the dot to mark {n}" for n in range(1, LENGTH + 1))
        self._completed, self._steps_left = 0, MARK_STEPS

    def _reset_world(self, rng: np.random.Generator) -> None:
        super()._reset_world(rng)
        self._marks = [self._mark, *rng.uniform(-1, 1, (LENGTH - 1, 2))]
        self._completed, self._steps_left, self.instruction = 0, MARK_STEPS, self.instructions[0]

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        reward, reached = super()._step_world(action)
        self._steps_left -= 1
        self._completed += reached
        if reached and self._completed < LENGTH:
            self._mark, self._steps_left = self._marks[self._completed], MARK_STEPS
            self.instruction = self.instructions[self._completed]
        return reward, self._completed == LENGTH

    def advance(self, action: FloatArray) -> tuple[float, bool, dict[str, Any]]:
        reward, truncated, info = super().advance(action)
        return reward, truncated or self._steps_left <= 0, {**info, "completed": self._completed}


@pytest.fixture(autouse=True)
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a suite of that environment."""
    suite = Suite("marks", ("marks",), LENGTH * MARK_STEPS, MarksEnv, robot="point")
    monkeypatch.setitem(suites._parts, "marks", lambda: suite)


def run(out: Path, **changes: object) -> dict[str, Any]:
    settings = {"out": out, "policy": "mock", "suite": "marks", "episodes": 30} | changes
    return evaluate(EvalConfig(**settings))["variants"]["policy"]  # type: ignore[arg-type,no-any-return]


class Watching(MockPolicy):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._states: list[object] = []

    def infer(self, observations, states):  # type: ignore[no-untyped-def]
        [observation], [state] = observations, states
        if not any(state is known for known in self._states):
            self._states.append(state)
        self.asked.append((observation["task"], len(state.executed), len(self._states)))
        return super().infer(observations, states)


def test_a_new_instruction_drops_the_rest_of_the_chunk_and_begins_the_policy_anew() -> None:
    policy, env = Watching(), MarksEnv("marks")
    index = next(i for i in range(50) if run_episode(env, policy, EpisodeKey("marks", 100_000, i)).success)
    policy = Watching()
    rollout = run_episode(env, policy, EpisodeKey("marks", 100_000, index))
    assert (rollout.completed, rollout.instructions) == (3, env.instructions)
    begins = [question for question in policy.asked if question[1] == 0]
    assert begins == [(text, 0, n) for n, text in enumerate(env.instructions, start=1)]
    # Inferences are two steps apart, but for an instruction that ended after the first of the two.
    inferred = [row["step"] for row in rollout.steps if row["total_ms"] is not None]
    assert set(np.diff(inferred)) <= {1, 2}
    assert len(inferred) == len(policy.asked)
    odd = [i for i in range(50) if 1 in np.diff(steps_of_inferences(env, i))]
    assert odd, "no chunk was dropped in any episode"


def steps_of_inferences(env: MarksEnv, index: int) -> list[int]:
    rollout = run_episode(env, MockPolicy(), EpisodeKey("marks", 100_000, index))
    return [row["step"] for row in rollout.steps if row["total_ms"] is not None]


def test_records_and_figures_of_a_run(tmp_path: Path) -> None:
    result = run(tmp_path / "r")
    episodes = read_lines(tmp_path / "r/episodes.jsonl")
    lengths = [episode["completed"] for episode in episodes]
    assert set(lengths) == {0, 1, 2, 3}
    assert all(episode["success"] is (episode["completed"] == 3) for episode in episodes)
    assert all(len(episode["instructions"]) == 3 for episode in episodes)
    chains = result["chains"]
    assert chains["in_a_row"] == [np.mean([length >= n for length in lengths]) for n in (1, 2, 3)]
    assert chains["in_a_row"][2] == result["success_rate"]
    assert chains["average_length"] == pytest.approx(np.mean(lengths))
    low, high = chains["average_length_ci95"]
    assert low < chains["average_length"] < high
    assert chains["per_instruction"]["move the dot to mark 1"] == {
        "begun": 30,
        "completed": sum(length >= 1 for length in lengths),
    }
    assert chains["per_instruction"]["move the dot to mark 3"]["begun"] == sum(length >= 2 for length in lengths)
    report = (tmp_path / "r/report.md").read_text()
    assert f"Instructions carried out in a row: {np.mean(lengths):.2f} of 3 on average" in report
    assert "| 3 |" in report
    assert "| move the dot to mark 2 |" in report


def test_runs_with_one_instruction_an_episode_have_none_of_it(tmp_path: Path) -> None:
    result = run(tmp_path / "r", suite="mock", episodes=2)
    assert "chains" not in result
    assert set(read_lines(tmp_path / "r/episodes.jsonl")[0]) == {
        *("task", "seed", "episode_index", "success", "steps", "inferences")
    }
    assert pq.read_schema(tmp_path / "r/steps.parquet").names == STEP_SCHEMA.names
    assert "in a row" not in (tmp_path / "r/report.md").read_text()
    assert compare([tmp_path / "r", tmp_path / "r"])[0].in_a_row == ()


def rewrite(run: Path, change: dict[str, Any], index: int) -> None:
    episodes = read_lines(run / "episodes.jsonl")
    episodes[index] |= change
    (run / "episodes.jsonl").write_text("".join(json.dumps(episode) + "\n" for episode in episodes))


def test_two_runs_are_compared_by_chain(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for folder in runs:
        run(folder)
    [same] = compare(runs)
    assert average_difference(same.in_a_row)[0] == 0
    lengths = [episode["completed"] for episode in read_lines(runs[0] / "episodes.jsonl")]
    rewrite(runs[1], {"completed": 0, "success": False}, lengths.index(3))
    [comparison] = compare(runs)
    assert [pairs.only_first for pairs in comparison.in_a_row] == [1, 1, 1]
    difference, low, high = average_difference(comparison.in_a_row)
    assert difference == pytest.approx(-3 / 30)
    assert low < difference < high
    text = render_comparison(runs, [comparison])
    assert "difference in average length (95 % interval) | 1 in a row, points" in text
    assert "| -0.10 (" in text
    rewrite(runs[1], {"instructions": ["dance"] * 3}, 0)
    with pytest.raises(ConfigError, match=r"compare: .* and .* have other instructions in one episode"):
        compare(runs)


def test_a_video_of_a_chain_shows_the_present_instruction(tmp_path: Path) -> None:
    run(tmp_path / "r", episodes=1, video=1)
    [video] = (tmp_path / "r/videos").iterdir()
    assert next(read_video(video)).shape == (256 + CAPTION, 256, 3)
    assert (tmp_path / "r/contact_sheet.png").is_file()
    frame = np.full((20, 100, 3), 200, np.uint8)
    one, other = draw_caption(frame, "open the drawer"), draw_caption(frame, "turn on the stove")
    np.testing.assert_array_equal(one[CAPTION:], frame)
    assert (one[:CAPTION] != other[:CAPTION]).any()


def test_intervals_of_the_average_length_cover_it_and_never_vanish() -> None:
    rng = np.random.default_rng(0)
    instructions = [str(n) for n in range(5)]
    true = sum(0.7**n for n in range(1, 6))
    covered = 0
    for _ in range(300):
        fails = rng.random((50, 5)) > 0.7
        lengths = np.where(fails.any(axis=1), fails.argmax(axis=1), 5).tolist()
        figures = chain_figures([{"completed": length, "instructions": instructions} for length in lengths])["chains"]
        low, high = figures["average_length_ci95"]
        covered += low <= true <= high
    assert covered >= 0.95 * 300
    none = chain_figures([{"completed": 0, "instructions": instructions}] * 50)["chains"]
    low, high = none["average_length_ci95"]
    assert low == 0
    assert 0.1 < high < 1
    alike = PairedSuccess(both=10, only_first=0, only_second=0, neither=40)
    _, low, high = average_difference([alike] * 5)
    assert low < 0 < high
