"""DySL: a policy whose backbone skips layers as far as the action allows it, and the files that this adds.

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

from dysl_vla.checkpoint import SKIP_SETTINGS, add_to_manifest, add_weights, canonical, read_document, validated
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import atomic_write, write_json
from dysl_vla.policies.base import SkippablePolicy, is_known_as
from dysl_vla.skip_controller.compatibility import match_heads
from dysl_vla.skip_controller.guidance import SkipGuidance, importance_measures
from dysl_vla.skip_controller.guided_step import GuidedStep, VerificationBudget
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
from dysl_vla.skip_controller.operating import Ablation, RandomExits, SkipStatistics, with_present_names
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import attach
from dysl_vla.skip_controller.torch_backend import TorchBackend, to_numpy, wait_for_gpu
from dysl_vla.types import (
    ActionChunk,
    EpisodeState,
    Observation,
    PolicySpec,
    gripper_columns,
)

HEADS = "skip.safetensors"
LOOKAHEAD = 4
"""Number of planned actions that continuity looks ahead."""


@dataclass(frozen=True)
class SkipSettings:
    """All settings of skipping that a checkpoint holds beside the heads' weights.

    Attributes:
        plan: Which layers may be skipped.
        heads: Sizes of adapters and controllers.
        teacher: Fingerprint of the policy that they were trained for.
        action_dim: Number of dimensions of the actions that guidance was measured on.
        statistics: Statistics that `skip` is turned into thresholds by.
        lookahead: Number of planned actions that continuity looks ahead.
        importance: Name of the importance measure.
        skip: The operating point.
        mean_layers: Mean number of layers that an inference runs at the operating point, on held-out demonstrations.

    Raises:
        ConfigError: `skip` is out of range, or the importance measure is unknown.
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
            raise ConfigError(f"skip must be above 0 and at most 1, got {self.skip}.")
        importance_measures.get(self.importance)


class DyslPolicy:
    """A policy and its skipping, as a `Policy`.

    Args:
        policy: The policy whose layers are skipped; they are attached to the heads, and must not be used otherwise.
        heads: Adapters and controllers.
        settings: The checkpoint's settings.
        skip: How much to skip, above 0 to 1; None: the checkpoint's operating point.
        ablation: The parts of the method that are on; None: all.
        provenance: How the heads were made.

    Attributes:
        skip: How much is skipped.

    Raises:
        ConfigError: The heads do not fit the decoder, or the guidance does not fit the actions.
        CheckpointError: The heads were trained for other weights.
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
                f"teacher must be this policy's fingerprint, {policy.fingerprint[:12]}, and the heads were trained for "
                f"a policy of fingerprint {settings.teacher[:12]}; distill it again."
            )
        action_dim = len(policy.spec.action_names)
        if settings.action_dim != action_dim:
            raise ConfigError(
                f"action_dim must be the policy's {action_dim}, and guidance was measured on actions of "
                f"{settings.action_dim} dimensions; distill it again."
            )
        self._policy = policy
        self._provenance = dict(provenance or {})
        self._settings = settings
        self._ablation = ablation or Ablation()
        self._budget = VerificationBudget()
        if self._ablation.random:
            if settings.mean_layers is None:
                raise ConfigError(
                    "mean_layers must be in the checkpoint for random exits, and is not; use dysl tune first."
                )
            self._random = RandomExits(settings.plan, settings.mean_layers)
        settings.statistics.point(settings.skip if skip is None else skip)  # refused before the policy is attached
        self._skipper = attach(policy.layers, settings.plan, heads, followers=policy.followers)
        self.set_skip(settings.skip if skip is None else skip)

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self._policy.spec

    @property
    def settings(self) -> SkipSettings:
        """Return the checkpoint's settings."""
        return self._settings

    @property
    def heads(self) -> SkipHeads:
        """Return the adapters and controllers."""
        assert self._skipper.heads is not None
        return self._skipper.heads

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return the provenance of the policy, with that of its adapters and controllers under `skipping`."""
        return {**self._policy.provenance, "skipping": self._provenance}

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the heads' weights, settings (which name the policy's fingerprint) and ablation."""
        digest = hashlib.sha256()
        for part in (replace(self._settings, skip=self.skip), self._ablation):
            digest.update(canonical(part).encode())
        add_weights(digest, self.heads.state_dict())
        return digest.hexdigest()

    def set_skip(self, skip: float) -> None:
        """Change how much to skip, from the next inference on.

        Raises:
            ConfigError: `skip` is out of range, or is not the stored setting where exits are random.
        """
        if self._ablation.random and skip != self._settings.skip:
            raise ConfigError(f"skip must be {self._settings.skip}: random runs as many layers as the stored setting.")
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
        """Detach the policy's layers from the heads."""
        self._skipper.detach()

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""
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
        """Infer from encoded observations, as `infer` does after encoding.

        Args:
            items: What the policy's `encode` returned, one item for each episode.
            states: The episodes' states, from `reset`.
            encode_s: Seconds that encoding took.
        """
        started = time.perf_counter()
        inputs = self._policy.collate(items)
        points = np.array([self._random.draw(_seed_of(item)) for item in items]) if self._ablation.random else None
        wait_for_gpu(inputs)
        encode_s += time.perf_counter() - started
        return self._step.infer(self._backend, inputs, states, encode_s=encode_s, allow_points=points)


