"""CAN motors that are not there, for LeRobot's own buses of DAMIAO and RobStride motors; python-can is not needed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

ENABLE, DISABLE, REFRESH = 0xFC, 0xFD, 0xCC
"""Last bytes of the commands that switch a motor on and off; third byte of DAMIAO's request for the state."""


@dataclass
class Motor:
    """A motor: whether it has torque, and whether it is silent or does not obey."""

    has_torque: bool = False
    is_mute: bool = False
    is_stubborn: bool = False


@dataclass
class CanMotors:
    """Motors 1 to 8, whose answers have the identifier of the motor plus 16, on buses that may be opened again.

    Attributes:
        motors: The motors by their identifiers.
        answers: What has not been received yet.
    """

    motors: dict[int, Motor] = field(default_factory=lambda: {number: Motor() for number in range(1, 9)})
    answers: deque[Any] = field(default_factory=deque)

    def open(self, **_: object) -> SimpleNamespace:
        """Replaces `can.interface.Bus`."""
        return SimpleNamespace(send=self.send, recv=self.recv, shutdown=lambda: None)

    def send(self, message: Any) -> None:
        """A frame reaches its motor, which answers."""
        is_refresh = message.arbitration_id == 0x7FF and message.data[2] == REFRESH
        number = message.data[0] if is_refresh else message.arbitration_id
        motor = self.motors[number]
        if motor.is_mute:
            return
        if not is_refresh and message.data[7] in (ENABLE, DISABLE) and not motor.is_stubborn:
            motor.has_torque = message.data[7] == ENABLE
        # DAMIAO's first byte is the state and the identifier, RobStride's the identifier alone
        first = 16 + number if self.is_robstride else motor.has_torque << 4 | number
        data = bytes([first, 128, 0, 128, 8, 0, 0, 30])
        self.answers.append(SimpleNamespace(arbitration_id=16 + number, data=data))

    def recv(self, timeout: float | None = None) -> Any:
        """The next answer; None: there is none."""
        return self.answers.popleft() if self.answers else None

    is_robstride: bool = False

    def torques(self) -> list[bool]:
        """Whether each motor has torque."""
        return [motor.has_torque for motor in self.motors.values()]


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> CanMotors:
    """Have a module of LeRobot talk to such motors."""
    motors = CanMotors(is_robstride="robstride" in module.__name__)
    can = SimpleNamespace(
        Message=SimpleNamespace, interface=SimpleNamespace(Bus=motors.open), BusABC=object, CanError=OSError
    )
    monkeypatch.setattr(module, "can", can)
    monkeypatch.setattr(module, "require_package", lambda *_, **__: None)
    return motors
