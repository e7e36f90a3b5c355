"""A robot always stops: every call that can go wrong, in every way, under everything that asks for the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dysl_vla.deploy import stopping
from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.replay_log import replay
from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.deploy.stopping import WatchedRobot, handled_signals, stop_robot
from dysl_vla.errors import DyslError, RobotFault
from tests.deploy.stand_ins import RATE, WORLD, Counting, FakeRobot

LONG_S = 0.6
BOUND_S = 1.0
"""Time that the loop may take to release the motors, beyond what the robot itself takes."""
CONFIG = LoopConfig(blend_steps=0, warm_up=2, max_age_s=0.06, stop_after=30, connect_s=0.3, answer_s=0.3)

WRONG: dict[str, tuple[str, ...]] = {
    "connect": ("long", "ever", "raises"),
    "observe": ("long", "ever", "raises", "late", "older", "ahead", "nan", "shape"),
    "act": ("long", "ever", "raises", "late"),
    "hold": ("long", "ever", "raises", "late", "nan", "shape"),
    "stop": ("long", "ever", "raises"),
}
ENDS = ("SIGINT", "SIGINT twice", "SIGTERM", "deadline", "loop.stop")
MATRIX = [(call, wrong, end) for call, wrongs in WRONG.items() for wrong in wrongs for end in ENDS]


class Faulty(FakeRobot):
    """A robot with torque on its motors, one of whose calls goes wrong from its tenth command on (connecting: at once).

    A call that hangs "for ever" hangs until the test ends, whatever else happens to the robot.
    """

    def __init__(self, call: str, wrong: str) -> None:
        super().__init__()
        self.call, self.wrong = call, wrong
        self.test_ends = threading.Event()
        self.has_torque = False
        self.released_at: float | None = None
        self.stops = 0
        self.went_wrong_at: float | None = None
        self._lock = threading.Lock()

    def _maybe(self, call: str) -> str:
        """What goes wrong with this call now; hangs and raises at once."""
        if call != self.call or (call not in ("connect", "stop") and len(self.sent) < 10):
            return ""
        self.went_wrong_at = self.went_wrong_at or time.perf_counter()
        if self.wrong in ("long", "ever"):
            self.test_ends.wait(LONG_S if self.wrong == "long" else None)
        elif self.wrong == "late":
            time.sleep(0.03)
        elif self.wrong == "raises":
            raise OSError(f"{call} is broken")
        return self.wrong

    def connect(self, rate_hz: float) -> None:
        super().connect(rate_hz)
        self._maybe("connect")
        with self._lock:
            if not self.stops:  # what a driver owes: a connect that comes back after stop gives no torque
                self.has_torque = True

    def observe(self, after: float) -> TimedObservation:
        timed = super().observe(after)
        wrong = self._maybe("observe")
        observation, timestamp = dict(timed.observation), timed.timestamp
        if wrong == "older":
            timestamp -= 10
        elif wrong == "ahead":
            timestamp += 60
        elif wrong == "nan":
            observation["observation.state"] = np.full(2, np.nan, np.float32)
        elif wrong == "shape":
            observation["observation.images.top"] = np.zeros((8, 8, 3), np.uint8)
        return TimedObservation(observation, timestamp)

    def act(self, action: Any) -> None:
        self._maybe("act")
        with self._lock:
            if self.stops:
                raise RobotFault("robot: was stopped.")
            assert np.isfinite(action).all()
            assert np.shape(action) == (3,)
            super().act(action)

    def hold(self, last: Any) -> Any:
        wrong = self._maybe("hold") if last is not None else ""
        held = np.zeros(3, np.float32)
        return held[:2] if wrong == "shape" else held * np.nan if wrong == "nan" else held

    def stop(self) -> None:
        with self._lock:
            self.stops += 1
            if self.call != "stop":
                self.has_torque, self.released_at = False, time.perf_counter()
        if self.call == "stop":
            self._maybe("stop")
            self.has_torque, self.released_at = False, time.perf_counter()


class Stuttering(Counting):
    """A policy that lets the loop run out of fresh chunks once the robot is to be asked to hold."""

    def __init__(self, robot: Faulty) -> None:
        super().__init__()
        self._robot = robot

    def infer(self, observations: Any, states: Any) -> Any:
        if self._robot.call == "hold" and len(self._robot.sent) >= 8:
            time.sleep(0.15)
        return super().infer(observations, states)


@pytest.fixture(autouse=True)
def hang_ups_count() -> Iterator[None]:
    """Hang-ups are not ignored, even if the tests run under nohup, whose children ignore them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def short_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot whose stop hangs is given up sooner than a user would."""
    monkeypatch.setattr(stopping, "STOP_S", 1.5)
    monkeypatch.setattr(stopping, "SAY_S", 0.3)
    monkeypatch.setattr(stopping, "JOIN_S", 0.3)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    limit = time.monotonic() + 2
    while (left := set(threading.enumerate()) - before) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not left, left


def ask_to_end(end: str, loop: ControlLoop) -> float:
    """Do what asks for the end, and return when that was."""
    asked_at = time.perf_counter()
    if end == "loop.stop":
        loop.stop("the test asks")
    elif end != "deadline":
        for _ in range(2 if "twice" in end else 1):
            os.kill(os.getpid(), signal.Signals[end.split(maxsplit=1)[0]])
            time.sleep(0.01)
    return asked_at


def check_torque_in_the_end(robot: Faulty, keeps_torque: bool) -> None:
    """A stop that hung "for ever" releases the motors late, which is waited for; one that raises never does."""
    limit = time.monotonic() + 2
    while robot.has_torque != keeps_torque and time.monotonic() < limit:
        time.sleep(0.005)
    assert robot.has_torque == keeps_torque
    assert (robot.released_at is None) == keeps_torque


@pytest.mark.parametrize(("call", "wrong", "end"), MATRIX, ids=["-".join(cell) for cell in MATRIX])
@pytest.mark.usefixtures("no_thread_left")
def test_the_motors_are_released_whatever_goes_wrong(call: str, wrong: str, end: str, tmp_path: Path) -> None:
    robot = Faulty(call, wrong)
    log = tmp_path / "log" if end == "deadline" else None
    loop = ControlLoop(Stuttering(robot), robot, RATE, Limits(), CONFIG, log=log)
    asked: list[float] = []

    def ask_when_it_is_wrong() -> None:
        while robot.went_wrong_at is None and len(robot.sent) < 15:
            time.sleep(0.002)
        time.sleep(0.05)
        asked.append(ask_to_end(end, loop))

    asker = threading.Thread(target=ask_when_it_is_wrong)
    asker.start()
    outcome: Any
    began = time.perf_counter()
    with handled_signals(lambda _: None):  # one that comes when all is over must not end the tests
        try:
            # Without anybody who asks, deadlines end it, or its time is over
            outcome = loop.run(0.8 if end == "deadline" else 20)
        except DyslError as error:
            outcome = error
        ended_at = time.perf_counter()
        asker.join()
    # Released in time, once, and nothing was sent after it
    own_s = LONG_S if call == "stop" and wrong == "long" else 0.0
    if (call, wrong) == ("stop", "ever") or (call, wrong) == ("stop", "raises"):
        assert robot.has_torque
        assert "switch it off" in str(outcome) + loop.stats.stopped
        assert isinstance(outcome, RobotFault)
    else:
        assert not robot.has_torque
        assert robot.released_at is not None
        if end != "deadline":
            assert robot.released_at - asked[0] < BOUND_S + own_s
    assert robot.stops == 1
    assert ended_at - began < 5
    sent = list(robot.sent)
    # Whatever hung comes back now: it changes nothing
    robot.test_ends.set()
    time.sleep(0.02)
    assert robot.sent == sent
    check_torque_in_the_end(robot, keeps_torque=(call, wrong) == ("stop", "raises"))
    if log is not None:
        assert json.loads((log / "stats.json").read_text())["stopped"] == loop.stats.stopped
    check_reason(loop.stats.stopped, outcome, (call, wrong, end))


def check_reason(stopped: str, outcome: Any, cell: tuple[str, str, str]) -> None:
    """The statistics say why the robot was stopped early, if it was."""
    call, wrong, end = cell
    is_harmless = wrong == "late" or (call, wrong) == ("stop", "long") or (call, wrong) == ("hold", "long")
    assert stopped or (end == "deadline" and is_harmless), outcome
    if end != "deadline" and not isinstance(outcome, DyslError):
        assert stopped.startswith((end.split(maxsplit=1)[0], "the test asks"))


@pytest.mark.parametrize("numbers", [("SIGINT",) * 3, ("SIGINT", "SIGTERM"), ("SIGHUP", "SIGQUIT", "SIGTSTP")])
def test_signals_do_not_interrupt_a_stop_that_runs(numbers: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """The thread that runs `stop` is another than the one that signals reach, and that one waits for it."""
    ended: list[bool] = []

    class Slow(FakeRobot):
        def stop(self) -> None:
            for name in numbers:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.1)
            time.sleep(0.3)
            ended.append(True)

    assert stop_robot(Slow()).problem == ""
    assert ended == [True]
    printed = capfd.readouterr().err
    assert all(f"{name} was seen" in printed for name in numbers)
    assert "has not returned for 0 s" in printed or "its stop has not returned" in printed


def test_an_ignored_hang_up_stays_ignored() -> None:
    """nohup does that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen: list[str] = []
    try:
        with handled_signals(seen.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert seen == ["SIGTERM"]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("offset_s", "words"), [(60.0, "ahead of this machine's clock"), (float("nan"), "ahead"), (-30.0, "before")]
)
def test_an_observation_of_another_clock_is_a_fault_that_names_the_clock(offset_s: float, words: str) -> None:
    robot = FakeRobot()
    watched = WatchedRobot(robot, 1, 1)
    watched.connect(RATE)
    watched.observe(0.0)
    good = robot.observe
    robot.observe = lambda after: TimedObservation(good(after).observation, time.perf_counter() + offset_s)  # type: ignore[method-assign]
    with pytest.raises(RobotFault, match=words) as caught:
        watched.observe(0.0)
    assert "time.perf_counter" in str(caught.value)


