"""Six STS3215 servos on a pseudo-terminal, for LeRobot's own driver: the Feetech protocol, version 0.

    python feetech_bus.py REGISTERS EVENTS

prints the name of its serial port and serves it until its parent ends. Registers are in a mapped file, so that another
process can read torque, goals and positions at any moment, move a joint by hand, and switch on a fault
(`Registers`). Each torque change and each goal is a line in EVENTS, with its time (`time.perf_counter`). It needs the
standard library alone. It is not for protocols and timing of other motors.
"""

from __future__ import annotations

import json
import mmap
import os
import pty
import select
import struct
import subprocess
import sys
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

MODEL, FIRMWARE = 777, (3, 10)
RESOLUTION = 4096
# Addresses of registers, and how many bytes they have.
MIN_LIMIT, MAX_LIMIT, HOMING_OFFSET = (9, 2), (11, 2), (31, 2)
TORQUE, GOAL, LOCK, PRESENT = (40, 1), (42, 2), (55, 1), (56, 2)
PING, READ, WRITE, SYNC_READ, SYNC_WRITE, BROADCAST = 1, 2, 3, 0x82, 0x83, 0xFE
OVERLOAD = 0x20
FAULTS = ("none", "mute", "late", "corrupt", "refuse", "ignore")
"""What a motor with a fault does: it answers as it should; neither answers nor does anything; answers after `delay_s`;
obeys, and answers nonsense; refuses to write; answers that it has written, and has not (as when the answer to an
earlier packet is taken for it)."""
HEADER, STRIDE, SETTINGS = 64, 128, struct.Struct("<BBdd")
TICK_S = 0.005


@dataclass(frozen=True)
class Motor:
    """A motor as LeRobot's calibration knows it; positions are in steps of the encoder."""

    id: int
    homing_offset: int
    range_min: int
    range_max: int


MOTORS = {
    "shoulder_pan": Motor(1, -1234, 780, 3390),
    "shoulder_lift": Motor(2, 812, 810, 3210),
    "elbow_flex": Motor(3, -305, 870, 3080),
    "wrist_flex": Motor(4, 1480, 900, 3200),
    "wrist_roll": Motor(5, 77, 0, 4095),
    "gripper": Motor(6, -998, 2030, 3490),
}
IDS = tuple(motor.id for motor in MOTORS.values())


def calibration() -> dict[str, dict[str, int]]:
    """LeRobot's calibration file for these motors."""
    return {
        name: {
            "id": motor.id,
            "drive_mode": 0,
            "homing_offset": motor.homing_offset,
            "range_min": motor.range_min,
            "range_max": motor.range_max,
        }
        for name, motor in MOTORS.items()
    }


class Registers:
    """The motors' registers, and the faults of the stand-in, in a file that processes share.

    Args:
        path: The file, made with `create`.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, speed: float = 2000.0) -> Registers:
        """Motors as they are after `lerobot-calibrate`, in the middle of their ranges, without torque.

        Args:
            path: New file.
            speed: Speed of the motors, in encoder steps a second.
        """
        path.write_bytes(bytes(HEADER + STRIDE * (max(IDS) + 1)))
        registers = cls(path)
        registers.set_fault("none")
        registers.speed = speed
        for motor in MOTORS.values():
            middle = (motor.range_min + motor.range_max) // 2
            offset = abs(motor.homing_offset) | (motor.homing_offset < 0) << 11  # sign and magnitude
            registers.put(motor.id, 0, bytes(FIRMWARE))
            for address, value in (((3, 2), MODEL), ((5, 1), motor.id), (HOMING_OFFSET, offset)):
                registers.write(motor.id, address, value)
            for address, value in ((MIN_LIMIT, motor.range_min), (MAX_LIMIT, motor.range_max)):
                registers.write(motor.id, address, value)
            registers.write(motor.id, GOAL, middle)
            registers.write(motor.id, PRESENT, middle)
        return registers

    def get(self, motor: int, start: int, length: int) -> bytes:
        """Bytes of a motor's registers."""
        at = HEADER + STRIDE * motor + start
        return self._bytes[at : at + length]

    def put(self, motor: int, start: int, data: bytes) -> None:
        """Replace bytes of a motor's registers, as if it had done it itself."""
        at = HEADER + STRIDE * motor + start
        self._bytes[at : at + len(data)] = data

    def read(self, motor: int, register: tuple[int, int]) -> int:
        """Value of a register, unsigned."""
        return int.from_bytes(self.get(motor, *register), "little")

    def write(self, motor: int, register: tuple[int, int], value: int) -> None:
        """Set a register, as if the motor had done it itself."""
        self.put(motor, register[0], value.to_bytes(register[1], "little"))

    def torques(self) -> list[int]:
        """Torque switches of all motors, in the order of their ids."""
        return [self.read(motor, TORQUE) for motor in IDS]

    def goals(self) -> list[int]:
        """Goals of all motors, in encoder steps."""
        return [self.read(motor, GOAL) for motor in IDS]

    def positions(self) -> list[int]:
        """Positions of all motors, in encoder steps."""
        return [self.read(motor, PRESENT) for motor in IDS]

    @property
    def speed(self) -> float:
        """Speed of the motors, in encoder steps a second."""
        return float(SETTINGS.unpack_from(self._bytes)[3])

    @speed.setter
    def speed(self, value: float) -> None:
        SETTINGS.pack_into(self._bytes, 0, *SETTINGS.unpack_from(self._bytes)[:3], value)

    def set_fault(self, fault: str, motors: Sequence[int] = IDS, delay_s: float = 0.0) -> None:
        """Switch a fault on, or all off with "none".

        Args:
            fault: One of `FAULTS`.
            motors: Ids of the motors that have it.
            delay_s: Delay of answers that are late.
        """
        mask = sum(1 << motor for motor in motors)
        SETTINGS.pack_into(self._bytes, 0, FAULTS.index(fault), mask, delay_s, self.speed)

    def fault(self, motor: int) -> str:
        """The fault that a motor has now."""
        index, mask, _, _ = SETTINGS.unpack_from(self._bytes)
        return FAULTS[index] if mask >> motor & 1 else "none"

    @property
    def delay_s(self) -> float:
        """Delay of answers that are late."""
        return float(SETTINGS.unpack_from(self._bytes)[2])


