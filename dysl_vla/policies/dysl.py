"""DySL: a policy whose backbone skips layers, as far as the action allows it, and the files that this adds to it.

skip.json           plan, sizes of the heads, statistics, operating point
skip.safetensors    adapters and controllers; what they were trained for in the metadata
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dysl_vla.checkpoint import add_to_manifest, canonical, read_document, validated
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import atomic_write, write_json
from dysl_vla.policies.base import BackbonePolicy, is_known_as
from dysl_vla.skip_controller.guidance import (
    VERIFY_TIME_DECAY,
    DyslState,
    GuidanceState,
    SkipGuidance,
    importance_measures,
)
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
from dysl_vla.skip_controller.operating import Ablation, RandomExits, SkipStatistics, with_present_names
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import Step, attach
from dysl_vla.types import (
    ActionChunk,
    EpisodeState,
    FloatArray,
    InferenceTiming,
    Observation,
    PolicySpec,
    SkipTrace,
    gripper_columns,
)

SETTINGS, HEADS = "skip.json", "skip.safetensors"
LOOKAHEAD = 4
"""Planned actions that continuity looks ahead."""


@dataclass(frozen=True)
class SkipSettings:
    """Everything about skipping that a checkpoint holds beside the heads' weights.

    Attributes:
        plan: Which layers may be skipped.
        heads: Sizes of adapters and controllers.
        teacher: Fingerprint of the policy that they were trained for.
        action_dim: Dimensions of the actions that guidance was measured on.
        statistics: From which the knob gets its thresholds.
        lookahead: Planned actions that continuity looks ahead.
        signal: Name of the importance signal.
        skip: The operating point.
        mean_layers: Layers run an inference at the operating point, on held-out demonstrations.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    plan: SkipPlan
    heads: HeadsConfig
    teacher: str
    action_dim: int
    statistics: SkipStatistics
    lookahead: int = LOOKAHEAD
    importance: str = "continuity"
    skip: float = 0.997
    mean_layers: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.skip <= 1:
            raise ConfigError(f"skip: {self.skip} must be above 0 and at most 1.")
        importance_measures.get(self.importance)


