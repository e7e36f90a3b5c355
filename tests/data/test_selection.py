"""Episodes are held out by their numbers, which stay when others are removed, and each frame has an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dysl_vla.data.info import render_info
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import choose_frames, observations, split_of
from dysl_vla.data.split import Split
from dysl_vla.errors import DatasetError
from dysl_vla.training.train import _held_out
from tests.data.foreign import DATA, EPISODES, edit_info, record


def without(root: Path, number: int) -> Path:
    """Remove an episode; the others keep their numbers."""
    for name in (DATA, EPISODES):
        table = pq.read_table(root / name)
        pq.write_table(table.filter(pc.not_equal(table["episode_index"], number)), root / name)
    lengths = pq.read_table(root / EPISODES)["length"].to_pylist()
    edit_info(root, total_episodes=len(lengths), total_frames=sum(lengths))
    return root


def test_what_is_held_out_stays_so_when_an_episode_is_removed(tmp_path: Path) -> None:
    demonstrations = Demonstrations(without(record(tmp_path, (3,) * 8), 1))
    split = Split(4)
    held_out = {demonstrations.rows[e].number for e in range(7) if split.is_held_out(demonstrations.rows[e].number)}
    assert held_out == {3, 7}
    episode = np.array([row.number for row in demonstrations.rows])[demonstrations.columns()["episode_index"]]
    for wanted in (True, False):
        chosen = choose_frames(demonstrations, 100, split, held_out=wanted)
        np.testing.assert_array_equal(chosen, np.flatnonzero(np.isin(episode, [3, 7]) == wanted))
    np.testing.assert_array_equal(_held_out(split, demonstrations), np.isin(episode, [3, 7]))
    assert "held out 2 of 7 episodes" in render_info(demonstrations)


def test_a_dataset_of_which_nothing_is_left_to_train_on_is_refused(tmp_path: Path) -> None:
    demonstrations = Demonstrations(without(record(tmp_path, (3, 3)), 0))
    with pytest.raises(DatasetError, match="all are held out"):
        _held_out(Split(2), demonstrations)


@pytest.mark.parametrize("record_of", [{"data": {"episodes": 4}}, {"data": {}, "init": {"data": {"episodes": 4}}}])
def test_a_dataset_that_has_lost_episodes_is_reported_with_both_numbers(
    tmp_path: Path, record_of: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations = Demonstrations(record(tmp_path))
    split_of(demonstrations, {"data": {"episodes": 3}})
    split_of(demonstrations, None)
    assert capsys.readouterr().err == ""
    split_of(demonstrations, record_of)
    assert f"{tmp_path}: has 3 episodes, the policy was trained on a dataset of 4" in capsys.readouterr().err


def test_a_blank_instruction_is_refused_where_frames_have_it(tmp_path: Path) -> None:
    tasks = {"task_index": [0, 1, 2], "task": ["go", " \t", ""]}
    pq.write_table(pa.table(tasks), record(tmp_path) / "meta/tasks.parquet")
    demonstrations = Demonstrations(tmp_path)
    assert len(list(observations(demonstrations, np.arange(5)))) == 5  # of episode 0, whose task is not blank
    with pytest.raises(DatasetError, match=r"meta/tasks\.parquet: a task must say what to do, got a blank one"):
        list(observations(demonstrations, np.arange(6)))
