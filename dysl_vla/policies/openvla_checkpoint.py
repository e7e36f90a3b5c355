"""Reads the checkpoints of OpenVLA-OFT as their authors publish them, and refuses what is not one.

    config.json, model-*.safetensors, model.safetensors.index.json
    action_head--N_checkpoint.pt, proprio_projector--N_checkpoint.pt   of training step N
    dataset_statistics.json                                           quantiles of states and actions
    preprocessor_config.json, tokenizer.json

What a checkpoint stores nowhere is an option with LIBERO's value as its default.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from dysl_vla.checkpoint import CONFIG, TOKENIZER, WEIGHTS, read_document
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies.base_reference import INDEX, parse_options
from dysl_vla.types import FULL_QUALITY, LIBERO_ACTIONS, LIBERO_STATE, Normalisation, PolicySpec, is_gripper

STATISTICS, PREPROCESSOR = "dataset_statistics.json", "preprocessor_config.json"
CAMERAS = ("agentview", "robot0_eye_in_hand")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of numbers that a checkpoint may have, by their names in safetensors."""
LIMITS = {"quantiles": ("q01", "q99"), "range": ("min", "max")}
"""Kind of normalisation to the statistics that are mapped to -1 and 1."""
RENAMED = (
    ("vision_backbone.featurizer.", "vision.0."),
    ("vision_backbone.fused_featurizer.", "vision.1."),
    ("language_model.model.", "backbone."),
)
"""Beginnings of the shards' tensors' names, and of the policy's."""
UNUSED = re.compile(r"vision\.\d\.(norm|attn_pool)\.|language_model\.lm_head\.|.*rotary_emb\.inv_freq$")
"""Tensors that a checkpoint has and the policy does not need."""
FILM = re.compile(r"(vision|vision_backbone)\..*\.(scale|shift)\.(weight|bias)$")
NEEDS = {
    "action_head": "which maps hidden states to actions; the original OpenVLA, whose actions are tokens, has none and "
    "is not supported. Get the file, or take a checkpoint of OpenVLA-OFT",
    "proprio_projector": "which makes a token of the robot's state. Get the file, or, where the policy was trained "
    "without it, give --policy-options use_proprio=false",
}
"""Parts that are kept beside the shards, and what to do where one is missing."""


