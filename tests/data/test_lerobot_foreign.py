"""Datasets of other programs are read as those programs mean them. What is refused is in test_lerobot_damaged.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.lerobot_frames import TOLERANCE
from dysl_vla.errors import DatasetError
from dysl_vla.video import write_video
from tests.data.foreign import (
    DATA,
    EPISODES,
    FROM,
    SIDE,
    TOP,
    VIDEO,
    edit_feature,
    edit_info,
    edit_table,
    grey,
    number_of,
    png,
    record,
    video,
)


def check_read(root: Path, lengths: tuple[int, ...] = (5, 9, 7), every: int = 1) -> Demonstrations:
    """Every frame is there once, in order, with the picture and the state of its number."""
    demonstrations = Demonstrations(root)
    columns = demonstrations.columns()
    places = [(e, f) for e, length in enumerate(lengths) for f in range(length)]
    read = list(demonstrations.frames("top"))
    assert [(e, f) for e, f, _ in read] == places
    numbers = [demonstrations.rows[e].start + f for e, f in places]
    assert numbers == list(range(len(places)))
    assert [number_of(image) for _, _, image in read] == [every * number for number in numbers]
    np.testing.assert_array_equal(columns["states"][:, 0], numbers)
    np.testing.assert_array_equal(columns["actions"][:, 0], -columns["states"][:, 0])
    np.testing.assert_array_equal(columns["episode_index"], [e for e, _ in places])
    assert columns["states"].dtype == np.float32
    return demonstrations


@pytest.mark.parametrize("kind", ["video", "image"])
def test_episodes_that_share_files_are_read(tmp_path: Path, kind: str) -> None:
    demonstrations = check_read(record(tmp_path, kind=kind))
    assert [row.origin for row in demonstrations.rows] == [None] * 3
    assert demonstrations.storage == {"top": kind}
    chosen = [(e, f, number_of(image)) for e, f, image in demonstrations.frames("top", {2, 0})]
    assert chosen == [(0, f, f) for f in range(5)] + [(2, f, 14 + f) for f in range(7)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_frame_has_the_picture_of_its_time(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """It has, whatever the video's rate and start, and however unsteady it is within the tolerance."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    fps, every = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 3))
    start = data.draw(st.floats(0, 10))
    root = record(tmp_path_factory.mktemp("d"), lengths, fps=fps)
    count = sum(lengths)
    steady = start + np.arange(every * (count - 1) + 1) / (every * fps)
    jitter = data.draw(st.lists(st.floats(-0.9, 0.9), min_size=len(steady), max_size=len(steady)))
    times = np.maximum(0, steady + min(TOLERANCE, 0.5 / every - 0.1) / fps * np.array(jitter))
    video(root / VIDEO, times)
    edit_table(root, EPISODES, **{FROM: start + np.cumsum([0, *lengths])[:-1] / fps})
    check_read(root, tuple(lengths), every)


@settings(max_examples=30, deadline=None)
@given(
    late=st.floats(0.3, 0.7),
    early=st.booleans(),
    fps=st.integers(1, 120),
    lengths=st.lists(st.integers(1, 8), min_size=1),
)
def test_a_picture_that_is_too_far_in_time_is_refused(
    tmp_path_factory: pytest.TempPathFactory, late: float, early: bool, fps: int, lengths: list[int]
) -> None:
    root = record(tmp_path_factory.mktemp("d"), lengths[:2], fps=fps)
    video(root / VIDEO, (np.arange(sum(lengths[:2])) + (1 - late if early else late)) / fps)
    if early:
        edit_table(root, EPISODES, **{FROM: (1 + np.cumsum([0, *lengths[:2]])[:-1]) / fps})
    with pytest.raises(DatasetError, match=r"file-000\.mp4: has no picture for frame"):
        list(Demonstrations(root).frames("top"))


def test_a_video_of_twice_the_rate_is_read_by_time(tmp_path: Path) -> None:
    video(record(tmp_path) / VIDEO, np.arange(42) / 60)
    check_read(tmp_path, every=2)


@pytest.mark.parametrize("rate", [15, 20, 29, 31, 45])
def test_a_video_of_another_rate_is_refused_with_both_rates(tmp_path: Path, rate: int) -> None:
    record(tmp_path, (40,))
    write_video(tmp_path / VIDEO, [grey(number) for number in range(100)], rate)
    with pytest.raises(DatasetError, match=rf"file-000\.mp4.*episode 0, at.*{rate} pictures a second.*is 30\. "):
        list(Demonstrations(tmp_path).frames("top"))


