"""Stopping a robot, whatever happens: whoever moves one does it through a `WatchedRobot`.

Three things would keep a robot from being stopped, and none of them can happen here. A signal that raises inside
`Robot.stop`: from the moment at which a robot may move until it is stopped, SIGINT, SIGTERM, SIGHUP (the terminal or
the ssh session is gone), SIGQUIT and SIGTSTP (Ctrl-Z) only set a flag. A call of a driver that hangs: calls are made by
other threads than the one that stops. A `stop` that hangs or fails: a message asks the user to switch the robot off.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dysl_vla.deploy.robot import Robot, TimedObservation
from dysl_vla.errors import DyslError, RobotFault, SafetyStop
from dysl_vla.types import EmbodimentSpec, FloatArray

clock = time.perf_counter
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
STOP_S = 30.0
"""A robot's `stop` that has not returned by then is given up, and a message asks the user to switch the robot off."""
SAY_S = 2.0
"""How often the user is informed that it is still waited for."""
POLL_S = 0.02
NAP_S = 0.02
"""How often a wait for a cycle's time looks whether the robot is to be stopped."""
GRACE_S = 0.2
"""Time that a running cycle may still take when the robot is to be stopped; after that, it is stopped all the same."""
JOIN_S = 2.0
"""Time for threads to end once the robot is stopped: an inference may be running."""
CONNECT_S, ANSWER_S = 60.0, 1.0
"""Longest time that connecting, and any other call, may take by default."""
AHEAD_S = 0.05
"""How far an observation's time may be ahead of this machine's clock: two machines' clocks are never quite the same."""


@contextmanager
def handled_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Have signals call `stop` with their name, as often as they come; none of them raises or ends the process.

    Only Python's main thread can handle signals; elsewhere this does nothing. A hang-up that is ignored, as under
    nohup, stays so; an interrupt that is ignored, as in a shell's background jobs, does not: it is to stop the robot.

    Args:
        stop: Function that must return at once, and take no lock that the main thread may hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        stop(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Stopped:
    """Result of stopping a robot.

    Attributes:
        problem: What went wrong, and that the robot must be switched off; empty: nothing went wrong.
        report: What the robot reports of the run.
    """

    problem: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)


def stop_robot(robot: Robot) -> Stopped:
    """Stop a robot and wait until it has stopped; signals meanwhile are answered, and change nothing.

    `Robot.stop` runs in a thread of its own, so that nothing can raise inside it, and one that never returns does not
    keep the caller for longer than `STOP_S`.

    Returns:
        What went wrong, and the robot's report.
    """
    stopped = Stopped()

    def work() -> None:
        try:
            robot.stop()
        except Exception as error:  # a driver's errors share no base
            stopped.problem = f"robot: stopping failed ({type(error).__name__}: {error}); switch it off."
        with suppress(Exception):  # a report is worth having, not worth failing for
            stopped.report = dict(robot.report())

    thread = threading.Thread(target=work, name="robot.stop", daemon=True)
    started = clock()
    said = SAY_S
    with handled_signals(lambda name: say(f"robot: {name} was seen; it is being stopped already.")):
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left, and the robot must be stopped all the same
            work()
        while thread.is_alive() and (waited := clock() - started) < STOP_S:
            thread.join(POLL_S)
            if waited >= said:
                say(f"robot: its stop has not returned for {waited:.0f} s; if it moves, switch it off.")
                said += SAY_S
    if thread.is_alive():
        stopped.problem = f"robot: its stop has not returned for {STOP_S:g} s; switch it off."
    if stopped.problem:
        say(stopped.problem)
    return stopped


