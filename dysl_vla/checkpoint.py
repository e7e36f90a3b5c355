"""Checkpoints: folders in Hugging Face's style, which are complete or refused.

    config.json          type of policy and its configuration, for people to read
    model.safetensors    weights; the configuration once more in its metadata
    tokenizer.json       of the `tokenizers` library
    provenance.json      how it was made: commands, versions, data, seeds
    manifest.json        SHA-256 of the other files

Nothing is ever unpickled. An edited configuration is found because it differs from the one beside the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write, read_json, sha256, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
PROVENANCE, MANIFEST = "provenance.json", "manifest.json"
SKIP_SETTINGS = "skip.json"
SHIPPED = Path(__file__).parent / "policies" / "shipped"


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        policy_type: Name of the policy's class in the registry `policies`.
        config: Configuration of the policy, a dataclass.
        tensors: Weights by name.
        tokenizer: Text of tokenizer.json.
        provenance: How the checkpoint was made.
    """

    policy_type: str
    config: Any
    tensors: dict[str, Tensor]
    tokenizer: str
    provenance: dict[str, Any]


HUB_FILES = ("*.json", "*.safetensors", "*_checkpoint.pt")
"""Files of a hub repository that are downloaded: weights without pickle, and OpenVLA-OFT's heads, read without it."""
FOREIGN_TYPES = {"openvla": "openvla-oft"}
"""What the config.json of others calls a type of policy, to its name here."""


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: A shipped name ("metaworld-mini"), a folder, or a Hugging Face hub id ("owner/name"), which is downloaded.
        revision: Commit of a hub id; None: the newest.

    Raises:
        ConfigError: No checkpoint has that name.
        CheckpointError: The folder holds no checkpoint, or the download failed.
    """
    for folder in (Path(name), SHIPPED / name):
        if (folder / CONFIG).is_file():
            return folder
    if Path(name).is_dir():
        raise CheckpointError(f"{name}: is no checkpoint (there is no {CONFIG}).")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not any(part.is_file() for part in Path(name).parents):
        with needs_extra("policy"):
            from huggingface_hub import snapshot_download
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["lora_adapter/*"]
                )
            )
        except Exception as error:  # the hub client's errors are many, and all mean the same here
            raise CheckpointError(
                f"{name}: is no folder here, and could not be downloaded from the hub ({error})."
            ) from error
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*") if path.is_dir()))
    raise ConfigError(f"unknown policy {name!r}: it is no folder; shipped with the package: {shipped or 'none'}, mock.")


def read_policy_type(folder: Path) -> str:
    """Return the type of a checkpoint's policy from its config.json: our name where we know another's.

    Raises:
        CheckpointError: The file is missing or damaged, or names no type.
    """
    return FOREIGN_TYPES.get(found := read_type_field(folder)[1], found)


def read_type_field(folder: Path) -> tuple[str, str]:
    """Return the field of config.json that names the type of a checkpoint's policy, and its value.

    Raises:
        CheckpointError: The file is missing or damaged, or names no type.
    """
    document = read_document(folder / CONFIG)
    for field in ("policy_type", "type", "model_type"):  # ours, LeRobot's, and that of transformers
        if isinstance(document.get(field), str):
            return field, document[field]
    raise CheckpointError(
        f"{folder / CONFIG}: field 'policy_type' is missing, and so are 'type' and 'model_type'; this is no policy."
    )


def has_skips(folder: Path) -> bool:
    """Tell whether a checkpoint holds adapters and controllers."""
    return (folder / SKIP_SETTINGS).exists()


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; an older one in the same folder is replaced file by file."""
    from safetensors.torch import save_file

    config = {"policy_type": checkpoint.policy_type, "config": asdict(checkpoint.config)}
    text = json.dumps(config, indent=2, allow_nan=False)
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(checkpoint.tensors, temporary, metadata={"format": "pt", "config": text})
    write_text(folder / CONFIG, text + "\n")
    write_text(folder / TOKENIZER, checkpoint.tokenizer)
    write_json(folder / PROVENANCE, checkpoint.provenance)
    write_json(folder / MANIFEST, {name: sha256(folder / name) for name in (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE)})


