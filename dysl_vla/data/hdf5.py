"""HDF5 files of demonstrations in robomimic's layout: opened, and their parts read with errors that name them.

A group `data` has a group `demo_<number>` for each demonstration. What these hold is the matter of `robomimic` (states
of the simulator) and `libero_hdf5` (images and the arm's state).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.lerobot import DemonstrationWriter, Episode, Origin
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import sha256

HUMAN = "human"
NO_SEED = -1
"""The seed of demonstrations whose initial states this package did not draw."""


@contextmanager
def recorded_file(path: Path) -> Iterator[Any]:
    """Open a file, and give its group `data`.

    Raises:
        ConfigError: The file does not exist.
        DatasetError: It is cut, is not HDF5, or has another layout.
        MissingExtraError: h5py is not installed.
    """
    with needs_extra("hdf5"):
        import h5py
    if not path.is_file():
        raise ConfigError(f"file: {path} does not exist.")
    try:
        opened = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read as HDF5 ({error}); download it again.") from error
    with opened:
        if not isinstance(opened.get("data"), h5py.Group):
            raise DatasetError(f"{path}: has no group 'data'; files of robomimic, robosuite and LIBERO have.")
        yield opened["data"]


def demonstration_numbers(path: Path, data: Any, limit: int | None = None) -> list[int]:
    """Return the numbers of a file's demonstrations, rising, at most `limit` of them.

    Raises:
        DatasetError: There are no demonstrations.
    """
    numbers = sorted(int(found[1]) for name in data if (found := re.fullmatch(r"demo_(\d+)", name)))
    if not numbers:
        raise DatasetError(f"{path}: holds no demonstrations (groups data/demo_0 and so on).")
    return numbers[:limit]


def human_origin(path: Path, suite: str, task: str) -> Origin:
    """Return the origin of a file's demonstration 0, which tells the demonstrations of different files apart."""
    return Origin(suite, task, NO_SEED, 0, f"{HUMAN}@{sha256(path)[:12]}", 0.0)


@contextmanager
def naming(path: Path, recorded: Any) -> Iterator[Any]:
    """Add the file and the name of a recording to the message of an error."""
    try:
        yield recorded
    except DatasetError as error:
        raise DatasetError(f"{path}: {recorded.name}: {error}") from error


def read_numbers(recorded: Any, name: str, width: int | None) -> NDArray[np.float64]:
    """Read a matrix of numbers.

    Args:
        recorded: The group of a demonstration.
        name: The name of the matrix in the group.
        width: The number of its columns; None when any number will do.

    Returns:
        (time, width).

    Raises:
        DatasetError: It is missing or damaged, has another shape, or a value is not a finite number.
    """
    try:
        values = np.asarray(recorded[name], np.float64)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise DatasetError(f"its {name} are missing, damaged, or not numbers ({error}).") from error
    if values.ndim != 2 or width not in (None, values.shape[1]):
        shape = "(time, any width)" if width is None else f"(time, {width})"
        raise DatasetError(f"its {name} must have shape {shape}, got {values.shape}.")
    if not np.isfinite(values).all():
        raise DatasetError(f"its {name} have a value that is not finite.")
    return values


def write_missing(
    path: Path,
    data: Any,
    origins: Sequence[Origin],
    writer: DemonstrationWriter,
    read: Callable[[Any, Origin], Episode | None],
) -> None:
    """Write the demonstrations of a file that a dataset lacks, and say how many are left out since they fail.

    Args:
        path: The file.
        data: Its group `data`.
        origins: Origins of the demonstrations, whose `episode_index` is their number in the file.
        writer: The writer of the dataset.
        read: Group and origin of a demonstration to the episode; None when the task is never done in it.
    """
    done = {row.origin for row in writer.rows}
    failed = 0
    with tqdm(origins, desc=origins[0].task, unit="episode") as progress:
        for origin in progress:
            if origin in done:
                continue
            with naming(path, data[f"demo_{origin.episode_index}"]) as recorded:
                episode = read(recorded, origin)
            if episode is None:
                failed += 1
                progress.set_postfix(failures=failed)
            else:
                writer.append(episode)
    if failed:
        progress.write(f"{failed} of {len(origins)} were left out, since the task is never done in them.")
