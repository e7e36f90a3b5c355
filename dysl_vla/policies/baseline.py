"""A policy whose layers another method runs, as a `Policy`, and its checkpoint.

config.json            method, sizes, its dial, and the policy that it was trained for
baseline.safetensors   its weights
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dysl_vla.checkpoint import (
    CONFIG,
    MANIFEST,
    PROVENANCE,
    add_weights,
    canonical,
    check_manifest,
    find_checkpoint,
    read_document,
    validated,
)
from dysl_vla.errors import CheckpointError
from dysl_vla.files import atomic_write, sha256, write_json
from dysl_vla.policies import is_known_as, load_skippable_policy, original_fingerprint
from dysl_vla.policies.base import SkippablePolicy, policies
from dysl_vla.policies.compute import ComputeConfig
from dysl_vla.skip_controller.baselines import Baseline, BaselineConfig, BaselineRunner, Pass, make_baseline
from dysl_vla.skip_controller.compatibility import compute_dtype, run_device
from dysl_vla.skip_controller.torch_backend import Forward, to_numpy, wait_for_gpu
from dysl_vla.types import ActionChunk, EpisodeState, InferenceTiming, Observation, PolicySpec, SkipTrace

POLICY_TYPE, WEIGHTS = "baseline", "baseline.safetensors"


@dataclass(frozen=True)
class BaselineSettings:
    """What a checkpoint says beside the weights.

    Attributes:
        sizes: The method and its sizes.
        dial: What decides how many layers run.
        policy: Name of the policy that it was trained for.
        teacher: Its fingerprint.
        mean_layers: Mean number of layers that an inference runs, on held-out demonstrations.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sizes: BaselineConfig
    dial: float
    policy: str
    teacher: str
    mean_layers: float


class BaselinePolicy:
    """A policy whose layers a baseline runs. It infers one observation after the other.

    Args:
        policy: The policy, whose layers are wrapped.
        baseline: The baseline.
        settings: The checkpoint's settings.
        provenance: How the baseline was trained.
    """

    takes_compute = True

    def __init__(
        self, policy: SkippablePolicy, baseline: Baseline, settings: BaselineSettings, provenance: Mapping[str, Any]
    ) -> None:
        self._policy, self._settings, self._provenance = policy, settings, dict(provenance)
        self._runner = BaselineRunner(policy.layers, baseline.eval())

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self._policy.spec

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return the provenance of the policy, with the baseline's under `baseline`."""
        return {**self._policy.provenance, "baseline": self._provenance}

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of settings, which name the policy's fingerprint, and weights."""
        digest = hashlib.sha256(canonical(self._settings).encode())
        add_weights(digest, self._runner.baseline.state_dict())
        return digest.hexdigest()

    def set_dial(self, dial: float) -> None:
        """Change what decides how many layers run."""
        self._settings = replace(self._settings, dial=dial)

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""
        return self._policy.reset()

    def close(self) -> None:
        """Restore the policy's layers."""
        self._runner.detach()

    @torch.inference_mode()
    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch; see `Policy.infer`."""
        chunks = []
        for observation, state in zip(observations, states, strict=True):
            started = time.perf_counter()
            [item] = self._policy.encode([observation], [state])
            chunks.append(self.infer_encoded(item, time.perf_counter() - started))
        return chunks

    @torch.inference_mode()
    def infer_encoded(self, item: Any, encode_s: float = 0.0) -> ActionChunk:
        """Infer from one encoded observation, as `infer` does after encoding."""
        started = time.perf_counter()
        inputs, _ = self._policy.collate([item])
        wait_for_gpu(inputs)
        encode_s += time.perf_counter() - started
        with self._runner.running(Pass(self._settings.dial)) as one:
            forward = Forward(timed=inputs)
            actions = self._policy.act(inputs, forward)
            actions = actions if one.actions is None else one.actions
            llm_s, decode_s = forward.times()
        ran = np.zeros(len(self._policy.layers), np.bool_)
        ran[one.layers_run] = True
        chosen = self.spec.action_normalisation.undo(to_numpy(actions))[0]
        timing = InferenceTiming(encode_s=encode_s, llm_s=llm_s, decode_s=decode_s)
        return ActionChunk(chosen, timing, SkipTrace(ran, {}, {}, (), None))

    @classmethod
    def from_pretrained(cls, name: str, compute: ComputeConfig | None = None) -> BaselinePolicy:
        """Load a checkpoint's folder.

        Raises:
            CheckpointError: A file is missing, damaged or edited, or the policy was changed since.
            ConfigError: The policy that it was trained for is not there.
        """
        folder = find_checkpoint(name)
        document = read_document(folder / CONFIG)
        check_manifest(folder, (CONFIG, PROVENANCE, WEIGHTS))
        values = {key: value for key, value in document.items() if key != "policy_type"}
        settings = validated(BaselineSettings, values, folder / CONFIG)
        policy = load_skippable_policy(settings.policy, compute)
        if not is_known_as(policy, settings.teacher):
            raise CheckpointError(f"{folder / CONFIG}: {settings.policy} was changed since; train the baseline again.")
        baseline = make_baseline(settings.sizes)
        try:
            baseline.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error}); train it again.") from error
        baseline.to(run_device(policy.layers, "0"), compute_dtype(policy.layers))
        return cls(policy, baseline, settings, read_document(folder / PROVENANCE))


def save_baseline(folder: Path, baseline: Baseline, settings: BaselineSettings, provenance: Mapping[str, Any]) -> None:
    """Write a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in baseline.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, {"policy_type": POLICY_TYPE, **asdict(settings)})
    write_json(folder / PROVENANCE, dict(provenance))
    write_json(folder / MANIFEST, {name: sha256(folder / name) for name in (CONFIG, PROVENANCE, WEIGHTS)})


def settings_for(
    policy: SkippablePolicy, sizes: BaselineConfig, name: str, dial: float, mean_layers: float
) -> BaselineSettings:
    """Return the settings of a baseline that was trained for a policy."""
    where = str(Path(name).resolve()) if Path(name).is_dir() else name
    return BaselineSettings(sizes, dial, where, original_fingerprint(policy), mean_layers)


policies.register(POLICY_TYPE)(BaselinePolicy)