def test_a_frame_whose_time_stands_still_gets_old() -> None:
    """The camera died, and the driver hands out its last frame with the last frame's time."""

    class Dead(FakeRobot):
        last: TimedObservation | None = None

        def observe(self, after: float) -> TimedObservation:
            if self.last is None or len(self.sent) < 10:
                self.last = super().observe(after)
            else:
                time.sleep(0.005)
            return self.last

    robot = Dead()
    with pytest.raises(DyslError, match=r"in a row were missed"):
        ControlLoop(Counting(), robot, RATE, Limits(), CONFIG).run(5)
    assert len(robot.sent) < 70


def test_what_hangs_is_named() -> None:
    robot = Faulty("observe", "ever")
    loop = ControlLoop(Counting(), robot, RATE, Limits(), CONFIG)
    with pytest.raises(DyslError, match=r"observe has not returned"):
        loop.run(20)
    assert "observe has still not returned" in loop.stats.stopped
    robot.test_ends.set()


SCRIPT = """
import sys, time
from dysl_vla.deploy.control import ControlLoop
from tests.deploy.test_stopping import CONFIG, Faulty
from tests.deploy.stand_ins import RATE, Counting
from dysl_vla.deploy.limits import Limits
robot = Faulty(sys.argv[1], "ever")
stop = robot.stop
def said_stop():
    stop()
    print("released", flush=True)
robot.stop = said_stop
act = robot.act
def said_act(action):
    act(action)
    if len(robot.sent) == 5:
        print("moving", flush=True)
robot.act = said_act
ControlLoop(Counting(), robot, RATE, Limits(), CONFIG).run(60)
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("nothing", signal.SIGINT),
        ("observe", signal.SIGINT),
        ("act", signal.SIGTERM),
        ("nothing", signal.SIGHUP),
    ],
)
def test_a_process_that_is_signalled_to_end_releases_the_motors_and_ends(call: str, number: signal.Signals) -> None:
    """Nothing waits for a thread that hangs in a driver for ever."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, call], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "moving\n"
        time.sleep(0.15)
        signalled_at = time.perf_counter()
        process.send_signal(number)
        process.send_signal(number)
        assert process.stdout.readline() == "released\n"
        assert time.perf_counter() - signalled_at < BOUND_S
        process.wait(timeout=5)
    finally:
        process.kill()
        process.wait()


