"""Encoded frames in two forms: kept in memory, or read and encoded again whenever they are needed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data.random_access import FrameSource
from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import SkippablePolicy
from dysl_vla.types import Observation
from dysl_vla.workers import begin_worker

with needs_extra("policy"):
    import torch
    from torch.utils.data import DataLoader

BATCH = 32
READERS = 4
"""Largest number of processes that read ahead."""
BATCHES_AHEAD = 2
"""Number of batches that each of them has ready."""


class Encoded(ABC):
    """Frames as a policy's decoder reads them.

    Attributes:
        indices: The frames' indices in the dataset, (frames,), rising; a copy has its frame's.
    """

    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @abstractmethod
    def rows(self, rows: NDArray[np.int64]) -> list[Any]:
        """Return the items of some rows."""

    @abstractmethod
    def ahead(self, batches: Iterable[NDArray[np.int64]]) -> Generator[list[Any]]:
        """Yield the items of one batch of rows after the other; coming ones are read in the meantime.

        Close the iterator to end it early.
        """

    def batches(self, size: int = BATCH) -> Iterator[tuple[slice, list[Any]]]:
        """Yield all items in order, in batches, with their rows."""
        parts = [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        yield from zip(parts, self.ahead(np.arange(part.start, part.stop) for part in parts), strict=True)


class KeptFrames(Encoded):
    """Frames that were encoded once, and are kept.

    Args:
        indices: See `Encoded`.
        items: What the policy's `encode` returned for each.
    """

    def __init__(self, indices: NDArray[np.int64], items: list[Any]) -> None:
        self.indices, self._items = indices, items

    def rows(self, rows: NDArray[np.int64]) -> list[Any]:
        """Return the items of some rows."""
        return [self._items[row] for row in rows.tolist()]

    def ahead(self, batches: Iterable[NDArray[np.int64]]) -> Generator[list[Any]]:
        """Yield the items of one batch of rows after the other."""
        for rows in batches:
            yield self.rows(rows)


class StreamedFrames(Encoded):
    """Frames that are read by other processes, ahead of use, and encoded here for each batch.

    An item is the same in every batch, but for rounding where the policy's arithmetic depends on a batch's size.

    Args:
        policy: The policy, which has no memory.
        source: What reads the frames.
        sharers: Number of processes on this machine that each have readers of their own.
    """

    def __init__(self, policy: SkippablePolicy, source: FrameSource, sharers: int = 1) -> None:
        self.indices, self._policy, self._source = source.indices, policy, source
        self._readers = max(1, min(READERS, len(os.sched_getaffinity(0)) // sharers))

    def rows(self, rows: NDArray[np.int64]) -> list[Any]:
        """Read and encode some rows."""
        return self._encoded(self._source.read(rows.tolist()))

    def ahead(self, batches: Iterable[NDArray[np.int64]]) -> Generator[list[Any]]:
        """Yield the items of one batch of rows after the other; see `Encoded.ahead`.

        Raises:
            DatasetError: A file is damaged.
            ConfigError: A process that reads was killed.
        """
        loader: DataLoader[Any] = DataLoader(
            self._source,  # type: ignore[arg-type] # it has the methods of a dataset
            batch_sampler=(rows.tolist() for rows in batches),  # read once
            num_workers=self._readers,
            prefetch_factor=BATCHES_AHEAD,
            collate_fn=_as_is,
            worker_init_fn=_begin_reader,
            multiprocessing_context="spawn",
        )
        with killed_readers():
            for read in loader:
                if isinstance(read, DyslError):
                    raise read
                yield self._encoded(read)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encoded(self, observations: list[Observation]) -> list[Any]:
        return self._policy.encode(observations, [self._policy.reset() for _ in observations])


def _as_is(batch: Any) -> Any:
    return batch


def _begin_reader(number: int) -> None:
    begin_worker()


@contextmanager
def killed_readers() -> Iterator[None]:
    """Turn the end of a process that reads, which PyTorch raises wherever the main thread is, into one line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError(
            f"memory: a process that reads frames was killed ({error}), as happens where memory is short; give a "
            "smaller --batch, or free some."
        ) from error