def test_a_video_that_was_cut_off_is_named_with_the_frame(tmp_path: Path) -> None:
    video(record(tmp_path) / VIDEO, np.arange(18) / 30)
    frames = Demonstrations(tmp_path).frames("top")
    with pytest.raises(
        DatasetError, match=r"file-000\.mp4.*frame 4 of episode 2, at 0\.6000 s; the nearest is at 0\.566"
    ):
        list(frames)
    assert len(list(Demonstrations(tmp_path).frames("top", {0, 1}))) == 14


def test_time_stamps_of_another_rate_are_refused(tmp_path: Path) -> None:
    edit_info(record(tmp_path), fps=15)
    with pytest.raises(
        DatasetError, match=r"frame 1 of episode 0 .*0\.0333 s.*15, it is due at 0\.0667 s.*30 a second"
    ):
        Demonstrations(tmp_path).columns()
    with pytest.raises(DatasetError, match="Correct fps"):
        list(Demonstrations(tmp_path).frames("top"))


def test_two_episodes_may_show_the_same_part_of_a_video(tmp_path: Path) -> None:
    edit_table(record(tmp_path, (5, 5)), EPISODES, **{FROM: [0.0, 0.0]})
    assert [number_of(image) for _, _, image in Demonstrations(tmp_path).frames("top")] == [*range(5), *range(5)]


def test_episodes_may_be_taken_out_and_lie_in_any_order(tmp_path: Path) -> None:
    record(tmp_path, (5, 9, 7))
    numbers = pa.array([3, 8, 9])
    data = pq.read_table(tmp_path / DATA)
    data = data.set_column(4, "episode_index", numbers.take(data["episode_index"]))
    (tmp_path / DATA).unlink()
    for file, episode in enumerate((8, 9, 3)):
        part = data.filter(pa.compute.equal(data["episode_index"], episode))
        pq.write_table(part, tmp_path / f"data/chunk-000/file-00{file}.parquet")
    edit_table(tmp_path, EPISODES, episode_index=numbers)
    demonstrations = check_read(tmp_path)
    assert [row.number for row in demonstrations.rows] == [3, 8, 9]


def test_files_are_read_in_the_order_of_their_numbers_and_hidden_ones_are_not(tmp_path: Path) -> None:
    data = pq.read_table(record(tmp_path) / DATA)
    (tmp_path / DATA).unlink()
    for number, (first, stop) in {9: (0, 3), 10: (3, 8), 1000: (8, 21)}.items():
        pq.write_table(data.slice(first, stop - first), tmp_path / f"data/chunk-000/file-{number:02d}.parquet")
    for name in ("data/chunk-000/._file-09.parquet", EPISODES.replace("file", "._file")):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07Mac OS X")  # AppleDouble
    check_read(tmp_path)


def test_images_are_read_from_wherever_their_rows_are(tmp_path: Path) -> None:
    record(tmp_path, (20, 21, 18), kind="image")
    data = pq.read_table(tmp_path / DATA)
    order = [*range(41, 59), *range(7), *range(20, 41), *range(7, 20)]  # an episode in two pieces
    pq.write_table(data.take(order), tmp_path / DATA, row_group_size=17)
    check_read(tmp_path, (20, 21, 18))
    for episodes in ({0}, {1}, {0, 2}):
        numbers = [number_of(image) for _, _, image in Demonstrations(tmp_path).frames("top", episodes)]
        assert numbers == [n for n in range(59) if (0 if n < 20 else 1 if n < 41 else 2) in episodes]


@pytest.mark.parametrize(
    "layout", [{"row_group_size": 20}, {"use_dictionary": False, "write_batch_size": 8, "data_page_size": 2**19}]
)
def test_images_are_not_all_in_memory(tmp_path: Path, layout: dict[str, Any]) -> None:
    """They are, from many row groups, as LeRobot writes one an episode, and from a single one of many pages."""
    record(tmp_path, (200,), kind="image")
    noise = np.random.default_rng(0).integers(0, 256, (200, 128, 128, 3), np.uint8)
    edit_table(tmp_path, DATA, **{TOP: [{"bytes": png(image), "path": ""} for image in noise]})
    pq.write_table(pq.read_table(tmp_path / DATA), tmp_path / DATA, **layout)
    edit_feature(tmp_path, TOP, shape=[128, 128, 3])
    before, most = pa.total_allocated_bytes(), 0
    for _, frame, image in Demonstrations(tmp_path).frames("top"):
        np.testing.assert_array_equal(image, noise[frame])
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < noise.nbytes / 2