class Servos:
    """What the motors do: answer packets, and move.

    Args:
        registers: The motors' registers.
        events: File for a line for each torque change and each goal.
    """

    def __init__(self, registers: Registers, events: TextIO) -> None:
        self._registers, self._events = registers, events
        self._positions = {motor: float(registers.read(motor, PRESENT)) for motor in IDS}
        self._moved_at = time.perf_counter()
        self._received = bytearray()

    def move(self) -> None:
        """Move towards the goals for the time since the last call; motors without torque stay."""
        registers, now = self._registers, time.perf_counter()
        step = registers.speed * (now - self._moved_at)
        self._moved_at = now
        for motor in IDS:
            if registers.read(motor, PRESENT) != round(self._positions[motor]):  # moved by hand
                self._positions[motor] = float(registers.read(motor, PRESENT))
            if not registers.read(motor, TORQUE):
                continue
            low, high = registers.read(motor, MIN_LIMIT), registers.read(motor, MAX_LIMIT)
            goal = min(max(registers.read(motor, GOAL), low), high)
            left = goal - self._positions[motor]
            self._positions[motor] += min(max(left, -step), step)
            registers.write(motor, PRESENT, round(self._positions[motor]))

    def receive(self, data: bytes) -> Iterator[tuple[float, bytes]]:
        """Carry out the packets that are whole by now.

        Yields:
            Answers, and when they are due (`time.perf_counter`).
        """
        self._received += data
        while len(packet := self._next_packet()) > 0:
            target, instruction, parameters = packet[2], packet[4], bytes(packet[5:-1])
            for motor, answer in self._answers(target, instruction, parameters):
                fault = self._registers.fault(motor)
                due = time.perf_counter() + (self._registers.delay_s if fault == "late" else 0.0)
                yield due, answer[:-1] + bytes([answer[-1] ^ 0x55]) if fault == "corrupt" else answer

    def _next_packet(self) -> bytearray:
        """The next whole packet: FF FF, id, length of the rest, instruction, parameters, checksum; empty: none yet."""
        received = self._received
        while (start := received.find(b"\xff\xff")) >= 0:
            del received[:start]
            if len(received) < 4 or len(received) < 4 + received[3]:
                break
            packet = received[: 4 + received[3]]
            if len(packet) >= 6 and packet[-1] == _checksum(packet[2:-1]):
                del received[: len(packet)]
                return packet
            del received[:1]
        return bytearray()

    def _answers(self, target: int, instruction: int, parameters: bytes) -> Iterator[tuple[int, bytes]]:
        """Answers of the motors that are addressed, in their order; a mute one neither obeys nor answers."""
        if instruction == SYNC_WRITE:
            start, length = parameters[:2]
            for at in range(2, len(parameters), length + 1):
                self._write(parameters[at], start, parameters[at + 1 : at + 1 + length])
        elif instruction == SYNC_READ:
            for motor in parameters[2:]:
                if self._hears(motor):
                    yield motor, _status(motor, 0, self._registers.get(motor, *parameters[:2]))
        else:
            for motor in IDS if target == BROADCAST else (target,):
                if not self._hears(motor):
                    continue
                data, error = b"", 0
                if instruction == READ:
                    data = self._registers.get(motor, *parameters)
                elif instruction == WRITE:
                    error = self._write(motor, parameters[0], parameters[1:])
                yield motor, _status(motor, error, data)

    def _hears(self, motor: int) -> bool:
        return motor in IDS and self._registers.fault(motor) != "mute"

    def _write(self, motor: int, start: int, data: bytes) -> int:
        """Set registers; returns the status packet's error."""
        registers = self._registers
        if not self._hears(motor) or registers.fault(motor) == "refuse":
            return OVERLOAD
        if registers.fault(motor) == "ignore":
            return 0
        torque = registers.read(motor, TORQUE)
        registers.put(motor, start, data)
        if start <= GOAL[0] < start + len(data):
            self._tell(motor, goal=registers.read(motor, GOAL))
            registers.write(motor, TORQUE, 1)  # a goal switches the torque on, as in real motors
        if registers.read(motor, TORQUE) != torque:
            self._tell(motor, torque=registers.read(motor, TORQUE))
        return 0

    def _tell(self, motor: int, **what: int) -> None:
        self._events.write(json.dumps({"t": time.perf_counter(), "motor": motor, **what}) + "\n")
        self._events.flush()


