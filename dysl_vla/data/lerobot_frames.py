"""The frames of a LeRobotDataset v3: where they are in its files, their numbers, and their pictures.

Episodes may be in any order in any number of data files, beside others that do not count; the frames of one must be in
order. A video's picture belongs to a frame by its time, as in LeRobot, and not by its place in the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data.lerobot_format import EpisodeRow, numbered_files, read_table
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.types import ImageArray
from dysl_vla.video import VideoReader

with needs_extra("train"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from PIL import Image

TOLERANCE = 0.25
"""Share of a frame's period (1 / fps of `meta/info.json`) by which a frame's time may differ from the time at which it
is due, and a picture's time from its frame's. Below a half, no picture is near enough to two frames."""
BATCH_ROWS = 16
"""Compressed images that are read at once."""
BUFFER = 2**20
"""Bytes that are read from a file at once; the default is a column of all rows of a group."""


@dataclass(frozen=True)
class Span:
    """Rows of a data file that follow one another there and in an episode: from `first` to before `stop`."""

    file: Path
    first: int
    stop: int


@dataclass(frozen=True)
class Located:
    """The places of the frames of a dataset's episodes.

    Attributes:
        files: The data files.
        order: For each frame, episode by episode, its row among those of all files, (frames,).
        timestamps: For each frame, its time in the episode, in seconds, (frames,).
        spans: For each episode, the places of its rows.
    """

    files: list[Path]
    order: NDArray[np.int64]
    timestamps: NDArray[np.float64]
    spans: list[list[Span]]


def row_of(spans: Sequence[Span], frame: int) -> Span:
    """Return the place of one frame among the spans of its episode."""
    for span in spans:
        if frame < span.stop - span.first:
            return Span(span.file, span.first + frame, span.first + frame + 1)
        frame -= span.stop - span.first
    raise IndexError(f"frame {frame} is beyond the episode's end")


def locate(root: Path, rows: Sequence[EpisodeRow], rate_hz: float) -> Located:
    """Find the frames of episodes in the data files, and check their times.

    Raises:
        DatasetError: A file is damaged, frames are missing or out of order, or their times do not fit the rate.
    """
    # Find the rows of these episodes, in the order of the episodes.
    files = numbered_files(root / "data")
    parts = [_bookkeeping(path) for path in files]
    number, frame, time = np.concatenate([*parts, np.empty((3, 0))], axis=1)
    kept = np.flatnonzero(np.isin(number, [row.number for row in rows]))
    episode = np.searchsorted([row.number for row in rows], number[kept])
    placed = np.argsort(episode, kind="stable")
    order, episode = kept[placed], episode[placed]
    _check_complete(root, rows, episode, frame[order])
    _check_times(root, rows, rate_hz, time[order])
    # Join rows that follow one another in a file and in an episode.
    sizes = [part.shape[1] for part in parts]
    file = np.repeat(np.arange(len(files)), sizes)[order] if files else order
    first_rows = np.cumsum(sizes) - sizes
    spans: list[list[Span]] = [[] for _ in rows]
    is_new = (np.diff(order) != 1) | (np.diff(file) != 0) | (np.diff(episode) != 0)
    edges = [0, *(np.flatnonzero(is_new) + 1), len(order)] if len(order) else []
    for start, stop in pairwise(edges):
        first = int(order[start] - first_rows[file[start]])
        spans[episode[start]].append(Span(files[file[start]], first, first + int(stop - start)))
    return Located(files, order, time[order], spans)


def _bookkeeping(path: Path) -> NDArray[np.float64]:
    """Read episode_index, frame_index and timestamp of a file, (3, rows)."""
    names = ("episode_index", "frame_index", "timestamp")
    table = read_table(path, names)
    return np.stack([np.asarray(vectors(table, name, 1, path)[:, 0], np.float64) for name in names])


def _check_complete(
    root: Path, rows: Sequence[EpisodeRow], episode: NDArray[np.int64], frame: NDArray[np.float64]
) -> None:
    """Refuse episodes that lack frames, have too many, or have them in another order."""
    lengths = np.array([row.length for row in rows], np.int64)
    there = np.bincount(episode, minlength=len(rows))
    if (wrong := np.flatnonzero(there != lengths)).size:
        row = rows[wrong[0]]
        raise DatasetError(
            f"{root}/data: has {there[wrong[0]]} frames of episode {row.number}, which has {row.length} by the table "
            "of episodes; restore what is missing."
        )
    due = np.arange(len(frame)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if (wrong := np.flatnonzero(frame != due)).size:
        at = wrong[0]
        raise DatasetError(
            f"{root}/data: the frames of episode {rows[episode[at]].number} are not in order: frame_index is "
            f"{frame[at]:g} where {due[at]} is due; write them in order."
        )


def _check_times(root: Path, rows: Sequence[EpisodeRow], rate_hz: float, timestamps: NDArray[np.float64]) -> None:
    """Refuse frames that were not taken at the rate: the time between two actions would be wrong."""
    for row in rows:
        times = timestamps[row.start : row.start + row.length]
        due = np.arange(row.length) / rate_hz
        if (wrong := np.flatnonzero(~(np.abs(times - due) <= TOLERANCE / rate_hz))).size:
            frame = int(wrong[0])
            step = float(np.median(np.diff(times))) if row.length > 1 else 0.0
            recorded = f"; its frames are {1 / step:.4g} a second" if step > 0 else ""
            raise DatasetError(
                f"{root}/data: frame {frame} of episode {row.number} has the timestamp {times[frame]:.4f} s; at the "
                f"fps of meta/info.json, {rate_hz:g}, it is due at {due[frame]:.4f} s{recorded}. Correct fps, or "
                "sample the episode again at that rate."
            )


def vectors(table: pa.Table, name: str, dim: int, path: Path) -> NDArray[Any]:
    """Read a column of vectors, kept as lists or, for one dimension, as plain numbers.

    Returns:
        (rows, dim).

    Raises:
        DatasetError: The column has another dimension, or holds something else than numbers.
    """
    column = table[name].combine_chunks()
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    flat = column.flatten() if is_list else column
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
        raise DatasetError(f"{path}: {name} holds {kind}, not numbers; convert the dataset again.")
    lengths = np.asarray(pc.list_value_length(column) if is_list else np.ones(len(column)))
    if column.null_count or (lengths != dim).any():
        raise DatasetError(f"{path}: {name} has another dimension than the {dim} of meta/info.json.")
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, dim)


def read_vectors(located: Located, dims: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Columns of all frames, episode by episode.

    Args:
        located: The places of the frames.
        dims: Column to its dimension.

    Returns:
        Column to (frames, dim).

    Raises:
        DatasetError: A file is damaged, or a column has another dimension.
    """
    if not located.files:
        return {name: np.empty((0, dim)) for name, dim in dims.items()}
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in dims}
    for path in located.files:
        table = read_table(path, list(dims))
        for name, dim in dims.items():
            parts[name].append(vectors(table, name, dim, path))
    return {name: np.concatenate(part)[located.order] for name, part in parts.items()}


