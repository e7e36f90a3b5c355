"""LeRobotDataset v3 on a local disk: written by demonstrations' collection, read for training.

Written is one data file and one video a camera and episode, which the format allows and which makes appending safe: an
episode's files come first, `meta/info.json`, which counts them, last. Read is any dataset of the format, also with many
episodes a file. What a dataset must show of every episode's origin (suite, task, seed, episode index, who acted) stands
in extra columns of the episodes' table. Not for the hub: nothing is downloaded or uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import is_unused, replacing, write_json
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, FloatArray, ImageArray, WorldSpec
from dysl_vla.video import CODEC, PIXEL_FORMAT, read_video, write_video

with needs_extra("sim"):
    import pyarrow as pa
    import pyarrow.dataset as pads
    import pyarrow.parquet as pq

ACTION_KEY = "action"
CODEBASE_VERSION = "v3.0"
INFO = "meta/info.json"
FILES_PER_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_CRF = 10
STATISTICS_FRAMES = 16


@dataclass(frozen=True)
class Origin:
    """Where an episode comes from, so that it can be made again and is never evaluated on."""

    suite: str
    task: str
    seed: int
    episode_index: int
    actor: str
    noise: float


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
        images: Camera name to uint8, (time, height, width, 3).
        states: (time, state).
        actions: (time, action): what the expert does in each of these moments.
        instruction: In plain English.
        origin: Where it comes from.
    """

    images: dict[str, ImageArray]
    states: FloatArray
    actions: FloatArray
    instruction: str
    origin: Origin


@dataclass(frozen=True)
class EpisodeRow:
    """An episode's entry in the dataset's table. `origin` is None in datasets that others wrote."""

    length: int
    start: int
    video_files: dict[str, tuple[int, int]]
    video_starts_s: dict[str, float]
    origin: Origin | None


def check_writable(root: Path, spec: WorldSpec, robot: str) -> None:
    """Refuse a folder that episodes of a world cannot be appended to.

    Raises:
        DatasetError: It holds something else, or demonstrations of another world or robot.
    """
    if (root / INFO).exists():
        present = Demonstrations(root)
        _check_same_world(present, spec, robot)
        if present.info["data_path"] != DATA_PATH or any(row.origin is None for row in present.rows):
            raise DatasetError(f"{root}: was written by another program; give --out a new folder.")
    elif not is_unused(root):
        raise DatasetError(f"{root}: is not empty and no dataset; give --out a new folder.")


