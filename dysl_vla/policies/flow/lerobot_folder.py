"""Reads the folders of flow policies as LeRobot saves them, and refuses what is not one.

    config.json, model.safetensors
    policy_preprocessor.json, policy_postprocessor.json     steps before and after the policy
    policy_preprocessor_step_N_normalizer_processor.safetensors (and the like)      statistics, "observation.state.mean"

The tokenizer lies in another repository, that of the vision-language model; it is taken from the folder where its
tokenizer.json is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor

from dysl_vla.checkpoint import CONFIG, TOKENIZER, WEIGHTS, read_document
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies.base_reference import parse_options
from dysl_vla.types import (
    FULL_QUALITY,
    IMAGE_PREFIX,
    LIBERO_ACTIONS,
    LIBERO_STATE,
    STATE_KEY,
    FloatArray,
    Normalisation,
    PolicySpec,
)

ABSENT = "-"
"""Name of a camera that is not there."""
LIBERO_CAMERAS = {"image": "agentview", "image2": "robot0_eye_in_hand"}
"""LeRobot's names of LIBERO's cameras, and ours."""
KINDS = ("smolvla", "pi0", "pi05")
"""Types of LeRobot's policies that can be loaded."""
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
ACTION = "action"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LIMITS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
"""Kind of normalisation to the statistics that are mapped to -1 and 1."""
NORMALIZER = "normalizer_processor"
RELATIVE = ("relative_actions_processor", "absolute_actions_processor")
"""Steps that may be there as long as they are not enabled."""
STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "smolvla_new_line_processor",
    "pi0_new_line_processor",
    *RELATIVE,
    NORMALIZER,
    "unnormalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
)
"""Steps of the processors that are done here, too; another one may change what the policy sees."""


@dataclass(frozen=True)
class FlowOptions:
    """What a LeRobot folder does not say. Where numbers of dimensions are LIBERO's, the names are, too.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    cameras: str = ""
    """Names of the cameras, separated by commas, as the embodiment calls them, in the order of the folder's; "-" for
    one that is not there, which the policy then does not see at all, as LeRobot masks it."""
    state_names: str = ""
    """Names of the state's dimensions, separated by commas, as the embodiment calls them."""
    action_names: str = ""
    """Names of the action's dimensions, separated by commas."""
    rate_hz: float = 20.0
    """Actions a second."""
    execute_steps: int = 0
    """Number of actions that are executed before the next inference; 0: those that the folder says."""
    steps: int = 0
    """Denoising steps of an inference; 0: those that the folder says."""
    keep_images: bool = False
    """Whether a camera's image is encoded once while it does not change, as that of a camera slower than the loop; the
    actions are the same."""
    vlm: str = ""
    """Folder with tokenizer.json and config.json of the vision-language model that the policy was made from, where the
    hub cannot be reached."""

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz < 10_000:
            raise ConfigError(f"rate_hz must be above 0 and below 10000, got {self.rate_hz}.")
        for name in ("execute_steps", "steps"):
            if not 0 <= getattr(self, name) < 10_000:
                raise ConfigError(f"{name} must be from 0 to below 10000, got {getattr(self, name)}.")
        for name in ("cameras", "state_names", "action_names"):
            names = [one for one in getattr(self, name).split(",") if one != ABSENT] if getattr(self, name) else []
            if len({*names, ""}) <= len(names) or any(one != one.strip() for one in names):
                raise ConfigError(f"{name} must be different names, separated by commas, got {getattr(self, name)!r}.")

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> FlowOptions:
        """Make options from texts.

        Raises:
            ConfigError: A name is unknown, or a value is out of range; the message names it.
        """
        return cls(**parse_options(cls, options))