def test_videos_and_images_stand_in_one_dataset(tmp_path: Path) -> None:
    record(tmp_path)
    images = pq.read_table(record(tmp_path / "other", kind="image") / DATA)[TOP].combine_chunks()
    edit_table(tmp_path, DATA, **{"observation.images.wrist": images})
    edit_feature(tmp_path, "observation.images.wrist", dtype="image", shape=[SIDE, SIDE, 3], names=None)
    demonstrations = check_read(tmp_path)
    both = zip(demonstrations.frames("top"), demonstrations.frames("wrist"), strict=True)
    assert all(number_of(top[2]) == number_of(wrist[2]) for top, wrist in both)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"info": {"is_depth_map": True}}, "depth map"),
        ({"info": {"video.is_depth_map": True}}, "depth map"),
        ({"video_info": {"video.is_depth_map": True}}, "depth map"),
        ({"shape": [SIDE, SIDE, 1]}, "1 channel, not 3"),
        ({"shape": [1, SIDE, SIDE], "names": ["channels", "height", "width"]}, "1 channel, not 3"),
        ({"shape": [SIDE, SIDE, 4]}, "4 channels, not 3"),
        ({"shape": [SIDE, SIDE], "names": None}, "shape"),
        ({"dtype": "uint8"}, "uint8"),
    ],
)
def test_a_camera_that_cannot_be_used_is_left_out_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    record(tmp_path)
    usable = {"dtype": "video", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]}
    edit_feature(tmp_path, "observation.images.odd", **usable | changes)
    demonstrations = check_read(tmp_path)
    assert list(demonstrations.spec.cameras) == ["top"]
    assert list(demonstrations.left_out) == ["odd"]
    assert why in demonstrations.left_out["odd"]
    with pytest.raises(DatasetError, match=f"'odd' cannot be used.*{why}.*top"):
        Demonstrations(tmp_path, cameras=["odd"])


def test_a_dataset_without_a_usable_camera_is_opened(tmp_path: Path) -> None:
    edit_feature(record(tmp_path), TOP, info={"is_depth_map": True})
    demonstrations = Demonstrations(tmp_path)
    assert (dict(demonstrations.spec.cameras), list(demonstrations.left_out)) == ({}, ["top"])
    assert len(demonstrations.columns()["states"]) == 21


def test_a_camera_under_another_key_is_left_out(tmp_path: Path) -> None:
    edit_feature(record(tmp_path), "observation.image", dtype="video", shape=[SIDE, SIDE, 3], names=None)
    assert "observation.images.<camera>" in check_read(tmp_path).left_out["observation.image"]


@pytest.mark.parametrize(
    ("shape", "names", "size"),
    [
        ([48, 64, 3], ["height", "width", "channels"], (48, 64)),
        ([48, 64, 3], ["height", "width", "channel"], (48, 64)),
        ([3, 48, 64], ["channels", "height", "width"], (48, 64)),
        ([3, 48, 64], None, (48, 64)),
        ([48, 64, 3], None, (48, 64)),
        ([3, 48, 3], ["channel", "height", "width"], (48, 3)),
        ([64, 48, 3], ["width", "height", "channels"], (48, 64)),
    ],
)
def test_shapes_are_read_as_their_names_say(
    tmp_path: Path, shape: list[int], names: list[str] | None, size: tuple[int, int]
) -> None:
    edit_feature(record(tmp_path), TOP, shape=shape, names=names)
    assert Demonstrations(tmp_path).spec.cameras == {"top": size}


def test_cameras_are_chosen_by_name(tmp_path: Path) -> None:
    record(tmp_path)
    edit_feature(tmp_path, "observation.images.side", dtype="video", shape=[4, 4, 3], names=None)
    with pytest.raises(DatasetError, match="no video of camera 'side'"):
        Demonstrations(tmp_path)
    assert list(Demonstrations(tmp_path, cameras=["top"]).spec.cameras) == ["top"]
    assert Demonstrations(tmp_path, cameras=[]).spec.cameras == {}
    with pytest.raises(DatasetError, match="'front' is not in the dataset; those that can be used: top, side"):
        Demonstrations(tmp_path, cameras=["top", "front"])


