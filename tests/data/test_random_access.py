"""Frames that are read in any order are those that are read in theirs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.data import random_access
from dysl_vla.data.augment import Copies, shifted
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.random_access import FrameSource
from dysl_vla.data.selection import observations
from dysl_vla.errors import DatasetError
from tests.data.foreign import VIDEO, record


def source_of(demonstrations: Demonstrations, copies: int = 0) -> FrameSource:
    return FrameSource(demonstrations, np.arange(demonstrations.total_frames), Copies(copies), {})


def check_any_order(demonstrations: Demonstrations) -> None:
    wanted = dict(observations(demonstrations, np.arange(demonstrations.total_frames)))
    source = source_of(demonstrations)
    rng = np.random.default_rng(0)
    for size in (1, 3, 8, 8):
        rows = rng.integers(0, len(source), size).tolist()
        for row, read in zip(rows, source.read(rows), strict=True):
            assert read.keys() == wanted[row].keys()
            assert all(np.array_equal(read[name], value) for name, value in wanted[row].items())


@pytest.mark.parametrize("kind", ["video", "image"])
def test_frames_of_episodes_that_share_a_file_are_found(tmp_path: Path, kind: str) -> None:
    check_any_order(Demonstrations(record(tmp_path, (5, 90, 7), kind=kind)))


def test_frames_of_many_videos_are_found_with_few_of_them_open(
    mock_demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_access, "OPEN_VIDEOS", 3)
    check_any_order(Demonstrations(mock_demos))


def test_a_copy_is_moved_in_the_same_way_by_any_process(mock_demos: Path) -> None:
    demonstrations = Demonstrations(mock_demos)
    source = source_of(demonstrations, copies=2)
    frame, first, second = source.read([30, 31, 32])
    assert source.indices[30:33].tolist() == [10, 10, 10]
    expected = [shifted(frame, {}, np.random.default_rng([10, copy])) for copy in range(2)]
    [elsewhere] = pickle.loads(pickle.dumps(source)).read([32])  # noqa: S301 # it has videos open
    for one, other in ((first, expected[0]), (second, expected[1]), (second, elsewhere)):
        assert all(np.array_equal(one[name], value) for name, value in other.items())


def test_a_damaged_video_is_an_answer_that_names_it(tmp_path: Path) -> None:
    source = source_of(Demonstrations(record(tmp_path)))
    (tmp_path / VIDEO).write_bytes(b"nothing")
    error = source.__getitems__([0, 1])
    assert isinstance(error, DatasetError)
    assert "file-000.mp4" in str(error)


def test_a_picture_that_is_missing_names_its_frame_and_episode(tmp_path: Path) -> None:
    demonstrations = Demonstrations(record(tmp_path))
    demonstrations.rows[1].video_starts_s["top"] += 100.0
    with pytest.raises(DatasetError, match="no picture for frame 2 of episode 1"):
        source_of(demonstrations).read([7])
