"""Checkpoints of policies too large to copy: heads and settings beside a reference to the base that they belong to.

config.json        type of the policy, and its base: name, revision, fingerprint, options
provenance.json    how the base came here
manifest.json      SHA-256 of the other files
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from dysl_vla.checkpoint import (
    CONFIG,
    MANIFEST,
    PROVENANCE,
    WEIGHTS,
    check_manifest,
    find_checkpoint,
    read_document,
    validated,
)
from dysl_vla.errors import CheckpointError, ConfigError, DyslError
from dysl_vla.files import sha256, write_json

SMALL = 16 * 2**20
"""Bytes up to which a file is hashed whole."""
SAMPLES, SAMPLE_BYTES = 16, 64
"""Evenly spread samples of each tensor, and the bytes of each."""
SETTINGS = ("config.json", "dataset_statistics.json", "preprocessor_config.json", "tokenizer.json")
OTHERS = ("*--*_checkpoint.pt", "policy_preprocessor*", "policy_postprocessor*")
"""Patterns of other files that count: OpenVLA-OFT's parts, and LeRobot's processors."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """The policy that a checkpoint's heads were trained for, kept elsewhere.

    Attributes:
        name: A hub id, or the absolute path of a folder.
        fingerprint: What `quick_fingerprint` returned for its files.
        revision: Commit of a hub id; None for a folder.
        options: `policy_options` that it was loaded with.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    fingerprint: str
    revision: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def find_base(name: str, options: Mapping[str, str]) -> tuple[Path, Base]:
    """Find the folder of a base, which a name means directly, or by a checkpoint that refers to it.

    Args:
        name: A hub id, a base's folder, or the folder of a checkpoint from `save_reference`.
        options: `policy_options` of this load; `base`=FOLDER says where a checkpoint's base is now, if it was moved.

    Returns:
        The base's folder, and the base with the options of the checkpoint and of this load.

    Raises:
        ConfigError: No checkpoint has that name.
        CheckpointError: The base is gone, or is not what it was when the checkpoint was made.
    """
    folder = find_checkpoint(name)
    given = {key: value for key, value in options.items() if key != "base"}
    document = read_document(folder / CONFIG)
    if "base" not in document:
        is_snapshot = folder.parent.name == "snapshots" and not Path(name).is_dir()  # the hub's cache: named by commit
        return folder, Base(
            name if is_snapshot else str(folder.resolve()),
            quick_fingerprint(folder),
            folder.name if is_snapshot else None,
            given,
        )
    check_manifest(folder, (CONFIG, PROVENANCE))
    base = validated(Base, document["base"], folder / CONFIG, "base.")
    where = options.get("base", base.name)
    try:
        found = find_checkpoint(where, base.revision if where == base.name else None)
    except DyslError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: the base {where} is not there ({error}); where it was moved, give "
            "--policy-options base=FOLDER."
        ) from error
    if quick_fingerprint(found) != base.fingerprint:
        raise CheckpointError(
            f"{found}: the base was changed since the heads in {folder} were trained; get it as it was"
            f"{f' (revision {base.revision})' if base.revision else ''}, or distill again."
        )
    return found, Base(base.name, base.fingerprint, base.revision, {**base.options, **given})


def save_reference(folder: Path, policy_type: str, base: Base, provenance: Mapping[str, Any]) -> None:
    """Write a checkpoint that refers to its base; heads are added by `dysl distill`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {"policy_type": policy_type, "base": asdict(base)})
    write_json(folder / PROVENANCE, dict(provenance))
    write_json(folder / MANIFEST, {name: sha256(folder / name) for name in (CONFIG, PROVENANCE)})


def quick_fingerprint(folder: Path) -> str:
    """Return a digest of a folder's weights and settings that does not read all of them.

    Small files count whole. Of larger ones count the safetensors header with samples of each tensor, or the checksums
    that a `.pt` file keeps of its parts. Training, merging, casting or quantising changes it; a single number that was
    changed in a large tensor may not.

    Raises:
        CheckpointError: A file is damaged.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        try:
            for part in _parts(path):
                digest.update(part)
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged ({error}); get it again.") from error
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return the files that decide what a base computes, those that are there; other files may come and go."""
    shards = [WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_document(folder / INDEX).get("weight_map")
        shards = [INDEX, *(str(name) for name in (places.values() if isinstance(places, dict) else ()))]
    named = {folder / name for name in (*SETTINGS, *shards) if Path(name).name == name}
    others = (path for pattern in OTHERS for path in folder.glob(pattern))
    return sorted(path for path in {*named, *others} if path.is_file())


def _parts(path: Path) -> Iterator[bytes]:
    if path.stat().st_size <= SMALL:
        yield path.read_bytes()
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = file.read(length)
            yield header
            tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            for name in sorted(tensors):
                first, last = tensors[name]["data_offsets"]
                for sample in range(SAMPLES):
                    file.seek(8 + length + first + (last - first) * sample // SAMPLES)
                    yield file.read(min(SAMPLE_BYTES, last - first))
    else:
        with zipfile.ZipFile(path) as archive:
            yield from (f"{part.filename} {part.CRC} ".encode() for part in archive.infolist())


def parse_options(options_type: type[Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Read texts as the values of a dataclass's fields, whose types are those of their defaults.

    Raises:
        ConfigError: A name is unknown, or a value is not of the field's type; the message names it.
    """
    kinds: dict[str, type[Any]] = {one.name: type(one.default) for one in fields(options_type)}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in kinds:
            raise ConfigError(f"policy_options must be among {', '.join(kinds)} and base, got {name!r}.")
        kind = kinds[name]
        if kind is bool and text not in ("true", "false"):
            raise ConfigError(f"{name} must be true or false, got {text!r}.")
        try:
            values[name] = text == "true" if kind is bool else kind(text)
        except ValueError as error:
            wanted = "an integer" if kind is int else "a number"
            raise ConfigError(f"{name} must be {wanted}, got {text!r}.") from error
    return values