class DemonstrationWriter:
    """Appends episodes to a dataset, a new one or one that it wrote before. One at a time may write to a folder.

    Args:
        root: The dataset's folder.
        spec: The world that the demonstrations are of.
        robot: Whose arm moves; LeRobot's `robot_type`.

    Raises:
        DatasetError: See `check_writable`.
    """

    def __init__(self, root: Path, spec: WorldSpec, robot: str) -> None:
        self._root = root
        self._spec = spec
        self._tasks: list[str] = []
        self.rows: list[EpisodeRow] = []
        check_writable(root, spec, robot)
        if (root / INFO).exists():
            present = Demonstrations(root)
            self._tasks, self.rows, self._info = list(present.instructions), present.rows, present.info
        else:
            self._info = _new_info(spec, robot)
            write_json(root / INFO, self._info)

    def append(self, episode: Episode) -> None:
        """Write one episode; it counts once this has returned."""
        number, length = len(self.rows), len(episode.states)
        start = int(self._info["total_frames"])
        chunk, file = divmod(number, FILES_PER_CHUNK)
        place = {"chunk_index": chunk, "file_index": file}
        if episode.instruction not in self._tasks:
            self._tasks.append(episode.instruction)
            _write_tasks(self._root / "meta/tasks.parquet", self._tasks)
        frame = np.arange(length, dtype=np.int64)
        columns: dict[str, pa.Array] = {
            STATE_KEY: _vectors(episode.states),
            ACTION_KEY: _vectors(episode.actions),
            "timestamp": pa.array((frame / self._spec.rate_hz).astype(np.float32)),
            "frame_index": pa.array(frame),
            "episode_index": pa.array(np.full(length, number, np.int64)),
            "index": pa.array(start + frame),
            "task_index": pa.array(np.full(length, self._tasks.index(episode.instruction), np.int64)),
        }
        for camera, images in episode.images.items():
            path = self._root / VIDEO_PATH.format(video_key=IMAGE_PREFIX + camera, **place)
            write_video(path, list(images), self._spec.rate_hz, crf=VIDEO_CRF)
        _write_table(self._root / DATA_PATH.format(**place), pa.table(columns))
        row = EpisodeRow(
            length=length,
            start=start,
            video_files=dict.fromkeys(episode.images, (chunk, file)),
            video_starts_s=dict.fromkeys(episode.images, 0.0),
            origin=episode.origin,
        )
        self._write_row(number, row, episode, place)
        self.rows.append(row)
        self._info |= {
            "total_episodes": number + 1,
            "total_frames": start + length,
            "total_tasks": len(self._tasks),
            "splits": {"train": f"0:{number + 1}"},
        }
        write_json(self._root / INFO, self._info)

    def _write_row(self, number: int, row: EpisodeRow, episode: Episode, place: dict[str, int]) -> None:
        assert row.origin is not None
        values: dict[str, Any] = {
            "episode_index": number,
            "tasks": [episode.instruction],
            "length": row.length,
            "dataset_from_index": row.start,
            "dataset_to_index": row.start + row.length,
            "data/chunk_index": place["chunk_index"],
            "data/file_index": place["file_index"],
            "meta/episodes/chunk_index": place["chunk_index"],
            "meta/episodes/file_index": place["file_index"],
        }
        for camera, (chunk, file) in row.video_files.items():
            prefix = f"videos/{IMAGE_PREFIX}{camera}"
            values[f"{prefix}/chunk_index"], values[f"{prefix}/file_index"] = chunk, file
            values[f"{prefix}/from_timestamp"], values[f"{prefix}/to_timestamp"] = 0.0, row.length / self._spec.rate_hz
        for key, statistics in _episode_statistics(episode).items():
            values |= {f"stats/{key}/{name}": value for name, value in statistics.items()}
        values |= {f"origin/{name}": value for name, value in asdict(row.origin).items()}
        table = pa.table({name: pa.array([value]) for name, value in values.items()})
        _write_table(self._root / EPISODES_PATH.format(**place), table)

    def close(self) -> None:
        """Write `meta/stats.json`, which LeRobot's training reads, from the statistics of all episodes."""
        if self.rows:
            write_json(self._root / "meta/stats.json", _merge_statistics(_episode_table(self._root, len(self.rows))))