def read_pictures(
    path: Path, times_s: Sequence[NDArray[np.float64]], numbers: Sequence[int], rate_hz: float
) -> Iterator[ImageArray]:
    """Read a video's pictures of some episodes.

    Args:
        path: The video.
        times_s: For each episode, the times of its frames in the video, in seconds, (frames,).
        numbers: The episodes' `episode_index`, for messages.
        rate_hz: Frames a second.

    Yields:
        A picture for each frame, uint8 (height, width, 3).

    Raises:
        DatasetError: The video is damaged, or has no picture at a frame's time.
    """
    with closing(VideoReader(path)) as video:
        for number, times in zip(numbers, times_s, strict=True):
            for frame, wanted in enumerate(times.tolist()):
                yield read_picture(video, wanted, frame, number, rate_hz)


def read_picture(video: VideoReader, wanted_s: float, frame: int, number: int, rate_hz: float) -> ImageArray:
    """Read the picture of one frame.

    Args:
        video: The video.
        wanted_s: The frame's time in the video, in seconds.
        frame: The frame's number in its episode, for the message.
        number: The episode's `episode_index`, for the message.
        rate_hz: Frames a second.

    Returns:
        The picture, uint8 (height, width, 3).

    Raises:
        DatasetError: The video is damaged, or has no picture at this time.
    """
    time, image = video.nearest(wanted_s)
    if abs(time - wanted_s) > TOLERANCE / rate_hz:
        raise DatasetError(
            f"{video.path}: has no picture for frame {frame} of episode {number}, at {wanted_s:.4f} s; the nearest is "
            f"at {time:.4f} s. It has {video.rate_hz:.4g} pictures a second, fps of meta/info.json is {rate_hz:g}. If "
            "that is the rate of the data, too, correct fps; else the video is of another recording or was cut off: "
            "restore it."
        )
    return image


def read_images(spans: Sequence[Span], key: str) -> Iterator[ImageArray]:
    """Read images from data files. Few are in memory at a time: decoded one, compressed those of a page of the file.

    Args:
        spans: The rows of the images.
        key: The column of the images.

    Yields:
        An image for each row, uint8 (height, width, 3).

    Raises:
        DatasetError: A file or an image is damaged.
    """
    for path, ranges in _together(spans):
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
                for row, value in _values(file, key, ranges):
                    yield _decode(value, f"{path}: row {row} of {key}")
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DatasetError(f"{path}: images {key} cannot be read ({error}); restore it.") from error


def _together(spans: Sequence[Span]) -> Iterator[tuple[Path, list[Span]]]:
    """Group spans that are passed in this order when a file is read once from its beginning to its end."""
    ahead: list[Span] = []
    for span in spans:
        if ahead and (span.file != ahead[-1].file or span.first < ahead[-1].stop):
            yield ahead[0].file, ahead
            ahead = []
        ahead.append(span)
    if ahead:
        yield ahead[0].file, ahead


def _values(file: pq.ParquetFile, key: str, spans: Sequence[Span]) -> Iterator[tuple[int, Any]]:
    """Yield row and value of a column, for spans in rising order. Row groups without a span are skipped."""
    stop = 0
    for group in range(file.num_row_groups):
        first, stop = stop, stop + file.metadata.row_group(group).num_rows
        if not any(span.first < stop and first < span.stop for span in spans):
            continue
        last = max(span.stop for span in spans)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[key]):
            if first >= last:
                return
            column = batch.column(batch.schema.names.index(key))
            for span in spans:
                start, end = max(span.first, first), min(span.stop, first + len(column))
                for row in range(start, end):
                    yield row, column[row - first].as_py()
            first += len(column)


def _decode(value: Any, what: str) -> ImageArray:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DatasetError(f"{what} is not an embedded image; write the dataset with its images embedded.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGB":
                raise DatasetError(f"{what} is an image of mode {image.mode}; expected RGB.")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{what} cannot be read as an image ({error}); restore it.") from error
