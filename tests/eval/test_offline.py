"""Evaluation on demonstrations, for those who have no simulator."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.offline import evaluate_offline
from dysl_vla.eval.offline_report import draw_horizon, render_offline
from dysl_vla.eval.offline_summary import Played, summarise
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.training.tune import Point, choose_by_error
from dysl_vla.types import Normalisation
from tests.conftest import make_tiny_policy

SPEC = make_tiny_policy().spec


def played(predicted: Any, demonstrated: Any) -> Played:
    frames = np.arange(0, len(demonstrated), SPEC.execute_steps)
    shape = np.shape(predicted)[:2]
    nothing = np.zeros(shape, np.float32)
    return Played(frames, demonstrated, predicted, nothing, nothing, nothing * np.nan, nothing.astype(bool))


def trained() -> MiniVLA:
    """A policy whose training held out one episode in twenty."""
    policy = make_tiny_policy()
    policy.provenance = {"data": {"held_out_every": 20}}
    return policy


def test_figures_are_distances_from_what_was_demonstrated_at_that_very_frame() -> None:
    """The second variant is off by one deviation in one of three dimensions, from each chunk's second action on."""
    demonstrated = np.arange(33, dtype=np.float32).reshape(11, 3)
    places = np.minimum(np.arange(0, 11, 2)[:, None] + np.arange(4), 10)
    right = demonstrated[places]
    wrong = right.copy()
    wrong[:, 1:, 1] += 0.5
    result = summarise([played(np.stack([right, wrong]), demonstrated)], ["full", "dysl"], SPEC)
    full, dysl = result["variants"]["full"], result["variants"]["dysl"]
    assert full["error"]["mean"] == 0
    assert full["horizon"] == [0, 0, 0, 0]
    assert dysl["horizon"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert list(dysl["per_dimension"]) == list(SPEC.action_names)
    # The last moment executes one action alone: behind it the episode is over
    assert dysl["per_dimension"][SPEC.action_names[1]] == pytest.approx(0.5 * 5 / 11)
    assert dysl["per_dimension"][SPEC.action_names[0]] == 0
    assert 0 < dysl["error"]["mean"] < 1 / 3
    assert dysl["difference"]["mean"] == pytest.approx(dysl["error"]["mean"])
    assert dysl["difference"]["ci95"] is None  # one block of moments says nothing of others
    many = summarise([played(np.stack([right, wrong]), demonstrated)] * 6, ["full", "dysl"], SPEC)
    low, high = many["variants"]["dysl"]["difference"]["ci95"]
    assert low <= dysl["difference"]["mean"] <= high
    assert result["repeating"] == pytest.approx((3 + 4 * 9 + 6) / 6)
    assert "difference" not in full


def test_the_horizon_ends_where_the_longest_episode_does(tmp_path: Path) -> None:
    demonstrated = np.zeros((3, 3), np.float32)
    result = summarise([played(np.zeros((1, 2, 4, 3), np.float32), demonstrated)], ["policy"], SPEC)
    assert result["variants"]["policy"]["horizon"] == [0, 0, 0, None]
    json.dumps(result, allow_nan=False)
    draw_horizon(result, tmp_path / "horizon.png")
    result |= {"episodes": [0], "data": "demos"}
    assert "| 4 | - |" in render_offline(result)


def test_episodes_are_called_by_their_numbers(mock_demos: Path, tmp_path: Path) -> None:
    """A policy is evaluated on the episodes that its training held out, also where another one was removed since."""
    data = shutil.copytree(mock_demos, tmp_path / "d")
    for path in (data / "meta/episodes/chunk-000").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.filter(pc.not_equal(table["episode_index"], 4)), path)
    info = json.loads((data / "meta/info.json").read_text())
    gone = Demonstrations(mock_demos).rows[4].length
    info |= {"total_episodes": info["total_episodes"] - 1, "total_frames": info["total_frames"] - gone}
    (data / "meta/info.json").write_text(json.dumps(info))
    trained().save_pretrained(tmp_path / "p")
    asked = EvalConfig(tmp_path / "out", str(tmp_path / "p"), data=data)
    assert evaluate_offline(asked)["episodes"] == [19]
    part = tmp_path / "out/episodes/000019.npz"
    for damaged in (b"", part.read_bytes()[:100]):
        part.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"000019\.npz: is damaged .*; remove it"):
            evaluate_offline(asked)