class Demonstrations:
    """A dataset on disk, opened for reading.

    Args:
        root: The dataset's folder.

    Attributes:
        info: `meta/info.json`.
        rows: The episodes.
        spec: The world: cameras, state, actions and rate, as far as the dataset says them.
        instructions: Distinct instructions; `task_index` counts them.

    Raises:
        DatasetError: The folder is no LeRobotDataset v3, or its parts do not fit each other.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / INFO
        if not path.is_file():
            raise DatasetError(f"{root}: holds no demonstrations (there is no meta/info.json).")
        try:
            self.info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, features = self.info["codebase_version"], self.info["features"]
            if version != CODEBASE_VERSION:
                raise DatasetError(f"{path}: codebase_version is {version!r}; this reads {CODEBASE_VERSION!r}.")
            self.spec = _spec_of(features, float(self.info["fps"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path}: is not a LeRobotDataset v3 description ({error!r}).") from error
        try:
            count = int(self.info["total_episodes"])
            self.instructions: list[str] = _read_tasks(root / "meta/tasks.parquet") if count else []
            self.rows = [self._row(values) for values in _episode_table(root, count).to_pylist()] if count else []
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DatasetError(f"{root}/meta: cannot be read ({error!r}).") from error
        if len(self.rows) != count:
            raise DatasetError(f"{root}/meta/episodes: {len(self.rows)} episodes, meta/info.json counts {count}.")

    def _row(self, values: dict[str, Any]) -> EpisodeRow:
        videos = {camera: f"videos/{IMAGE_PREFIX}{camera}" for camera in self.spec.cameras}
        names = {name: values.get(f"origin/{name}") for name in Origin.__dataclass_fields__}
        return EpisodeRow(
            length=values["length"],
            start=values["dataset_from_index"],
            video_files={c: (values[f"{v}/chunk_index"], values[f"{v}/file_index"]) for c, v in videos.items()},
            video_starts_s={c: values[f"{v}/from_timestamp"] for c, v in videos.items()},
            origin=None if None in names.values() else Origin(**names),  # type: ignore[arg-type]
        )

    @property
    def total_frames(self) -> int:
        """Frames of all episodes."""
        return sum(row.length for row in self.rows)

    def columns(self) -> dict[str, NDArray[Any]]:
        """All frames without their images, in the dataset's order.

        Returns:
            `states` (frames, state), `actions` (frames, action), `episode_index` and `task_index` (frames,).

        Raises:
            DatasetError: A file is missing or damaged, a value is not finite, a dimension is another than declared.
        """
        names = [STATE_KEY, ACTION_KEY, "episode_index", "task_index", "index"]
        try:
            files = sorted((self.root / "data").glob("*/*.parquet"))
            table = pads.dataset(files, format="parquet").to_table(columns=names)
            table = table.filter(pa.compute.less(table["index"], self.total_frames)).sort_by("index")
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.root}/data: cannot be read ({error}).") from error
        if len(table) != self.total_frames:
            raise DatasetError(f"{self.root}/data: {len(table)} frames, the episodes count {self.total_frames}.")
        arrays = {}
        for key, name, dim in (
            (STATE_KEY, "states", len(self.spec.state_names)),
            (ACTION_KEY, "actions", len(self.spec.action_names)),
        ):
            column = table[key].combine_chunks()
            is_scalar = pa.types.is_floating(column.type)  # as the format keeps vectors of one dimension
            array = np.asarray(column if is_scalar else column.flatten(), np.float32)
            if len(array) != len(table) * dim:
                raise DatasetError(f"{self.root}: {key} has another dimension than the {dim} of meta/info.json.")
            arrays[name] = array.reshape(-1, dim)
            bad = ~np.isfinite(arrays[name]).all(axis=1)
            if bad.any():
                episode = table["episode_index"][int(bad.argmax())].as_py()
                raise DatasetError(f"{self.root}: {key} of episode {episode} has a value that is not finite.")
        return arrays | {name: table[name].to_numpy() for name in ("episode_index", "task_index")}

    def frames(self, camera: str, episodes: Container[int] | None = None) -> Iterator[tuple[int, int, ImageArray]]:
        """Decode a camera's videos, each file once.

        Args:
            camera: Its name.
            episodes: Only these; None: all.

        Yields:
            Episode index, frame index, uint8 (height, width, 3).

        Raises:
            DatasetError: A video is missing, cut off or of another size than declared.
        """
        size = (*self.spec.cameras[camera], 3)
        by_file: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(self.rows):
            if episodes is None or index in episodes:
                by_file.setdefault(row.video_files[camera], []).append(index)
        for (chunk, file), inside in by_file.items():
            name = self.info["video_path"].format(video_key=IMAGE_PREFIX + camera, chunk_index=chunk, file_index=file)
            starts = {e: round(self.rows[e].video_starts_s[camera] * self.spec.rate_hz) for e in inside}
            wanted = {starts[e] + i: (e, i) for e in inside for i in range(self.rows[e].length)}
            found = 0
            for position, image in enumerate(read_video(self.root / name)):
                if position in wanted:
                    if image.shape != size:
                        raise DatasetError(f"{self.root / name}: frames are {image.shape}, declared is {size}.")
                    found += 1
                    yield *wanted[position], image
            if found != len(wanted):
                raise DatasetError(f"{self.root / name}: {found} frames, {len(wanted)} are needed; it was cut off.")


def _new_info(spec: WorldSpec, robot: str) -> dict[str, Any]:
    if not float(spec.rate_hz).is_integer():
        raise DatasetError(f"fps: LeRobot's format needs a whole number, the world runs at {spec.rate_hz} Hz.")
    features: dict[str, Any] = {}
    for camera, (height, width) in spec.cameras.items():
        features[IMAGE_PREFIX + camera] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": CODEC,
                "video.pix_fmt": PIXEL_FORMAT,
                "video.fps": int(spec.rate_hz),
                "video.channels": 3,
                "has_audio": False,
                "is_depth_map": False,
            },
        }
    for key, names in ((STATE_KEY, spec.state_names), (ACTION_KEY, spec.action_names)):
        features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": robot,
        "fps": int(spec.rate_hz),
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "splits": {},
        "features": features,
    }


def _spec_of(features: Mapping[str, Any], fps: float) -> WorldSpec:
    for key in (STATE_KEY, ACTION_KEY):
        if key not in features:
            raise DatasetError(f"meta/info.json: there is no feature {key!r}.")
    state, action = (_names(features[key]) for key in (STATE_KEY, ACTION_KEY))
    for key, feature in features.items():
        if key.startswith(IMAGE_PREFIX) and (feature["dtype"] != "video" or feature["shape"][-1] != 3):
            raise DatasetError(
                f"meta/info.json: feature {key!r} is {feature['dtype']} of shape {feature['shape']}; this reads videos "
                "of shape (height, width, 3)."
            )
    return WorldSpec(
        cameras={
            key.removeprefix(IMAGE_PREFIX): (feature["shape"][0], feature["shape"][1])
            for key, feature in features.items()
            if key.startswith(IMAGE_PREFIX)
        },
        state_names=state,
        action_names=action,
        action_low=(-np.inf,) * len(action),
        action_high=(np.inf,) * len(action),
        rate_hz=fps,
    )


def _names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """A vector's names: a list, a list under some word ("motors"), a map to positions, or none."""
    names, length = feature["names"], feature["shape"][0]
    if isinstance(names, Mapping):
        lists = [value for value in names.values() if isinstance(value, list)]
        names = lists[0] if lists else sorted(names, key=lambda name: names[name])
    return tuple(map(str, names or range(length)))


