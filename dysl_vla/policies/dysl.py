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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dysl_vla.checkpoint import add_to_manifest, add_weights, canonical, read_document, validated
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import atomic_write, write_json
from dysl_vla.policies.base import SkippablePolicy, is_known_as
from dysl_vla.skip_controller.guidance import SkipGuidance, importance_measures
from dysl_vla.skip_controller.guided_step import GuidedStep, VerificationBudget
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
from dysl_vla.skip_controller.operating import Ablation, RandomExits, SkipStatistics, with_present_names
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import attach
from dysl_vla.skip_controller.torch_backend import TorchBackend, to_numpy
from dysl_vla.types import (
    ActionChunk,
    EpisodeState,
    Observation,
    PolicySpec,
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
        policy: Whose layers are skipped; they are attached to the heads, and must not be used otherwise meanwhile.
        heads: Adapters and controllers.
        settings: The checkpoint's.
        skip: How much to skip, above 0 to 1; None: the checkpoint's operating point.
        ablation: Parts of the method to leave out.
        provenance: How the heads were made.

    Raises:
        ConfigError: The heads do not fit the decoder, or the guidance not the actions.
        CheckpointError: They were trained for other weights.
    """

    def __init__(
        self,
        policy: SkippablePolicy,
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
        self._budget = VerificationBudget()
        if self._ablation.random:
            if settings.mean_layers is None:
                raise ConfigError("random: the checkpoint does not say how many layers to run; tune it first.")
            self._random = RandomExits(settings.plan, settings.mean_layers)
        self._skipper = attach(policy.layers, settings.plan, heads, followers=policy.followers)
        self.set_skip(settings.skip if skip is None else skip)

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
        """The provenance of the policy that skips; that of its adapters and controllers under `skipping`."""
        return {**self._policy.provenance, "skipping": self._provenance}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the heads' weights, settings (which name the policy's fingerprint) and ablation."""
        digest = hashlib.sha256()
        for part in (replace(self._settings, skip=self.skip), self._ablation):
            digest.update(canonical(part).encode())
        add_weights(digest, self.heads.state_dict())
        return digest.hexdigest()

    def set_skip(self, skip: float) -> None:
        """Change how much to skip, for episodes that begin afterwards.

        Raises:
            ConfigError: Not above 0, or above 1, or not the stored setting where skips are random.
        """
        if self._ablation.random and skip != self._settings.skip:
            raise ConfigError(f"skip: random runs as many layers as the stored setting does, {self._settings.skip}.")
        settings, spec = self._settings, self._policy.spec
        point = settings.statistics.point(skip)
        self.skip = skip
        lengths = [block.length for block in settings.plan.blocks]
        self._guidance = SkipGuidance(
            lengths,
            settings.action_dim,
            point.thresholds,
            lookahead=settings.lookahead,
            importance=settings.importance,
            grippers=gripper_columns(spec.action_names),
        )
        self._step = GuidedStep(spec, self._guidance, lengths, self._ablation, self._budget)
        self._backend = TorchBackend(
            self._skipper,
            self._policy.act,
            self._policy.remember,
            threshold=point.threshold,
            force_skip=self._ablation.random,
        )

    def close(self) -> None:
        """Take the skipping off the policy again."""
        self._skipper.detach()

    def reset(self) -> EpisodeState:
        """The state of an episode that begins."""
        state = self._policy.reset()
        state.guidance = self._guidance.reset()
        return state

    @torch.inference_mode()
    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch; see `Policy.infer`."""
        started = time.perf_counter()
        items = self._policy.encode(observations, states)
        return self.infer_encoded(items, states, time.perf_counter() - started)

    @torch.inference_mode()
    def infer_encoded(
        self, items: Sequence[Any], states: Sequence[EpisodeState], encode_s: float = 0.0
    ) -> list[ActionChunk]:
        """What `infer` does after encoding.

        Args:
            items: Of the policy's `encode`, one an episode.
            states: Of `reset`, one an episode.
            encode_s: Seconds that encoding took.
        """
        started = time.perf_counter()
        inputs = self._policy.collate(items)
        points = np.array([self._random.draw(_seed_of(item)) for item in items]) if self._ablation.random else None
        encode_s += time.perf_counter() - started
        return self._step.infer(self._backend, inputs, states, encode_s=encode_s, allow_points=points)


def _seed_of(item: Any) -> int:
    """A number that what a row sees decides, so that random exits can be repeated, and none is a neighbour's."""
    seen = max(_tensors(item), key=Tensor.numel)
    return zlib.crc32(to_numpy(seen).tobytes())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


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
    policy: SkippablePolicy, folder: Path, skip: float | None = None, ablation: Ablation | None = None
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
    like = next(policy.layers.parameters())
    heads.to(like.device, like.dtype)
    return DyslPolicy(policy, heads.eval(), settings, skip=skip, ablation=ablation, provenance=provenance)