def validated(kind: type[T], values: object, path: Path, prefix: str = "") -> T:
    """Make a dataclass from the values of a file.

    Args:
        kind: The dataclass.
        values: What the file holds for it.
        path: The file, for messages.
        prefix: Place of the values in the file, for messages ("config.").

    Raises:
        CheckpointError: A value does not fit; the message names the file and the field.
    """
    with needs_extra("policy"):
        from pydantic import TypeAdapter, ValidationError
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = prefix + ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: field {field!r}: {first['msg']}.") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_checkpoint(folder: Path, policy_type: str, config_class: type[Any]) -> Checkpoint:
    """Read a checkpoint and check every part of it.

    Args:
        folder: The folder, from `find_checkpoint`.
        policy_type: The type that the policy must have.
        config_class: The dataclass of its configuration.

    Raises:
        CheckpointError: A file is missing, damaged or edited; the message names it and, where it is a field, the field.
    """
    with needs_extra("policy"):
        from safetensors import SafetensorError, safe_open
    found = read_policy_type(folder)
    if found != policy_type:
        raise CheckpointError(f"{folder / CONFIG}: field 'policy_type' is {found!r}; this reads {policy_type!r}.")
    document = read_document(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get("config", "null"))
            _check_unedited(folder / CONFIG, document, written)
            check_manifest(folder, (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: is missing or damaged ({error}); get it again.") from error
    config = validated(config_class, document["config"], folder / CONFIG, "config.")
    return Checkpoint(
        policy_type=policy_type,
        config=config,
        tensors=tensors,
        tokenizer=(folder / TOKENIZER).read_text(encoding="utf-8"),
        provenance=read_document(folder / PROVENANCE),
    )


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{error} Get the checkpoint again.") from error


def canonical(config: Any) -> str:
    """Render a configuration as text that depends on its values alone: JSON with sorted keys.

    Fields that are None or empty are left out, so that a field that is added later with an empty default changes no
    fingerprint of an older checkpoint.

    Args:
        config: A dataclass.
    """

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: given(value) if isinstance(value, dict) else value
            for name, value in values.items()
            if value is not None and value not in ((), [], {}, "")
        }

    return json.dumps(given(asdict(config)), sort_keys=True)


def add_weights(digest: Any, weights: Mapping[str, Tensor]) -> None:
    """Add weights of any type and device to a digest of `hashlib`."""
    from torch import uint8

    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes())


def add_to_manifest(folder: Path, names: Sequence[str]) -> None:
    """Add files of a checkpoint, or new versions of them, to its manifest."""
    write_json(
        folder / MANIFEST, {**read_document(folder / MANIFEST), **{name: sha256(folder / name) for name in names}}
    )


def _check_unedited(path: Path, document: Any, written: Any) -> None:
    difference = _first_difference(document, written, "")
    if difference is not None:
        raise CheckpointError(
            f"{path}: field {difference!r} is not what the weights were saved with; undo the edit, or train anew."
        )


def check_manifest(folder: Path, names: Sequence[str]) -> None:
    """Compare the files of a folder with its manifest, which must name all the given ones.

    Raises:
        CheckpointError: A file is missing, or its SHA-256 differs from the manifest's.
    """
    manifest = read_document(folder / MANIFEST)
    for name in {**dict.fromkeys(names), **manifest}:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing; get the checkpoint again.")
        if manifest.get(name) != sha256(folder / name):
            raise CheckpointError(
                f"{folder / name}: is damaged or edited (its SHA-256 is not the manifest's); get it again."
            )


def _first_difference(left: Any, right: Any, path: str) -> str | None:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            inside = f"{path}.{key}" if path else str(key)
            if key not in left or key not in right:
                return inside
            found = _first_difference(left[key], right[key], inside)
            if found is not None:
                return found
        return None
    return None if left == right else path