def _check_same_world(present: Demonstrations, spec: WorldSpec, robot: str) -> None:
    compared = {"robot": (robot, present.info.get("robot_type"))}
    for name in ("cameras", "state_names", "action_names", "rate_hz"):
        compared[name] = getattr(spec, name), getattr(present.spec, name)
    for name, (mine, theirs) in compared.items():
        if mine != theirs:
            raise DatasetError(
                f"{present.root}: {name} is {theirs}, the new demonstrations have {mine}; give --out a new folder."
            )


def _vectors(values: FloatArray) -> pa.Array:
    """A column of vectors; those of one dimension are plain numbers in the format."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """LeRobot reads this table with pandas and wants the text as its index, which pandas keeps in the schema."""
    column = {"field_name": "task_index", "name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    text = {"field_name": "task", "name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [column | {"metadata": None}, text | {"metadata": None}],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.3",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks)})
    _write_table(path, table.replace_schema_metadata({"pandas": json.dumps(pandas)}))


def _read_tasks(path: Path) -> list[str]:
    table = pq.read_table(path).sort_by("task_index")
    text = "task" if "task" in table.column_names else "__index_level_0__"
    return [str(task) for task in table[text].to_pylist()]


def _episode_table(root: Path, count: int) -> pa.Table:
    """The table's first rows; those behind them are of an episode that was interrupted before it counted."""
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{root}/meta/episodes: holds no episodes.")
    return pads.dataset(files, format="parquet").to_table().sort_by("episode_index").slice(0, count)


def _episode_statistics(episode: Episode) -> dict[str, dict[str, Any]]:
    """Mean, deviation and range of every feature; images as LeRobot wants them, (3, 1, 1) in [0, 1], of some frames."""
    statistics: dict[str, dict[str, Any]] = {}
    for key, values in ((STATE_KEY, episode.states), (ACTION_KEY, episode.actions)):
        statistics[key] = _statistics(values.astype(np.float64)) | {"count": [len(values)]}
    for camera, images in episode.images.items():
        some = images[:: max(1, len(images) // STATISTICS_FRAMES)]
        of_pixels = _statistics(some.reshape(-1, 3) / 255.0)
        shaped = {name: [[[value]] for value in values] for name, values in of_pixels.items()}
        statistics[IMAGE_PREFIX + camera] = shaped | {"count": [len(some)]}
    return statistics


def _statistics(values: NDArray[np.float64]) -> dict[str, list[float]]:
    reduced = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: value.tolist() for name, value in reduced.items()}


def _merge_statistics(table: pa.Table) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for key in (name[6:-6] for name in table.column_names if name.startswith("stats/") and name.endswith("/count")):
        low, high, mean, std, count = (
            np.array(table[f"stats/{key}/{name}"].to_pylist(), np.float64)
            for name in ("min", "max", "mean", "std", "count")
        )
        weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        overall = (weight * mean).sum(0)
        variance = (weight * (std**2 + (mean - overall) ** 2)).sum(0)
        merged[key] = {
            "min": low.min(0).tolist(),
            "max": high.max(0).tolist(),
            "mean": overall.tolist(),
            "std": np.sqrt(variance).tolist(),
            "count": [int(count.sum())],
        }
    return merged
