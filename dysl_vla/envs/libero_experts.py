"""Scripted experts for LIBERO's tasks, from privileged state; see `robosuite_experts`."""

from __future__ import annotations

from typing import Any

from dysl_vla.envs.robosuite_experts import Expert


def make_expert(world: Any) -> Expert | None:
    """Return the expert of an episode that has just begun; None for a task that has none.

    Args:
        world: LIBERO's environment, whose `parsed_problem` has the goal.
    """
    return None
