"""Scripted experts on Meta-World's privileged state: the teachers of its demonstrations.

Meta-World ships one for each task. Two of them fail in one of six episodes of the full initial distribution, for
reasons that a few lines fix; those two are written anew here. They are not for evaluation: an expert sees what no
camera shows.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dysl_vla.types import FloatArray

GRIPPED_OPENING = 0.45


class MetaWorldExpert(Protocol):
    """The interface of Meta-World's scripted policies."""

    def get_action(self, obs: NDArray[np.float64]) -> FloatArray:
        """Map the full state, (39,), to an action, (4,), which may exceed the action space."""


class DoorOpenExpert:
    """Hook the fingers behind the door's handle, then pull.

    Meta-World's own descends as soon as it is within 12 cm of the handle, and for near doors lands on its wrong side.
    """

    def get_action(self, obs: NDArray[np.float64]) -> FloatArray:
        """See `MetaWorldExpert`."""
        hand, handle = obs[:3], obs[4:7]
        hook = handle + np.array([0.01, 0.02, 0.0])
        away = np.linalg.norm(hand[:2] - hook[:2])
        if hand[2] > handle[2] + 0.04:
            target = hook if away < 0.03 else hook + np.array([0.0, 0.0, 0.13])
        elif hand[0] < handle[0] - 0.06 or away > 0.12:
            target = np.array([hand[0], hand[1], handle[2] + 0.13])
        else:
            target = handle - np.array([0.05, 0.0, 0.0])
        return _towards(hand, target, gain=25.0, gripper=1.0)


class PegInsertSideExpert:
    """Grasp the peg, lift it in front of the hole, push it in.

    Meta-World's own takes a peg that slipped 2.5 cm in its fingers for one that it does not hold, and presses it down.
    """

    def get_action(self, obs: NDArray[np.float64]) -> FloatArray:
        """See `MetaWorldExpert`."""
        hand, opening, peg, goal = obs[:3], obs[3], obs[4:7], obs[-3:]
        hole = np.array([-0.35, goal[1], 0.16])
        over_peg = np.linalg.norm(hand[:2] - peg[:2]) <= 0.04
        gripped = over_peg and opening < GRIPPED_OPENING and hand[2] - peg[2] < 0.06
        if not over_peg:
            target = peg + np.array([0.0, 0.0, 0.3])
        elif not gripped and abs(hand[2] - peg[2]) > 0.025:
            target = peg
        elif np.linalg.norm(peg[1:] - hole[1:]) > 0.03:
            target = hole + np.array([0.4, 0.0, 0.0])
        else:
            target = hole
        closing = over_peg and abs(hand[2] - peg[2]) <= 0.15
        return _towards(hand, target, gain=25.0, gripper=0.6 if closing else -1.0)


def make_metaworld_expert(task: str) -> MetaWorldExpert:
    """A fresh expert for one episode of a task, named without its version."""
    if task == "door-open":
        return DoorOpenExpert()
    if task == "peg-insert-side":
        return PegInsertSideExpert()
    from metaworld.policies import ENV_POLICY_MAP

    # Every second action exceeds the action space, and would warn.
    warnings.filterwarnings("ignore", message="Constant.s. may be too high", category=UserWarning)
    policy_class: Any = ENV_POLICY_MAP[f"{task}-v3"]
    expert: MetaWorldExpert = policy_class()
    return expert


def _towards(hand: NDArray[np.float64], target: NDArray[np.float64], *, gain: float, gripper: float) -> FloatArray:
    return np.array([*(gain * (target - hand)), gripper], np.float32)
