from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dysl_vla.data.info import render_info
from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, Origin
from dysl_vla.data.lerobot_statistics import QUANTILES
from dysl_vla.errors import DatasetError
from dysl_vla.types import EmbodimentSpec
from dysl_vla.video import read_video, write_video

SPEC = EmbodimentSpec(
    cameras={"top": (32, 48)},
    state_names=("x", "y"),
    action_names=("dx", "gripper"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    rate_hz=20.0,
)


def make_episode(number: int, length: int = 7) -> Episode:
    rng = np.random.default_rng(number)
    # Smooth pictures: noise is not what a video keeps.
    ramp = np.linspace(0, 200, 48)[None, None, :, None] + 5 * np.arange(length)[:, None, None, None]
    return Episode(
        images={"top": np.broadcast_to(ramp, (length, 32, 48, 3)).astype(np.uint8)},
        states=rng.normal(size=(length, 2)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        instruction=f"task {number % 2}",
        origin=Origin("mock", f"t{number % 2}", 0, number, "expert", 1.0),
    )


def write(root: Path, *numbers: int) -> list[Episode]:
    episodes = [make_episode(number, 5 + number) for number in numbers]
    writer = DemonstrationWriter(root, SPEC, "test")
    for episode in episodes:
        writer.append(episode)
    writer.close()
    return episodes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    episodes = write(tmp_path / "d", 0, 1, 2)
    demonstrations = Demonstrations(tmp_path / "d")
    columns = demonstrations.columns()
    np.testing.assert_array_equal(columns["states"], np.concatenate([e.states for e in episodes]))
    np.testing.assert_array_equal(columns["actions"], np.concatenate([e.actions for e in episodes]))
    assert [row.origin for row in demonstrations.rows] == [e.origin for e in episodes]
    assert [demonstrations.instructions[i] for i in columns["task_index"][[0, 5, -1]]] == ["task 0", "task 1", "task 0"]
    for episode, frame, image in demonstrations.frames("top"):
        error = np.abs(image.astype(int) - episodes[episode].images["top"][frame])
        assert error.max() <= 6
    assert "3 episodes, 18 frames" in render_info(demonstrations)


def test_a_dataset_is_appended_to(tmp_path: Path) -> None:
    write(tmp_path / "two", 0, 1)
    write(tmp_path / "two", 2)
    write(tmp_path / "one", 0, 1, 2)
    for name in ("meta/info.json", "meta/stats.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_what_an_interruption_left_is_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "d", 0)
    info = (tmp_path / "d/meta/info.json").read_text()
    write(tmp_path / "d", 1)
    (tmp_path / "d/meta/info.json").write_text(info)  # killed before the episode counted
    assert len(Demonstrations(tmp_path / "d").rows) == 1
    assert len(Demonstrations(tmp_path / "d").columns()["states"]) == 5
    for folder in ("data", "meta/episodes"):  # killed while a table was written
        (tmp_path / "d" / folder / "chunk-000/.file-001.parquet.4242.tmp").write_bytes(b"PAR1 half a file")
    write(tmp_path / "d", 3)
    assert [row.length for row in Demonstrations(tmp_path / "d").rows] == [5, 8]


def test_vectors_of_one_dimension_are_plain_numbers(tmp_path: Path) -> None:
    spec = replace(SPEC, action_names=("dx",), action_low=(-1.0,), action_high=(1.0,))
    episode = make_episode(0)
    writer = DemonstrationWriter(tmp_path / "d", spec, "test")
    writer.append(replace(episode, actions=episode.actions[:, :1]))
    assert pq.read_schema(tmp_path / "d/data/chunk-000/file-000.parquet").field("action").type == pa.float32()
    np.testing.assert_array_equal(Demonstrations(tmp_path / "d").columns()["actions"], episode.actions[:, :1])


def test_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    episodes = write(tmp_path / "d", 0, 1, 2)
    stats = json.loads((tmp_path / "d/meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0))
    states = np.concatenate([e.states for e in episodes])
    np.testing.assert_allclose(stats["observation.state"]["min"], states.min(0))
    np.testing.assert_allclose(stats["observation.state"]["max"], states.max(0))
    assert stats["action"]["count"] == [18]
    pixels = np.concatenate([e.images["top"] for e in episodes]) / 255
    np.testing.assert_allclose(np.ravel(stats["observation.images.top"]["mean"]), pixels.mean((0, 1, 2)))
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)


def quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values.astype(np.float64), [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)


def test_quantiles_are_those_of_the_numbers(tmp_path: Path) -> None:
    episodes = write(tmp_path / "d", 0, 1, 2)
    stats = json.loads((tmp_path / "d/meta/stats.json").read_text())
    for key, name in (("action", "actions"), ("observation.state", "states")):
        values = np.concatenate([getattr(e, name) for e in episodes])
        np.testing.assert_allclose([stats[key][q] for q in QUANTILES], quantiles(values))
    rows = pq.read_table(tmp_path / "d/meta/episodes/chunk-000/file-001.parquet")
    np.testing.assert_allclose(
        [rows[f"stats/action/{q}"][0].as_py() for q in QUANTILES], quantiles(episodes[1].actions)
    )
    pixels = episodes[1].images["top"].reshape(-1, 3) / 255
    found = [rows[f"stats/observation.images.top/{q}"][0].as_py() for q in QUANTILES]
    np.testing.assert_allclose(np.reshape(found, (5, 3)), quantiles(pixels))
    of_images = [stats["observation.images.top"][q] for q in QUANTILES]
    assert np.shape(of_images) == (5, 3, 1, 1)
    by_episode = [quantiles(e.images["top"].reshape(-1, 3) / 255) for e in episodes]
    np.testing.assert_allclose(np.reshape(of_images, (5, 3)), np.average(by_episode, axis=0, weights=[5, 6, 7]))


def forget_quantiles(root: Path) -> None:
    """Make a dataset as this package wrote it before it had quantiles and statistics of time stamps and indices."""
    for path in (root / "meta/episodes/chunk-000").iterdir():
        table = pq.read_table(path)
        late = [n for n in table.column_names if re.search(r"^stats/(.*/q\d\d|[a-z_]*(index|stamp)/)", n)]
        assert len(late) == 3 * 5 + 5 * 10
        pq.write_table(table.drop_columns(late), path)
    stats = json.loads((root / "meta/stats.json").read_text())
    kept = {key: {n: v for n, v in of.items() if n not in QUANTILES} for key, of in stats.items() if "." in key}
    (root / "meta/stats.json").write_text(json.dumps(kept | {"action": stats["action"]}))


def test_a_dataset_of_before_is_appended_to_as_it_is(tmp_path: Path) -> None:
    """LeRobot reads a table in many files only if the first has all columns."""
    write(tmp_path / "d", 0)
    forget_quantiles(tmp_path / "d")
    write(tmp_path / "d", 1)
    schemas = [pq.read_schema(tmp_path / f"d/meta/episodes/chunk-000/file-00{i}.parquet") for i in range(2)]
    assert schemas[0].names == schemas[1].names
    assert [row.length for row in Demonstrations(tmp_path / "d").rows] == [5, 6]
    stats = json.loads((tmp_path / "d/meta/stats.json").read_text())
    assert "q50" in stats["action"]
    assert "q50" not in stats["observation.images.top"]


def share_files(root: Path) -> None:
    """Lay a dataset out as LeRobot does: everything of a chunk in one file."""
    count = len(Demonstrations(root).rows)
    data = pa.concat_tables([pq.read_table(root / f"data/chunk-000/file-00{i}.parquet") for i in range(count)])
    table = pa.concat_tables(
        [pq.read_table(root / f"meta/episodes/chunk-000/file-00{i}.parquet") for i in range(count)]
    )
    images = [image for _, _, image in Demonstrations(root).frames("top")]
    for folder in ("data", "meta/episodes", "videos"):
        shutil.rmtree(root / folder)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(data, root / "data/chunk-000/file-000.parquet")
    write_video(root / "videos/observation.images.top/chunk-000/file-000.mp4", images, 20)
    starts = pa.array([row["dataset_from_index"] / 20 for row in table.to_pylist()])
    for name, values in (("from_timestamp", starts), ("file_index", pa.array([0] * count, pa.int64()))):
        column = f"videos/observation.images.top/{name}"
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, root / "meta/episodes/chunk-000/file-000.parquet")


def add_feature(root: Path) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=features | {"reward": {"dtype": "float32", "shape": [1], "names": None}})


def take_origin_of_last(root: Path) -> None:
    """Leave out the columns that LeRobot does not write when it continues a dataset."""
    path = root / "meta/episodes/chunk-000/file-002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([n for n in table.column_names if n.startswith("origin/")]), path)


def take_origins(root: Path) -> None:
    share_files(root)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([n for n in table.column_names if n.startswith("origin/")]), path)


def move_videos(root: Path) -> None:
    (root / "videos").rename(root / "clips")
    edit_info(root, video_path="clips/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")


def renumber(root: Path) -> None:
    path = root / "meta/episodes/chunk-000/file-002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "episode_index", pa.array([7])), path)
    path = root / "data/chunk-000/file-002.parquet"
    data = pq.read_table(path)
    pq.write_table(data.set_column(4, "episode_index", pa.array([7] * len(data))), path)


@pytest.mark.parametrize("change", [add_feature, take_origin_of_last, take_origins, move_videos, renumber])
def test_what_another_program_has_written_to_is_read_and_not_appended_to(tmp_path: Path, change: object) -> None:
    root = tmp_path / "d"
    episodes = write(root, 0, 1, 2)
    change(root)  # type: ignore[operator]
    read = {(e, f): image for e, f, image in Demonstrations(root).frames("top")}
    assert len(read) == len(Demonstrations(root).columns()["states"]) == 18
    for (episode, frame), image in read.items():
        assert np.abs(image.astype(int) - episodes[episode].images["top"][frame]).max() <= 6
    before = sorted(root.rglob("*"))
    with pytest.raises(DatasetError, match="another program"):
        DemonstrationWriter(root, SPEC, "test")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cameras": {"top": (16, 48)}}, "cameras"),
        ({"state_names": ("x",)}, "state_names"),
        ({"rate_hz": 10.0}, "rate_hz"),
    ],
)
def test_demonstrations_of_another_world_are_not_appended(tmp_path: Path, change: dict, field: str) -> None:
    write(tmp_path / "d", 0)
    with pytest.raises(DatasetError, match=field):
        DemonstrationWriter(tmp_path / "d", replace(SPEC, **change), "test")
    with pytest.raises(DatasetError, match=r"robot is test.*another"):
        DemonstrationWriter(tmp_path / "d", SPEC, "another")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match="not empty"):
        DemonstrationWriter(tmp_path, SPEC, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def break_video(root: Path) -> None:
    path = root / "videos/observation.images.top/chunk-000/file-001.mp4"
    frames = list(read_video(path))
    write_video(path, frames[:-2], 20)


def cut_video(root: Path) -> None:
    path = root / "videos/observation.images.top/chunk-000/file-001.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_camera(root: Path) -> None:
    shutil.rmtree(root / "videos/observation.images.top")


def resize_video(root: Path) -> None:
    write_video(root / "videos/observation.images.top/chunk-000/file-001.mp4", [np.zeros((8, 8, 3), np.uint8)] * 6, 20)


@pytest.mark.parametrize("damage", [break_video, cut_video, remove_camera, resize_video])
def test_a_damaged_video_is_named(tmp_path: Path, damage: object) -> None:
    write(tmp_path / "d", 0, 1)
    damage(tmp_path / "d")  # type: ignore[operator]
    with pytest.raises(DatasetError, match=r"observation\.images\.top"):
        list(Demonstrations(tmp_path / "d").frames("top"))


def test_an_action_that_is_not_finite_is_named_with_its_episode(tmp_path: Path) -> None:
    episodes = [make_episode(0), make_episode(1)]
    episodes[1].actions[3, 1] = np.nan
    writer = DemonstrationWriter(tmp_path / "d", SPEC, "test")
    for episode in episodes:
        writer.append(episode)
    with pytest.raises(DatasetError, match="action of episode 1"):
        Demonstrations(tmp_path / "d").columns()


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebase_version": "v2.1"}, "codebase_version"),
        ({"total_episodes": 5}, "episodes"),
        ({"features": {}}, "no feature"),
        ({"fps": "fast"}, "not a LeRobotDataset v3"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    write(tmp_path / "d", 0)
    edit_info(tmp_path / "d", **changes)
    with pytest.raises(DatasetError, match=words):
        Demonstrations(tmp_path / "d")


def test_a_wrong_dimension_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", 0)
    features = json.loads((tmp_path / "d/meta/info.json").read_text())["features"]
    features["action"] |= {"shape": [3], "names": ["a", "b", "c"]}
    edit_info(tmp_path / "d", features=features)
    with pytest.raises(DatasetError, match="action has another dimension"):
        Demonstrations(tmp_path / "d").columns()


def test_a_folder_without_demonstrations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no demonstrations"):
        Demonstrations(tmp_path)
