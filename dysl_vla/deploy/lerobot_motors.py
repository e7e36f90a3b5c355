"""Releases the motors of a LeRobot robot, whatever its calls and cameras are doing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

RELEASE_S = 1.5
"""How long motors are asked to give up their torque."""
TURN_S = 0.2
"""How long a call waits for the one that LeRobot is busy with; stopping goes on without it then."""
NAP_S = 0.02
STOPPED = "robot: it was stopped; make a new one to go on."
TORQUE = "Torque_Enable"
SILENT = "the motor does not answer"


class Motors:
    """Motors on one bus.

    Args:
        prefix: Prefix of their names, "left_" for a left arm's.
        owner: The robot, or the arm, that has them.
        bus: LeRobot's bus.

    Attributes:
        held: Names of the motors that may still have torque.
        error: Why they may still have it.
        was_open: Whether the bus was seen open; a bus that never was has switched nothing on.
    """

    def __init__(self, prefix: str, owner: Any, bus: Any) -> None:
        self.owner, self.bus = owner, bus
        self._names = {prefix + motor: motor for motor in bus.motors}
        self.held = list(self._names)
        self.error = "its driver has not returned in time"
        self.was_open = False

    def release(self) -> None:
        """Take the torque off each motor until the motor confirms it, or until time is over.

        On a bus that is open, all motors are asked; on one that was closed since, those that may still have torque.
        """
        if self.bus.is_connected or getattr(self.bus, "canbus", None) is not None:  # a CAN bus after a failed handshake
            self.was_open, self.held = True, list(self._names)
        elif not self.was_open:
            self.held = []
        port = getattr(self.bus, "port_handler", None)
        until = time.perf_counter() + RELEASE_S
        while self.held:
            with suppress(Exception):
                if port is not None:
                    self._ask_all(port)
            for name in tuple(self.held):
                try:
                    self.bus.disable_torque(self._names[name])
                    if self._is_off(self._names[name]):
                        self.held = [other for other in self.held if other != name]
                    else:
                        self.error = "the motor takes the command, and its torque is still on"
                except Exception as error:  # any error of a driver; the other motors must be asked, too
                    self.error = one_line(error)
            if time.perf_counter() > until:
                return
            if self.held:
                time.sleep(NAP_S)
                self._reopen(port)

    def _is_off(self, motor: str) -> bool:
        """Whether a motor confirms that it has no torque. `disable_torque` alone confirms nothing on a CAN bus.

        Raises:
            Exception: The motor does not answer, or its driver cannot ask it.
        """
        if hasattr(self.bus, "port_handler"):
            return bool(self.bus.read(TORQUE, motor, normalize=False) == 0)
        if hasattr(self.bus, "_refresh_motor"):  # Damiao: the state is in the answer; 0 is off, 1 on, more a fault
            answer = self.bus._refresh_motor(motor)
            if answer is None:
                raise ConnectionError(SILENT)
            return int(answer.data[0]) >> 4 == 0
        if hasattr(self.bus, "update_motor_state"):  # RobStride: the answer has no state, so it must be a new one
            self.bus.flush_rx_queue()
            return bool(self.bus.update_motor_state(motor))
        raise ConnectionError("its driver cannot confirm that the motor has obeyed")

    def _reopen(self, port: Any) -> None:
        """Open a bus again that is closed, or whose cable may have been put back."""
        if port is not None and not _is_there(port):
            with suppress(Exception):
                port.closePort()
            with suppress(Exception):
                port.openPort()
        elif getattr(self.bus, "canbus", port) is None:
            with suppress(Exception):
                self.bus.connect(handshake=False)  # the handshake would switch motors on

    def _ask_all(self, port: Any) -> None:
        """Send one packet to all motors, which they obey even if their answers are lost."""
        port.is_using = False  # it may be in use by a call that will not come back to it
        self.bus.sync_write(TORQUE, {self._names[name]: 0 for name in self.held}, normalize=False)


class GuardedPort:
    """Keeps all but the release of motors off a serial port once the robot is stopped.

    A call that was under way then fails at its next byte, instead of moving a motor or switching it on.

    Args:
        port: Port handler of the motors' SDK.
    """

    def __init__(self, port: Any) -> None:
        self._write, self._read = port.writePort, port.readPort
        port.writePort, port.readPort = self.write, self.read
        self._writing = threading.Lock()
        self._is_shut = False

    def write(self, packet: Any) -> Any:
        """Replaces the port's `writePort`."""
        if _is_releasing():
            return self._write(packet)
        with self._writing:
            self._check()
            return self._write(packet)

    def read(self, length: int) -> Any:
        """Replaces the port's `readPort`."""
        if not _is_releasing():
            self._check()
        return self._read(length)

    def shut(self) -> None:
        """Refuse others from now on; a packet that is being written is completed."""
        self._is_shut = True
        if self._writing.acquire(timeout=TURN_S):
            self._writing.release()

    def _check(self) -> None:
        if self._is_shut:
            raise ConnectionError(STOPPED)


_RELEASING = threading.local()
"""Has `is_set` in threads that release motors."""


def _is_releasing() -> bool:
    return getattr(_RELEASING, "is_set", False)


def run_all(jobs: Sequence[Callable[[], object]], seconds: float) -> list[Exception | None]:
    """Do jobs at the same time, on threads that may use shut ports.

    Args:
        jobs: The jobs.
        seconds: How long to wait for them; a job that is not done by then goes on.

    Returns:
        For each job its error; None: it succeeded.
    """
    errors: list[Exception | None] = [TimeoutError(f"not done after {seconds:g} s") for _ in jobs]

    def work(index: int) -> None:
        _RELEASING.is_set = True
        try:
            jobs[index]()
            errors[index] = None
        except Exception as error:  # any error of a driver
            errors[index] = error

    threads = [_started(partial(work, index), is_daemon=True) for index in range(len(jobs))]
    until = time.perf_counter() + seconds
    for thread in threads:
        if thread is not None:
            thread.join(max(0.0, until - time.perf_counter()))
    return list(errors)


def run_to_end(work: Callable[[], None]) -> None:
    """Do work to its end: an impatient second Ctrl-C, or the end of the program, would leave the motors on."""
    is_done = threading.Event()  # `Thread.join` takes a thread for dead when the join is interrupted

    def run() -> None:
        try:
            work()
        except Exception as error:  # stopping must not raise, but must not be silent either
            print_line(f"could not be stopped ({type(error).__name__}: {one_line(error)}): switch its power off.")
        finally:
            is_done.set()

    _started(run, is_daemon=False)
    while not is_done.is_set():
        with suppress(KeyboardInterrupt):
            is_done.wait()


def _started(work: Callable[[], None], is_daemon: bool) -> threading.Thread | None:
    """Start a thread; where the system has no more of them, the work is done at once, and None is returned."""
    thread = threading.Thread(target=work, name="stop", daemon=is_daemon)
    try:
        thread.start()
    except RuntimeError:
        work()
        return None
    return thread


def _is_there(port: Any) -> bool:
    """Whether the port is there, even if motors are not."""
    try:
        return bool(port.is_open) and port.ser.in_waiting >= 0
    except Exception:  # each SDK and system has errors of its own
        return False


def print_line(what: str) -> None:
    """Print a line about the robot on stderr."""
    with suppress(OSError):
        print(f"robot: {what}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