class LeRobotFolder:
    """The files of a policy.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        config: Its config.json.
        kind: The policy's type, one of `KINDS`.
        shapes: Name of a tensor, without a leading "model.", to its shape.

    Raises:
        CheckpointError: A file is missing or damaged, or the policy is of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_document(folder / CONFIG)
        self.kind = str(self.config.get("type"))
        if self.kind not in KINDS:
            raise CheckpointError(
                f"{folder / CONFIG}: type must be one of {', '.join(KINDS)}, which can be loaded, got {self.kind!r}."
            )
        for name in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha", "use_relative_actions"):
            if self.config.get(name):
                raise CheckpointError(f"{folder / CONFIG}: {name} is not supported.")
        self._names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 # it is no mapping
                    short = name.removeprefix("model.")
                    part = file.get_slice(name)
                    self._names[short], self.shapes[short] = name, tuple(part.get_shape())
                    self._dtypes[name] = part.get_dtype()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error}); get it again.") from error

    def places(self, renamed: Callable[[str], str | None], expected: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return a policy's names of tensors to the folder's.

        Args:
            renamed: Maps the folder's name of a tensor, without "model.", to the policy's; None: it is not needed.
            expected: The policy's names, and shapes.

        Raises:
            CheckpointError: A tensor is missing, unknown, or of another shape.
        """
        found = {new: name for name in self.shapes if (new := renamed(name)) is not None}
        for name, shape in expected.items():
            there = self.shapes.get(found.get(name, ""))
            if there != shape:
                raise CheckpointError(
                    f"{self.folder}: tensor {found.get(name, name)!r} must have the shape {shape}, got {there}; get it "
                    "again."
                )
        if unknown := sorted(found.keys() - expected.keys()):
            raise CheckpointError(
                f"{self.folder}: tensor {found[unknown[0]]!r} is not known, so that this is another {self.kind}, which "
                "is not supported."
            )
        return {name: self._names[found[name]] for name in expected}

    def dtypes(self, places: Mapping[str, str]) -> dict[str, torch.dtype]:
        """Return for each module of a policy, "backbone" or "expert", the type of numbers of most of its weights.

        LeRobot keeps some in more exact numbers than others: SmolVLA's expert and projections beside a prefix of
        bfloat16, for one.

        Args:
            places: What the method of that name returned.

        Raises:
            CheckpointError: They are of a type that is not supported.
        """
        found: dict[str, Counter[str]] = {}
        for name, place in places.items():
            found.setdefault(name.partition(".")[0], Counter())[self._dtypes[place]] += 1
        common = {name: counts.most_common(1)[0][0] for name, counts in found.items()}
        for name, kind in common.items():
            if kind not in DTYPES:
                path = self.folder / WEIGHTS
                raise CheckpointError(f"{path}: {name} must have numbers of {', '.join(DTYPES)}, got {kind}.")
        return {name: DTYPES[kind] for name, kind in common.items()}

    def weights(
        self, places: Mapping[str, str], dtypes: Mapping[str, torch.dtype], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors that `places` returned, one after the other, as numbers of their modules' types."""
        with safe_open(self.folder / WEIGHTS, framework="pt", device=str(device)) as file:
            for name, place in places.items():
                yield name, file.get_tensor(place).to(dtypes[name.partition(".")[0]])

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number of config.json.

        Raises:
            CheckpointError: It is missing, and has no default, or is none.
        """
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{self.folder / CONFIG}: {name} must be a number, got {value!r}.")
        return value

    def spec(self, options: FlowOptions) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts.

        Raises:
            CheckpointError: A feature or its statistics are missing.
            ConfigError: Names that are given are of another number than the dimensions, or must be given.
        """
        inputs, outputs = (self._features(name) for name in ("input_features", "output_features"))
        seen = {key: shape for key, (kind, shape) in inputs.items() if kind == "VISUAL"}
        sizes = {key: shape[1:] for key, shape in seen.items() if ".empty_camera_" not in key}
        if STATE_KEY not in inputs or ACTION not in outputs or not sizes:
            raise CheckpointError(f"{self.folder / CONFIG} must have a state, a camera and an action as features.")
        self.check_processors()
        renamed = {new: old for old, new in self.renamed().items()}
        own = [renamed.get(key, key).removeprefix(IMAGE_PREFIX) for key in sizes]
        own = [LIBERO_CAMERAS.get(name, name) for name in own]
        cameras = _named("cameras", options.cameras, own, len(own))
        if all(name == ABSENT for name in cameras):
            raise ConfigError("cameras must name at least one that is there.")
        statistics = self.statistics()
        chunk = int(self.number("chunk_size"))
        execute = options.execute_steps or int(self.number("n_action_steps", chunk))
        if execute > chunk:
            raise ConfigError(f"execute_steps must be at most the chunk_size of {chunk}, got {execute}.")
        (state_dim,), (action_dim,) = inputs[STATE_KEY][1], outputs[ACTION][1]
        return PolicySpec(
            cameras={
                name: (int(size[0]), int(size[1]))
                for name, size in zip(cameras, sizes.values(), strict=True)
                if name != ABSENT
            },
            state_names=_named("state_names", options.state_names, LIBERO_STATE, state_dim),
            action_names=_named("action_names", options.action_names, LIBERO_ACTIONS, action_dim),
            state_normalisation=self._normalisation("STATE", STATE_KEY, statistics, state_dim),
            action_normalisation=self._normalisation("ACTION", ACTION, statistics, action_dim),
            rate_hz=options.rate_hz,
            chunk_length=chunk,
            execute_steps=execute,
            rendering=FULL_QUALITY,
        )

    def _features(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = self.config.get(name)
        try:
            assert isinstance(found, dict)
            return {str(key): (str(one["type"]), tuple(map(int, one["shape"]))) for key, one in found.items()}
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {name} must name features, got {found!r:.100}.") from error

    def check_processors(self) -> None:
        """Refuse processors with steps that are not known here, or that a known one does otherwise.

        Raises:
            CheckpointError: A step is unknown, or a file of processors is missing.
        """
        for name in (PREPROCESSOR, POSTPROCESSOR):
            for step in self._steps(name):
                kind = step.get("registry_name")
                if kind not in STEPS:
                    raise CheckpointError(f"{self.folder / name}: step {kind!r} is not supported.")
                if kind in RELATIVE and step["config"].get("enabled"):
                    raise CheckpointError(f"{self.folder / name}: relative actions are not supported.")

    def _steps(self, name: str) -> list[dict[str, Any]]:
        if not (self.folder / name).is_file():
            raise CheckpointError(
                f"{self.folder} has no {name}, which holds the policy's normalisation; it was saved by a LeRobot "
                "before 0.4, whose script migrate_policy_normalization.py writes it."
            )
        steps = read_document(self.folder / name).get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise CheckpointError(f"{self.folder / name} must have a list of steps; get it again.")
        return [{"config": {}, **step} for step in steps]

    def _step(self, name: str, kind: str) -> dict[str, Any]:
        return next((step for step in self._steps(name) if step.get("registry_name") == kind), {"config": {}})

    def renamed(self) -> dict[str, str]:
        """Return the names of observations as the environment has them to the policy's names."""
        return dict(self._step(PREPROCESSOR, "rename_observations_processor")["config"].get("rename_map") or {})

    def statistics(self) -> dict[str, FloatArray]:
        """Return the statistics that states and actions are normalised with, "action.mean" and so on.

        Raises:
            CheckpointError: Their file is missing or damaged.
        """
        found: dict[str, FloatArray] = {}
        for name, kind in ((PREPROCESSOR, NORMALIZER), (POSTPROCESSOR, "unnormalizer_processor")):
            file = self._step(name, kind).get("state_file")
            if file is None:
                continue
            path = self.folder / Path(str(file)).name
            try:
                found |= {key: np.asarray(value, np.float32) for key, value in load_file(path).items()}
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is missing or damaged ({error}); get it again.") from error
        return found

    def _normalisation(
        self, kind: str, feature: str, statistics: Mapping[str, FloatArray], dimensions: int
    ) -> Normalisation:
        file, step = (POSTPROCESSOR, "unnormalizer_processor") if kind == "ACTION" else (PREPROCESSOR, NORMALIZER)
        modes = self._step(file, step)["config"].get("norm_map") or self.config.get("normalization_mapping") or {}
        mode = str(modes.get(kind))
        if str(modes.get("VISUAL", "IDENTITY")) != "IDENTITY":
            raise CheckpointError(
                f"{self.folder / file}: images are normalised by {modes['VISUAL']}, which is not supported."
            )
        if mode == "IDENTITY":
            return Normalisation((0.0,) * dimensions, (1.0,) * dimensions)
        first, second = LIMITS.get(mode, ("mean", "std"))
        if mode not in (*LIMITS, "MEAN_STD"):
            raise CheckpointError(f"{self.folder / file}: normalisation {mode!r} of {kind} is not supported.")
        try:
            low, high = (statistics[f"{feature}.{name}"].reshape(dimensions) for name in (first, second))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: {feature} is normalised by {mode} and needs {first} and {second} of {dimensions} "
                f"dimensions, which are not among its statistics ({', '.join(sorted(statistics)) or 'none'}); a base "
                "policy has none of your robot and must be fine-tuned first, else get the files again."
            ) from error
        if mode == "MEAN_STD":
            return Normalisation(tuple(low.tolist()), tuple(np.maximum(high, 1e-8).tolist()))
        half = np.maximum((high - low) / 2, np.spacing(np.abs(low) + 1))  # one that never moves is -1, as LeRobot's
        return Normalisation(tuple((low + half).tolist()), tuple(half.tolist()))

    def tokenizer(self, options: FlowOptions, model: str) -> Tokenizer:
        """Return the tokenizer of the vision-language model: where the option says, from this folder, or from the hub.

        Args:
            options: The options.
            model: The repository that has the tokenizer.

        Raises:
            CheckpointError: It cannot be had, or is damaged.
        """
        path = (Path(options.vlm) if options.vlm else self.folder) / TOKENIZER
        if not options.vlm and not path.is_file():
            try:
                path = Path(model) / TOKENIZER if Path(model).is_dir() else Path(hf_hub_download(model, TOKENIZER))
            except Exception as error:  # the hub client's errors are many, and all mean the same here
                raise CheckpointError(
                    f"The tokenizer of {model} cannot be had ({error}); put its {TOKENIZER} into {self.folder}, or "
                    "give the folder that has it by --policy-options vlm=FOLDER."
                ) from error
        try:
            tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} is missing or damaged ({error}); get it again.") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def read_vlm_config(options: FlowOptions, model: str) -> dict[str, Any]:
    """Return the configuration of the vision-language model where it is on disk, else an empty one."""
    folder = Path(options.vlm or model)
    return read_document(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _named(option: str, given: str, default: Collection[str], count: int) -> tuple[str, ...]:
    """Return names that an option gives, or the defaults, of a number."""
    names = tuple(given.split(",")) if given else tuple(default)
    if len(names) != count:
        raise ConfigError(
            f"{option} must be {count} names, as many as the policy has, got {', '.join(names)}; give "
            f"--policy-options {option}=NAME,NAME."
        )
    return names


def count_layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Return how many numbered modules have tensors of a prefix, "vlm.layers."."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for name in shapes if (found := pattern.match(name))), default=-1)