def test_a_stop_that_is_slow_is_waited_for_and_reported(capfd: pytest.CaptureFixture[str]) -> None:
    class Slow(FakeRobot):
        def stop(self) -> None:
            time.sleep(0.8)
            super().stop()

    robot = Slow()
    assert stop_robot(robot).problem == ""
    assert robot.calls == ["stop"]
    assert "if it moves, switch it off" in capfd.readouterr().err


def test_a_stop_that_fails_or_hangs_says_to_switch_it_off(capfd: pytest.CaptureFixture[str]) -> None:
    for wrong in ("raises", "ever"):
        robot = Faulty("stop", wrong)
        assert "switch it off" in stop_robot(robot).problem
        assert "switch it off" in capfd.readouterr().err
        robot.test_ends.set()


@pytest.mark.parametrize("call", ["observe", "act"])
@pytest.mark.usefixtures("no_thread_left")
def test_replaying_a_log_is_stopped_too_whatever_hangs(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ControlLoop(Counting(), FakeRobot(), RATE, Limits(), CONFIG, log=tmp_path / "log", robot_name="x:y")
    loop.run(0.4)
    robot = Faulty(call, "ever")
    monkeypatch.setattr("dysl_vla.deploy.replay_log.make_robot", lambda *_: robot)
    with pytest.raises(RobotFault, match=f"{call} has not returned"):
        replay(tmp_path / "log")
    assert not robot.has_torque
    robot.test_ends.set()


class NoThread(threading.Thread):
    """A thread that the system does not start."""

    refused = ""

    def start(self) -> None:
        if self.name == self.refused:
            raise RuntimeError("can't start new thread")
        super().start()


@pytest.mark.parametrize("name", ["control", "inference", "log"])
@pytest.mark.usefixtures("no_thread_left")
def test_a_thread_that_cannot_be_started_is_a_fault_and_the_robot_is_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NoThread, "refused", name)
    monkeypatch.setattr(threading, "Thread", NoThread)
    robot = FakeRobot()
    with pytest.raises(RobotFault, match=f"thread: {name} could not be started"):
        ControlLoop(Counting(), robot, RATE, Limits(), CONFIG, log=tmp_path / "log").run(1)
    assert robot.calls[-1] == "stop"
    assert robot.sent == []


def call_all(robot: WatchedRobot) -> list[Callable[[], object]]:
    return [
        lambda: robot.connect(RATE),
        lambda: robot.observe(0.0),
        lambda: robot.act(np.zeros(3, np.float32)),
        lambda: robot.hold(None),
    ]


def test_nothing_is_called_once_the_robot_is_to_stop() -> None:
    robot = FakeRobot()
    watched = WatchedRobot(robot, 1, 1)
    watched.stop("enough")
    for call in call_all(watched):
        with pytest.raises(DyslError, match="being stopped"):
            call()
    assert robot.calls == []
    assert watched.embodiment == WORLD
