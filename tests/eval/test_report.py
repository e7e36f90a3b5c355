from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from dysl_vla.eval.report import layers_by_importance, near_gripper_events
from dysl_vla.policies.mock import MockPolicy

SPEC = MockPolicy.spec  # the gripper is the third dimension; mean 0, deviation 1


def table(*episodes: list[float], layers: list[int | None] | None = None) -> pa.Table:
    rows = [
        {"step": step, "action": [0.0, 0.0, command], "layers": None, "verified": None}
        for commands in episodes
        for step, command in enumerate(commands)
    ]
    for row, count in zip(rows, layers or [], strict=False):
        row["layers"], row["verified"] = count, None if count is None else False
    schema = pa.schema(
        [("step", pa.int32()), ("action", pa.list_(pa.float32())), ("layers", pa.int16()), ("verified", pa.bool_())]
    )
    return pa.Table.from_pylist(rows, schema)


def test_the_five_steps_around_a_closing_gripper_are_near() -> None:
    near = near_gripper_events(table([-1.0] * 6 + [1.0] * 6), SPEC)
    assert np.flatnonzero(near).tolist() == [4, 5, 6, 7, 8]


def test_noise_is_no_event_and_a_slow_closing_is_one() -> None:
    assert not near_gripper_events(table([-1.0, -0.8, -1.1, -0.7, -1.0]), SPEC).any()
    near = near_gripper_events(table([0.0] * 4 + [0.2, 0.4, 0.6] + [0.6] * 4), SPEC)
    assert np.flatnonzero(near).tolist() == [4, 5, 6, 7, 8]


def test_events_do_not_reach_into_other_episodes() -> None:
    near = near_gripper_events(table([-1.0, 1.0], [1.0] * 5, [-1.0] * 5), SPEC)
    assert np.flatnonzero(near).tolist() == [0, 1]


def test_layers_near_the_gripper_are_compared_with_free_motion() -> None:
    commands = [-1.0] * 6 + [1.0] * 6
    layers = [4, None, 4, None, 12, None, 12, None, 12, None, 4, None]
    result = layers_by_importance(table(commands, layers=layers), SPEC)
    assert result is not None
    assert (result["near_gripper"], result["free_motion"], result["ratio"]) == (12, 4, 3)
    assert result["mean"] == pytest.approx(8)
    assert result["verified"] == 0


def test_what_does_not_exist_is_none() -> None:
    assert layers_by_importance(table([0.0] * 4), SPEC) is None
    without = replace(SPEC, action_names=("dx", "dy", "dz"))
    result = layers_by_importance(table([-1.0, 1.0, 1.0], layers=[4, 4, 4]), without)
    assert result is not None
    assert result["ratio"] is None
