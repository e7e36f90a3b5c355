"""A policy on a robot's controller: NumPy and ONNX Runtime, nothing else.

config.json        spec, what is looked at, skipping; versions and provenance
encoder.onnx       resized and cropped images, state and token ids to the backbone's input
backbone.onnx      the decoder with its adapters and controllers, and the action head; layers are conditions
*.onnx.data        weights of a graph that would be too large for one file with them; only then
tokenizer.json     of the `tokenizers` library, which is needed only for instructions that config.json does not list
example.npz        an observation and the actions that the exported policy answered
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
from dysl_vla.errors import CheckpointError, ConfigError, MissingExtraError
from dysl_vla.extras import needs_extra
from dysl_vla.files import sha256
from dysl_vla.images import Place, looked_at
from dysl_vla.skip_controller.guidance import VERIFY_TIME_DECAY, DyslState, GuidanceState, SkipGuidance
from dysl_vla.skip_controller.operating import SkipStatistics, with_present_names
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    ActionChunk,
    EpisodeState,
    FloatArray,
    InferenceTiming,
    Normalisation,
    Observation,
    PolicySpec,
    SkipTrace,
    gripper_columns,
)

with needs_extra("robot"):
    import onnxruntime

POLICY_TYPE, FORMAT = "dysl-bundle", 3
READABLE = (1, 2, 3)
"""Formats: 2 may resize images, which a runtime of before would not do; 3 has other names for settings of skipping."""
ENCODER, BACKBONE, EXAMPLE = "encoder.onnx", "backbone.onnx", "example.npz"
FILES = (DOCUMENT, ENCODER, BACKBONE, TOKENIZER, EXAMPLE)
TOLERANCES = {"fp32": 1e-4, "int8": 2e-2}
"""How far from the recorded actions a machine may be, in deviations of the demonstrated actions."""
EMBEDS = "inputs_embeds"
MAX_INSTRUCTIONS = 1000
"""Whose token ids are kept."""


class Bundle:
    """An exported policy. Implements `Policy`.

    Args:
        folder: Of `dysl export`.
        skip: The knob, from 0, the full model, to 1; None: the exported operating point.
        threads: Of ONNX Runtime, for one operation.

    Raises:
        CheckpointError: A file is missing, damaged or edited, or this machine computes something else than the one
            that exported it.
        ConfigError: A value of `skip` that cannot work.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path, *, skip: float | None = None, threads: int = 1) -> None:
        self._folder = folder
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder}: is no bundle (there is no {MANIFEST}); make one with dysl export.")
        check_manifest(folder, FILES)
        self._digest = sha256(folder / MANIFEST)
        document = read_document(folder / DOCUMENT)
        try:
            if document.get("policy_type") != POLICY_TYPE:
                raise CheckpointError(f"{folder}: is no bundle but a {document.get('policy_type')}; use dysl export.")
            if document["format"] not in READABLE:
                raise CheckpointError(f"{folder / DOCUMENT}: is of format {document['format']}, this reads {READABLE}.")
            self.precision: str = document["precision"]
            self.spec = _spec(document["spec"])
            self.provenance: Mapping[str, Any] = document["provenance"]
            self._places = {name: _place(crop) for name, crop in document["crops"].items()}
            self._resizes = {name: (int(size[0]), int(size[1])) for name, size in document.get("resizes", {}).items()}
            self._text_tokens = int(document["text_tokens"])
            self._token_ids = {text: _ids(ids) for text, ids in document["instructions"].items()}
            skipping = with_present_names(document["skipping"])
            self._plan = SkipPlan(
                skipping["plan"]["num_layers"],
                tuple(skipping["plan"]["static_layers"]),
                tuple(skipping["plan"]["exits"]),
            )
            self._statistics = SkipStatistics(**{name: tuple(v) for name, v in skipping["statistics"].items()})
            self._exported_skip = float(skipping["skip"])
            self._lookahead, self._importance = int(skipping["lookahead"]), str(skipping["importance"])
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{folder / DOCUMENT}: {type(error).__name__}: {error}; export it again.") from error
        self._target_of = {e: block.target for block in self._plan.blocks for e in self._plan.exits_of(block)}
        self._lengths = np.array([block.length for block in self._plan.blocks], np.int64)
        self._encoder = _session(folder / ENCODER, threads)
        self._backbone = _session(folder / BACKBONE, threads)
        self._encoder_inputs = [node.name for node in self._encoder.get_inputs()]
        self._encoded_names = [node.name for node in self._encoder.get_outputs()]
        self._from_start = np.array(0, np.int64)
        self._verify_s = 0.0  # what verification took, at most lately
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
        """Of all files, and the setting."""
        return hashlib.sha256(f"{self._digest}{self.skip}".encode()).hexdigest()

    def set_skip(self, skip: float) -> None:
        """Turn the knob, for episodes that begin afterwards.

        Raises:
            ConfigError: Below 0 or above 1.
        """
        self._is_full = skip == 0
        point = self._statistics.point(1.0 if self._is_full else skip)
        self.skip = skip
        self._threshold = np.array(_log_odds(point.threshold), np.float32)
        self._guide = SkipGuidance(
            self._lengths.tolist(),
            len(self.spec.action_names),
            point.thresholds,
            lookahead=self._lookahead,
            importance=self._importance,
            grippers=gripper_columns(self.spec.action_names),
        )

    def reset(self) -> DyslState:
        """The state of an episode that begins."""
        return DyslState(guide=self._guide.reset())

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode, one after the other; see `Policy.infer`."""
        return [self._infer(observation, state) for observation, state in zip(observations, states, strict=True)]

    def check_example(self) -> None:
        """Answer the recorded observation as the exporting machine did.

        Raises:
            CheckpointError: The answers differ.
        """
        path = self._folder / EXAMPLE
        try:
            with np.load(path, allow_pickle=False) as file:
                example = {name: file[name] for name in file.files}
            observation: dict[str, Any] = {
                IMAGE_PREFIX + camera: example[IMAGE_PREFIX + camera] for camera in self.spec.cameras
            }
            observation |= {STATE_KEY: example[STATE_KEY], TASK_KEY: str(example[TASK_KEY])}
            wanted = {"full": example["full"], "skipping": example["skipping"]}
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); export it again.") from error
        self.spec.check_observation(observation)
        encoded = self._encode(observation)
        full, everything = np.array(math.inf, np.float32), np.array(-math.inf, np.float32)
        skipping = self._run(encoded, np.zeros_like(self._lengths), everything, self._from_start)
        first = min(self._skips(skipping[3]))
        started = time.perf_counter()
        resumed = self._run({**encoded, EMBEDS: skipping[4]}, self._lengths, full, np.array(first))
        self._verify_s = time.perf_counter() - started
        answers = {"skipping": skipping[0][0], "full": resumed[0][0]}
        for name, actions in answers.items():
            distance = float(np.abs(actions - wanted[name]).max())
            limit = TOLERANCES[self.precision]
            if not distance <= limit:
                raise CheckpointError(
                    f"{path}: this machine's actions ({name}) differ from the recorded ones by {distance:.2g} "
                    f"deviations; at most {limit:g} may. Do not run this bundle here; export it on such a machine, "
                    "or with --precision fp32."
                )

    def _infer(self, observation: Observation, state: EpisodeState) -> ActionChunk:
        clock = time.perf_counter
        spec = self.spec
        guide = getattr(state, "guide", None)
        if not isinstance(state, DyslState) or not isinstance(guide, GuidanceState):
            raise TypeError("states: must be made by this policy's reset().")
        started = clock()
        spec.check_observation(observation)
        encoded = self._encode(observation)
        seen = clock()
        self._guide.observe(guide, state.latest(spec.action_normalisation, len(spec.action_names)))
        points = self._lengths if self._is_full else guide.allow_points
        observed = clock()
        answer, asked, logits, lefts, first = self._run(encoded, points, self._threshold, self._from_start)
        thought = clock()
        actions: FloatArray = answer[0]
        skips = self._skips(lefts)
        wanted = self._guide.update_and_check(guide, actions, spec.execute_steps) and bool(skips)
        is_verified = wanted and state.has_time(self._verify_s)
        if wanted and not is_verified:
            self._verify_s *= VERIFY_TIME_DECAY  # one that was slow by chance must not forbid all that follow
        verify_s = 0.0
        resumed_from = None
        judged = clock()
        if is_verified:
            resumed_from = min(skips)
            exact = self._run({**encoded, EMBEDS: first}, self._lengths, self._threshold, np.array(resumed_from))
            actions = exact[0][0]
            verify_s = clock() - judged
            self._verify_s = max(verify_s, VERIFY_TIME_DECAY * self._verify_s)
            self._guide.update_and_check(guide, actions, spec.execute_steps)
        world = spec.action_normalisation.undo(actions)
        ended = clock()
        return ActionChunk(
            actions=world,
            timing=InferenceTiming(
                encode_s=seen - started,
                llm_s=thought - observed + verify_s,
                decode_s=0.0,  # the action head is part of the backbone's graph
                guidance_s=observed - seen + (ended - thought) - verify_s,
            ),
            skips=SkipTrace(
                layers_run=self._layers_run(skips),
                skips=skips,
                outputs={
                    layer: 1 / (1 + math.exp(-float(np.clip(logit, -50, 50))))
                    for layer, is_asked, logit in zip(self._target_of, asked, logits, strict=True)
                    if is_asked
                },
                allow_points=tuple(points.tolist()),
                continuity=guide.continuity,
                is_verified=is_verified,
                is_verification_late=wanted and not is_verified,
                resumed_from=resumed_from,
                verify_s=verify_s,
            ),
        )

    def _encode(self, observation: Observation) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        for name in self._encoder_inputs:
            if name == "token_ids":
                feeds[name] = self._tokens(observation[TASK_KEY])
            elif name == STATE_KEY:
                feeds[name] = np.asarray(observation[STATE_KEY], np.float32)[None]
            else:
                camera = name.removeprefix(IMAGE_PREFIX)
                feeds[name] = looked_at(observation[name], self._resizes.get(camera), self._places[camera])[None]
        return dict(zip(self._encoded_names, self._encoder.run(None, feeds), strict=True))

    def _run(
        self,
        encoded: Mapping[str, NDArray[Any]],
        points: NDArray[np.int64],
        threshold: NDArray[np.float32],
        resume_from: NDArray[np.int64],
    ) -> list[NDArray[Any]]:
        """One pass of the backbone; its arguments and answers are those of `ConditionalDecoder`."""
        answers: list[NDArray[Any]] = self._backbone.run(
            None, {**encoded, "allow_points": points, "threshold": threshold, "resume_from": resume_from}
        )
        return answers

    def _tokens(self, instruction: str) -> NDArray[np.int64]:
        known = self._token_ids.get(instruction)
        if known is not None:
            return known
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ModuleNotFoundError as error:
                listed = "; ".join(self._token_ids)
                raise MissingExtraError(
                    f"{TASK_KEY}: {instruction!r:.80} is none of this bundle's instructions ({listed}); for others: "
                    "pip install tokenizers"
                ) from error
            self._tokenizer = Tokenizer.from_file(str(self._folder / TOKENIZER))
            self._tokenizer.enable_padding(length=self._text_tokens)
            self._tokenizer.enable_truncation(self._text_tokens)
        if len(self._token_ids) > MAX_INSTRUCTIONS:
            self._token_ids.clear()
        self._token_ids[instruction] = _ids(self._tokenizer.encode(instruction).ids)
        return self._token_ids[instruction]

    def _skips(self, lefts: NDArray[np.bool_]) -> dict[int, int]:
        exits = zip(self._target_of.items(), lefts.tolist(), strict=True)
        return {layer: target for (layer, target), left in exits if left}

    def _layers_run(self, skips: Mapping[int, int]) -> NDArray[np.bool_]:
        run = np.ones(self._plan.num_layers, np.bool_)
        for layer, target in skips.items():
            run[layer:target] = False
        return run


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base but this
        raise CheckpointError(f"{path}: ONNX Runtime {onnxruntime.__version__} refuses it ({error}).") from error


def _spec(values: Mapping[str, Any]) -> PolicySpec:
    normalisations = {
        name: Normalisation(tuple(values[name]["mean"]), tuple(values[name]["std"]))
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
    """Of a threshold; below 0 all pass, from 1 none does."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
