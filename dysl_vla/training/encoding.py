"""Demonstrations as a policy's decoder reads them: each frame is encoded once, and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import check_memory
from dysl_vla.policies import SkippablePolicy
from dysl_vla.types import IMAGE_PREFIX, EpisodeState, Observation

with needs_extra("policy"):
    import torch
    from torch import Tensor

    from dysl_vla.skip_controller.torch_backend import Forward, to_numpy
    from dysl_vla.training.behaviour_cloning import SHIFT

BATCH = 32


@dataclass(frozen=True)
class Encoded:
    """Frames, encoded.

    Attributes:
        indices: The frames' indices in the dataset, (frames,), rising; a copy has its frame's.
        items: What the policy's `encode` returned for each.
    """

    indices: NDArray[np.int64]
    items: list[Any]

    def rows(self, rows: NDArray[np.int64]) -> list[Any]:
        """Return the items of some rows."""
        return [self.items[row] for row in rows.tolist()]

    def batches(self, size: int = BATCH) -> Iterator[tuple[slice, list[Any]]]:
        """Yield all items in order, in batches, with their rows."""
        for start in range(0, len(self.items), size):
            rows = slice(start, min(start + size, len(self.items)))
            yield rows, self.items[rows]


@torch.inference_mode(False)
@torch.no_grad()
def encode(
    policy: SkippablePolicy,
    demonstrations: Demonstrations,
    chosen: NDArray[np.int64],
    what: str,
    *,
    augment_copies: int = 0,
) -> Encoded:
    """Encode chosen frames.

    A policy with memory gets its state by acting on the demonstration from its beginning, at the moments at which it
    would infer; in place of each chosen frame, the latest of these moments is taken then.

    Args:
        policy: The policy that encodes them.
        demonstrations: Demonstrations of an embodiment that the policy fits.
        chosen: Indices of frames, rising.
        what: Name of the frames on the progress bar.
        augment_copies: Number of copies of each frame, behind it, whose images are moved as in training; how far is a
            function of frame and copy.

    Raises:
        DatasetError: A file is damaged.
        ObservationError: The frames do not fit the policy.
    """
    resizes: Mapping[str, tuple[int, int]] = getattr(policy, "resizes", {})
    if policy.has_memory:
        chosen = _moments(demonstrations, chosen, policy.spec.execute_steps)
    total = len(chosen) * (1 + augment_copies)
    items: list[Any] = []
    indices: list[int] = []
    with tqdm(total=total, desc=f"encoding {what}", unit="frame") as progress:
        for index, some in _encoded(policy, demonstrations, chosen, resizes, augment_copies):
            if not items:
                check_memory(
                    sum(map(_bytes, some)) // len(some) * total, f"{total} encoded frames", "give fewer --frames"
                )
            indices += index
            items += some
            progress.update(len(some))
    return Encoded(np.array(indices, np.int64), items)


def _encoded(
    policy: SkippablePolicy,
    demonstrations: Demonstrations,
    chosen: NDArray[np.int64],
    resizes: Mapping[str, tuple[int, int]],
    copies: int,
) -> Iterator[tuple[list[int], list[Any]]]:
    """Yield frames and their copies, some at a time, as indices and items."""
    walk = _Walk(policy, demonstrations, chosen) if policy.has_memory else None
    pending: list[tuple[int, Observation]] = []
    read, state = 0, policy.reset()
    for index, observation in observations(demonstrations, chosen if walk is None else walk.needed):
        if walk is not None:
            state = walk.state_at(index)
        if walk is None or index in walk.chosen:
            if index != chosen[read]:
                raise DatasetError(f"{demonstrations.root} has frame {index} out of order in its videos.")
            read += 1
            pending.append((index, observation))
            pending += [
                (index, _shift(observation, resizes, np.random.default_rng([index, copy]))) for copy in range(copies)
            ]
        if pending and (walk is not None or len(pending) >= BATCH):
            yield _flushed(policy, pending, state)
        if walk is not None:
            walk.act(observation, state)
    if pending:
        yield _flushed(policy, pending, state)


def _flushed(
    policy: SkippablePolicy, pending: list[tuple[int, Observation]], state: EpisodeState
) -> tuple[list[int], list[Any]]:
    indices, seen = [index for index, _ in pending], [observation for _, observation in pending]
    pending.clear()
    return indices, policy.encode(seen, [state] * len(seen))


class _Walk:
    """A policy with memory that acts through demonstrations."""

    def __init__(self, policy: SkippablePolicy, demonstrations: Demonstrations, chosen: NDArray[np.int64]) -> None:
        self._policy = policy
        self._starts = {row.start for row in demonstrations.rows}
        self._state = policy.reset()
        self.chosen = set(chosen.tolist())
        self.needed = _moments_before(demonstrations, chosen, policy.spec.execute_steps)

    def state_at(self, index: int) -> EpisodeState:
        """Return the episode's state at a moment that follows the last one."""
        if index in self._starts:
            self._state = self._policy.reset()
        return self._state

    def act(self, observation: Observation, state: EpisodeState) -> None:
        """Let the full model act at a moment."""
        spec = self._policy.spec
        inputs, _ = self._policy.collate(self._policy.encode([observation], [state]))
        actions = to_numpy(self._policy.act(inputs, Forward()))[0]
        self._policy.remember(inputs, {0: state})
        state.executed.extend(spec.action_normalisation.undo(actions[: spec.execute_steps]))


def _moments(demonstrations: Demonstrations, chosen: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return the moments at which a policy would infer, at or before chosen frames."""
    moments = [
        row.start + (frame - row.start) // steps * steps
        for row in demonstrations.rows
        for frame in chosen[(chosen >= row.start) & (chosen < row.start + row.length)].tolist()
    ]
    return np.unique(np.array(moments, np.int64))


def _moments_before(demonstrations: Demonstrations, chosen: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return all moments of the chosen frames' episodes, up to the last chosen one of each."""
    needed: list[int] = []
    for row in demonstrations.rows:
        here = chosen[(chosen >= row.start) & (chosen < row.start + row.length)]
        if len(here):
            needed += range(row.start, int(here[-1]) + 1, steps)
    return np.array(needed, np.int64)


def _bytes(value: Any) -> int:
    """Count the bytes of the tensors in an item."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        value = vars(value).values() if hasattr(value, "__dict__") else ()
    return sum(map(_bytes, value))


def _shift(observation: Observation, resizes: Mapping[str, tuple[int, int]], rng: np.random.Generator) -> Observation:
    """Move each camera's image by up to SHIFT of the pixels that the policy gets; its edges are repeated."""
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
