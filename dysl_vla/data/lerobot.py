"""LeRobotDataset v3 on a local disk: written where demonstrations are collected, read for training.

Each episode is written as one data file and one video a camera, which the format allows and which makes appending safe:
an episode's files come first, `meta/info.json`, which counts them, last. Any dataset of the format can be read: with
many episodes a file, with videos or images, recorded by LeRobot or continued by it. The origin of every episode (suite,
task, seed, episode index, who acted) is kept in extra columns of the episodes' table. Nothing is downloaded from the
hub or uploaded to it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data import lerobot_statistics as statistics
from dysl_vla.data.lerobot_format import (
    ACTION_KEY,
    CODEBASE_VERSION,
    EPISODES,
    INFO,
    Episode,
    EpisodeRow,
    Origin,
    numbered_files,
    read_declared,
    read_episodes,
    read_info,
    read_table,
    read_tasks,
    write_table,
    write_tasks,
)
from dysl_vla.data.lerobot_frames import Located, locate, read_images, read_picture, read_pictures, read_vectors, row_of
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import is_unused, write_json
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, EmbodimentSpec, FloatArray, ImageArray
from dysl_vla.video import CODEC, PIXEL_FORMAT, VideoReader, write_video

with needs_extra("train"):
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["ACTION_KEY", "DemonstrationWriter", "Demonstrations", "Episode", "EpisodeRow", "Origin", "check_writable"]

FILES_PER_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = EPISODES + "/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_CRF = 10


class Demonstrations:
    """A dataset on disk, opened for reading.

    Args:
        root: The dataset's folder.
        cameras: Names of the cameras to use; None: all that can be used.
        state_names: Names of the state's dimensions, for a dataset that does not name them.
        action_names: Names of the action's dimensions, for a dataset that does not name them.

    Attributes:
        info: The content of `meta/info.json`.
        rows: The episodes.
        spec: The embodiment: cameras, state, actions and rate, as far as the dataset declares them. Without names,
            dimensions are "0", "1" and so on.
        storage: Camera to how its images are kept, "video" or "image".
        left_out: Cameras that cannot be used, and why.
        rendering: `FULL_QUALITY` when the cameras' images were simulated with shadows and reflections; else None.
        has_state_names: Whether the dataset itself names the state's dimensions.
        has_action_names: Whether the dataset itself names the action's dimensions.
        instructions: Distinct instructions; `task_index` of `columns` counts them.

    Raises:
        DatasetError: The folder is no LeRobotDataset v3, its parts do not fit each other, or a choice does not fit it.
    """

    def __init__(
        self,
        root: Path,
        *,
        cameras: Sequence[str] | None = None,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
    ) -> None:
        self.root = root
        self.info = read_info(root)
        declared = read_declared(self.info, cameras, state_names, action_names)
        self.spec, self.storage, self.left_out = declared.spec, declared.storage, declared.left_out
        self.rendering = declared.rendering
        self.has_state_names, self.has_action_names = declared.has_state_names, declared.has_action_names
        self.rows = read_episodes(root, self.info, self.storage) if self.info["total_episodes"] else []
        tasks = read_tasks(root) if self.rows else {}
        self.instructions = list(tasks.values())
        self._task_numbers = np.array(list(tasks), np.int64)

    @property
    def total_frames(self) -> int:
        """The number of frames of all episodes."""
        return sum(row.length for row in self.rows)

    def columns(self) -> dict[str, NDArray[Any]]:
        """All frames without their images, episode by episode.

        Returns:
            `states` (frames, state), `actions` (frames, action), float32; `episode_index`, which counts `rows`, and
            `task_index`, which counts `instructions`, (frames,), int64.

        Raises:
            DatasetError: A file is missing or damaged, frames are missing or were not taken at the rate, a value is
                not finite, or a vector has another dimension than declared.
        """
        dims = {STATE_KEY: len(self.spec.state_names), ACTION_KEY: len(self.spec.action_names), "task_index": 1}
        read = read_vectors(self._located, dims)
        episode = np.repeat(np.arange(len(self.rows)), [row.length for row in self.rows] or 0)
        arrays: dict[str, NDArray[Any]] = {}
        for key, name in ((STATE_KEY, "states"), (ACTION_KEY, "actions")):
            with np.errstate(over="ignore"):  # what overflows is not finite, and is refused below
                arrays[name] = np.asarray(read[key], np.float32)
            bad = ~np.isfinite(arrays[name]).all(axis=1)
            if bad.any():
                number = self.rows[episode[int(bad.argmax())]].number
                raise DatasetError(f"{self.root}: {key} of episode {number} has a value that is not finite.")
        task = read["task_index"][:, 0]
        known = np.isin(task, self._task_numbers)
        if not known.all():
            raise DatasetError(f"{self.root}/meta/tasks.parquet: has no task {task[~known][0]}, which frames have.")
        return arrays | {"episode_index": episode, "task_index": np.searchsorted(self._task_numbers, task)}

    def frames(self, camera: str, episodes: Container[int] | None = None) -> Iterator[tuple[int, int, ImageArray]]:
        """Read a camera's images, each exactly once.

        Args:
            camera: The camera's name.
            episodes: Places in `rows` of the episodes to read; None: all.

        Yields:
            Episode, frame, and image, uint8 (height, width, 3). Episodes and frames rise.

        Raises:
            DatasetError: A video or image is missing, damaged or of another size than declared, or a video has no
                picture at a frame's time.
        """
        wanted = [index for index in range(len(self.rows)) if episodes is None or index in episodes]
        places = ((episode, frame) for episode in wanted for frame in range(self.rows[episode].length))
        images = self._pictures(camera, wanted) if self.storage[camera] == "video" else self._images(camera, wanted)
        for (episode, frame), image in zip(places, images, strict=True):
            self._check_size(camera, episode, image)
            yield episode, frame, image

    def pictures_at(
        self, camera: str, indices: Sequence[int], open_video: Callable[[Path], VideoReader]
    ) -> Iterator[ImageArray]:
        """Read a camera's images of some frames, for which the files are searched.

        Args:
            camera: The camera's name.
            indices: Indices of the frames. In rising order, the fewest pictures are decoded.
            open_video: Opens a video, or finds it open.

        Yields:
            Image of each frame, uint8 (height, width, 3).

        Raises:
            DatasetError: See `frames`.
        """
        starts = [row.start for row in self.rows]
        places = [(episode, index - starts[episode]) for index in indices for episode in [bisect(starts, index) - 1]]
        images: Iterator[ImageArray]
        if self.storage[camera] == "video":
            images = (self._picture(camera, self.rows[episode], frame, open_video) for episode, frame in places)
        else:
            spans = [row_of(self._located.spans[episode], frame) for episode, frame in places]
            images = read_images(spans, IMAGE_PREFIX + camera)
        for (episode, _), image in zip(places, images, strict=True):
            self._check_size(camera, episode, image)
            yield image

    def _check_size(self, camera: str, episode: int, image: ImageArray) -> None:
        size = (*self.spec.cameras[camera], 3)
        if image.shape != size:
            raise DatasetError(
                f"{self.root}: {IMAGE_PREFIX}{camera}: frames of episode {self.rows[episode].number} are "
                f"{image.shape}, meta/info.json declares {size}; correct the shape, or restore the images."
            )

    def _video(self, camera: str, chunk: int, file: int) -> Path:
        path: str = self.info["video_path"]
        name = path.format(video_key=IMAGE_PREFIX + camera, chunk_index=chunk, file_index=file)
        return self.root / name

    def _picture(
        self, camera: str, row: EpisodeRow, frame: int, open_video: Callable[[Path], VideoReader]
    ) -> ImageArray:
        video = open_video(self._video(camera, *row.video_files[camera]))
        time_s = row.video_starts_s[camera] + float(self._located.timestamps[row.start + frame])
        return read_picture(video, time_s, frame, row.number, self.spec.rate_hz)

    def _pictures(self, camera: str, episodes: Sequence[int]) -> Iterator[ImageArray]:
        for (chunk, file), inside in groupby(episodes, lambda episode: self.rows[episode].video_files[camera]):
            rows = [self.rows[episode] for episode in inside]
            times = self._located.timestamps
            yield from read_pictures(
                self._video(camera, chunk, file),
                [row.video_starts_s[camera] + times[row.start : row.start + row.length] for row in rows],
                [row.number for row in rows],
                self.spec.rate_hz,
            )

    def _images(self, camera: str, episodes: Sequence[int]) -> Iterator[ImageArray]:
        spans = [span for episode in episodes for span in self._located.spans[episode]]
        yield from read_images(spans, IMAGE_PREFIX + camera)

    @cached_property
    def _located(self) -> Located:
        return locate(self.root, self.rows, self.spec.rate_hz)


def check_writable(root: Path, spec: EmbodimentSpec, robot: str, rendering: str | None = None) -> None:
    """Refuse a folder that episodes of an embodiment cannot be appended to.

    Raises:
        DatasetError: The folder holds something else, or demonstrations of another embodiment or robot or with other
            rendering, or another program has written to it, be it a single episode.
    """
    if (root / INFO).exists():
        present = Demonstrations(root)
        _check_same_embodiment(present, spec, robot, rendering)
        expected = _new_info(spec, robot, rendering)
        is_ours = all(present.info.get(name) == expected[name] for name in ("data_path", "video_path"))
        is_ours &= _kinds(present.info) == _kinds(expected)
        is_ours &= all(row.origin is not None and row.number == index for index, row in enumerate(present.rows))
        if not is_ours:
            raise DatasetError(f"{root}: was written, or changed, by another program; give --out a new folder.")
    elif not is_unused(root):
        raise DatasetError(f"{root}: is not empty and holds no dataset; give --out a new folder.")


class DemonstrationWriter:
    """Appends episodes to a new dataset, or to one that it wrote before. Only one writer may use a folder at a time.

    LeRobot can continue a dataset that was begun here: its table of episodes has all columns that LeRobot's has, which
    is what LeRobot asks of a table in many files. A dataset that was begun before it had them keeps its own columns.

    Args:
        root: The dataset's folder.
        spec: The embodiment that the demonstrations are of.
        robot: The robot whose arm moves; LeRobot's `robot_type`.
        rendering: `FULL_QUALITY` for images that were simulated with shadows and reflections.

    Raises:
        DatasetError: See `check_writable`.
    """

    def __init__(self, root: Path, spec: EmbodimentSpec, robot: str, rendering: str | None = None) -> None:
        self._root = root
        self._spec = spec
        self._tasks: list[str] = []
        self._columns: set[str] | None = None
        self.rows: list[EpisodeRow] = []
        check_writable(root, spec, robot, rendering)
        if (root / INFO).exists():
            present = Demonstrations(root)
            self._tasks, self.rows, self._info = list(present.instructions), present.rows, present.info
        else:
            self._info = _new_info(spec, robot, rendering)
            write_json(root / INFO, self._info)
        if self.rows:
            first = root / EPISODES_PATH.format(chunk_index=0, file_index=0)
            self._columns = set(pq.read_schema(first).names)

    def append(self, episode: Episode) -> None:
        """Write one episode, which counts once this has returned."""
        number, length = len(self.rows), len(episode.states)
        start = int(self._info["total_frames"])
        chunk, file = divmod(number, FILES_PER_CHUNK)
        place = {"chunk_index": chunk, "file_index": file}
        if episode.instruction not in self._tasks:
            self._tasks.append(episode.instruction)
            write_tasks(self._root, self._tasks)
        frame = np.arange(length, dtype=np.int64)
        numbers: dict[str, NDArray[Any]] = {
            "timestamp": (frame / self._spec.rate_hz).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, number, np.int64),
            "index": start + frame,
            "task_index": np.full(length, self._tasks.index(episode.instruction), np.int64),
        }
        for camera, images in episode.images.items():
            path = self._root / VIDEO_PATH.format(video_key=IMAGE_PREFIX + camera, **place)
            write_video(path, list(images), self._spec.rate_hz, crf=VIDEO_CRF)
        columns = {STATE_KEY: _vectors(episode.states), ACTION_KEY: _vectors(episode.actions)}
        columns |= {name: pa.array(values) for name, values in numbers.items()}
        write_table(self._root / DATA_PATH.format(**place), pa.table(columns))
        row = EpisodeRow(
            number=number,
            length=length,
            start=start,
            video_files=dict.fromkeys(episode.images, (chunk, file)),
            video_starts_s=dict.fromkeys(episode.images, 0.0),
            origin=episode.origin,
        )
        self._write_row(row, episode, numbers, place)
        self.rows.append(row)
        self._info |= {
            "total_episodes": number + 1,
            "total_frames": start + length,
            "total_tasks": len(self._tasks),
            "splits": {"train": f"0:{number + 1}"},
        }
        write_json(self._root / INFO, self._info)

    def _write_row(
        self, row: EpisodeRow, episode: Episode, numbers: dict[str, NDArray[Any]], place: dict[str, int]
    ) -> None:
        assert row.origin is not None
        values: dict[str, Any] = {
            "episode_index": row.number,
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
        vectors = {STATE_KEY: episode.states, ACTION_KEY: episode.actions}
        vectors |= {name: value[:, None] for name, value in numbers.items()}
        measured = {key: statistics.of_numbers(value) for key, value in vectors.items()}
        measured |= {IMAGE_PREFIX + name: statistics.of_images(images) for name, images in episode.images.items()}
        for key, found in measured.items():
            values |= {f"stats/{key}/{name}": value for name, value in found.items()}
        values |= {f"origin/{name}": value for name, value in asdict(row.origin).items()}
        table = pa.table({name: pa.array([v]) for name, v in values.items() if name in (self._columns or values)})
        self._columns = self._columns or set(values)
        write_table(self._root / EPISODES_PATH.format(**place), table)

    def close(self) -> None:
        """Write `meta/stats.json`, which LeRobot's training reads; see `lerobot_statistics.merged`."""
        if not self.rows:
            return
        tables = [read_table(path) for path in numbered_files(self._root / EPISODES)]
        table = pa.concat_tables(tables, promote_options="permissive").sort_by("episode_index").slice(0, len(self.rows))
        episodes: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name in (name for name in table.column_names if name.startswith("stats/")):
            _, key, statistic = name.split("/")
            episodes.setdefault(key, {})[statistic] = np.array(table[name].to_pylist(), np.float64)
        columns = Demonstrations(self._root).columns()
        exact = {STATE_KEY: columns["states"], ACTION_KEY: columns["actions"]}
        write_json(self._root / "meta/stats.json", statistics.merged(episodes, exact))


def _new_info(spec: EmbodimentSpec, robot: str, rendering: str | None) -> dict[str, Any]:
    if not float(spec.rate_hz).is_integer():
        raise DatasetError(f"fps must be a whole number in LeRobot's format, got {spec.rate_hz} Hz.")
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
                **({"rendering": rendering} if rendering else {}),
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


def _kinds(info: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """The dtype and shape of each feature, which all files of a dataset must share."""
    return {key: (feature["dtype"], list(feature["shape"])) for key, feature in info["features"].items()}


def _check_same_embodiment(present: Demonstrations, spec: EmbodimentSpec, robot: str, rendering: str | None) -> None:
    compared = {"robot": (robot, present.info.get("robot_type")), "rendering": (rendering, present.rendering)}
    for name in ("cameras", "state_names", "action_names", "rate_hz"):
        compared[name] = getattr(spec, name), getattr(present.spec, name)
    for name, (mine, theirs) in compared.items():
        if mine != theirs:
            raise DatasetError(
                f"{present.root}: {name} is {theirs}, the new demonstrations have {mine}; give --out a new folder."
            )


def _vectors(values: FloatArray) -> pa.Array:
    """A column of vectors; vectors of one dimension are plain numbers in the format."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
