"""A policy on a robot's controller, which needs only NumPy and ONNX Runtime.

config.json        specification, crops, skipping; versions and provenance
encoder.onnx       resized and cropped images, state and token ids to the backbone's input, and to what the expert reads
backbone.onnx      the decoder with its adapters and controllers, and the action head; layers are conditions. In a
                   pruned bundle, only the layers of the shortest path and their adapters, without any condition
expert.onnx        a flow policy's denoising step, which reads what its decoder wrote; that has no action head then
*.onnx.data        weights of a graph that would be too large for one file with them; only then
tokenizer.json     of the `tokenizers` library, which is needed only for instructions that config.json does not list
example.npz        an observation and the actions that the exported policy predicted
manifest.json      SHA-256 of the other files
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dysl_vla.checkpoint import CONFIG as DOCUMENT
from dysl_vla.checkpoint import MANIFEST, TOKENIZER, check_manifest, read_document
from dysl_vla.denoising import beginning
from dysl_vla.deploy.onnx_backend import BACKBONE, ENCODER, EXPERT, open_backend, open_graph
from dysl_vla.errors import CheckpointError, ConfigError, MissingExtraError, ObservationError
from dysl_vla.files import sha256
from dysl_vla.images import Place, looked_at
from dysl_vla.skip_controller.guidance import SkipGuidance
from dysl_vla.skip_controller.guided_step import GuidedStep, VerificationBudget
from dysl_vla.skip_controller.operating import Ablation, SkipStatistics, with_present_names
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    ActionChunk,
    EpisodeState,
    Normalisation,
    Observation,
    PolicySpec,
    gripper_columns,
    with_suffix,
)

POLICY_TYPE, FORMAT = "dysl-bundle", 5
READABLE = (1, 2, 3, 4, 5)
"""Formats that can be read: since 2 images may be resized, 3 renamed settings of skipping, since 4 layers that are
always skipped may be left out, and since 5 actions may be denoised."""
EXAMPLE = "example.npz"
FILES = (DOCUMENT, ENCODER, BACKBONE, TOKENIZER, EXAMPLE)
"""A bundle's files except its manifest; a flow policy's has `EXPERT`, too."""
TOLERANCES = {"fp32": 1e-4, "int8": 2e-2}
"""Largest distance of a machine's actions from the recorded ones, in deviations of the demonstrated actions."""
MAX_INSTRUCTIONS = 1000
"""Number of instructions whose token ids are kept."""


