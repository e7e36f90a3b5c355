"""The metadata of a LeRobotDataset v3: `meta/info.json`, the tasks, the table of episodes.

Everything here is small and read at once. The frames that it describes are read by `lerobot_frames`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write
from dysl_vla.types import FULL_QUALITY, IMAGE_PREFIX, STATE_KEY, EmbodimentSpec, FloatArray, ImageArray

with needs_extra("train"):
    import pyarrow as pa
    import pyarrow.parquet as pq

ACTION_KEY = "action"
CODEBASE_VERSION = "v3.0"
INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes"
CONVERT = "python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id NAME --root DIR --push-to-hub=false"
NUMBER = re.compile(r"(float|u?int)\d+|bool")
PLACEHOLDER = re.compile(r"\{(video_key|(chunk|file)_index(:0\dd)?)\}")
"""A placeholder that a path of `meta/info.json` may have."""


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
        actions: The expert's action at each of these moments, (time, action).
        instruction: The instruction in plain English.
        origin: Where the episode comes from.
    """

    images: dict[str, ImageArray]
    states: FloatArray
    actions: FloatArray
    instruction: str
    origin: Origin


@dataclass(frozen=True)
class EpisodeRow:
    """An episode's entry in the dataset's table.

    Attributes:
        number: The episode's `episode_index`, which is not its place among the rows where episodes were removed.
        length: Number of frames.
        start: Place of the first frame among all frames.
        video_files: Camera to chunk and file, of the cameras that are kept as videos.
        video_starts_s: Camera to the time at which the episode begins in that file.
        origin: Where the episode comes from; None in datasets that other programs wrote.
    """

    number: int
    length: int
    start: int
    video_files: dict[str, tuple[int, int]]
    video_starts_s: dict[str, float]
    origin: Origin | None


@dataclass(frozen=True)
class Declared:
    """The usable part of what `meta/info.json` declares.

    Attributes:
        spec: Cameras, state, actions and rate.
        storage: Camera to "video" or "image".
        left_out: Cameras that cannot be used, and why.
        rendering: `FULL_QUALITY` when the cameras' `info` says so; else None.
        has_state_names: Whether the dataset itself names the dimensions of the state.
        has_action_names: Whether the dataset itself names the dimensions of the action.
    """

    spec: EmbodimentSpec
    storage: dict[str, str]
    left_out: dict[str, str]
    rendering: str | None
    has_state_names: bool
    has_action_names: bool


