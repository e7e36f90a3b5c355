"""Demonstrations as a policy's decoder reads them: encoded once and kept, or, where memory is short, streamed."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.augment import Copies
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.random_access import FrameSource
from dysl_vla.data.selection import observations
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy
from dysl_vla.policies.compute import free_memory
from dysl_vla.types import EpisodeState, Observation

with needs_extra("policy"):
    import torch
    from torch import Tensor

    from dysl_vla.processes import Processes
    from dysl_vla.skip_controller.torch_backend import Forward, to_numpy
    from dysl_vla.training.encoded import BATCH, Encoded, KeptFrames, StreamedFrames

NONE = Copies()
MEMORY_SHARE = 0.8
"""Share of the free memory that encoded frames may take before they are streamed; the rest is for the training."""


@torch.inference_mode(False)
@torch.no_grad()
def encode(
    policy: SkippablePolicy,
    demonstrations: Demonstrations,
    chosen: NDArray[np.int64],
    what: str,
    *,
    copies: Copies = NONE,
    stream: bool | None = None,
    reserve: int = 0,
    processes: Processes | None = None,
) -> Encoded:
    """Encode chosen frames, and keep them where they fit into memory.

    A policy with memory gets its state by acting on the demonstration from its beginning, at the moments at which it
    would infer; in place of each chosen frame, the latest of these moments is taken then.

    Args:
        policy: The policy that encodes them.
        demonstrations: Demonstrations of an embodiment that the policy fits.
        chosen: Indices of frames, rising.
        what: Name of the frames on the progress bar.
        copies: Copies of each frame, which stand behind it.
        stream: Whether frames are read and encoded when they are needed, in place of kept; None: where they do not
            fit, measured by the first of them.
        reserve: Bytes that are left free for what comes after.
        processes: Processes of which each holds all frames; None: this one alone.

    Raises:
        ConfigError: The frames shall be kept and do not fit into memory, or the policy's state needs them to be kept.
        DatasetError: A file is damaged.
        ObservationError: The frames do not fit the policy.
    """
    processes = processes or Processes()
    resizes: Mapping[str, tuple[int, int]] = getattr(policy, "resizes", {})
    if policy.has_memory:
        chosen = _moments(demonstrations, chosen, policy.spec.execute_steps)
        if stream:
            raise ConfigError(
                "stream must not be always for a policy with memory, whose frames are encoded in the order of their "
                "episodes and kept; give fewer --frames where memory is short."
            )
    total = len(chosen) * (1 + copies.count)
    bar = tqdm(total=total, desc=f"encoding {what}", unit="frame", disable=not processes.is_main or bool(stream))
    with closing(_encoded(policy, demonstrations, chosen, resizes, copies)) as batches, bar:
        kept = _kept(policy, batches, bar, stream=stream, reserve=reserve, processes=processes)
    if kept is not None:
        return kept
    source = FrameSource(demonstrations, chosen, copies, resizes)
    return StreamedFrames(policy, source, processes.local_count)


def _kept(
    policy: SkippablePolicy,
    batches: Iterator[tuple[list[int], list[Any]]],
    bar: tqdm[Any],
    *,
    stream: bool | None,
    reserve: int,
    processes: Processes,
) -> KeptFrames | None:
    """Keep all frames; None where they are to be streamed, which the first of them decide."""
    items: list[Any] = []
    indices: list[int] = []
    if stream:
        return None
    for index, some in batches:
        if not items:
            needed = tensor_bytes(some) * bar.total // len(some)
            if stream is None and not policy.has_memory:
                stream = processes.is_any(needed > memory_to_keep(some, reserve, processes))
            if stream:
                return None
            _check_fits(policy, needed, some, processes)
        indices += index
        items += some
        bar.update(len(some))
    return KeptFrames(np.array(indices, np.int64), items)


def _check_fits(policy: SkippablePolicy, needed: int, some: list[Any], processes: Processes) -> None:
    """Refuse to keep what does not fit into memory.

    Args:
        policy: The policy.
        needed: Bytes that all items take.
        some: Some of them, on the device that keeps them.
        processes: Processes of which each keeps all items.

    Raises:
        ConfigError: They do not fit.
    """
    free = free_memory(_device(some), processes.local_count)
    if free is not None and needed > free:
        fix = "give fewer --frames" if policy.has_memory else "give --stream always, or fewer --frames"
        raise ConfigError(f"memory: encoded frames need {needed / 1e9:.1f} GB, there are {free / 1e9:.1f}; {fix}.")


def memory_to_keep(value: Any, reserve: int, processes: Processes) -> float:
    """Return the bytes that may be kept on the device of the tensors in a value; infinite where it does not say.

    Args:
        value: An item or some.
        reserve: Bytes that are left free for what comes after.
        processes: Processes of which each keeps as much.
    """
    free = free_memory(_device(value), processes.local_count)
    return math.inf if free is None else MEMORY_SHARE * (free - reserve)


def _device(value: Any) -> torch.device:
    return next((tensor.device for tensor in _tensors(value)), torch.device("cpu"))


def _encoded(
    policy: SkippablePolicy,
    demonstrations: Demonstrations,
    chosen: NDArray[np.int64],
    resizes: Mapping[str, tuple[int, int]],
    copies: Copies,
) -> Generator[tuple[list[int], list[Any]]]:
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
            pending += [(index, copies.copy(observation, resizes, index, number)) for number in range(copies.count)]
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


def tensor_bytes(value: Any) -> int:
    """Count the bytes of the tensors in an item, a batch or an answer."""
    return sum(tensor.nbytes for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        value = vars(value).values() if hasattr(value, "__dict__") else ()
    for part in value:
        yield from _tensors(part)
