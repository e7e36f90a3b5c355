from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.cli import main
from dysl_vla.data.info import outwards, render_info
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.split import split_for
from dysl_vla.deploy.lerobot_file import ordered_bounds
from tests.data.foreign import DATA, SIDE, edit_feature, edit_info, edit_table, record


def info(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["demos", "info", str(root)]) == 0
    return capsys.readouterr().out


def test_it_says_what_can_be_used_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    edit_feature(tmp_path, "observation.images.top", info={"video.codec": "av1"})
    edit_feature(tmp_path, "observation.images.far", dtype="video", shape=[8, 8, 1], names=None)
    edit_feature(tmp_path, "observation.images.near", dtype="image", shape=[4, 6, 3], names=None)
    said = info(tmp_path, capsys)
    assert "3 episodes, 21 frames, 30 Hz, robot so101_follower" in said
    assert f"top: {SIDE}x{SIDE}, video, av1\n" in said
    assert "near: 4x6, image\n" in said
    assert "left out far: it has 1 channel, not 3" in said
    assert "unnamed" not in said


def test_no_video_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = info(record(tmp_path), capsys)
    shutil.rmtree(tmp_path / "videos")
    assert info(tmp_path, capsys) == before


def test_dimensions_are_shown_with_their_ranges(tmp_path: Path) -> None:
    record(tmp_path, (101, 100))
    values = np.stack([np.linspace(-50, 150, 201), np.linspace(7, 7.3, 201)], 1).astype(np.float32)
    edit_table(tmp_path, DATA, action=pa.FixedSizeListArray.from_arrays(values.ravel(), 2))
    said = render_info(Demonstrations(tmp_path))
    assert "| action | number | -50 | -48 | 148 | 150 | 58.02 |  |" in said
    assert "| action | episode | 7 | 7.003 | 7.297 | 7.3 | 0.08703 | hardly moves |" in said
    assert "| state | number | 0 | 2 | 198 | 200 | 58.02 |  |" in said
    assert "hardly moves: its std is below" in said


def test_the_bounds_can_be_pasted_into_a_robots_file(tmp_path: Path) -> None:
    lines = render_info(Demonstrations(record(tmp_path))).splitlines()[-2:]
    pasted = json.loads("{" + "".join(lines) + "}")
    assert pasted == {"action_low": [-20.0, -2.0], "action_high": [0.0, 0.0]}


@pytest.mark.parametrize("value", [0.0, 7.0, -1234.5, 1e-40])
def test_the_bounds_of_a_constant_action_can_be_pasted_too(tmp_path: Path, value: float) -> None:
    values = pa.array(np.full(2 * 21, value, np.float32))
    edit_table(record(tmp_path), DATA, action=pa.FixedSizeListArray.from_arrays(values, 2))
    pasted = json.loads("{" + "".join(render_info(Demonstrations(tmp_path)).splitlines()[-2:]) + "}")
    low, high = ordered_bounds(["a", "b"], pasted["action_low"], pasted["action_high"])
    assert low[0] <= value <= high[0]


@given(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2).map(sorted))
def test_bounds_contain_what_was_demonstrated_and_little_more(values: list[float]) -> None:
    low, high = outwards(*values)
    assert low <= values[0] <= values[1] <= high
    ordered_bounds(["a"], [low], [high])  # a robot's file may have them
    spread = (values[1] - values[0]) or abs(values[1]) or 1
    assert high - low <= (values[1] - values[0]) + spread / 50 + 1e-9
    assert len(json.dumps(low).lstrip("-").replace(".", "").strip("0")) <= 10


def test_missing_names_are_said_with_how_to_give_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_feature(record(tmp_path), "action", names=None)
    said = info(tmp_path, capsys)
    assert "unnamed  the dataset does not name the dimensions of its action" in said
    assert "--action-names" in said
    assert "--state-names" not in said


@pytest.mark.parametrize("count", [1, 19, 20, 41])
def test_held_out_episodes_are_counted(tmp_path: Path, count: int) -> None:
    said = render_info(Demonstrations(record(tmp_path, (1,) * count)))
    assert f"held out {sum(map(split_for(count).is_held_out, range(count)))} of {count} episodes" in said


def test_a_dataset_without_episodes_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_info(record(tmp_path), total_episodes=0, total_frames=0)
    assert "0 episodes, 0 frames" in info(tmp_path, capsys)
