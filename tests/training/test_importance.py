"""The importance measure that heads are trained for tells moments apart, or is replaced, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.training.importance import choose_importance
from dysl_vla.types import Normalisation, PolicySpec


def recorded(*columns: float | np.ndarray, names: tuple[str, ...]) -> tuple[Any, PolicySpec]:
    """Two episodes of forty frames, and a policy of the same actions."""
    actions = np.stack([np.broadcast_to(np.asarray(column, np.float32), 80) for column in columns], axis=1)
    rows = [SimpleNamespace(start=0, length=40), SimpleNamespace(start=40, length=40)]
    std = tuple(float(s) if s > 1e-4 else 1.0 for s in actions.std(axis=0))
    spec = PolicySpec(
        cameras={},
        state_names=(),
        action_names=names,
        rate_hz=30.0,
        chunk_length=4,
        execute_steps=2,
        state_normalisation=Normalisation((), ()),
        action_normalisation=Normalisation(tuple(map(float, actions.mean(axis=0))), std),
    )
    return SimpleNamespace(rows=rows, root="data", columns=lambda: {"actions": actions}), spec


MOVING = np.cumsum(np.random.default_rng(0).normal(size=80))
GRASPING = np.repeat([0.0, 1.0, 1.0, 0.0], 20)


def test_a_gripper_that_moves_is_what_is_looked_at() -> None:
    assert choose_importance(None, *recorded(MOVING, GRASPING, names=("pan.pos", "gripper.pos"))) == "gripper"
    assert choose_importance("continuity", *recorded(MOVING, GRASPING, names=("pan.pos", "gripper"))) == "continuity"


def test_a_gripper_that_never_moves_is_replaced_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_importance(None, *recorded(MOVING, 0.7, names=("pan.pos", "gripper.pos"))) == "continuity"
    assert "gripper never moves" in capsys.readouterr().err
    assert choose_importance(None, *recorded(MOVING, names=("pan.pos",))) == "continuity"


@pytest.mark.parametrize(
    ("asked", "columns", "names", "message"),
    [
        ("gripper", (MOVING, 0.7), ("pan.pos", "gripper.pos"), "'gripper' is the same at every demonstrated moment"),
        ("gripper", (MOVING,), ("pan.pos",), "none of the actions is a gripper's: pan.pos"),
        ("touch", (MOVING,), ("pan.pos",), "unknown importance measure 'touch'"),
        (None, (0.5, 0.7), ("pan.pos", "gripper.pos"), "never change"),
    ],
)
def test_a_measure_that_says_nothing_is_refused(
    asked: str | None, columns: tuple[Any, ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_importance(asked, *recorded(*columns, names=names))
