"""Holding a robot follows from what its actions are: positions, velocities, torques or deltas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.deploy.robot import hold_action
from dysl_vla.errors import ConfigError
from dysl_vla.types import ACTION_KINDS, RELATIVE, EmbodimentSpec, action_kinds
from tests.deploy.stand_ins import RATE, WORLD, Counting, FakeRobot

TORQUES = ("shoulder.torque", "elbow_effort", "gripper")
CONFIG = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)


def embodiment(names: tuple[str, ...], kinds: tuple[str, ...] | None = None) -> EmbodimentSpec:
    bounds = (-1.0,) * len(names), (1.0,) * len(names)
    return EmbodimentSpec({}, (), names, *bounds, 20.0, action_kinds=kinds)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("delta", RELATIVE),
        ("position", ("x", "shoulder", "shoulder.pos", "gripper", "left_gripper.pos", "level", "marvel", "current")),
        ("velocity", ("vel", "x.vel", "joint1_vel", "velocity", "base_velocity", "angular.velocity", "Theta.Vel")),
        (
            "torque",
            ("torque", "elbow.torque", "elbow_torque", "effort", "elbow_effort", "elbow.effort", "elbow.current"),
        ),
    ],
)
def test_the_name_of_an_action_tells_its_kind(kind: str, names: tuple[str, ...]) -> None:
    assert action_kinds(names) == (kind,) * len(names)
    assert embodiment(names).kinds == (kind,) * len(names)


def test_declared_kinds_decide_and_unknown_ones_are_refused() -> None:
    assert embodiment(("a", "b"), ("torque", "delta")).kinds == ("torque", "delta")
    with pytest.raises(ConfigError, match=r"action_kinds must be among position, .*got 'force' for b"):
        embodiment(("a", "b"), ("position", "force"))
    with pytest.raises(ConfigError, match=r"action_kinds must have one kind for each of the 2 actions, a, b; got 1"):
        embodiment(("a", "b"), ("position",))


@given(st.lists(st.tuples(st.sampled_from(("position", "velocity", "delta")), st.floats(-2, 2, width=32)), min_size=1))
def test_a_held_arm_stands_still_where_it_was_sent(actions: list[tuple[str, float]]) -> None:
    kinds = tuple(kind for kind, _ in actions)
    arm = embodiment(tuple(f"j{index}" for index in range(len(actions))), kinds)
    last = np.array([value for _, value in actions], np.float32)
    before = last.copy()
    held = hold_action(arm, last)
    assert held is not None
    for (kind, value), kept in zip(actions, held, strict=True):
        assert kept == (np.clip(np.float32(value), -1, 1) if kind == "position" else 0)
    np.testing.assert_array_equal(last, before)
    if "position" in kinds:
        assert hold_action(arm, None) is None
    else:
        assert hold_action(arm, None) is not None


def test_before_the_first_command_positions_are_held_where_they_are_measured() -> None:
    arm = embodiment(("j1", "wheel.vel", "gripper"))
    measured = {"j1": 2.0, "wheel.vel": 0.7, "gripper": 0.5, "j2": 9.0}
    held = hold_action(arm, None, measured)
    assert held is not None
    assert held.tolist() == [2.0, 0.0, 0.5]  # beyond the range, which the loop refuses
    for name in ("j1", "gripper"):
        assert hold_action(arm, None, {other: 0.0 for other in measured if other != name}) is None
    held = hold_action(arm, np.full(3, 0.25, np.float32), measured)
    assert held is not None
    assert held.tolist() == [0.25, 0.0, 0.25]


def test_a_velocity_whose_range_has_no_0_is_refused_and_not_held_at_its_least() -> None:
    wheels = EmbodimentSpec({}, (), ("a.vel", "b.vel"), (0.2, -1), (1, 1), 20.0)
    for last in (None, np.full(2, 0.5, np.float32)):
        with pytest.raises(ConfigError, match=r"must leave 0 for a\.vel"):
            hold_action(wheels, last)


class TorqueArm(FakeRobot):
    """Takes torques, and has no `hold` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embodiment = replace(WORLD, action_names=TORQUES)

    def hold(self, last: Any) -> Any:
        return hold_action(self.embodiment, last)


def pushing() -> Counting:
    policy = Counting()
    policy.spec = replace(policy.spec, action_names=TORQUES)
    return policy


def test_an_arm_of_torques_without_a_hold_of_its_own_is_refused_before_it_moves() -> None:
    robot = TorqueArm()
    with pytest.raises(ConfigError, match=r"shoulder\.torque, elbow_effort are torques, .*give the robot a `hold`"):
        ControlLoop(pushing(), robot, RATE, Limits(), CONFIG).run(1)
    assert robot.sent == []
    assert robot.calls == ["connect", "stop"]


@pytest.mark.parametrize("held", [None, np.zeros(3, np.float32)])
def test_an_arm_of_torques_with_a_hold_of_its_own_runs(held: Any) -> None:
    class Compensated(TorqueArm):
        def hold(self, last: Any) -> Any:
            return held

    robot = Compensated()
    assert ControlLoop(pushing(), robot, RATE, Limits(), CONFIG).run(0.1).cycles == 10
    assert robot.sent


def test_limits_go_by_the_kind_of_an_action() -> None:
    """What has no largest change of its own may change slowly, but for deltas and grippers."""
    arm = embodiment(("a", "b", "c", "d", "gripper"), (*ACTION_KINDS, "position"))
    limiter = ActionLimiter(Limits(), arm, 20.0)
    assert limiter.limits.max_change == pytest.approx((0.05, 0.05, 0.05, 2.0, 2.0))
    assert limiter.positions == [0]
    box = Limits(workspace_low=(0,) * 3, workspace_high=(1,) * 3)
    names = ("x", "y", "z")
    ActionLimiter(box, replace(embodiment(names), state_names=names), 20.0)
    with pytest.raises(ConfigError, match="positions x, y and z or deltas dx"):
        ActionLimiter(box, replace(embodiment(names, ("velocity",) * 3), state_names=names), 20.0)
