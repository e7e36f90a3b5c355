"""Files that are complete or absent: they are written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dysl_vla.errors import ConfigError

TEMPORARY = ".tmp"
WEIGHTS_OF_A_RUN = ("weights", "policies", "teacher", "initial_weights")
"""Settings of a run that are fingerprints, which say nothing to people."""
LOCK = ".lock"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success the file there is renamed to `path`, on failure it is removed.

    The temporary name ends in `.tmp`, so that a search for files of `path`'s kind never finds a half-written one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # some writers make files for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked_dir(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes while the body runs, and remove temporary files that were left in it.

    The folder is made if it does not exist. The lock ends with the process, however that ends.

    Raises:
        ConfigError: Another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"out: {folder} is in use by another process; wait for it, or give another.") from error
        for leftover in folder.rglob(f".*{TEMPORARY}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        yield


def is_unused(folder: Path) -> bool:
    """Tell whether a folder is absent, empty, or holds only what an interrupted beginning leaves.

    Raises:
        ConfigError: The path is a file.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise ConfigError(f"out must be a folder, got the file {folder}; give another path.")
    return all(path.name == LOCK or path.suffix == TEMPORARY for path in folder.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is not a JSON object.")
    return value


def check_same_run(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other settings than it was begun with.

    Args:
        path: File of the settings of the run that was begun, written with `write_json`.
        identity: Settings of this run.

    Raises:
        ConfigError: The settings differ; the message names the first difference.
    """
    present = read_json(path)
    for name in {**present, **identity}:
        if _given(present.get(name)) != _given(identity.get(name)):
            if name in WEIGHTS_OF_A_RUN:
                raise ConfigError(
                    f"out: {path.parent} holds another run: its policy is another one, or has been changed since (as "
                    "dysl tune does); give a new folder."
                )
            raise ConfigError(
                f"out: {path.parent} holds another run: its {name} is {present.get(name)!r}, this one's is "
                f"{identity.get(name)!r}; give a new folder."
            )


def _given(value: Any) -> Any:
    """Return a setting as JSON holds it, without options that were not given, so that new ones change no old run."""
    plain = json.loads(json.dumps(value, default=str))
    if isinstance(plain, dict):
        plain = {name: inside for name, one in plain.items() if (inside := _given(one)) is not None}
    return None if plain in ("", [], {}) or plain is False else plain


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. NaN is refused, as it is not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON lines atomically."""
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it to the disk. A last line that an interruption cut off is removed before."""
    with path.open("ab+") as file:
        _drop_torn_line(path)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a file; there are none when it does not exist. A last line without its end does not count.

    Raises:
        ConfigError: A line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is damaged ({error}); remove that line.") from error
    return records


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin work that would fill the disk.

    Args:
        folder: Folder to write to; it, or one above it, exists.
        needed: Bytes.
        what: What is to be written, in the plural, for the message.

    Raises:
        ConfigError: Less space is free.
    """
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(present).free
    if needed > free:
        raise ConfigError(f"out: {what} need {needed / 1e9:.1f} GB in {folder}, there are {free / 1e9:.1f}; free some.")


def check_memory(needed: int, what: str, fix: str) -> None:
    """Refuse to begin work that would not fit into memory. Where the free memory is unknown, nothing is refused.

    Args:
        needed: Bytes.
        what: What needs them, in the plural, for the message.
        fix: What to do about it, for the message.

    Raises:
        ConfigError: Less memory is free.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise ConfigError(f"memory: {what} need {needed / 1e9:.1f} GB, there are {free / 1e9:.1f}; {fix}.")


def available_memory() -> int | None:
    """Return the bytes of memory that are available without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_torn_line(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _umask() -> int:
    present = os.umask(0)
    os.umask(present)
    return present