class Bundle:
    """An exported policy, as a `Policy`.

    Args:
        folder: Folder that `dysl export` wrote.
        skip: How much to skip, from 0, the full model, to 1; None: the exported operating point.
        threads: Threads of ONNX Runtime for one operation.

    Attributes:
        precision: Precision of the weights, "fp32" or "int8".
        is_pruned: Whether it has the layers of the shortest path alone; then `skip` is 1.
        spec: What the policy expects of an embodiment, and what it predicts.
        provenance: How the policy was made.
        skip: How much is skipped.

    Raises:
        CheckpointError: A file is missing, damaged or edited, or this machine computes other actions than the one that
            exported it.
        ConfigError: `skip` is out of range, or is not 1 where the bundle is pruned.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path, *, skip: float | None = None, threads: int = 1) -> None:
        self._folder = folder
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} is no bundle (there is no {MANIFEST}); make one with dysl export.")
        if not (folder / BACKBONE).is_file() and read_document(folder / DOCUMENT).get("policy_type") != POLICY_TYPE:
            raise CheckpointError(f"{folder} is no bundle but a checkpoint; make a bundle of it with dysl export.")
        document = read_document(folder / DOCUMENT)
        denoising = document.get("denoising")  # a flow policy's
        check_manifest(folder, (*FILES, EXPERT) if denoising else FILES)
        self._digest = sha256(folder / MANIFEST)
        try:
            if document.get("policy_type") != POLICY_TYPE:
                raise CheckpointError(f"{folder} is no bundle but a {document.get('policy_type')}; use dysl export.")
            if document["format"] not in READABLE:
                raise CheckpointError(f"{folder / DOCUMENT} must be of format {READABLE}, got {document['format']}.")
            self.precision: str = document["precision"]
            self.spec = _spec(document["spec"])
            self.provenance: Mapping[str, Any] = document["provenance"]
            self._places = {name: _place(crop) for name, crop in document["crops"].items()}
            self._resizes = {name: (int(size[0]), int(size[1])) for name, size in document.get("resizes", {}).items()}
            self._takes_others = bool(document.get("takes_other_instructions", True))
            self._suffix = str(document.get("instruction_suffix", ""))
            steps = int(denoising["steps"]) if denoising else 0
            self._noise_width = int(denoising["width"]) if denoising else 0
            self._token_ids = {text: _ids(ids) for text, ids in document["instructions"].items()}
            skipping = with_present_names(document["skipping"])
            self._plan = SkipPlan(
                skipping["plan"]["num_layers"],
                tuple(skipping["plan"]["static_layers"]),
                tuple(skipping["plan"]["exits"]),
            )
            self._statistics = SkipStatistics(**{name: tuple(v) for name, v in skipping["statistics"].items()})
            self._exported_skip = float(skipping["skip"])
            self.is_pruned = bool(skipping.get("is_pruned", False))
            self._lookahead, self._importance = int(skipping["lookahead"]), str(skipping["importance"])
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{folder / DOCUMENT}: {type(error).__name__}: {error}; export it again.") from error
        self._encoder = open_graph(folder / ENCODER, threads)
        self._backend = open_backend(
            folder,
            self._plan,
            actions=len(self.spec.action_names),
            denoising_steps=steps,
            is_pruned=self.is_pruned,
            threads=threads,
        )
        self._encoder_inputs = [node.name for node in self._encoder.get_inputs()]
        self._encoded_names = [node.name for node in self._encoder.get_outputs()]
        self._budget = VerificationBudget()
        self._tokenizer: Any = None
        self.set_skip(self._exported_skip)
        self.check_example()
        self.set_skip(self._exported_skip if skip is None else skip)

    @classmethod
    def from_pretrained(cls, name: str) -> Bundle:
        """Load a bundle from its folder."""
        return cls(Path(name))

    @property
    def fingerprint(self) -> str:
        """Return a digest of all files and of how much is skipped."""
        return hashlib.sha256(f"{self._digest}{self.skip}".encode()).hexdigest()

    def set_skip(self, skip: float) -> None:
        """Change how much to skip, from the next inference on.

        Raises:
            ConfigError: `skip` is below 0 or above 1, or is not 1 where the bundle is pruned.
        """
        if self.is_pruned and skip != 1:
            raise ConfigError(
                f"skip must be 1 for {self._folder}, which was exported with --prune and has no other layers, got "
                f"{skip}; export the policy without --prune."
            )
        self._is_full = skip == 0
        point = self._statistics.point(1.0 if self._is_full else skip)
        self.skip = skip
        self._backend.threshold = _log_odds(point.threshold)
        lengths = [block.length for block in self._plan.blocks]
        self._lengths = np.array([lengths], np.int64)
        self._guidance = SkipGuidance(
            lengths,
            len(self.spec.action_names),
            point.thresholds,
            lookahead=self._lookahead,
            importance=self._importance,
            grippers=gripper_columns(self.spec.action_names),
        )
        ablation = Ablation(guidance=False, verification=False) if self.is_pruned else None
        self._step = GuidedStep(self.spec, self._guidance, lengths, ablation, self._budget)

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""
        return EpisodeState(guidance=self._guidance.reset())

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode, one after the other; see `Policy.infer`."""
        return [self._infer(observation, state) for observation, state in zip(observations, states, strict=True)]

    def _infer(self, observation: Observation, state: EpisodeState) -> ActionChunk:
        started = time.perf_counter()
        self.spec.check_observation(observation)
        encoded = self._encode(observation, state)
        encode_s = time.perf_counter() - started
        points = self._lengths if self._is_full else None
        [chunk] = self._step.infer(self._backend, encoded, [state], encode_s=encode_s, allow_points=points)
        return chunk

    def check_example(self) -> None:
        """Refuse a machine whose actions for the recorded observation differ from the exporting machine's.

        Raises:
            CheckpointError: The actions differ, or the example cannot be read.
        """
        path = self._folder / EXAMPLE
        try:
            with np.load(path, allow_pickle=False) as file:
                example = {name: file[name] for name in file.files}
            observation: dict[str, Any] = {
                IMAGE_PREFIX + camera: example[IMAGE_PREFIX + camera] for camera in self.spec.cameras
            }
            observation |= {STATE_KEY: example[STATE_KEY], TASK_KEY: str(example[TASK_KEY])}
            wanted = {name: example[name] for name in ("full", "skipping") if name == "skipping" or not self.is_pruned}
        except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export it again.") from error
        self.spec.check_observation(observation)
        encoded = self._encode(observation, self.reset())
        self._backend.threshold = -math.inf  # every block is left at its first exit
        skipping = self._backend.run(encoded, np.zeros_like(self._lengths))
        answers = {"skipping": skipping.actions[0]}
        if "full" in wanted:
            resumed = self._backend.resume(encoded, skipping)
            self._budget.took(resumed.llm_s)
            answers["full"] = resumed.actions[0]
        for name, actions in answers.items():
            distance = float(np.abs(actions - wanted[name]).max())
            limit = TOLERANCES[self.precision]
            if not distance <= limit:
                raise CheckpointError(
                    f"{path}: this machine's actions ({name}) differ from the recorded ones by {distance:.2g} "
                    f"deviations, more than the {limit:g} that are allowed. Do not run this bundle here; export it on "
                    "this kind of machine, or with --precision fp32."
                )

    def _encode(self, observation: Observation, state: EpisodeState) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        for name in self._encoder_inputs:
            if name == "token_ids":
                feeds[name] = self._tokens(observation[TASK_KEY])
            elif name == STATE_KEY:
                feeds[name] = np.asarray(observation[STATE_KEY], np.float32)[None]
            else:
                camera = name.removeprefix(IMAGE_PREFIX)
                feeds[name] = looked_at(observation[name], self._resizes.get(camera), self._places[camera])[None]
        encoded = dict(zip(self._encoded_names, self._encoder.run(None, feeds), strict=True))
        if self._noise_width:
            encoded |= beginning(observation, state, self.spec, self._noise_width)
        return encoded

    def _tokens(self, instruction: str) -> NDArray[np.int64]:
        known = self._token_ids.get(instruction)
        if known is not None:
            return known
        listed = "; ".join(self._token_ids)
        if not self._takes_others:
            raise ObservationError(
                f"{TASK_KEY} must be one of this bundle's instructions ({listed}), got {instruction!r:.80}; its policy "
                "needs more than its tokenizer to make token ids of others."
            )
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ModuleNotFoundError as error:
                raise MissingExtraError(
                    f"{TASK_KEY} must be one of this bundle's instructions ({listed}), got {instruction!r:.80}; for "
                    "others: pip install tokenizers"
                ) from error
            self._tokenizer = Tokenizer.from_file(str(self._folder / TOKENIZER))
        if len(self._token_ids) > MAX_INSTRUCTIONS:
            self._token_ids.clear()
        text = with_suffix(instruction, self._suffix)
        self._token_ids[instruction] = _ids(self._tokenizer.encode(text).ids)
        return self._token_ids[instruction]


def _spec(values: Mapping[str, Any]) -> PolicySpec:
    normalisations = {
        name: Normalisation(*(tuple(values[name].get(part, ())) for part in ("mean", "std", "signs")))
        for name in ("state_normalisation", "action_normalisation")
    }
    names = {name: tuple(values[name]) for name in ("state_names", "action_names")}
    cameras = {camera: (int(size[0]), int(size[1])) for camera, size in values["cameras"].items()}
    return PolicySpec(**{**values, **normalisations, **names, "cameras": cameras})


def _place(values: Sequence[int]) -> Place:
    top, left, height, width = map(int, values)
    return top, left, height, width


def _ids(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array([values], np.int64)


def _log_odds(probability: float) -> float:
    """Return a threshold's log-odds; those of 0 and below are exceeded by all, those of 1 and above by none."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