def test_full_and_skipping_are_compared_on_held_out_episodes(distilled: Path, mock_demos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = evaluate_offline(EvalConfig(out, str(distilled), data=mock_demos))
    assert list(result["variants"]) == ["full", "dysl"]
    assert result["episodes"] == [11, 23]
    lengths = [Demonstrations(mock_demos).rows[number].length for number in (11, 23)]
    assert result["moments"] == sum(-(-length // 2) for length in lengths)
    full, dysl = result["variants"]["full"], result["variants"]["dysl"]
    assert full["layers"] is None
    assert dysl["layers"] < 6
    assert full["llm_ms"]["p50"] > 0
    assert dysl["distance"] > 0
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "report.md").read_text() == render_offline(result) + "\n"
    for picture in ("episode-011.png", "episode-023.png", "horizon.png"):
        assert Image.open(out / picture).size[0] > 300
    again = evaluate_offline(EvalConfig(out, str(distilled), data=mock_demos))
    assert again["variants"] == result["variants"]  # nothing was played again
    with pytest.raises(ConfigError, match="holds another run"):
        evaluate_offline(EvalConfig(out, str(distilled), data=mock_demos, held_out=0.5))


def test_the_full_model_is_as_far_off_as_its_own_inferences_say(mock_demos: Path, tmp_path: Path) -> None:
    policy = trained()
    policy.save_pretrained(tmp_path / "p")
    result = evaluate_offline(EvalConfig(tmp_path / "out", str(tmp_path / "p"), data=mock_demos))
    assert list(result["variants"]) == ["policy"]
    demonstrations = Demonstrations(mock_demos)
    row, columns = demonstrations.rows[19], demonstrations.columns()
    views = {camera: list(demonstrations.frames(camera, [19])) for camera in demonstrations.spec.cameras}
    errors = []
    for frame in range(0, row.length, 2):
        observation = {f"observation.images.{name}": view[frame][2] for name, view in views.items()}
        observation |= {
            "observation.state": columns["states"][row.start + frame],
            "task": demonstrations.instructions[columns["task_index"][row.start]],
        }
        [chunk] = policy.infer([observation], [policy.reset()])
        wanted = columns["actions"][row.start + frame : row.start + min(frame + 2, row.length)]
        errors.append(np.abs(chunk.actions[: len(wanted)] - wanted).mean() / 0.5)
    steps = np.array_split(np.array(errors), range(10, len(errors), 10))
    assert result["variants"]["policy"]["error"]["mean"] == pytest.approx(
        np.mean([part.mean() for part in steps]), rel=2e-2
    )


def test_a_bundle_is_evaluated_as_the_checkpoint_that_it_was_made_from(
    skipping_checkpoint: Path, bundle_folder: Path, mock_demos: Path, tmp_path: Path
) -> None:
    results = [
        evaluate_offline(EvalConfig(tmp_path / f"out-{index}", str(folder), data=mock_demos))["variants"]
        for index, folder in enumerate((skipping_checkpoint, bundle_folder))
    ]
    for way in ("full", "dysl"):
        assert results[0][way]["error"]["mean"] == pytest.approx(results[1][way]["error"]["mean"], rel=1e-3)
        assert results[0][way]["layers"] == results[1][way]["layers"] or way == "full"


def test_any_share_or_all_episodes_can_be_asked_for(distilled: Path, mock_demos: Path, tmp_path: Path) -> None:
    asked = EvalConfig(tmp_path / "all", str(distilled), data=mock_demos, held_out=1.0, episodes=3, skip=0)
    result = evaluate_offline(asked)
    assert result["episodes"] == [0, 8, 16]
    assert list(result["variants"]) == ["policy"]
    assert evaluate_offline(replace(asked, out=tmp_path / "half", held_out=0.5))["episodes"] == [1, 9, 17]
    with pytest.raises(DatasetError, match="none is held out"):
        evaluate_offline(replace(asked, out=tmp_path / "none", held_out=0.0))
    with pytest.raises(ConfigError, match="held_out"):
        EvalConfig(tmp_path / "x", held_out=0.1)


def test_the_command_says_what_it_found(distilled: Path, mock_demos: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--policy", str(distilled), "--data", str(mock_demos), "--out", str(tmp_path / "out")]
    assert main(["eval", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "minus full's, paired by frame" in shown
    assert f"Records and pictures: {tmp_path / 'out'}" in shown
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    assert main(["eval", *arguments[:-1], str(tmp_path / "used")]) == 2


def test_the_fastest_setting_near_enough_to_the_full_model_is_chosen() -> None:
    curve = [Point(skip, 3, 1, 2, error, 0) for skip, error in ((1.0, 0.2), (0.9, 0.1), (0.5, 0.12), (0.1, 0.01))]
    assert choose_by_error(curve, 0.1).skip == 0.9
    assert choose_by_error(curve, 0.5).skip == 1.0
    with pytest.raises(ConfigError, match=r"nearest possible is 0\.01, at skip 0\.1"):
        choose_by_error(curve, 0.001)


def test_policies_without_names_of_their_own_are_told_apart_by_deviation() -> None:
    """A dimension of large units does not drown the others."""
    spec = replace(SPEC, action_normalisation=Normalisation((0.0,) * 3, (100.0, 1.0, 1.0)))
    demonstrated = np.zeros((4, 3), np.float32)
    predicted = np.zeros((1, 2, 4, 3), np.float32)
    predicted[..., 0] = 100.0
    result = summarise([played(predicted, demonstrated)], ["policy"], spec)
    assert result["variants"]["policy"]["error"]["mean"] == pytest.approx(1 / 3)