@dataclass(frozen=True)
class OpenVLAOptions:
    """What a checkpoint of OpenVLA-OFT stores nowhere. The defaults are those of the authors' evaluation in LIBERO.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    chunk_length: int = 8
    """Number of actions that an inference predicts."""
    num_images: int = 2
    """Number of cameras."""
    cameras: str = ""
    """Names of the cameras, separated by commas, in the order of the training: first the one beside the robot."""
    image_size: int = 256
    """Pixels on each side of a camera's image, as the environment renders it."""
    state_names: str = ",".join(LIBERO_STATE)
    """Names of the state's dimensions, separated by commas, as the embodiment calls them."""
    action_names: str = ",".join(LIBERO_ACTIONS)
    """Names of the action's dimensions, separated by commas. Where the last one is a gripper that the checkpoint leaves
    out of its normalisation, it is -1 to open and 1 to close, as in LIBERO."""
    normalisation: str = "quantiles"
    """What is mapped to -1 and 1: "quantiles", the data set's q01 and q99, or "range", its minimum and maximum, as for
    ALOHA."""
    norm_stats: str = ""
    """Data set of the states and actions, by its key in dataset_statistics.json; it may be left out if there is one."""
    use_proprio: bool = True
    """Whether the policy was trained with proprioception."""
    execute_steps: int = 8
    """Number of actions that are executed before the next inference."""
    rate_hz: float = 20.0
    """Actions a second."""

    def __post_init__(self) -> None:
        for name in ("chunk_length", "num_images", "image_size", "execute_steps", "rate_hz"):
            if not 0 < getattr(self, name) < 10_000:
                raise ConfigError(f"{name} must be above 0 and below 10000, got {getattr(self, name)}.")
        if self.normalisation not in LIMITS:
            raise ConfigError(f"normalisation must be one of {', '.join(LIMITS)}, got {self.normalisation!r}.")
        for name in ("state_names", "action_names", *(["cameras"] if self.cameras else [])):
            names = getattr(self, name).split(",")
            if len({*names, ""}) <= len(names) or any(one != one.strip() for one in names):
                raise ConfigError(f"{name} must be different names, separated by commas, got {getattr(self, name)!r}.")
        if self.execute_steps > self.chunk_length:
            raise ConfigError(
                f"execute_steps must be at most the chunk_length of {self.chunk_length}, got {self.execute_steps}."
            )
        if len(set(self.camera_names)) != self.num_images:
            raise ConfigError(
                f"num_images must be the number of cameras ({', '.join(self.camera_names)}), got {self.num_images}; "
                "name others by the option cameras=NAME,NAME."
            )

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Return the names of the cameras, in the order of the training."""
        return tuple(self.cameras.split(",")) if self.cameras else CAMERAS[: self.num_images]

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> OpenVLAOptions:
        """Make options from texts.

        Raises:
            ConfigError: A name is unknown, or a value is out of range; the message names it.
        """
        values = parse_options(cls, options)
        if "chunk_length" in values:
            values.setdefault("execute_steps", min(values["chunk_length"], cls.execute_steps))
        if "cameras" in values:
            values.setdefault("num_images", len(values["cameras"].split(",")))
        return cls(**values)


class OpenVLAFiles:
    """The files of a checkpoint: the shapes of all tensors at once, the weights as they are asked for.

    Args:
        folder: The folder.
        device: Where the weights go; on "meta" they are not read.
        use_proprio: Whether a projector of proprioception belongs to the checkpoint.

    Attributes:
        shapes: Name of a tensor in the policy to its shape.
        dtype: Type of numbers of the decoder's weights.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint is of a kind that is not supported.
    """

    dtype: torch.dtype

    def __init__(self, folder: Path, device: torch.device, *, use_proprio: bool) -> None:
        self.folder, self._device = folder, device
        for pattern, what in (
            ("vision_backbone--*", "FiLM, which changes the vision transformers by the instruction"),
            ("noisy_action_projector--*", "a diffusion head"),
        ):
            if found := sorted(folder.glob(pattern)):
                raise CheckpointError(f"{folder} has {what} ({found[0].name}), and is not supported.")
        self._loose = self._read_part("action_head", "head.", "model.")
        if diffusion := [name for name in self._loose if name.startswith("head.noise_predictor.")]:
            raise CheckpointError(f"{folder} has a diffusion head ({diffusion[0]}), and is not supported.")
        if use_proprio:
            self._loose |= self._read_part("proprio_projector", "proprio_projector.", "")
            parts = [path.name for part in NEEDS for path in folder.glob(f"{part}--*_checkpoint.pt")]
            if len({name.partition("--")[2] for name in parts}) > 1:
                raise CheckpointError(f"{folder} must have parts of one training step, got {' and '.join(parts)}.")
        self.shapes = {name: tuple(value.shape) for name, value in self._loose.items()}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as file:
                    self._add_shard(path, file)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is missing or damaged ({error}); get it again.") from error
        self.shape("backbone.layers.0.self_attn.q_proj.weight")  # its type is the decoder's
        if film := [name for name in self.shapes if FILM.match(name)]:
            raise CheckpointError(
                f"{folder} has FiLM, which changes the vision transformers by the instruction ({film[0]}), and is not "
                "supported."
            )

    def _read_part(self, part: str, prefix: str, old_prefix: str) -> dict[str, Tensor]:
        """Read a part that is kept beside the shards, by its tensors' names in the policy."""
        found = sorted(self.folder.glob(f"{part}--*_checkpoint.pt"))
        if not found:
            raise CheckpointError(f"{self.folder} has no {part}--N_checkpoint.pt, {NEEDS[part]}.")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{self.folder} must have one {part}, got {names}; keep that of the shards' step.")
        try:
            tensors = torch.load(found[0], map_location=self._device, weights_only=True)
            values = {key.removeprefix("module.").removeprefix(old_prefix): value for key, value in tensors.items()}
            if not all(isinstance(value, Tensor) for value in values.values()):
                raise ValueError("it holds other things than tensors")
        except UnpicklingError as error:
            raise CheckpointError(
                f"{found[0]} needs pickle, which could run any program and is never used; save the module's state_dict "
                "with torch.save."
            ) from error
        except Exception as error:  # torch's errors for a damaged file are many
            raise CheckpointError(f"{found[0]} is damaged ({str(error).splitlines()[0]}); get it again.") from error
        return {prefix + key: value for key, value in values.items()}

    def _shards(self) -> list[Path]:
        """Return the paths of the safetensors files."""
        if not (self.folder / INDEX).is_file():
            return [self.folder / WEIGHTS]
        places = read_document(self.folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{self.folder / INDEX}: field 'weight_map' is missing; get the checkpoint again.")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.folder / INDEX}: field 'weight_map' must name safetensors files beside it, got {name!r}."
                )
        return [self.folder / name for name in sorted(set(places.values()))]

    def _add_shard(self, path: Path, file: Any) -> None:
        """Note a shard's tensors by their names in the policy."""
        for key in file.keys():  # noqa: SIM118 # it is no mapping
            name = key
            for old, new in RENAMED:
                name = new + name.removeprefix(old) if name.startswith(old) else name
            if name in self.shapes:
                raise CheckpointError(f"{self.folder} has the tensor {name!r} twice, again in {path.name}.")
            self._places[name] = (path, key)
            self.shapes[name] = tuple(file.get_slice(key).get_shape())
            if name == "backbone.layers.0.self_attn.q_proj.weight":
                self.dtype = self._dtype(file.get_slice(key).get_dtype())

    def _dtype(self, name: str) -> torch.dtype:
        if name not in DTYPES:
            raise CheckpointError(
                f"{self.folder} has weights of type {name}, and must have one of {', '.join(DTYPES)}; take the "
                "checkpoint that is not quantised."
            )
        return DTYPES[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            CheckpointError: It is missing.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder} must have a tensor {name!r}; get the checkpoint again.")
        return self.shapes[name]

    def count(self, prefix: str) -> int:
        """Return how many modules of a list there are, whose tensors' names begin with the prefix and a number."""
        found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in self.shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare the tensors with those of the policy.

        Raises:
            CheckpointError: One is missing, unknown, or of another shape.
        """
        for name, value in expected.items():
            if self.shape(name) != tuple(value.shape):
                raise CheckpointError(
                    f"{self.folder}: {name} must be {tuple(value.shape)}, as the other tensors and config.json have "
                    f"it, got {self.shapes[name]}; get the checkpoint again."
                )
        last = tuple(f"vision.{index}.blocks.{self.count(f'vision.{index}.blocks.') - 1}." for index in (0, 1))
        for name in self.shapes:
            if name not in expected and not name.startswith(last) and not UNUSED.match(name):
                raise CheckpointError(f"{self.folder} has an unknown tensor {name!r}; take another checkpoint.")

    def weights(self, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors, one after the other, on the device and as a type of numbers."""
        for name in list(self._loose):
            yield name, self._loose.pop(name).to(self._device, dtype)
        for path in sorted({path for path, _ in self._places.values()}):
            with safe_open(path, framework="pt") as file:
                for name, (place, key) in self._places.items():
                    if place == path and name in names:
                        yield name, file.get_tensor(key).to(self._device, dtype)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer of instructions.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        path = self.folder / TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no others
            raise CheckpointError(f"{path} is missing or damaged ({error}); get it again.") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def pixel_statistics(self) -> tuple[list[list[float]], list[list[float]]]:
        """Return mean and deviation of the colours for each vision transformer, as they were rounded in training.

        Raises:
            CheckpointError: They are missing or damaged.
        """
        path = self.folder / PREPROCESSOR
        document = read_document(path)
        try:
            if rounded := document.get("tvf_normalize_params"):
                means, deviations = [entry["mean"] for entry in rounded], [entry["std"] for entry in rounded]
            else:
                means, deviations = document["means"], document["stds"]
            if np.array(means, float).shape != (2, 3) or np.array(deviations, float).shape != (2, 3):
                raise ValueError("there must be three numbers for each of the two vision transformers")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the pixels' normalisation is damaged ({error!r}); get it again.") from error
        return means, deviations


