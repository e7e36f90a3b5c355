from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.deploy.chunks import Plan
from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.errors import ConfigError, DyslError, ObservationError, RobotFault, SafetyStop
from dysl_vla.types import ActionChunk
from tests.deploy.stand_ins import RATE, WORLD, Counting, FakeRobot


def loop(policy: Any, robot: Any, config: LoopConfig | None = None, **options: Any) -> ControlLoop:
    config = config or LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    return ControlLoop(policy, robot, RATE, options.pop("limits", Limits()), config, **options)


def test_each_action_is_the_one_that_was_predicted_for_its_time() -> None:
    robot = FakeRobot()
    stats = loop(Counting(), robot).run(0.5)
    assert stats.cycles == stats.on_time + stats.late + stats.missed == 50
    assert robot.calls == ["connect", "stop"]
    right = 0
    for sent_at, action in robot.sent:
        timestamp = robot.start + round(float(action[0]) * 1000) / RATE
        right += abs((sent_at - timestamp) * RATE - (float(action[1]) * 100 + 0.5)) < 0.6
    assert right > 0.7 * len(robot.sent)
    times = np.array([sent_at for sent_at, _ in robot.sent])
    assert abs(np.median(np.diff(times)) - 1 / RATE) < 0.003


def test_a_slow_inference_does_not_slow_the_actions_and_nothing_old_is_sent() -> None:
    robot = FakeRobot()
    policy = Counting([0.0] * 5 + [0.15])
    config = LoopConfig("continue", blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    stats = loop(policy, robot, config).run(0.5)
    assert max(stats.age_ms) <= 60
    assert stats.missed >= 8
    assert len(robot.sent) >= 40  # holding is sending, too
    assert any(action[2] == 0.5 for _, action in robot.sent)


@pytest.mark.parametrize("on_miss", ["hold", "continue", "stop"])
def test_a_missed_deadline_follows_what_was_declared(on_miss: Any, tmp_path: Path) -> None:
    robot = FakeRobot()
    config = LoopConfig(on_miss, stop_after=1000, blend_steps=0, warm_up=2, max_age_s=0.08)
    running = loop(Counting([0.0] * 5 + [0.1]), robot, config, log=tmp_path / "log")
    if on_miss == "stop":
        with pytest.raises(SafetyStop, match="deadline"):
            running.run(0.5)
    else:
        running.run(0.5)
    lines = [json.loads(line) for line in (tmp_path / "log" / "cycles.jsonl").read_text().splitlines()]
    missed = [line for line in lines if line["status"] == "missed"]
    assert missed
    if on_miss == "continue":
        assert any(line.get("sent") == "action" and line["index"] > 2 for line in missed)
    elif on_miss == "hold":
        assert not any(line.get("sent") == "action" for line in missed)
    else:
        assert len(missed) == 1
    stats = json.loads((tmp_path / "log" / "stats.json").read_text())
    assert stats["cycles"] == len(lines)
    assert stats["missed"] == len(missed)
    assert robot.calls == ["connect", "stop"]


def test_misses_in_a_row_stop_the_robot() -> None:
    robot = FakeRobot()
    with pytest.raises(SafetyStop, match="5 cycles in a row"):
        loop(
            Counting([0.0] * 5 + [1.0]), robot, LoopConfig(stop_after=5, blend_steps=0, warm_up=2, max_age_s=0.06)
        ).run(5)
    assert robot.calls == ["connect", "stop"]
    assert len(robot.sent) < 100


def test_guidance_gets_what_was_sent_before_the_observation_and_the_deadline() -> None:
    robot, policy = FakeRobot(), Counting()
    loop(policy, robot).run(0.3)
    executed, needed_at = policy.states[-1]
    timestamp = robot.observed_at[-1]
    assert needed_at is not None
    assert timestamp < needed_at < timestamp + 0.05  # the chunk before has actions for three cycles
    before = [action for sent_at, action in robot.sent if sent_at < timestamp]
    np.testing.assert_array_equal(executed[-3:], before[-3:])


class Failing(Counting):
    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self._error, self._after = error, after

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        if len(self.states) >= self._after:
            raise self._error
        return super().infer(observations, states)


@pytest.mark.parametrize("after", [0, 1, 10])
@pytest.mark.parametrize("error", [ObservationError("broken"), ValueError("bug")])
def test_every_exception_stops_the_robot_once(error: Exception, after: int) -> None:
    robot = FakeRobot()
    with pytest.raises(DyslError, match=r"broken|ValueError: bug"):
        loop(Failing(error, after), robot).run(2)
    assert robot.calls == ["connect", "stop"]


def test_actions_that_are_not_finite_are_never_sent() -> None:
    class Nan(Counting):
        def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
            [chunk] = super().infer(observations, states)
            if len(self.states) > 10:
                chunk.actions[3, 1] = np.nan
            return [chunk]

    robot = FakeRobot()
    with pytest.raises(SafetyStop, match="not finite"):
        loop(Nan(), robot).run(2)
    assert robot.calls == ["connect", "stop"]
    assert all(np.isfinite(action).all() for _, action in robot.sent)


@pytest.mark.parametrize("seconds", [0.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_stops_the_robot_too(seconds: float) -> None:
    robot = FakeRobot()
    with pytest.raises(ConfigError, match="seconds"):
        loop(Counting(), robot).run(seconds)
    assert robot.calls == ["stop"]


def test_an_instruction_is_asked_for_where_the_robot_gives_none() -> None:
    class Mute(FakeRobot):
        def observe(self, after: float) -> TimedObservation:
            timed = super().observe(after)
            return replace(timed, observation={**timed.observation, "task": ""})

    with pytest.raises(ConfigError, match="--instruction"):
        loop(Counting(), Mute()).run(0.1)
    assert loop(Counting(), Mute(), instruction="go").run(0.1).cycles == 10


def test_the_first_command_starts_from_where_the_robot_is() -> None:
    class Standing(FakeRobot):
        def hold(self, last: Any) -> Any:
            return np.array([0.5, 0.5, 0.5], np.float32) if last is None else last

    robot = Standing()
    loop(Counting(), robot, limits=Limits(max_change=(0.1,) * 3)).run(0.05)
    assert (robot.sent[0][1] >= 0.4 - 1e-6).all()

    class Outside(FakeRobot):
        def hold(self, last: Any) -> Any:
            return np.array([1.5, 0, 0], np.float32)

    robot = Outside()
    with pytest.raises(SafetyStop, match="stands at"):
        loop(Counting(), robot).run(0.1)
    assert robot.sent == []


NAMES = ("pan.pos", "lift.pos", "gripper")
ARM = replace(WORLD, action_names=NAMES, action_low=(-100.0,) * 3, action_high=(100.0,) * 3)


class Arm(FakeRobot):
    """A robot that takes positions, and stands at -90 degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.embodiment = ARM

    def hold(self, last: Any) -> Any:
        return np.array([-90, 0, 0], np.float32) if last is None else last


class Reaching(Counting):
    """A policy that wants to be at +15 degrees."""

    def __init__(self, wanted: float = 15.0, delay: float = 0.0) -> None:
        super().__init__()
        self.spec = replace(self.spec, action_names=NAMES)
        self._wanted, self._delay = wanted, delay

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        time.sleep(self._delay)
        [chunk] = super().infer(observations, states)
        chunk.actions[:] = [self._wanted, 0, 0]
        return [chunk]


@pytest.mark.parametrize("blend_steps", [0, 2, 5])
def test_a_robot_that_stands_far_away_goes_there_at_the_allowed_speed(blend_steps: int) -> None:
    robot, lines = Arm(), []
    config = LoopConfig(blend_steps=blend_steps, warm_up=2, max_age_s=0.06, stop_after=1000)
    stats = loop(Reaching(), robot, config, limits=Limits(max_change=(3.0, 3.0, 200.0)), notify=lines.append).run(0.6)
    positions = [-90.0, *(float(action[0]) for _, action in robot.sent)]
    assert max(np.abs(np.diff(positions))) <= 3 + 1e-4
    assert positions[-1] == pytest.approx(15)
    assert stats.approaching >= 34
    assert stats.clamped == 0  # going there is no breach
    assert any("pan.pos stands at -90" in line for line in lines)
    refusing = loop(Reaching(), Arm(), config, limits=Limits("refuse", max_change=(3.0, 3.0, 200.0)))
    assert refusing.run(0.6).approaching >= 34


def test_a_far_start_is_refused_where_that_is_declared() -> None:
    robot = Arm()
    config = LoopConfig(warm_up=2, max_age_s=0.06, far_start="refuse")
    with pytest.raises(SafetyStop, match=r"far_start: pan\.pos stands at -90, the policy's first action is 15"):
        loop(Reaching(), robot, config).run(1)
    assert robot.sent == []
    robot = Arm()
    near = loop(Reaching(-89.5), robot, config)
    assert near.run(0.1).approaching == 0
    assert robot.sent[-1][1][0] == -89.5


def test_a_robot_of_positions_must_tell_where_it_holds() -> None:
    class Silent(Arm):
        def hold(self, last: Any) -> Any:
            return last

    robot = Silent()
    with pytest.raises(SafetyStop, match=r"does not tell where it holds"):
        loop(Reaching(), robot).run(0.1)
    assert robot.sent == []


@pytest.mark.parametrize("blend_steps", [1, 2, 4])
def test_the_first_plan_is_blended_with_the_held_position(blend_steps: int) -> None:
    robot = Arm()
    config = LoopConfig(blend_steps=blend_steps, warm_up=2, max_age_s=0.06)
    loop(Reaching(-60), robot, config, limits=Limits(max_change=(200.0,) * 3)).run(0.1)
    assert robot.sent[0][1][0] == pytest.approx(-90 + 30 / (blend_steps + 1), abs=1e-3)


@pytest.mark.parametrize(
    ("delay", "config", "words"),
    [
        (0.05, {}, r"at most --rate 2\d(\.\d)? would work"),  # three periods of 10 ms last 30, and 100 are needed
        (0.05, {"rate_hz": 10.0, "max_age_s": 0.1001}, r"with --max-age-s 0\.1\d it would work"),
    ],
)
def test_a_policy_that_is_too_slow_is_refused_before_anything_moves(
    delay: float, config: dict[str, float], words: str
) -> None:
    robot = Arm()
    rate = config.pop("rate_hz", RATE)
    running = ControlLoop(
        Reaching(delay=delay), robot, rate, Limits(), LoopConfig(warm_up=2, **{"max_age_s": 0.2, **config})
    )
    with pytest.raises(ConfigError, match=words) as caught:
        running.run(1)
    assert "Nothing was moved" in str(caught.value)
    assert "dysl export" in str(caught.value)
    assert robot.sent == []
    assert robot.calls == ["connect", "stop"]


def test_a_policy_that_is_slow_but_fast_enough_observes_earlier_and_misses_nothing() -> None:
    """Its inference takes longer than a period and a half, but a chunk's eight executed actions last long enough."""
    robot = Arm()
    policy = Reaching(-90, delay=0.03)
    policy.spec = replace(policy.spec, chunk_length=16, execute_steps=8)
    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.2, stop_after=1000)
    stats = loop(policy, robot, config).run(1.0)
    assert stats.missed < 8  # observing when the executed part ends would miss about 15
    assert stats.cycles == 100


def test_a_robot_that_cannot_be_connected_is_stopped_all_the_same() -> None:
    class Dead(FakeRobot):
        def connect(self, rate_hz: float) -> None:
            raise RobotFault("robot: no power")

    robot = Dead()
    with pytest.raises(RobotFault, match="no power"):
        loop(Counting(), robot).run(1)
    assert robot.calls == ["stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_robot_once_and_keep_the_log(number: signal.Signals, tmp_path: Path) -> None:
    class Asking(FakeRobot):
        def act(self, action: Any) -> None:
            super().act(action)
            if len(self.sent) == 10:
                os.kill(os.getpid(), number)

    robot = Asking()
    before = signal.getsignal(number)
    stats = loop(Counting(), robot, log=tmp_path / "log").run(5)
    assert stats.stopped == number.name
    assert stats.cycles < 100
    assert robot.calls == ["connect", "stop"]
    assert json.loads((tmp_path / "log" / "stats.json").read_text())["stopped"] == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"robot": {"rate_hz": 30.0}}, "rate_hz"),
        ({"robot": {"action_names": ("a", "b", "c")}}, "action_names"),
        ({"robot": {"cameras": {"top": (32, 32)}}}, "wrist"),
        ({"limits": Limits(low=(0.0,))}, "low"),
        ({"config": LoopConfig(max_age_s=0.001)}, "max_age_s"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_connected(change: dict[str, Any], words: str) -> None:
    robot = FakeRobot()
    robot.embodiment = replace(WORLD, **change.pop("robot", {}))
    with pytest.raises(ConfigError, match=words):
        loop(Counting(), robot, **change)
    assert robot.calls == []


def test_loop_values_that_cannot_work_are_refused() -> None:
    for values in (
        {"on_miss": "x"},
        {"stop_after": 0},
        {"blend_steps": -1},
        {"max_age_s": float("nan")},
        {"frozen_s": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(values))):
            LoopConfig(**values)  # type: ignore[arg-type]


CHUNKS = hnp.arrays(np.float32, (8, 3), elements=st.floats(-1, 1, width=32))


@given(CHUNKS, CHUNKS, st.integers(0, 7), st.integers(0, 8), st.integers(0, 5))
def test_a_new_chunk_takes_over_without_a_jump(old: Any, new: Any, index: int, left: int, blend_steps: int) -> None:
    rest, last = old[8 - left :], old[0]
    plan = Plan(1, new, 0.0).blended(index, rest, last, blend_steps)
    steps = min(blend_steps, 8 - index)
    for step in range(steps):
        share = (step + 1) / (blend_steps + 1)
        before = rest[step] if step < left else last
        np.testing.assert_allclose(
            plan.actions[index + step], share * new[index + step] + (1 - share) * before, atol=1e-6
        )
    np.testing.assert_array_equal(plan.actions[index + steps :], new[index + steps :])
    assert (np.abs(plan.actions) <= 1 + 1e-6).all()


class Disagreeing(Counting):
    """Each chunk is at another level, but for the actions that it is told will have been sent before it is there."""

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        [chunk] = super().infer(observations, states)
        [state], level = states, len(self.states) % 2
        actions = np.full_like(chunk.actions, level)
        if state.leftover is not None:
            held = min(len(state.leftover), state.sent_before)
            actions[:held] = state.leftover[:held]
        return [replace(chunk, actions=actions)]


def jumps(log: Path, *, real_time_chunking: bool) -> float:
    """Return the share of new chunks with which the level changes."""
    robot = FakeRobot()
    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.3, stop_after=1000, real_time_chunking=real_time_chunking)
    policy = Disagreeing([0.03] * 40, chunk=16)
    policy.spec = replace(policy.spec, execute_steps=8)
    loop(policy, robot, config, log=log).run(1.0)
    lines = [json.loads(line) for line in (log / "cycles.jsonl").read_text().splitlines()]
    sent = [line for line in lines if line.get("sent")]
    levels = [round(float(action[0])) for _, action in robot.sent]
    assert len(sent) == len(levels)
    changes = [
        levels[cycle] != levels[cycle - 1]
        for cycle in range(1, len(sent))
        if sent[cycle].get("chunk") != sent[cycle - 1].get("chunk") and sent[cycle - 1].get("sent") == "action"
    ]
    assert len(changes) >= 5
    return float(np.mean(changes))


def test_with_real_time_chunking_a_chunk_begins_as_the_one_before_goes_on(tmp_path: Path) -> None:
    """Without it, the arm jumps to the other level whenever another chunk takes over."""
    without = jumps(tmp_path / "without", real_time_chunking=False)
    assert without > 0.6
    assert jumps(tmp_path / "with", real_time_chunking=True) < without - 0.3