class DyslPolicy:
    """A policy and its skipping. Implements `Policy`.

    Args:
        policy: Whose backbone skips; it is attached to the heads, and must not be used otherwise meanwhile.
        heads: Adapters and controllers.
        settings: The checkpoint's.
        skip: The knob, above 0 to 1; None: the checkpoint's operating point.
        ablation: Parts to leave out.
        provenance: How the heads were made.

    Raises:
        ConfigError: The heads do not fit the backbone, or the guide not the actions.
        CheckpointError: They were trained for other weights.
    """

    def __init__(
        self,
        policy: BackbonePolicy,
        heads: SkipHeads,
        settings: SkipSettings,
        *,
        skip: float | None = None,
        ablation: Ablation | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not is_known_as(policy, settings.teacher):
            raise CheckpointError(
                f"teacher: the heads were trained for a policy of fingerprint {settings.teacher[:12]}, this one's is "
                f"{policy.fingerprint[:12]}; distill it again."
            )
        action_dim = len(policy.spec.action_names)
        if settings.action_dim != action_dim:
            raise ConfigError(
                f"action_dim: guidance was measured on actions of {settings.action_dim} dimensions, the policy has "
                f"{action_dim}; distill it again."
            )
        self._policy = policy
        self._provenance = dict(provenance or {})
        self._settings = settings
        self._ablation = ablation or Ablation()
        self._verify_s = 0.0  # what verification took, at most lately
        self._lengths = np.array([block.length for block in settings.plan.blocks], np.int64)
        self.set_skip(settings.skip if skip is None else skip)
        if self._ablation.random:
            if settings.mean_layers is None:
                raise ConfigError("random: the checkpoint does not say how many layers to run; tune it first.")
            self._random = RandomExits(settings.plan, settings.mean_layers)
        self._skipper = attach(policy.backbone, settings.plan, heads)

    @property
    def spec(self) -> PolicySpec:
        """What the policy expects of a world, and how it answers."""
        return self._policy.spec

    @property
    def settings(self) -> SkipSettings:
        """The checkpoint's."""
        return self._settings

    @property
    def heads(self) -> SkipHeads:
        """Adapters and controllers."""
        assert self._skipper.heads is not None
        return self._skipper.heads

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Of the policy that skips; that of its adapters and controllers under `skipping`."""
        return {**self._policy.provenance, "skipping": self._provenance}

    @property
    def fingerprint(self) -> str:
        """Of weights, settings and ablation."""
        digest = hashlib.sha256()
        for part in (replace(self._settings, skip=self.skip), self._ablation):  # the settings name the teacher
            digest.update(canonical(part).encode())
        for name, value in sorted(self.heads.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def set_skip(self, skip: float) -> None:
        """Turn the knob, for episodes that begin afterwards.

        Raises:
            ConfigError: Not above 0, or above 1, or not the stored setting where skips are random.
        """
        if self._ablation.random and skip != self._settings.skip:
            raise ConfigError(f"skip: random runs as many layers as the stored setting does, {self._settings.skip}.")
        self._point = self._settings.statistics.point(skip)
        self.skip = skip
        self._guide = SkipGuidance(
            self._lengths.tolist(),
            self._settings.action_dim,
            self._point.thresholds,
            lookahead=self._settings.lookahead,
            importance=self._settings.importance,
            grippers=gripper_columns(self._policy.spec.action_names),
        )

    def close(self) -> None:
        """Take the skipping off the policy again."""
        self._skipper.detach()

    def reset(self) -> DyslState:
        """The state of an episode that begins."""
        return DyslState(guide=self._guide.reset())

    @torch.inference_mode()
    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch; see `Policy.infer`."""
        started = time.perf_counter()
        inputs = self._policy.encode(observations)
        return self.act(inputs, states, time.perf_counter() - started)

    @torch.inference_mode()
    def act(
        self, inputs: Mapping[str, Tensor], states: Sequence[EpisodeState], encode_s: float = 0.0
    ) -> list[ActionChunk]:
        """What `infer` does after encoding.

        Args:
            inputs: Of the policy's `encode`.
            states: Of `reset`, one an episode.
            encode_s: What encoding took.
        """
        clock = time.perf_counter
        spec = self._policy.spec
        started = clock()
        guides = [self._observe(state) for state in states]
        points = np.stack([self._points(guide) for guide in guides])
        if self._ablation.random:
            points = self._random_points(inputs)
        observed = clock()
        with self._skipper.step(
            points,
            threshold=self._point.threshold,
            mask=inputs.get("attention_mask"),
            force_skip=self._ablation.random,
        ) as step:
            hidden = self._policy.backbone(**inputs).last_hidden_state
        thought = clock()
        actions: FloatArray = self._policy.decode(hidden).float().cpu().numpy()
        decoded = clock()
        wanted = [
            self._guide.update_and_check(guide, row, spec.execute_steps)
            and bool(step.targets[index])
            and self._ablation.verification
            for index, (guide, row) in enumerate(zip(guides, actions, strict=True))
        ]
        verified = [ask and state.has_time(self._verify_s) for ask, state in zip(wanted, states, strict=True)]
        if any(wanted) and not any(verified):
            self._verify_s *= VERIFY_TIME_DECAY  # one that was slow by chance must not forbid all that follow
        judged = clock()
        verify_s = again_s = 0.0
        first_skip = step.first_skip
        if any(verified):
            with self._skipper.verify(step):
                exact = self._policy.backbone(**inputs).last_hidden_state
            verify_s = clock() - judged
            self._verify_s = max(verify_s, VERIFY_TIME_DECAY * self._verify_s)
            actions = np.where(
                np.array(verified)[:, None, None], self._policy.decode(exact).float().cpu().numpy(), actions
            )
            again_s = clock() - judged - verify_s
            for guide, row, is_verified in zip(guides, actions, verified, strict=True):
                if is_verified:
                    self._guide.update_and_check(guide, row, spec.execute_steps)
        world = spec.action_normalisation.undo(actions)
        ended = clock()
        timing = InferenceTiming(
            encode_s=encode_s,
            llm_s=thought - observed + verify_s,
            decode_s=decoded - thought + again_s,
            guidance_s=observed - started + (ended - decoded) - verify_s - again_s,
        )
        return [
            ActionChunk(
                actions=world[row],
                timing=timing,
                skips=_trace(
                    step,
                    row,
                    guide,
                    resumed_from=first_skip if verified[row] else None,
                    is_late=wanted[row] and not verified[row],
                    verify_s=verify_s,
                ),
            )
            for row, guide in enumerate(guides)
        ]

    def _observe(self, state: EpisodeState) -> GuidanceState:
        guide = getattr(state, "guide", None)
        if not isinstance(state, DyslState) or not isinstance(guide, GuidanceState):
            raise TypeError("states: must be made by this policy's reset().")
        self._guide.observe(guide, state.latest(self._policy.spec.action_normalisation, self._settings.action_dim))
        return guide

    def _points(self, guide: GuidanceState) -> NDArray[np.int64]:
        return guide.allow_points if self._ablation.guidance else np.zeros_like(self._lengths)

    def _random_points(self, inputs: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """Drawn by what each row sees, so that they can be repeated, and no episode is another's."""
        seen = max(inputs.values(), key=Tensor.numel).float().cpu().numpy()
        return np.array([self._random.draw(zlib.crc32(row.tobytes())) for row in seen])


def _trace(
    step: Step, row: int, guide: GuidanceState, *, resumed_from: int | None, is_late: bool, verify_s: float
) -> SkipTrace:
    return SkipTrace(
        layers_run=step.layers_run[row],
        skips=step.targets[row],
        outputs=step.outputs[row],
        allow_points=tuple(step.allow_points[row].tolist()),
        continuity=guide.continuity,
        is_verified=resumed_from is not None,
        is_verification_late=is_late,
        resumed_from=resumed_from,
        controllers_s=step.controllers_s,
        adapters_s=step.adapters_s,
        verify_s=verify_s,
    )


def has_skips(folder: Path) -> bool:
    """Does a checkpoint hold skipping?"""
    return (folder / SETTINGS).exists()


def save_skips(folder: Path, heads: SkipHeads, settings: SkipSettings, provenance: Mapping[str, Any]) -> None:
    """Add skipping to the checkpoint of a policy."""
    made_for = {"plan": asdict(settings.plan), "heads": asdict(settings.heads), "teacher": settings.teacher}
    tensors = {name: value.detach().half().contiguous() for name, value in heads.state_dict().items()}
    with atomic_write(folder / HEADS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "made_for": json.dumps(made_for)})
    write_json(folder / SETTINGS, {**asdict(settings), "provenance": dict(provenance)})
    add_to_manifest(folder, (HEADS,))  # the settings are checked against what stands in there


def save_operating_point(folder: Path, skip: float, mean_layers: float, measured: Mapping[str, Any]) -> None:
    """Change a checkpoint's operating point.

    Args:
        folder: The checkpoint's.
        skip: The knob.
        mean_layers: Layers run an inference.
        measured: How it was chosen; kept beside it.
    """
    settings, document = read_skips(folder)
    provenance = {**document["provenance"], "operating_point": dict(measured)}
    write_json(
        folder / SETTINGS, {**asdict(replace(settings, skip=skip, mean_layers=mean_layers)), "provenance": provenance}
    )


def read_skips(folder: Path) -> tuple[SkipSettings, dict[str, Any]]:
    """A checkpoint's settings, and the document that they come from.

    Raises:
        CheckpointError: Naming the field.
    """
    document = read_document(folder / SETTINGS)
    values = {key: value for key, value in document.items() if key != "provenance"}
    settings = validated(SkipSettings, with_present_names(values), folder / SETTINGS)
    return settings, document


def load_heads(folder: Path) -> tuple[SkipHeads, SkipSettings, dict[str, Any]]:
    """A checkpoint's adapters and controllers in float32, its settings, and how they were made.

    Raises:
        CheckpointError: It has none, or they are damaged or edited.
    """
    settings, document = read_skips(folder)
    heads = SkipHeads(settings.plan, settings.heads)
    expected = heads.state_dict()
    try:
        with safe_open(folder / HEADS, framework="pt") as file:
            made_for = json.loads((file.metadata() or {}).get("made_for", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / HEADS}: is missing or damaged ({error}); get it again.") from error
    for name in ("plan", "heads", "teacher"):
        if made_for.get(name) != document.get(name):
            raise CheckpointError(
                f"{folder / SETTINGS}: field {name!r} is not what the heads were trained for; distill anew with it."
            )
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise CheckpointError(f"{folder / HEADS}: tensor {name!r} is missing or not {tuple(value.shape)}.")
    heads.load_state_dict({name: tensors[name].float() for name in expected})
    return heads, settings, document.get("provenance", {})


def load_dysl(
    policy: BackbonePolicy, folder: Path, skip: float | None = None, ablation: Ablation | None = None
) -> DyslPolicy:
    """Give a policy the skipping of its checkpoint.

    Args:
        policy: Loaded from the folder.
        folder: The checkpoint.
        skip: See `DyslPolicy`.
        ablation: See `DyslPolicy`.

    Raises:
        CheckpointError: Damaged, edited, or made for another policy.
        ConfigError: A value of `skip` that cannot work.
    """
    heads, settings, provenance = load_heads(folder)
    like = next(policy.backbone.parameters())
    heads.to(like.device, like.dtype)
    return DyslPolicy(policy, heads.eval(), settings, skip=skip, ablation=ablation, provenance=provenance)
