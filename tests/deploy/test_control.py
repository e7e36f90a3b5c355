from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.deploy.chunks import Plan
from dysl_vla.deploy.control import ControlConfig, ControlLoop, LoopConfig, control
from dysl_vla.deploy.cycle_log import read_log, replay, view
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.loop_stats import render_stats
from dysl_vla.deploy.mujoco_robot import MujocoRobot, Simulation, _Eyes, _make_env
from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.errors import ConfigError, DyslError, ObservationError, RobotFault, SafetyStop
from dysl_vla.files import read_json, write_json
from dysl_vla.types import ActionChunk
from tests.deploy.stand_ins import RATE, WORLD, Counting, FakeRobot


def loop(policy: Any, robot: Any, config: LoopConfig | None = None, **options: Any) -> ControlLoop:
    config = config or LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=1000)
    return ControlLoop(policy, robot, RATE, options.pop("limits", Limits()), config, **options)


def test_each_action_is_the_one_that_was_predicted_for_its_time() -> None:
    robot = FakeRobot()
    account = loop(Counting(), robot).run(0.5)
    assert account.cycles == account.on_time + account.late + account.missed == 50
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
    account = loop(policy, robot, config).run(0.5)
    assert max(account.age_ms) <= 60
    assert account.missed >= 8
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
    account = json.loads((tmp_path / "log" / "account.json").read_text())
    assert account["cycles"] == len(lines)
    assert account["missed"] == len(missed)
    assert robot.calls == ["connect", "stop"]


def test_misses_in_a_row_stop_the_robot() -> None:
    robot = FakeRobot()
    with pytest.raises(SafetyStop, match="5 cycles in a row"):
        loop(
            Counting([0.0] * 5 + [1.0]), robot, LoopConfig(stop_after=5, blend_steps=0, warm_up=2, max_age_s=0.06)
        ).run(5)
    assert robot.calls == ["connect", "stop"]
    assert len(robot.sent) < 100


def test_guidance_sees_what_was_sent_before_the_reading_and_the_deadline() -> None:
    robot, policy = FakeRobot(), Counting()
    loop(policy, robot).run(0.3)
    executed, needed_at = policy.states[-1]
    timestamp = robot.readings[-1]
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
    with pytest.raises((DyslError, ValueError), match=r"broken|bug"):
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
            reading = super().observe(after)
            return replace(reading, observation={**reading.observation, "task": ""})

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
    """Takes positions, and stands at -90 degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.embodiment = ARM

    def hold(self, last: Any) -> Any:
        return np.array([-90, 0, 0], np.float32) if last is None else last


class Reaching(Counting):
    """Wants to be at +15 degrees."""

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
    robot, told = Arm(), []
    config = LoopConfig(blend_steps=blend_steps, warm_up=2, max_age_s=0.06, stop_after=1000)
    account = loop(Reaching(), robot, config, limits=Limits(max_change=(3.0, 3.0, 200.0)), tell=told.append).run(0.6)
    positions = [-90.0, *(float(action[0]) for _, action in robot.sent)]
    assert max(np.abs(np.diff(positions))) <= 3 + 1e-4
    assert positions[-1] == pytest.approx(15)
    assert account.approaching >= 34
    assert account.clamped == 0  # going there is no breach
    assert any("pan.pos stands at -90" in line for line in told)
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


def test_a_robot_of_positions_must_say_where_it_holds() -> None:
    class Silent(Arm):
        def hold(self, last: Any) -> Any:
            return last

    robot = Silent()
    with pytest.raises(SafetyStop, match=r"does not say where it holds"):
        loop(Reaching(), robot).run(0.1)
    assert robot.sent == []


@pytest.mark.parametrize("blend_steps", [1, 2, 4])
def test_the_first_plan_is_joined_to_the_held_position(blend_steps: int) -> None:
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


def test_a_policy_that_is_slow_but_fast_enough_looks_earlier_and_misses_nothing() -> None:
    """Its inference takes longer than a period and a half, but a chunk's eight executed actions last long enough."""
    robot = Arm()
    policy = Reaching(-90, delay=0.03)
    policy.spec = replace(policy.spec, chunk_length=16, execute_steps=8)
    config = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.2, stop_after=1000)
    account = loop(policy, robot, config).run(1.0)
    assert account.missed < 8  # looking when the executed part ends would miss about 15
    assert account.cycles == 100


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
    account = loop(Counting(), robot, log=tmp_path / "log").run(5)
    assert account.stopped == number.name
    assert account.cycles < 100
    assert robot.calls == ["connect", "stop"]
    assert json.loads((tmp_path / "log" / "account.json").read_text())["stopped"] == number.name
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
    for values in ({"on_miss": "x"}, {"stop_after": 0}, {"blend": -1}, {"max_age_s": float("nan")}, {"frozen_s": 0.0}):
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


class Circling(Counting):
    """Never stands still, never reaches a wall."""

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        [chunk] = super().infer(observations, states)
        x, y = observations[0]["observation.state"]
        chunk.actions[:] = np.clip([-3 * y - x, 3 * x - y, 0], -0.5, 0.5)
        return [chunk]


def simulate(seconds: float, simulation: Simulation, **options: Any) -> tuple[Any, MujocoRobot, float]:
    """Control a simulated robot; the account or the error, the robot, and when after the start it ended."""
    robot = MujocoRobot(simulation)
    config = LoopConfig(warm_up=2, frozen_s=0.3, **{"stop_after": 6, **options})
    control_loop = ControlLoop(Circling(), robot, 20.0, Limits(), config)
    started = time.perf_counter()
    outcome: Any
    try:
        outcome = control_loop.run(seconds)
    except DyslError as error:
        outcome = error
    return outcome, robot, time.perf_counter() - started


