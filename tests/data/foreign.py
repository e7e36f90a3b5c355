"""Datasets in the layout of LeRobot's recorder, many episodes a file, with the oddities that tests ask for."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
TOP = "observation.images.top"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"
FROM = f"videos/{TOP}/from_timestamp"


def grey(number: int) -> NDArray[np.uint8]:
    """A picture from which its number can be read, also when it was compressed; numbers repeat after 60."""
    return np.full((SIDE, SIDE, 3), 10 + 4 * (number % 61), np.uint8)


def number_of(image: NDArray[np.uint8]) -> int:
    return round((float(image.mean()) - 10) / 4)


def video(
    path: Path, times_s: Sequence[float], *, codec: str = "libx264", container: str = "mp4", **options: str
) -> None:
    """Write numbered pictures that are shown at given times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"movie_timescale": "90000"} if container == "mp4" else {}
    with av.open(str(path), "w", format=container, options=settings) as file:
        stream = file.add_stream(codec, rate=30, options=options or {"preset": "ultrafast", "crf": "8"})
        stream.width = stream.height = 64 if codec == "libsvtav1" else SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        for number, time in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), grey(number)[0, 0]), "rgb24")
            frame.pts, frame.time_base = round(time * 90_000), Fraction(1, 90_000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def record(root: Path, lengths: Sequence[int] = (5, 9, 7), *, fps: float = 30, kind: str = "video") -> Path:
    """Write a dataset with one camera, "top", whose pictures are numbered. States are (number, episode).

    Args:
        root: Its folder.
        lengths: Frames of the episodes.
        fps: Of info.json, the time stamps and the video.
        kind: "video" or "image".
    """
    total = sum(lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum([0, *lengths])
    frame = np.arange(total) - starts[episode]
    states = np.stack([np.arange(total), episode], 1).astype(np.float32)
    data: dict[str, Any] = {
        "observation.state": pa.FixedSizeListArray.from_arrays(states.ravel(), 2),
        "action": pa.FixedSizeListArray.from_arrays(-states.ravel(), 2),
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": episode,
        "index": np.arange(total),
        "task_index": episode % 2,
    }
    rows: dict[str, Any] = {
        "episode_index": np.arange(len(lengths)),
        "tasks": [[f"task {e % 2}"] for e in range(len(lengths))],
        "length": list(lengths),
        "data/chunk_index": [0] * len(lengths),
        "data/file_index": [0] * len(lengths),
        "dataset_from_index": starts[:-1],
        "dataset_to_index": starts[1:],
    }
    if kind == "image":
        data["observation.images.top"] = [{"bytes": png(grey(i)), "path": f"frame-{i:06d}.png"} for i in range(total)]
    else:
        video(root / VIDEO, np.arange(total) / fps)
        for name, values in (("from", starts[:-1]), ("to", starts[1:])):
            rows[f"videos/observation.images.top/{name}_timestamp"] = values / fps
        for name in ("chunk_index", "file_index"):
            rows[f"videos/observation.images.top/{name}"] = [0] * len(lengths)
    for name, table in ((DATA, data), (EPISODES, rows)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), root / name)
    pq.write_table(pa.table({"task_index": [0, 1], "task": ["task 0", "task 1"]}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(_info(lengths, fps, kind)))
    return root


def _info(lengths: Sequence[int], fps: float, kind: str) -> dict[str, Any]:
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": ["number", "episode"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["number", "episode"]},
        "observation.images.top": {"dtype": kind, "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "fps": fps,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 2,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }


def edit_info(root: Path, **changes: Any) -> None:
    """Change fields of info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_feature(root: Path, key: str, **changes: Any) -> None:
    """Change a feature in info.json, or add one."""
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=features | {key: features.get(key, {}) | changes})


def edit_table(root: Path, name: str, **columns: Any) -> None:
    """Replace or add columns of a Parquet file; None removes one."""
    table = pq.read_table(root / name)
    for column, values in columns.items():
        if column in table.column_names:
            table = table.drop_columns([column])
        if values is not None:
            table = table.append_column(column, [values if isinstance(values, pa.Array) else pa.array(values)])
    pq.write_table(table, root / name)
