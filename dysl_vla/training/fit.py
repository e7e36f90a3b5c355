"""Heads that begin where a pass over some frames puts them; see `skip_controller.closed_form`."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy

with needs_extra("policy"):
    from dysl_vla.processes import Processes
    from dysl_vla.skip_controller.closed_form import fit_adapters
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
        ConfigError: The policy's `act` ran no layer.
    """
    heads = skipper.heads
    assert heads is not None
    if processes.is_main:
        rows = np.unique(np.linspace(0, len(frames) - 1, count).astype(np.int64))
        with closing(frames.ahead(np.array_split(rows, max(1, len(rows) // BATCH)))) as parts:
            fit_adapters(skipper, policy.act, map(policy.collate, parts))
    heads.load_state_dict(processes.from_main({name: value.cpu() for name, value in heads.state_dict().items()}))