class WatchedRobot:
    """A robot whose calls are watched: what raises, hangs, or answers what cannot be stops it.

    Args:
        robot: The robot, not connected yet.
        connect_s: Longest time that connecting may take.
        answer_s: Longest time that another call may take, beyond the time that `observe` is asked to wait for.

    Attributes:
        is_over: The robot is to be stopped, or was; from then on it is sent nothing.
        reason: Why it was to be stopped, if someone asked for it.
        fault: Why it was to be stopped, if something was wrong.
    """

    def __init__(self, robot: Robot, connect_s: float = CONNECT_S, answer_s: float = ANSWER_S) -> None:
        self._robot = robot
        self._connect_s, self._answer_s = connect_s, answer_s
        self._calls: dict[str, tuple[float, float]] = {}
        self._latest = -np.inf
        self.is_over = False
        self.reason = ""
        self.fault: Exception | None = None

    @property
    def embodiment(self) -> EmbodimentSpec:
        """The robot's specification."""
        return self._robot.embodiment

    def connect(self, rate_hz: float) -> None:
        """See `Robot.connect`."""
        with self._call("connect", self._connect_s):
            self._robot.connect(rate_hz)

    def observe(self, after: float) -> TimedObservation:
        """See `Robot.observe`.

        Raises:
            RobotFault: The observation's time is ahead of this machine's clock, or before that of the last one.
        """
        with self._call("observe", max(0.0, after - clock()) + self._answer_s):
            timed = self._robot.observe(after)
        ahead = timed.timestamp - clock()
        if not ahead <= AHEAD_S:  # also where it is no number
            raise RobotFault(
                f"robot: the observation's time is {ahead:.2f} s ahead of this machine's clock, so its age is unknown; "
                "stamp observations with time.perf_counter."
            )
        if timed.timestamp < self._latest:
            raise RobotFault(
                f"robot: the observation's time is {self._latest - timed.timestamp:.2f} s before the last one's: its "
                "clock was set back, or it hands out old frames; stamp observations with time.perf_counter."
            )
        self._latest = timed.timestamp
        return timed

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        with self._call("act", self._answer_s):
            self._robot.act(action)

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """See `Robot.hold`.

        Raises:
            RobotFault: The robot returns no action but something else.
        """
        with self._call("hold", self._answer_s):
            held = self._robot.hold(last)
        if held is not None and (np.shape(held) != (len(self.embodiment.action_names),) or not np.isfinite(held).all()):
            raise RobotFault(
                f"robot: hold must return {len(self.embodiment.action_names)} finite numbers, got "
                f"{np.asarray(held).tolist()}; check its sensors."
            )
        return held

    def wait_until(self, due: float) -> None:
        """Sleep until a time, or until the robot is to be stopped.

        Args:
            due: Time in seconds of `time.perf_counter`.
        """
        while (left := due - clock()) > 0 and not self.is_over:
            time.sleep(min(left, NAP_S))

    def stop(self, reason: str) -> None:
        """Ask for the end, from any thread or signal handler; takes no lock."""
        self.reason = self.reason or reason
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """Ask for the end because of an error. What goes wrong because the robot is being stopped is not remembered."""
        if not self.is_over:
            self.fault = error
            self.is_over = True

    def run(self, work: Callable[[], None]) -> Stopped:
        """Do work that moves the robot, in a thread of its own, until it ends or the robot must stop; then stop it.

        Within `POLL_S` + `GRACE_S` of a reason to stop, `Robot.stop` is called, whatever hangs.

        Returns:
            The result of stopping; `reason` and `fault` say why it was stopped.
        """
        thread = threading.Thread(target=self._do, args=(work,), name="control", daemon=True)
        with handled_signals(self.stop):
            try:
                start_thread(thread)
                while thread.is_alive() and not self.is_over:
                    thread.join(POLL_S)
                    self._check_calls()
                thread.join(GRACE_S)
            except RobotFault as error:
                self.fail(error)
            finally:
                self.is_over = True
                stopped = stop_robot(self._robot)
        if thread.ident is not None:
            self.join(thread)
        return stopped

    def join(self, thread: threading.Thread) -> None:
        """Wait for a thread to end, once the robot is stopped; not for long where a call of the robot hangs in it."""
        thread.join(GRACE_S)
        if not self._calls:
            thread.join(JOIN_S)

    @property
    def hanging(self) -> list[str]:
        """Calls of the robot that have not returned."""
        return list(self._calls)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DyslError as error:
            self.fail(error)
        except Exception as error:  # whatever it is, the robot must stop; the caller of `run` raises it
            fault = RobotFault(f"control: {type(error).__name__}: {error}")
            fault.__cause__ = error
            self.fail(fault)

    def _check_calls(self) -> None:
        for name, (since, limit_s) in list(self._calls.items()):
            if clock() - since > limit_s:
                self.fail(
                    RobotFault(f"robot: {name} has not returned for {limit_s:.1f} s; check its cables and power.")
                )

    @contextmanager
    def _call(self, name: str, limit_s: float) -> Iterator[None]:
        if self.is_over:
            raise SafetyStop(f"robot: is being stopped; {name} is not called any more.")
        self._calls[name] = clock(), limit_s
        try:
            yield
        except DyslError:
            raise
        except Exception as error:  # a driver's errors share no base
            raise RobotFault(f"robot: {name} failed ({type(error).__name__}: {error}).") from error
        finally:
            del self._calls[name]


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RobotFault: The system has no thread left.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise RobotFault(
            f"thread: {thread.name} could not be started ({error}); raise the system's limit, or end other programs."
        ) from error


def say(text: str) -> None:
    """Print a line on stderr, past Python's buffers, which a signal handler must not enter a second time."""
    with suppress(OSError):  # the terminal may be gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