def _seed_of(item: Any) -> int:
    """Return a number that depends only on a row's input, so that its random exits can be repeated in any batch."""
    seen = max(_tensors(item), key=Tensor.numel)
    return zlib.crc32(to_numpy(seen).tobytes())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


def save_skips(folder: Path, heads: SkipHeads, settings: SkipSettings, provenance: Mapping[str, Any]) -> None:
    """Add adapters, controllers and their settings to the checkpoint of a policy."""
    made_for = {"plan": asdict(settings.plan), "heads": asdict(settings.heads), "teacher": settings.teacher}
    tensors = {name: value.detach().half().contiguous() for name, value in heads.state_dict().items()}
    with atomic_write(folder / HEADS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "made_for": json.dumps(made_for)})
    write_json(folder / SKIP_SETTINGS, {**asdict(settings), "provenance": dict(provenance)})
    add_to_manifest(folder, (HEADS,))  # the settings are checked against the heads' metadata


def save_operating_point(folder: Path, skip: float, mean_layers: float, measured: Mapping[str, Any]) -> None:
    """Change a checkpoint's operating point.

    Args:
        folder: The checkpoint's folder.
        skip: The new operating point.
        mean_layers: Mean number of layers that an inference runs there.
        measured: How it was chosen; it is kept beside the setting.
    """
    settings, document = read_skips(folder)
    provenance = {**document["provenance"], "operating_point": dict(measured)}
    write_json(
        folder / SKIP_SETTINGS,
        {**asdict(replace(settings, skip=skip, mean_layers=mean_layers)), "provenance": provenance},
    )


def read_skips(folder: Path) -> tuple[SkipSettings, dict[str, Any]]:
    """Read a checkpoint's settings, and return them with the document that they come from.

    Raises:
        CheckpointError: A field does not fit; the message names it.
    """
    document = read_document(folder / SKIP_SETTINGS)
    values = {key: value for key, value in document.items() if key != "provenance"}
    settings = validated(SkipSettings, with_present_names(values), folder / SKIP_SETTINGS)
    return settings, document


def load_heads(folder: Path) -> tuple[SkipHeads, SkipSettings, dict[str, Any]]:
    """Load a checkpoint's adapters and controllers in float32, its settings, and how they were made.

    Raises:
        CheckpointError: The checkpoint has none, or they are damaged or edited.
    """
    settings, document = read_skips(folder)
    heads = SkipHeads(settings.plan, settings.heads)
    expected = heads.state_dict()
    try:
        with safe_open(folder / HEADS, framework="pt") as file:
            made_for = json.loads((file.metadata() or {}).get("made_for", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / HEADS} is missing or damaged ({error}); get it again.") from error
    for name in ("plan", "heads", "teacher"):
        if made_for.get(name) != document.get(name):
            raise CheckpointError(
                f"{folder / SKIP_SETTINGS}: field {name!r} must be what the heads were trained for; distill it again."
            )
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{folder / HEADS}: tensor {name!r} must be there, with shape {tuple(value.shape)}; get it again."
            )
    heads.load_state_dict({name: tensors[name].float() for name in expected})
    return heads, settings, document.get("provenance", {})


def load_dysl(
    policy: SkippablePolicy, folder: Path, skip: float | None = None, ablation: Ablation | None = None
) -> DyslPolicy:
    """Give a policy the skipping of its checkpoint.

    Args:
        policy: The policy that was loaded from the folder.
        folder: The checkpoint's folder.
        skip: See `DyslPolicy`.
        ablation: See `DyslPolicy`.

    Raises:
        CheckpointError: The heads are damaged, edited, or made for another policy.
        ConfigError: `skip` is out of range.
    """
    heads, settings, provenance = load_heads(folder)
    match_heads(heads, policy.layers, policy.followers)
    return DyslPolicy(policy, heads.eval(), settings, skip=skip, ablation=ablation, provenance=provenance)