def read_spec(folder: Path, options: OpenVLAOptions) -> PolicySpec:
    """Read what the policy expects and predicts.

    Raises:
        ConfigError: The option `norm_stats` names no data set of the checkpoint.
        CheckpointError: The statistics are missing or damaged.
    """
    path = folder / (STATISTICS if (folder / STATISTICS).is_file() else CONFIG)
    document = read_document(path)
    every = document if path.name == STATISTICS else document.get("norm_stats")
    if not isinstance(every, dict) or not every:
        raise CheckpointError(f"{folder} has no {STATISTICS}; get the checkpoint again.")
    key = options.norm_stats or (next(iter(every)) if len(every) == 1 else "")
    if key not in every:
        raise ConfigError(
            f"norm_stats must be one of {', '.join(every)}, got {key!r}; give --policy-options norm_stats=NAME."
        )
    states, actions = tuple(options.state_names.split(",")), tuple(options.action_names.split(","))
    limits = LIMITS[options.normalisation]
    try:
        state = Normalisation((0.0,) * len(states), (1.0,) * len(states))
        if options.use_proprio:
            state, _ = _normalisation(every[key]["proprio"], limits, len(states))
        action, mask = _normalisation(every[key]["action"], limits, len(actions))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: {key} must have {' and '.join(limits)} of {len(states)} states and {len(actions)} actions "
            f"({error!r}); other robots' are named by --policy-options state_names=... action_names=..., and a policy "
            "without proprioception by use_proprio=false."
        ) from error
    if actions == LIBERO_ACTIONS or (is_gripper(actions[-1]) and not mask[-1]):
        # The head's gripper, g, is 1 to open; `decode` returns 1 - 2 g; LIBERO's is the sign of 1 - 2 (std g + mean).
        mean, std = action.mean[-1], action.std[-1]
        action = Normalisation((*action.mean[:-1], 1 - std - 2 * mean), action.std, signs=(len(actions) - 1,))
    return PolicySpec(
        cameras=dict.fromkeys(options.camera_names, (options.image_size, options.image_size)),
        state_names=states,
        action_names=actions,
        rate_hz=options.rate_hz,
        chunk_length=options.chunk_length,
        execute_steps=options.execute_steps,
        state_normalisation=state,
        action_normalisation=action,
        rendering=FULL_QUALITY,
    )


def _normalisation(
    statistics: Mapping[str, Any], limits: tuple[str, str], size: int
) -> tuple[Normalisation, NDArray[np.bool_]]:
    """Return the map of the limits to -1 and 1, and which dimensions it changes."""
    low, high = (np.array(statistics[name], np.float64) for name in limits)
    mask = np.array(statistics.get("mask", [True] * size), bool)
    if not low.shape == high.shape == mask.shape == (size,):
        raise ValueError(f"got {low.size} of {size} dimensions")
    half = (high - low + 1e-8) / 2
    mean, std = np.where(mask, half + low, 0), np.where(mask, half, 1)
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std))), mask
