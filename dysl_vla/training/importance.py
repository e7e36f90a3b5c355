"""The choice of the importance measure that heads are trained for: one that varies over the demonstrated actions."""

from __future__ import annotations

import sys

import numpy as np

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.guidance import WINDOW, importance_measures
from dysl_vla.skip_controller.operating import MIN_CHANGE
from dysl_vla.types import PolicySpec, gripper_columns


def choose_importance(asked: str | None, demonstrations: Demonstrations, spec: PolicySpec) -> str:
    """Choose the importance measure of a policy.

    Args:
        asked: The measure that was asked for; None: the gripper's movement where there is a gripper that moves, else
            the continuity of the whole trajectory.
        demonstrations: The demonstrations whose actions it must tell apart.
        spec: The policy's specification.

    Returns:
        The measure's name.

    Raises:
        ConfigError: It is unknown, needs a gripper that does not exist, or is the same at every demonstrated moment.
    """
    grippers = gripper_columns(spec.action_names)
    if asked is not None:
        if asked == "gripper" and not grippers:
            raise ConfigError(
                f"importance must not be gripper: none of the actions is a gripper's: {', '.join(spec.action_names)}."
            )
        if not _varies(asked, demonstrations, spec):
            raise ConfigError(
                f"importance must vary over the demonstrations: {asked!r} is the same at every demonstrated moment; "
                "choose another --importance."
            )
        return asked
    if grippers:
        if _varies("gripper", demonstrations, spec):
            return "gripper"
        print("The gripper never moves, so importance is measured by the continuity of all motion.", file=sys.stderr)
    if not _varies("continuity", demonstrations, spec):
        raise ConfigError(f"data must have actions that change, and those in {demonstrations.root} never change.")
    return "continuity"


def _varies(name: str, demonstrations: Demonstrations, spec: PolicySpec) -> bool:
    """Tell whether a measure takes different values on the demonstrated actions, beyond what counts as noise."""
    measure = importance_measures.get(name)
    actions = spec.action_normalisation.apply(demonstrations.columns()["actions"])
    if name == "gripper":
        actions = actions[:, list(gripper_columns(spec.action_names))]
    values = [
        value
        for row in demonstrations.rows
        for start in range(row.start, row.start + row.length - WINDOW, WINDOW)
        if (value := measure(np.asarray(actions[start : start + WINDOW + 1], np.float64))) is not None
    ]
    return bool(values) and max(values) - min(values) > MIN_CHANGE
