"""Compares a flow policy's bundle with the policy that it was exported from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.policies import load_policy
from dysl_vla.types import TASK_KEY


def acts_as_the_policy_does(folder: Path, checkpoint: Path, data: Path) -> None:
    """Compare actions and what was skipped over an episode, at several operating points.

    Opening a bundle compares what it computes where it resumes.
    """
    seen = [dict(one) for _, one in observations(Demonstrations(data), np.arange(8))]
    for observation in seen[5:]:
        observation[TASK_KEY] = "move it"  # an instruction that the bundle does not list
    for skip in (0.0, 0.5, 1.0):
        bundle, policy = Bundle(folder, skip=skip), load_policy(str(checkpoint), skip=skip)
        states: list[Any] = [bundle.reset(), policy.reset()]
        for observation in seen:
            [mine], [wanted] = (p.infer([observation], [s]) for p, s in zip((bundle, policy), states, strict=True))
            scale = policy.spec.action_normalisation.std
            np.testing.assert_allclose(mine.actions / scale, wanted.actions / scale, atol=1e-4)
            if mine.skips is not None and wanted.skips is not None:
                np.testing.assert_array_equal(mine.skips.layers_run, wanted.skips.layers_run)
                assert mine.skips.skips == wanted.skips.skips
                assert mine.skips.is_verified == wanted.skips.is_verified
                assert mine.skips.outputs.keys() == wanted.skips.outputs.keys()
            for state in states:
                state.executed.append(wanted.actions[0])
                state.leftover, state.sent_before = wanted.actions[1:], 1
