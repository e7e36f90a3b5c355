"""Processes that train one model together, started by `accelerate launch` or `torchrun`, and what they exchange.

Each of them holds all weights and works on its share of every batch. Nothing here starts a process. Accelerate is
imported only where several processes were started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.extras import needs_extra

with needs_extra("policy"):
    import torch
    from torch import Tensor

T = TypeVar("T")

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers say how many processes they started."""
TIMEOUT = timedelta(hours=3)
"""Longest time for which a process waits for another one; one that ended is noticed at once."""


class Processes:
    """A process that trains alone: what it exchanges is its own.

    Attributes:
        rank: The number of this process, from 0.
        count: The number of processes.
        local_count: The number of processes on this machine, which share its memory and cores.
    """

    rank = 0
    count = 1
    local_count = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this process's share of the rows of a batch."""
        size = len(rows) // self.count
        return rows[self.rank * size : (self.rank + 1) * size]

    def own_device(self, device: str | None) -> str | None:
        """Return the device of this process, where the same one was asked for in all of them."""
        return device

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace the values of float32 tensors by their means over the processes."""

    def gathered(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the batch."""
        return values

    def is_any(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        return flag

    def from_main(self, value: T) -> T:
        """Return the main process's value."""
        return value

    def wait(self) -> None:
        """Wait until all processes are here."""


class LaunchedProcesses(Processes):
    """One of several processes.

    Args:
        device: The device that was asked for; on "cpu", they exchange by gloo, also where there are GPUs.

    Raises:
        MissingExtraError: Accelerate is not installed.
    """

    def __init__(self, device: str | None) -> None:
        with needs_extra("train"):
            from accelerate import Accelerator, InitProcessGroupKwargs
        self._accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def own_device(self, device: str | None) -> str | None:
        """Return the device of this process: of several GPUs, the one with its number on this machine."""
        return f"cuda:{self._accelerator.local_process_index}" if device == "cuda" else device

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace the values of float32 tensors by their means over the processes, in one exchange."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _ended_together():
            mean = self._accelerator.reduce(flat.to(self._accelerator.device), "mean")
        parts = mean.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def gathered(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the batch."""
        with _ended_together():
            rows: Tensor = self._accelerator.gather(values.contiguous().to(self._accelerator.device))
        return rows.to(values.device)

    def is_any(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        return bool(self.gathered(torch.tensor([flag])).any())

    def from_main(self, value: T) -> T:
        """Return the main process's value, which can be pickled."""
        from accelerate.utils import broadcast_object_list

        values = [value]
        with _ended_together():
            broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        with _ended_together():
            self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the others, which may go on."""
        self._accelerator.end_training()


@contextmanager
def launched_processes(device: str | None) -> Iterator[Processes]:
    """Join the processes that were launched together with this one; one that was launched alone stays alone.

    Args:
        device: The device that was asked for.

    Raises:
        ConfigError: Several processes were asked for, and one was started.
        MissingExtraError: Accelerate is not installed.
    """
    if max(int(os.environ.get(name) or 1) for name in SIZES) < 2:
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
            raise ConfigError(
                "num_processes: accelerate launch --cpu starts several processes through MPI alone, and has started "
                "one; give --multi_gpu in place of --cpu, which also starts them where there is no GPU."
            )
        yield Processes()
        return
    processes = LaunchedProcesses(device)
    yield processes
    processes.end()


@contextmanager
def _ended_together() -> Iterator[None]:
    """Turn the failure of an exchange, in which another process was missing, into one line."""
    try:
        yield
    except RuntimeError as error:
        hours = round(TIMEOUT.total_seconds() / 3600)
        raise DyslError(
            f"another process of this run has ended, or has not answered for {hours} hours, so this one ends as well; "
            f"what the other one printed says why, and the same command goes on from the last state ({error})."
        ) from error
