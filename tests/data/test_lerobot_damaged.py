"""Datasets of other programs that are damaged, or that this package cannot read, are refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dysl_vla.data.lerobot import Demonstrations, Origin
from dysl_vla.errors import DatasetError
from tests.data.foreign import DATA, EPISODES, FROM, SIDE, TOP, VIDEO, edit_feature, edit_info, edit_table, png, record


def cut(name: str) -> Callable[[Path], None]:
    """Cut a file off, as if it had not been written to its end."""

    def break_(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) * 2 // 3])

    return break_


def table(name: str, **columns: Any) -> Callable[[Path], None]:
    return lambda root: edit_table(root, name, **columns)


def info(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit_info(root, **changes)


def feature(key: str, **changes: Any) -> Callable[[Path], None]:
    return lambda root: edit_feature(root, key, **changes)


def tasks(**columns: Any) -> Callable[[Path], None]:
    return lambda root: pq.write_table(pa.table(columns), root / "meta/tasks.parquet")


STATES = [[float(i), 0.0] for i in range(21)]


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (info(total_frames=20), r"total_frames is 20, its 3 episodes have 21"),
        (info(total_episodes=4), r"3 episodes, meta/info\.json counts 4"),
        (info(fps=0), "fps is 0"),
        (info(fps=float("nan")), "fps is nan"),
        (info(total_episodes=-1), "total_episodes -1"),
        (info(features=[1]), "not a LeRobotDataset v3"),
        (info(codebase_version="v2.1"), r"'v2\.1'.*convert_dataset_v21_to_v30"),
        (info(video_path="../{video_key}/file-{file_index:03d}.mp4"), "video_path must.*correct it"),
        (info(video_path="/etc/{video_key}/file-{file_index:03d}.mp4"), "video_path must.*correct it"),
        (info(video_path="videos/{video_key.__class__}.mp4"), "video_path must.*correct it"),
        (info(video_path="videos/{video_key}-{file_index:0999999999d}.mp4"), "video_path must.*correct it"),
        (info(data_path="a/../../data-{file_index}.parquet"), "data_path must.*correct it"),
        (info(video_path=None), "no video_path"),
        (feature("observation.state", shape=[2, 1]), r"observation\.state is float32 of shape \[2, 1\]"),
        (feature("observation.state", dtype="string"), r"observation\.state is string"),
        (feature("observation.state", names=["x"]), "2 dimensions and 1 names"),
        (feature("action", shape=[3], names=None), "action has another dimension than the 3"),
        (feature(TOP, shape=[SIDE, 2 * SIDE, 3]), r"observation\.images\.top.*episode 0.*\(16, 16, 3\).*\(16, 32, 3\)"),
        (tasks(task_index=[0], task=["task 0"]), r"tasks\.parquet: has no task 1"),
        (tasks(task_index=[0, 0], task=["a", "b"]), "task_index is there twice"),
        (tasks(number=[0], task=["a"]), "columns task_index and task"),
        (tasks(task_index=[0, 1], words=["a", "b"]), "columns task_index and task"),
        (cut("meta/tasks.parquet"), r"tasks\.parquet: cannot be read"),
        (cut(EPISODES), r"episodes/.*cannot be read"),
        (cut(DATA), r"data/.*cannot be read.*not finalized"),
        (cut(VIDEO), r"\.mp4"),
        (table(EPISODES, length=["5", "9", "many"]), "length of the row 0 must be a number, got '5'"),
        (table(EPISODES, length=[5, 9.5, 7]), r"length of the row 1 must be a whole number, got 9\.5"),
        (table(EPISODES, episode_index=[[0], [1], [2]]), r"episode_index of the row 0 must be a number, got \[0\]"),
        (table(EPISODES, **{FROM: ["a", "b", "c"]}), f"{FROM} of episode 0 must be a number, got 'a'"),
        (
            table(EPISODES, **{FROM.replace("from_timestamp", "file_index"): ["0", "0", "zero"]}),
            "file_index of episode 0 must be a number",
        ),
        (
            table(EPISODES, **{f"origin/{name}": ["x"] * 3 for name in Origin.__dataclass_fields__}),
            "origin/seed of episode 0 must be a number, got 'x'",
        ),
        (feature("action", names=["j1", "j1"]), "the names of action must differ, got j1 more than once"),
        (table(EPISODES, length=[5, 9, 8]), "total_frames is 21, its 3 episodes have 22"),
        (table(EPISODES, length=[5, 8, 8]), "9 frames of episode 1, which has 8"),
        (table(EPISODES, length=[5, 16, 0]), "episode 2 has no frames"),
        (table(EPISODES, length=None), "no column 'length'"),
        (table(EPISODES, length=[5, None, 7]), "no length"),
        (table(EPISODES, episode_index=[0, 1, 1]), "episode 1 .*is there twice"),
        (table(EPISODES, **{FROM: [0.0, None, 0.1]}), "episode 1 has no video of camera 'top'"),
        (table(EPISODES, **{FROM: None}), "episode 0 has no video of camera 'top'"),
        (table(DATA, timestamp=None), "no column 'timestamp'"),
        (table(DATA, timestamp=[1.0 + i / 30 for i in range(21)]), "frame 0 of episode 0 has the timestamp 1.0000"),
        (table(DATA, timestamp=[float("nan")] * 21), "frame 0 of episode 0 has the timestamp nan"),
        (table(DATA, frame_index=[1, 0, *range(2, 21)]), "episode 0 are not in order"),
        (table(DATA, episode_index=[0] * 4 + [1] * 10 + [2] * 7), "4 frames of episode 0, which has 5"),
        (table(DATA, episode_index=[0] * 5 + [None] * 9 + [2] * 7), "episode_index"),
        (table(DATA, **{"observation.state": [["a", "b"]] * 21}), r"observation\.state holds"),
        (table(DATA, **{"observation.state": [[1.0, 2.0]] * 20 + [None]}), "another dimension"),
        (table(DATA, **{"observation.state": [*STATES[:19], [1.0], [1.0, 2.0, 3.0]]}), "another dimension"),
        (
            table(DATA, **{"observation.state": [*STATES[:19], [1.0, None], [1.0, 2.0]]}),
            "episode 2 has a value that is",
        ),
        (table(DATA, **{"observation.state": [*STATES[:20], [1e39, 2.0]]}), "episode 2 has a value that is not finite"),
        (table(DATA, **{"action": None}), "no column 'action'"),
        (table(DATA, **{"task_index": None}), "no column 'task_index'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(
    tmp_path: Path, break_: Callable[[Path], None], words: str
) -> None:
    break_(record(tmp_path))
    with pytest.raises(DatasetError, match=words):  # noqa: PT012 # each is found out at one of them
        demonstrations = Demonstrations(tmp_path)
        demonstrations.columns()
        list(demonstrations.frames("top"))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([{"bytes": b"no image", "path": ""}] * 21, "row 0 of observation.images.top cannot be read as an image"),
        ([{"bytes": None, "path": "/etc/passwd"}] * 21, "not an embedded image"),
        ([{"bytes": png(np.zeros((SIDE, SIDE), np.uint16)), "path": ""}] * 21, "mode I;16; expected RGB"),  # type: ignore[arg-type]
        ([{"bytes": png(np.zeros((8, 8, 3), np.uint8)), "path": ""}] * 21, r"\(8, 8, 3\), meta/info\.json declares"),
        (["frame-0.png"] * 21, "not an embedded image"),
        (None, "cannot be read"),
    ],
)
def test_images_that_cannot_be_read_are_refused(tmp_path: Path, images: list[Any] | None, words: str) -> None:
    edit_table(record(tmp_path, kind="image"), DATA, **{TOP: images})
    with pytest.raises(DatasetError, match=words):
        list(Demonstrations(tmp_path).frames("top"))


def refusal(root: Path) -> str | None:
    try:
        Demonstrations(root)
    except DatasetError as error:
        return str(error)
    return None


def test_any_oddity_of_a_description_is_read_or_refused(tmp_path: Path) -> None:
    """No other exception than this package's is ever raised."""
    good = json.loads((record(tmp_path) / "meta/info.json").read_text())
    harmless = ("data_path", "robot_type", "total_tasks")
    for odd in (None, [], "x", -3, {}, [None], {"x": None}):
        for key in good:
            edit_info(tmp_path, **good | {key: odd})
            said = refusal(tmp_path)
            assert said is None or re.search(r"meta/(info\.json|episodes)", said)
            assert said or key in harmless or (key, odd) == ("video_path", "x"), (key, odd)
        for name in good["features"]:
            for field in ("dtype", "shape", "names", "info"):
                edit_info(tmp_path, **good)
                edit_feature(tmp_path, name, **{field: odd})
                said = refusal(tmp_path)
                assert said is None or "meta/info.json" in said