def test_a_simulated_robot_runs_in_real_time_in_a_process_of_its_own() -> None:
    account, robot, seconds = simulate(1.5, Simulation("mock-reach"), stop_after=1000)
    assert not isinstance(account, Exception), account
    assert 1.5 < seconds < 6
    assert account.cycles == 30
    report = robot.report()
    assert report["unsafe commands refused"] == 0
    assert 20 <= report["commands executed"] <= 34
    assert account.robot == report
    assert "30 cycles" in render_stats(account)


@pytest.mark.parametrize(
    ("fault", "kind", "words", "within"),
    [
        ({"freeze_after": 0.5}, SafetyStop, "very same image", 1.5),
        ({"nan_after": 0.5}, ObservationError, "not finite", 1.2),
        ({"drop_after": 0.5}, (RobotFault, SafetyStop), "no reading|in a row", 1.7),
        ({"late_after": 0.5, "late_s": 0.45}, SafetyStop, "in a row", 1.7),
        ({"stall_after": 0.5}, (RobotFault, SafetyStop), "no reading|in a row|no command", 1.7),
    ],
)
def test_each_fault_ends_safely_in_its_time(fault: dict[str, float], kind: Any, words: str, within: float) -> None:
    outcome, robot, seconds = simulate(5, Simulation("mock-reach", **fault))
    assert isinstance(outcome, kind), outcome
    assert any(word in str(outcome) for word in words.split("|"))
    assert seconds < within + 2.5  # the last 2: a stalled process is waited for, then killed
    assert robot.report()["unsafe commands refused"] == 0
    assert robot._process is not None
    assert not robot._process.is_alive()
    assert robot._shared is None  # its memory was freed


@pytest.mark.parametrize("freeze_after", [0.0, 1e9])
def test_only_a_frozen_camera_shows_the_very_same_image_all_the_time(freeze_after: float) -> None:
    """Also where nothing moves in its view: an arm may have left it."""
    eyes = _Eyes(Simulation("mock-reach", freeze_after=freeze_after), 0.0)
    still = np.zeros((4, 4, 3), np.uint8)
    looks = [eyes.look({"observation.images.top": still}, time.perf_counter()) for _ in range(20)]
    shown = {reading["observation.images.top"].tobytes() for look in looks for reading, _ in look}
    assert (len(shown) == 1) == (freeze_after == 0)
    assert not still.any()


def test_a_robot_whose_controller_is_gone_holds() -> None:
    robot = MujocoRobot(Simulation("mock-reach"))
    assert robot.embodiment.action_names == ("dx", "dy", "gripper")
    robot.connect(20.0)
    robot.act(np.array([0.5, 0.5, 1], np.float32))
    time.sleep(0.8)
    robot.stop()
    report = robot.report()
    assert report["periods held for want of a command"] >= 8
    assert 1 <= report["commands executed"] <= 6
    with pytest.raises(RobotFault, match="stopped"):
        robot.act(np.zeros(3, np.float32))


def test_names_that_mean_nothing_are_refused() -> None:
    for text, words in (("mock-fly", "mock-reach"), ("nothing-x", "nothing to simulate")):
        with pytest.raises(ConfigError, match=words):
            assert MujocoRobot(Simulation(text)).world
    with pytest.raises(ConfigError, match="is no option"):
        Simulation.parse("mock-reach?speed=3")
    with pytest.raises(ConfigError, match="not negative"):
        Simulation.parse("mock-reach?answer_s=nan")
    with pytest.raises(ConfigError, match="is no number"):
        Simulation.parse("mock-reach?episode=x")
    with closing(_make_env("mock-Reach@Point", None)) as env:
        assert env.task == "reach"
    with pytest.raises(ConfigError, match=r"no robot 'Panda'"):
        _make_env("mock-reach@Panda", None)
    assert Simulation.parse("mock-reach?episode=2&nan_after=1.5") == Simulation("mock-reach", 2, nan_after=1.5)
    for name, words in (("mujoco", "KIND:NAME"), ("ur5:x", "unknown kind 'ur5'; there are: lerobot, mujoco")):
        with pytest.raises(ConfigError, match=words):
            control(ControlConfig(name, policy="mock"))


def test_a_log_is_played_back_and_viewed(bundle_folder: Path, tmp_path: Path) -> None:
    config = ControlConfig(
        "mujoco:mock-reach?seed=100001",
        bundle=bundle_folder,
        rate=50.0,
        seconds=1.0,
        log=tmp_path / "log",
        loop=LoopConfig(stop_after=1000),
    )
    account = control(config)
    assert account.cycles == 50
    played = replay(tmp_path / "log")
    assert played["sent"] + played["passed"] == sum("action" in line for line in read_log(tmp_path / "log")[1])
    assert played["sent"] > 25
    assert played["robot"]["commands executed"] > 25
    assert played["robot"]["unsafe commands refused"] == 0
    edited = read_json(tmp_path / "log" / "account.json")
    write_json(tmp_path / "log" / "account.json", {**edited, "action_names": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="the log has"):
        replay(tmp_path / "log")
    recording = view(tmp_path / "log")
    assert recording.stat().st_size > 1000
    with pytest.raises(ConfigError, match="holds no log"):
        view(tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        control(config)