def _status(motor: int, error: int, data: bytes) -> bytes:
    body = bytes([motor, len(data) + 2, error]) + data
    return b"\xff\xff" + body + bytes([_checksum(body)])


def _checksum(body: bytes | bytearray) -> int:
    return ~sum(body) & 0xFF


def serve(registers: Path, events: Path) -> None:
    """Serve a new serial port until the parent process ends; its name is printed first."""
    parent = os.getppid()
    with suppress(OSError):  # motors have processors of their own, and LeRobot waits 50 ms for an answer
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    ours, theirs = pty.openpty()  # their end stays open here, too, so that they can close theirs and come again
    tty.setraw(theirs)
    print(os.ttyname(theirs), flush=True)
    answers: deque[tuple[float, bytes]] = deque()
    with events.open("a", encoding="utf-8") as file:
        servos = Servos(Registers(registers), file)
        while os.getppid() == parent:
            wait = TICK_S
            while answers and (wait := answers[0][0] - time.perf_counter()) <= 0:
                os.write(ours, answers.popleft()[1])
                wait = TICK_S
            if select.select([ours], [], [], min(wait, TICK_S))[0]:
                servos.move()
                answers.extend(servos.receive(os.read(ours, 4096)))
            else:
                servos.move()


class Bus:
    """A stand-in that runs in a process of its own.

    Args:
        folder: Folder for its files.
        name: Name of its files; two arms need two.

    Attributes:
        port: Name of its serial port.
        registers: The registers of its motors.
        registers_file: File of the registers.
        events_file: File of the events.
        process: The process that serves the port; None: the cable is pulled.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.registers_file, self.events_file = folder / f"{name}.registers", folder / f"{name}.events.jsonl"
        self.registers = Registers.create(self.registers_file)
        self.events_file.touch()
        self._link = folder / f"{name}.port"  # the same again, when it is plugged in again
        self.port = str(self._link)
        self.process: subprocess.Popen[str] | None = None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events so far of a kind, "goal" or "torque"."""
        records = [json.loads(line) for line in self.events_file.read_text(encoding="utf-8").splitlines()]
        return [record for record in records if kind in record]

    def plug(self) -> None:
        """Start it, or put its cable back."""
        files = (str(self.registers_file), str(self.events_file))
        command = [sys.executable, str(Path(__file__).resolve()), *files]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        self._link.unlink(missing_ok=True)
        self._link.symlink_to(port)

    def unplug(self) -> None:
        """Pull its USB cable: the port is gone; motors, which have their own supply, keep their torque."""
        if self.process is not None:
            self._link.unlink(missing_ok=True)
            self.process.kill()
            self.process.communicate()
            self.process = None


@contextmanager
def running_bus(folder: Path, name: str = "bus") -> Iterator[Bus]:
    """Start a stand-in, see `Bus`, and end it with the body."""
    bus = Bus(folder, name)
    bus.plug()
    try:
        yield bus
    finally:
        bus.unplug()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
