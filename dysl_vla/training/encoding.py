"""Demonstrations as a policy's backbone reads them, and what the full model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import check_memory
from dysl_vla.policies import BackbonePolicy
from dysl_vla.types import IMAGE_PREFIX, Observation

with needs_extra("policy"):
    import torch
    from torch import Tensor

    from dysl_vla.training.behaviour_cloning import SHIFT

BATCH = 32


@dataclass(frozen=True)
class Encoded:
    """Frames, encoded; the first dimension of everything counts them.

    Attributes:
        indices: (frames,) of the dataset, rising; augment_copies copies have their frame's.
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
    policy: BackbonePolicy,
    demonstrations: Demonstrations,
    chosen: NDArray[np.int64],
    what: str,
    *,
    augment_copies: int = 0,
) -> Encoded:
    """Encode chosen frames.

    Args:
        policy: Its encoder.
        demonstrations: Of a world that the policy fits.
        chosen: Indices of frames, rising.
        what: Names them on the progress bar.
        augment_copies: Copies of each frame, behind it, whose images are moved as in training; a function of frame and
            copy.

    Raises:
        DatasetError: A file is damaged.
        ObservationError: The frames do not fit the policy.
    """
    inputs: dict[str, Tensor] = {}
    pending: list[Observation] = []
    done = 0
    indices = np.repeat(chosen, 1 + augment_copies)
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
                _shift(observation, resizes, np.random.default_rng([index, copy])) for copy in range(augment_copies)
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
