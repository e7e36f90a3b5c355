"""Demonstrations as a policy's backbone reads them, and what the full model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.split import Split
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import check_memory
from dysl_vla.policies import BackbonePolicy
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, Observation, PolicySpec

with needs_extra("policy"):
    import torch
    from torch import Tensor

    from dysl_vla.policies.training import SHIFT

BATCH = 32


def demonstrations_for(root: Path, spec: PolicySpec) -> Demonstrations:
    """Demonstrations as a policy needs them: its cameras alone, and its names where the dataset has none.

    Raises:
        DatasetError: The dataset is damaged, or has not the policy's cameras.
        ConfigError: It is of another world than the policy's.
    """
    found = Demonstrations(root)
    names: dict[str, Sequence[str]] = {}
    if not found.has_state_names and len(found.spec.state_names) == len(spec.state_names):
        names["state_names"] = spec.state_names
    if not found.has_action_names and len(found.spec.action_names) == len(spec.action_names):
        names["action_names"] = spec.action_names
    demonstrations = Demonstrations(root, cameras=list(spec.cameras), **names)
    spec.check_world(demonstrations.spec)
    return demonstrations


def observations(demonstrations: Demonstrations, chosen: NDArray[np.int64]) -> Iterator[tuple[int, Observation]]:
    """Chosen frames as a policy sees them.

    Args:
        demonstrations: Where from.
        chosen: Indices of frames, rising.

    Yields:
        Index, observation.

    Raises:
        DatasetError: A file is damaged, or the cameras' videos are not in one order.
    """
    columns = demonstrations.columns()
    wanted = set(chosen.tolist())
    episodes = set(columns["episode_index"][chosen].tolist())
    cameras = list(demonstrations.spec.cameras)
    for views in zip(*(demonstrations.frames(camera, episodes) for camera in cameras), strict=True):
        if len({view[:2] for view in views}) > 1:
            raise DatasetError(f"{demonstrations.root}: its cameras' videos hold episodes in different orders.")
        episode, frame, _ = views[0]
        index = demonstrations.rows[episode].start + frame
        if index in wanted:
            yield (
                index,
                {
                    **{IMAGE_PREFIX + camera: view[2] for camera, view in zip(cameras, views, strict=True)},
                    STATE_KEY: columns["states"][index],
                    TASK_KEY: demonstrations.instructions[columns["task_index"][index]],
                },
            )


@dataclass(frozen=True)
class Encoded:
    """Frames, encoded; the first dimension of everything counts them.

    Attributes:
        indices: (frames,) of the dataset, rising; shifted copies have their frame's.
        inputs: The backbone's arguments, each (frames, ...).
    """

    indices: NDArray[np.int64]
    inputs: dict[str, Tensor]

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """The backbone's arguments for some rows."""
        chosen = torch.from_numpy(rows)
        return {name: value[chosen] for name, value in self.inputs.items()}

    def batches(self, size: int = BATCH) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """All frames in order, as views."""
        for start in range(0, len(self.indices), size):
            rows = slice(start, min(start + size, len(self.indices)))
            yield rows, {name: value[rows] for name, value in self.inputs.items()}


@torch.inference_mode(False)
@torch.no_grad()
def encode(
    policy: BackbonePolicy, demonstrations: Demonstrations, chosen: NDArray[np.int64], what: str, *, shifted: int = 0
) -> Encoded:
    """Encode chosen frames.

    Args:
        policy: Its encoder.
        demonstrations: Of a world that the policy fits.
        chosen: Indices of frames, rising.
        what: Names them on the progress bar.
        shifted: Copies of each frame, behind it, whose images are moved as in training; a function of frame and copy.

    Raises:
        DatasetError: A file is damaged.
        ObservationError: The frames do not fit the policy.
    """
    inputs: dict[str, Tensor] = {}
    pending: list[Observation] = []
    done = 0
    indices = np.repeat(chosen, 1 + shifted)
    resizes: Mapping[str, tuple[int, int]] = getattr(policy, "resizes", {})
    with tqdm(total=len(indices), desc=f"encoding {what}", unit="frame") as progress:

        def flush() -> None:
            nonlocal done
            encoded = policy.encode(pending)
            if not inputs:
                needed = sum(value[0].nbytes for value in encoded.values()) * len(indices)
                check_memory(needed, f"{len(indices)} encoded frames", "give fewer --frames")
            for name, value in encoded.items():
                if name not in inputs:
                    inputs[name] = value.new_empty((len(indices), *value.shape[1:]))
                inputs[name][done : done + len(pending)] = value
            done += len(pending)
            progress.update(len(pending))
            pending.clear()

        for index, observation in observations(demonstrations, chosen):
            if index != indices[done + len(pending)]:
                raise DatasetError(f"{demonstrations.root}: frame {index} comes out of order in its videos.")
            pending.append(observation)
            pending.extend(
                _shift(observation, resizes, np.random.default_rng([index, copy])) for copy in range(shifted)
            )
            if len(pending) >= BATCH:
                flush()
        if pending:
            flush()
    return Encoded(indices, inputs)


def _shift(observation: Observation, resizes: Mapping[str, tuple[int, int]], rng: np.random.Generator) -> Observation:
    """Each camera's image moved by up to SHIFT of the pixels that the policy sees; its edges are repeated."""
    moved = dict(observation)
    for key, image in observation.items():
        if key.startswith(IMAGE_PREFIX):
            seen = resizes.get(key.removeprefix(IMAGE_PREFIX), image.shape[:2])
            shift = round(SHIFT * image.shape[0] / seen[0])
            down, right = rng.integers(-shift, shift + 1, 2)
            rows = np.clip(np.arange(image.shape[0]) + down, 0, image.shape[0] - 1)
            columns = np.clip(np.arange(image.shape[1]) + right, 0, image.shape[1] - 1)
            moved[key] = image[rows[:, None], columns]
    return moved


def choose_frames(demonstrations: Demonstrations, count: int, split: Split, *, held_out: bool) -> NDArray[np.int64]:
    """So many frames, or all, evenly spread over the episodes that are, or are not, held out.

    Raises:
        ConfigError: Less than one.
        DatasetError: There is none.
    """
    if count < 1:
        raise ConfigError(f"frames: {count} must be at least 1.")
    kept = [row for index, row in enumerate(demonstrations.rows) if split.is_held_out(index) == held_out]
    frames = np.concatenate([np.arange(row.start, row.start + row.length) for row in kept] or [np.empty(0, np.int64)])
    if not len(frames):
        raise DatasetError(f"{demonstrations.root}: {split.explain(len(demonstrations.rows))}.")
    return np.asarray(frames[evenly(len(frames), count)], np.int64)


def evenly(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` indices of a sequence, evenly spread, rising."""
    return np.arange(min(length, count)) * length // max(1, min(length, count))