def read_info(root: Path) -> dict[str, Any]:
    """Read `meta/info.json`, and check what every reader needs.

    Raises:
        DatasetError: The file is missing, damaged or of another version, or its paths lead out of the folder.
    """
    path = root / INFO
    if not path.is_file():
        raise DatasetError(f"{root}: holds no demonstrations (there is no meta/info.json).")
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, fps, count, frames = (info[n] for n in ("codebase_version", "fps", "total_episodes", "total_frames"))
        if version != CODEBASE_VERSION:
            raise DatasetError(
                f"{path}: codebase_version must be {CODEBASE_VERSION!r}, got {version!r}. LeRobot converts a dataset "
                f"of v2.1: {CONVERT}"
            )
        is_right = 0 < float(fps) < math.inf and int(count) >= 0 and int(frames) >= 0
        features = {str(key): dict(feature) for key, feature in info["features"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: is not a LeRobotDataset v3 description ({error!r}).") from error
    if not is_right:
        raise DatasetError(
            f"{path}: fps is {fps}, total_episodes {count}, total_frames {frames}; correct what is wrong."
        )
    for name in ("data_path", "video_path"):
        template = info.get(name)
        if template is not None and not _stays_inside(template):
            raise DatasetError(
                f"{path}: {name} must lead to a file in the dataset's folder, got {template!r}; correct it."
            )
    return info | {"features": features}


def _stays_inside(template: object) -> bool:
    """Whether a path of `meta/info.json` stays below the dataset's folder; links in the folder may lead anywhere."""
    if not isinstance(template, str):
        return False
    rest = PLACEHOLDER.sub("x", template)
    path = PurePosixPath(rest)
    return not path.is_absolute() and ".." not in path.parts and not re.search(r"[{}\\]", rest)


def read_declared(
    info: Mapping[str, Any],
    cameras: Sequence[str] | None,
    state_names: Sequence[str] | None,
    action_names: Sequence[str] | None,
) -> Declared:
    """Read what `meta/info.json` declares, with the cameras and names that a user chose; see `Demonstrations`.

    Raises:
        DatasetError: A choice does not fit the dataset, or the dataset lacks what is needed.
    """
    features = info["features"]
    try:
        states, has_state_names = _names(STATE_KEY, features, "state_names", state_names)
        actions, has_action_names = _names(ACTION_KEY, features, "action_names", action_names)
        sizes, left_out = _cameras(features)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DatasetError(f"{INFO}: is not a LeRobotDataset v3 description ({error!r}).") from error
    for name in cameras or ():
        if name not in sizes:
            why = f"cannot be used: {left_out[name]}" if name in left_out else "is not in the dataset"
            usable = f"those that can be used: {', '.join(sizes)}" if sizes else "no camera can be used"
            raise DatasetError(f"cameras: {name!r} {why}; {usable}.")
    chosen = {name: size for name, size in sizes.items() if cameras is None or name in cameras}
    storage = {name: features[IMAGE_PREFIX + name]["dtype"] for name in chosen}
    if "video" in storage.values() and info.get("video_path") is None:
        raise DatasetError(f"{INFO}: has no video_path, although cameras are kept as videos; add it.")
    spec = EmbodimentSpec(
        cameras=chosen,
        state_names=states,
        action_names=actions,
        action_low=(-np.inf,) * len(actions),
        action_high=(np.inf,) * len(actions),
        rate_hz=float(info["fps"]),
    )
    infos = [features[IMAGE_PREFIX + name].get("info") or {} for name in chosen]
    is_full = any(info.get("rendering") == FULL_QUALITY for info in infos)
    return Declared(spec, storage, left_out, FULL_QUALITY if is_full else None, has_state_names, has_action_names)


def _names(
    key: str, features: Mapping[str, Any], option: str, given: Sequence[str] | None
) -> tuple[tuple[str, ...], bool]:
    """The names of a vector's dimensions, and whether they are the dataset's own.

    Datasets have a list, lists under some keys ("motors"; "left", "right"), a map to positions, or no names. Names that
    are in the lists of two keys get the keys in front: "left_j1".
    """
    if key not in features:
        raise DatasetError(f"{INFO}: there is no feature {key!r}.")
    shape, found = features[key]["shape"], features[key].get("names")
    if len(shape) != 1 or not NUMBER.fullmatch(features[key]["dtype"]):
        raise DatasetError(f"{INFO}: {key} is {features[key]['dtype']} of shape {shape}; expected one row of numbers.")
    if isinstance(found, Mapping):
        lists = [(str(group), str(name)) for group, value in found.items() if isinstance(value, list) for name in value]
        plain = [name for _, name in lists]
        is_clear = len(set(plain)) == len(plain)  # the arms of a robot may have the same joints
        named = plain if is_clear else [f"{group}_{name}" for group, name in lists]
        found = named or sorted(found, key=lambda name: found[name])
    if found and len(found) != shape[0]:
        raise DatasetError(
            f"{INFO}: {key} has {shape[0]} dimensions and {len(found)} names ({found}); correct its names."
        )
    own = tuple(map(str, found or ()))
    if repeated := sorted({name for name in own if own.count(name) > 1}):
        raise DatasetError(
            f"{INFO}: the names of {key} must differ, got {', '.join(repeated)} more than once; correct them."
        )
    if given is None:
        return own or tuple(map(str, range(shape[0]))), bool(own)
    if own and own != tuple(given):
        raise DatasetError(f"{option}: the dataset names them itself: {', '.join(own)}; leave the option out.")
    if len(given) != shape[0] or len(set(given)) != len(given):
        raise DatasetError(f"{option}: {', '.join(given)}: expected {shape[0]} different names, one a dimension.")
    return tuple(given), bool(own)


def _cameras(features: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The sizes of the cameras that can be used, and why the others cannot."""
    sizes, left_out = {}, {}
    for key, feature in features.items():
        if key.startswith(IMAGE_PREFIX):
            found = _camera_size(key, feature)
            if isinstance(found, str):
                left_out[key.removeprefix(IMAGE_PREFIX)] = found
            else:
                sizes[key.removeprefix(IMAGE_PREFIX)] = found
        elif feature.get("dtype") in ("video", "image"):
            left_out[key] = f"its key is not {IMAGE_PREFIX}<camera>"
    return sizes, left_out


def _camera_size(key: str, feature: Mapping[str, Any]) -> tuple[int, int] | str:
    """The height and width of a camera, or why it cannot be used."""
    shape = tuple(feature["shape"])
    about = [feature.get("info") or {}, feature.get("video_info") or {}]
    if "/" in key:
        return "its name has a '/'"
    if feature["dtype"] not in ("video", "image"):
        return f"it is kept as {feature['dtype']}, neither as a video nor as images"
    if any(flags.get(name) for flags in about for name in ("is_depth_map", "video.is_depth_map")):
        return "it is a depth map"
    if len(shape) != 3:
        return f"its shape is {list(shape)}, not (height, width, 3)"
    names = feature.get("names")
    initials = "".join(str(name)[:1].lower() for name in names) if isinstance(names, list) else ""
    if sorted(initials) != ["c", "h", "w"]:
        initials = "chw" if shape[0] == 3 and shape[2] != 3 else "hwc"
    size = dict(zip(initials, map(int, shape), strict=True))
    if size["c"] != 3:
        return f"it has {size['c']} channel{'s' if size['c'] != 1 else ''}, not 3"
    return size["h"], size["w"]


def read_tasks(root: Path) -> dict[int, str]:
    """Read the tasks: `task_index`, rising, to instruction.

    LeRobot writes the text with pandas as an index, whose column is "task" or, for an index without a name, another.

    Raises:
        DatasetError: The table is missing or damaged.
    """
    path = root / TASKS
    table = read_table(path)
    texts = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    try:
        numbers, tasks = table["task_index"].to_pylist(), table[texts[0]].to_pylist()
        found = {int(number): str(task) for number, task in zip(numbers, tasks, strict=True) if task is not None}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: does not have the columns task_index and task ({error!r}); restore it.") from error
    if len(found) != len(numbers):
        raise DatasetError(f"{path}: a task_index is there twice, or has no task; restore it.")
    return dict(sorted(found.items()))


def read_episodes(root: Path, info: Mapping[str, Any], storage: Mapping[str, str]) -> list[EpisodeRow]:
    """Read the first rows of the table; a row behind them is of an episode that was interrupted before it counted.

    Raises:
        DatasetError: The table is damaged, or does not fit `meta/info.json`.
    """
    folder, count = root / EPISODES, int(info["total_episodes"])
    videos = [name for name, kind in storage.items() if kind == "video"]
    names = ["episode_index", "length"]
    optional = [f"origin/{name}" for name in Origin.__dataclass_fields__]
    optional += [f"videos/{IMAGE_PREFIX}{name}/{c}" for name in videos for c in ("chunk_index", "file_index")]
    optional += [f"videos/{IMAGE_PREFIX}{name}/from_timestamp" for name in videos]
    tables = [read_table(path, names, optional) for path in numbered_files(folder)]
    values = [row for table in tables for row in table.to_pylist()]
    if any(row["episode_index"] is None or row["length"] is None for row in values):
        raise DatasetError(f"{folder}: an episode has no episode_index or no length; restore the table.")
    for place, row in enumerate(values):
        for column in ("episode_index", "length"):
            row[column] = _whole(folder, f"the row {place}", column, row[column])
    values = sorted(values, key=lambda row: int(row["episode_index"]))[:count]
    if len(values) != count:
        raise DatasetError(
            f"{folder}: has {len(values)} episodes, meta/info.json counts {count}, as after a recording that was cut "
            "off before it was finalized; restore it, or set total_episodes and total_frames to what there is."
        )
    rows: list[EpisodeRow] = []
    for row in values:
        start = rows[-1].start + rows[-1].length if rows else 0
        rows.append(_row(folder, row, start, videos))
        if rows[-1].length < 1 or (len(rows) > 1 and rows[-1].number == rows[-2].number):
            raise DatasetError(f"{folder}: episode {rows[-1].number} has no frames, or is there twice; restore it.")
    total = sum(row.length for row in rows)
    if total != int(info["total_frames"]):
        raise DatasetError(
            f"{root / INFO}: total_frames is {info['total_frames']}, its {count} episodes have {total}; correct it, "
            "or restore the episodes that are missing."
        )
    return rows


def _row(folder: Path, values: Mapping[str, Any], start: int, videos: Sequence[str]) -> EpisodeRow:
    number = values["episode_index"]
    files, starts = {}, {}
    for camera in videos:
        prefix = f"videos/{IMAGE_PREFIX}{camera}/"
        chunk, file, from_s = (values.get(prefix + name) for name in ("chunk_index", "file_index", "from_timestamp"))
        if chunk is None or file is None or from_s is None or (isinstance(from_s, float) and not math.isfinite(from_s)):
            raise DatasetError(
                f"{folder}: episode {number} has no video of camera {camera!r}, as after a recording that was cut "
                "off before its videos were encoded; record it again, or choose other cameras."
            )
        who = f"episode {number}"
        indices = (("chunk_index", chunk), ("file_index", file))
        first, second = (_whole(folder, who, prefix + name, value) for name, value in indices)
        files[camera], starts[camera] = (first, second), _number(folder, who, prefix + "from_timestamp", from_s)
    origin = {name: values.get(f"origin/{name}") for name in Origin.__dataclass_fields__}
    if None not in origin.values():
        for name in ("seed", "episode_index"):
            origin[name] = _whole(folder, f"episode {number}", f"origin/{name}", origin[name])
        for name in ("suite", "task", "actor"):
            origin[name] = str(origin[name])
        origin["noise"] = _number(folder, f"episode {number}", "origin/noise", origin["noise"])
    return EpisodeRow(
        number=number,
        length=values["length"],
        start=start,
        video_files=files,
        video_starts_s=starts,
        origin=None if None in origin.values() else Origin(**origin),  # type: ignore[arg-type]
    )


def _number(folder: Path, who: str, column: str, value: object) -> float:
    """A value of the table of episodes.

    Raises:
        DatasetError: It is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DatasetError(f"{folder}: {column} of {who} must be a number, got {value!r}; restore the table.")
    return float(value)


def _whole(folder: Path, who: str, column: str, value: object) -> int:
    """A whole number of the table of episodes.

    Raises:
        DatasetError: It is none.
    """
    if not (found := _number(folder, who, column, value)).is_integer():
        raise DatasetError(f"{folder}: {column} of {who} must be a whole number, got {value!r}; restore the table.")
    return int(found)


def numbered_files(folder: Path) -> list[Path]:
    """The Parquet files of a dataset's folder, chunk-*/file-*, in the order of their numbers.

    Hidden files are left out: macOS leaves a "._file-000.parquet" beside a file on a disk of another system.
    """
    files = [path for path in folder.glob("*/*.parquet") if not path.name.startswith(".")]
    numbers = re.compile(r"\d+")
    return sorted(files, key=lambda path: ([int(n) for n in numbers.findall(f"{path.parent.name}/{path.name}")], path))


def read_table(path: Path, names: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """Read columns of one Parquet file.

    Args:
        path: The file.
        names: Names of the columns that must be there; None: all columns are read.
        optional: Names of columns that are read if they are there.

    Raises:
        DatasetError: The file is missing or damaged, or a column is missing.
    """
    try:
        with pq.ParquetFile(path) as file:
            if names is None:
                return file.read()
            present = file.schema_arrow.names
            if missing := [name for name in names if name not in present]:
                raise DatasetError(f"{path}: has no column {missing[0]!r}; restore it, or convert the dataset again.")
            wanted = [*names, *(name for name in optional if name in present)]
            return file.read(columns=wanted).select(wanted)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path}: cannot be read ({error}); restore it. A recording that was not finalized leaves such files."
        ) from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)


def write_tasks(root: Path, tasks: Sequence[str]) -> None:
    """Write the tasks. LeRobot reads them with pandas, with the text as the index, which pandas keeps in the schema."""
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
    write_table(root / TASKS, table.replace_schema_metadata({"pandas": json.dumps(pandas)}))
