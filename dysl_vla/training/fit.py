"""Heads that begin where a pass over some frames puts them; see `skip_controller.closed_form`."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy
from dysl_vla.policies.compute import free_memory

with needs_extra("policy"):
    import torch

    from dysl_vla.processes import Processes
    from dysl_vla.skip_controller.closed_form import fit_adapters
    from dysl_vla.skip_controller.compatibility import run_device
    from dysl_vla.skip_controller.skipping import Skipper
    from dysl_vla.training.encoded import BATCH, Encoded


def fit_heads(policy: SkippablePolicy, skipper: Skipper, frames: Encoded, count: int, processes: Processes) -> None:
    """Set the adapters of an attached policy to their best linear maps.

    One process does it for all: another machine's rounding may give other factors of the same map.

    Args:
        policy: The policy.
        skipper: Its layers, attached with heads.
        frames: Encoded frames.
        count: Number of frames that are used, evenly spread.
        processes: The processes that train the heads.

    Raises:
        ConfigError: The policy's `act` ran no layer, or memory is too short.
    """
    heads = skipper.heads
    assert heads is not None
    if processes.is_main:
        needed = 16 * (policy.width + 1) ** 2 * len(heads.adapters)  # two sums in double precision for each exit
        free = free_memory(run_device(policy.layers, "0") or torch.device("cpu"), processes.local_count)
        if free is not None and needed > free:
            raise ConfigError(
                f"fit_frames must be left out: its sums need {needed / 1e9:.1f} GB of memory, there are "
                f"{free / 1e9:.1f}; or take a plan with fewer exits."
            )
        rows = np.unique(np.linspace(0, len(frames) - 1, count).astype(np.int64))
        with closing(frames.ahead(np.array_split(rows, max(1, len(rows) // BATCH)))) as parts:
            fit_adapters(skipper, policy.act, map(policy.collate, parts))
    heads.load_state_dict(processes.from_main({name: value.cpu() for name, value in heads.state_dict().items()}))