@pytest.mark.parametrize("option", ["state_names", "action_names"])
def test_names_are_given_to_a_dataset_that_has_none(tmp_path: Path, option: str) -> None:
    key = "action" if option == "action_names" else "observation.state"
    assert getattr(Demonstrations(record(tmp_path)), f"has_{option}")
    with pytest.raises(DatasetError, match=f"{option}: the dataset names them itself: number, episode"):
        Demonstrations(tmp_path, **{option: ["x", "y"]})
    assert getattr(Demonstrations(tmp_path, **{option: ["number", "episode"]}).spec, option) == ("number", "episode")
    edit_feature(tmp_path, key, names=None)
    demonstrations = Demonstrations(tmp_path)
    assert not getattr(demonstrations, f"has_{option}")
    assert getattr(demonstrations.spec, option) == ("0", "1")
    assert getattr(Demonstrations(tmp_path, **{option: ["x", "y"]}).spec, option) == ("x", "y")
    for wrong in (["x"], ["x", "y", "z"], ["x", "x"]):
        with pytest.raises(DatasetError, match=f"{option}.*expected 2 different names"):
            Demonstrations(tmp_path, **{option: wrong})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"left": ["x"], "right": ["y"]}, ("x", "y")),
        ({"left": ["j1"], "right": ["j1"]}, ("left_j1", "right_j1")),
        ({"y": 1, "x": 0}, ("x", "y")),
        (["x", "y"], ("x", "y")),
        (None, ("0", "1")),
        ([], ("0", "1")),
    ],
)
def test_all_ways_to_name_dimensions_are_read(tmp_path: Path, names: object, expected: tuple[str, ...]) -> None:
    edit_feature(record(tmp_path), "action", names=names)
    assert check_read(tmp_path).spec.action_names == expected


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 2), pa.list_(pa.int64())]
)
def test_numbers_are_read_whatever_their_type_even_where_files_differ(tmp_path: Path, kind: pa.DataType) -> None:
    record(tmp_path)
    data = pq.read_table(tmp_path / DATA)
    late = data.slice(14)
    late = late.set_column(0, "observation.state", pa.array(late["observation.state"].to_pylist(), kind))
    pq.write_table(data.slice(0, 14), tmp_path / DATA)
    pq.write_table(late, tmp_path / "data/chunk-000/file-001.parquet")
    check_read(tmp_path)


def test_columns_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    record(tmp_path)
    events = pa.array([[{"role": "user", "content": "faster", "style": None}]] * 21)
    edit_table(tmp_path, DATA, language_events=events, subtask_index=[0] * 21, **{"next.done": [False] * 21})
    edit_table(tmp_path, DATA, **{"observation.state.velocity": [[0.0]] * 21, "action.raw": [1.0] * 21})
    edit_feature(tmp_path, "language_events", dtype="language", shape=[1], names=None)
    pq.write_table(pa.table({"subtask": ["reach"], "subtask_index": [0]}), tmp_path / "meta/subtasks.parquet")
    check_read(tmp_path)


def test_an_episode_may_have_several_tasks(tmp_path: Path) -> None:
    record(tmp_path)
    edit_table(tmp_path, DATA, task_index=[0, 0, 1, 1, 0, *[1] * 16])
    np.testing.assert_array_equal(check_read(tmp_path).columns()["task_index"][:6], [0, 0, 1, 1, 0, 1])


@pytest.mark.parametrize(
    "table",
    [
        {"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]},
        {"task": ["task 1", "task 0"], "task_index": [1, 0]},
        {"task": ["task 1", "another", "task 0"], "task_index": pa.array([1, 7, 0], pa.int32())},
    ],
)
def test_tasks_are_found_by_their_number(tmp_path: Path, table: dict[str, Any]) -> None:
    record(tmp_path)
    pq.write_table(pa.table(table), tmp_path / "meta/tasks.parquet")
    demonstrations = check_read(tmp_path)
    instructions = [demonstrations.instructions[i] for i in demonstrations.columns()["task_index"]]
    assert instructions == ["task 0"] * 5 + ["task 1"] * 9 + ["task 0"] * 7


def test_numbers_of_tasks_may_have_gaps(tmp_path: Path) -> None:
    edit_table(record(tmp_path), DATA, task_index=[4] * 5 + [9] * 16)
    pq.write_table(pa.table({"task": ["put", "take"], "task_index": [9, 4]}), tmp_path / "meta/tasks.parquet")
    demonstrations = check_read(tmp_path)
    assert [demonstrations.instructions[i] for i in demonstrations.columns()["task_index"][[0, -1]]] == ["take", "put"]


@pytest.mark.parametrize("fields", [{"total_tasks": 0}, {}])
def test_a_dataset_without_episodes_is_empty(tmp_path: Path, fields: dict[str, int]) -> None:
    """LeRobot leaves one when it has begun to record, and one whose first episode was interrupted."""
    edit_info(record(tmp_path), total_episodes=0, total_frames=0, **fields)
    if fields:
        for name in ("data", "videos", "meta/episodes"):
            shutil.rmtree(tmp_path / name)
        (tmp_path / "meta/tasks.parquet").unlink()
    demonstrations = Demonstrations(tmp_path)
    assert demonstrations.rows == []
    assert demonstrations.columns()["states"].shape == (0, 2)
    assert list(demonstrations.frames("top")) == []


def test_links_in_the_folder_are_followed(tmp_path: Path) -> None:
    """The cache of the hub keeps its files as links."""
    record(tmp_path / "d")
    for number, name in enumerate((DATA, VIDEO, EPISODES, "meta/info.json", "meta/tasks.parquet")):
        (tmp_path / "d" / name).rename(tmp_path / f"blob-{number}")
        (tmp_path / "d" / name).symlink_to(tmp_path / f"blob-{number}")
    check_read(tmp_path / "d")
