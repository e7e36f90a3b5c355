"""Robots of LeRobot, imported when it is installed: "lerobot:FILE.json".

The file holds what LeRobot's own command line takes for the robot, and what this package must know of it; for an SO-101
with two cameras (launch/so101.json):

    {
      "robot": {
        "type": "so101_follower",
        "port": "/dev/ttyACM0",
        "id": "my_arm",
        "cameras": {
          "front": {"type": "opencv", "index_or_path": 0, "width": 640, "height": 480, "fps": 30},
          "wrist": {"type": "opencv", "index_or_path": 2, "width": 640, "height": 480, "fps": 30}
        }
      },
      "rate_hz": 30,
      "action_low": {
        "shoulder_pan.pos": -110, "shoulder_lift.pos": -105, "elbow_flex.pos": -100,
        "wrist_flex.pos": -100, "wrist_roll.pos": -180, "gripper.pos": 0
      },
      "action_high": {
        "shoulder_pan.pos": 110, "shoulder_lift.pos": 105, "elbow_flex.pos": 100,
        "wrist_flex.pos": 100, "wrist_roll.pos": 180, "gripper.pos": 100
      }
    }

Cameras, state and actions have LeRobot's names, in its order; bounds are in its units, by name or as lists in that
order. "rename" maps its names to those that the policy was trained with: {"front": "top", "shoulder_pan.pos": "j1"}.
The instruction comes from `dysl control --instruction`.

Stopping takes the torque off the motors, unless the file has LeRobot's "disable_torque_on_disconnect": false. It does
so whatever cameras, or calls that have not come back, are doing.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from difflib import SequenceMatcher
from functools import partial
from importlib import import_module
from importlib.metadata import distributions, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np

from dysl_vla.deploy.robot import TimedObservation, robots
from dysl_vla.errors import ConfigError, DyslError, MissingExtraError, RobotFault
from dysl_vla.files import read_json
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EmbodimentSpec, FloatArray

TURN_S = 0.2
"""How long a call waits for the one that LeRobot is busy with; stopping goes on without it then."""
FRAME_S = 0.5
"""How long a reading waits for new frames."""
RELEASE_S = 1.5
"""How long motors are asked to give up their torque."""
CLOSE_S = 1.0
"""How long LeRobot is given to disconnect, and then cameras to close; the motors are released by then."""
POLL_S = 0.001
NAP_S = 0.02
STOPPED = "robot: it was stopped; make a new one to go on."
KEYS = ("robot", "rate_hz", "action_low", "action_high", "rename")
"""Of the file; the last may be left out."""
FLAG = "disable_torque_on_disconnect"
TORQUE = "Torque_Enable"
HINTS = {
    "port": "it is the arm's serial port, which `lerobot-find-port` tells",
    "id": "it is the name under which `lerobot-calibrate` has stored its calibration",
}

Bounds = Sequence[float] | Mapping[str, float]


class LeRobotRobot:
    """Implements `Robot` with an object of LeRobot's `Robot` class.

    Args:
        robot: Not connected yet.
        rate_hz: At which it takes actions.
        action_low: Smallest action, in its units: by its names, or in its order.
        action_high: Largest.
        rename: Its names of cameras, state and actions, to the policy's.
        calibrate: The command that calibrates it, for messages.

    Raises:
        ConfigError: Rate, bounds or names do not fit it.
    """

    def __init__(
        self,
        robot: Any,
        rate_hz: float,
        action_low: Bounds,
        action_high: Bounds,
        *,
        rename: Mapping[str, str] | None = None,
        calibrate: str = "lerobot-calibrate",
    ) -> None:
        shown: Mapping[str, Any] = robot.observation_features
        sizes = {name: kind[:2] for name, kind in shown.items() if isinstance(kind, tuple) and kind[2:] == (3,)}
        self._states = tuple(name for name, kind in shown.items() if not isinstance(kind, tuple))
        self._actions = tuple(robot.action_features)
        names = _renamed({} if rename is None else rename, (*sizes, *self._states), self._actions)
        low, high = _bounds(self._actions, action_low, action_high)
        self.embodiment = EmbodimentSpec(
            cameras={names[name]: size for name, size in sizes.items()},
            state_names=tuple(names[name] for name in self._states),
            action_names=tuple(names[name] for name in self._actions),
            action_low=low,
            action_high=high,
            rate_hz=_rate(rate_hz),
        )
        self._robot, self._calibrate = robot, calibrate
        self._images = {name: names[name] for name in sizes}
        self._parts = _parts(robot, import_module("lerobot.robots").Robot)
        self._not_connected: type[Exception] = import_module("lerobot.utils.errors").DeviceNotConnectedError
        self._cameras = _cameras(self._parts, shown)
        self._ports = [_Port(each.bus.port_handler) for each in self._motors() if hasattr(each.bus, "port_handler")]
        self._latest: dict[str, float] = {}
        self._turn = threading.Lock()  # LeRobot answers one call at a time
        self._doing = ""
        self._ending = threading.Lock()
        self._is_used = self._is_stopped = self._is_overtaken = False
        self._left = ""

    def connect(self, rate_hz: float) -> None:
        """See `Robot.connect`. Where it fails, the robot is stopped."""
        if not math.isclose(rate_hz, self.embodiment.rate_hz):
            raise ConfigError(f"rate: this robot takes {self.embodiment.rate_hz:g} actions a second, not {rate_hz:g}.")
        try:
            with self._alone("connect"):
                self._is_used = True
                if kept := [prefix + FLAG for prefix, part in self._parts.items() if not _lets_go(part)]:
                    _say(f"{', '.join(kept)} is false: motors keep their torque when the robot is stopped.")
                if not self._motors():
                    _say("releasing its motors is left to its own driver, which may not do so: see that they let go.")
                # Calibrating would ask questions, and some robots do not know the word.
                knows = "calibrate" in inspect.signature(self._robot.connect).parameters
                self._robot.connect(**({"calibrate": False} if knows else {}))
                is_calibrated = self._robot.is_calibrated is not False
        except RobotFault:
            with suppress(RobotFault):  # which is said already; why it could not be connected is to be raised
                self.stop()
            raise
        if not is_calibrated:
            with suppress(RobotFault):
                self.stop()
            raise RobotFault(
                f"robot: its motors are not calibrated as {self._robot.calibration_fpath} says, so positions would be "
                f"wrong; calibrate it with: {self._calibrate}"
            )

    def observe(self, after: float) -> TimedObservation:
        """See `Robot.observe`; cameras without time stamps of their own are read now."""
        self._await_frames(after)
        with self._alone("read"):
            stamps = [getattr(camera, "latest_timestamp", None) for camera in self._seen().values()]
            timestamp = min([time.perf_counter(), *(stamp for stamp in stamps if stamp is not None)])
            shown: Mapping[str, Any] = self._robot.get_observation()
            state = np.array([shown[name] for name in self._states], np.float32)
            images = {IMAGE_PREFIX + name: np.asarray(shown[theirs]) for theirs, name in self._images.items()}
        self._latest = dict(zip(self.embodiment.state_names, state.tolist(), strict=True))
        return TimedObservation({**images, STATE_KEY: state, TASK_KEY: ""}, timestamp)

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        with self._alone("command"):
            self._robot.send_action(dict(zip(self._actions, action.tolist(), strict=True)))

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """The last command, positions, and no velocity; before it, where the joints are."""
        if last is not None:
            held = last.copy()
            held[[name.endswith(".vel") for name in self._actions]] = 0.0
            return held
        latest = self._latest
        if not set(self.embodiment.action_names) <= set(latest):
            return None
        return np.array([latest[name] for name in self.embodiment.action_names], np.float32)

    def report(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def stop(self) -> None:
        """See `Robot.stop`: the motors let go first, then LeRobot disconnects, then cameras are closed.

        Returns within some seconds. What could not be done is also said on stderr.

        Raises:
            RobotFault: Motors may still hold torque; all else has been done.
        """
        self._left = ""
        _surely(self._stop)
        if self._left:
            raise RobotFault(f"robot: {self._left}")

    def _stop(self) -> None:
        with self._ending:  # who calls a second time, waits for the first
            if self._is_stopped:
                return
            self._is_stopped = True
            has_turn = self._turn.acquire(timeout=TURN_S)
            self._is_overtaken = not has_turn
            self._let_go()
            if has_turn:
                self._turn.release()

    def _stop_again(self) -> None:
        with self._ending:
            self._let_go()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """LeRobot's object is ours in the body; its errors are faults. What comes back after a stop is undone."""
        if self._is_stopped:
            raise RobotFault(STOPPED)
        if not self._turn.acquire(timeout=TURN_S):
            raise RobotFault(
                f"robot: could not {what}: it is still busy with the call to {self._doing} after {TURN_S:g} s."
            )
        self._doing = what
        try:
            if self._is_stopped:
                raise RobotFault(STOPPED)
            yield
        except Exception as error:
            if self._is_stopped or isinstance(error, RobotFault):
                raise RobotFault(STOPPED) from error
            shut = "" if what == "connect" else self._shut()
            raise RobotFault(f"robot: could not {what} ({type(error).__name__}: {_line(error)}{shut}).") from error
        finally:
            self._turn.release()
            if self._is_overtaken:
                _surely(self._stop_again)
        if self._is_overtaken:
            raise RobotFault(STOPPED)

    def _shut(self) -> str:
        """Which cameras are not open: LeRobot only says that the whole robot is not connected."""
        shut = []
        for name, camera in self._cameras.items():
            with suppress(Exception):
                if not camera.is_connected:
                    shut.append(name)
        return f"; not open: camera {', '.join(shut)}" if shut else ""

    def _seen(self) -> dict[str, Any]:
        """The cameras whose images are in readings: not those that only measure depth."""
        return {name: camera for name, camera in self._cameras.items() if getattr(camera, "use_rgb", True)}

    def _await_frames(self, after: float) -> None:
        """Wait until each camera whose own thread stamps its frames has one that is later, and it is later itself.

        Raises:
            RobotFault: One has none in time.
        """
        stamped = {name: camera for name, camera in self._seen().items() if hasattr(camera, "thread")}
        until = max(after, time.perf_counter()) + FRAME_S
        while not self._is_stopped:
            old = [name for name, camera in stamped.items() if not (camera.latest_timestamp or -math.inf) > after]
            now = time.perf_counter()
            if now > after and not old:
                return
            if now > until:
                raise RobotFault(
                    f"robot: camera {', '.join(old)} has shown nothing new for {FRAME_S:g} s; see to its cable."
                )
            time.sleep(max(POLL_S, min(after - now, NAP_S)))
        raise RobotFault(STOPPED)

    def _motors(self) -> list[_Motors]:
        """The motors on LeRobot's buses, some of which are made when it connects; other drivers have none."""
        return [
            _Motors(prefix, part, bus)
            for prefix, part in self._parts.items()
            for bus in tuple(vars(part).values())  # another thread may be connecting it
            if hasattr(bus, "motors") and hasattr(bus, "disable_torque")
        ]

    def _let_go(self) -> None:
        """Motors first, whatever cameras and `is_connected` say. Each step has its time, and none can raise."""
        if not self._is_used:
            return
        for port in self._ports:
            port.shut()
        for part in self._parts.values():
            with suppress(AttributeError):
                part.cameras = {}  # a closed one would keep LeRobot from disconnecting, a stuck one delay it
        motors = self._motors()
        ours = [each for each in motors if _lets_go(each.owner)]
        _each([each.release for each in ours], RELEASE_S + CLOSE_S)
        [error] = _each([self._robot.disconnect], CLOSE_S)
        _each([partial(each.bus.disconnect, False) for each in motors], CLOSE_S)
        if held := [name for each in ours for name in each.held]:
            why = next(each.error for each in ours if each.held)
            self._left = (
                f"{', '.join(held)} may still hold torque, which did not come off ({why}): switch the arm's power off."
            )
        elif error is not None and not ours and not isinstance(error, self._not_connected):
            self._left = (
                f"LeRobot could not disconnect ({_line(error)}): it may still hold or move: switch its power off."
            )
        if self._left:
            _say(self._left)
        _each([camera.disconnect for camera in self._cameras.values()], CLOSE_S)


class _Motors:
    """Motors on one bus.

    Args:
        prefix: Of their names.
        owner: The robot, or the arm, that has them.
        bus: LeRobot's.

    Attributes:
        held: Those that may still have torque.
        error: Why.
    """

    def __init__(self, prefix: str, owner: Any, bus: Any) -> None:
        self.owner, self.bus = owner, bus
        self._names = {prefix + motor: motor for motor in bus.motors}
        self.held = list(self._names)
        self.error = ""

    def release(self) -> None:
        """Take the torque off each motor, and on a serial bus look whether it is off, until it is or time is over."""
        if not self.bus.is_connected:
            self.held = []  # it was not opened, so nothing was switched on
            return
        port = getattr(self.bus, "port_handler", None)
        until = time.perf_counter() + RELEASE_S
        while True:
            with suppress(Exception):
                if port is not None:
                    self._ask_all(port)
            for name in tuple(self.held):
                try:
                    self.bus.disable_torque(self._names[name])
                    if port is None or self.bus.read(TORQUE, self._names[name], normalize=False) == 0:
                        self.held.remove(name)
                    else:
                        self.error = "it says that it is off, and is on"
                except Exception as error:  # a driver's; the other motors must be asked, too
                    self.error = _line(error)
            if not self.held or time.perf_counter() > until:
                return
            time.sleep(NAP_S)
            if port is not None and not _answers(port):
                with suppress(Exception):  # the cable may have been put back
                    port.closePort()
                with suppress(Exception):
                    port.openPort()

    def _ask_all(self, port: Any) -> None:
        """One packet to all motors, which is obeyed also where their answers are lost."""
        port.is_using = False  # by a call that will not come back to it
        self.bus.sync_write(TORQUE, {self._names[name]: 0 for name in self.held}, normalize=False)


class _Port:
    """Keeps others off a serial port once the robot is stopped.

    A call that was under way then fails at its next byte, instead of moving a motor or switching it on.

    Args:
        port: The motors' SDK's handler.
    """

    def __init__(self, port: Any) -> None:
        self._write, self._read = port.writePort, port.readPort
        port.writePort, port.readPort = self.write, self.read
        self._one = threading.Lock()
        self._is_shut = False

    def write(self, packet: Any) -> Any:
        """Instead of the port's."""
        if getattr(_LETTING_GO, "is_it", False):
            return self._write(packet)
        with self._one:
            self._check()
            return self._write(packet)

    def read(self, length: int) -> Any:
        """Instead of the port's."""
        if not getattr(_LETTING_GO, "is_it", False):
            self._check()
        return self._read(length)

    def shut(self) -> None:
        """From now on; what is being written is written."""
        self._is_shut = True
        if self._one.acquire(timeout=TURN_S):
            self._one.release()

    def _check(self) -> None:
        if self._is_shut:
            raise ConnectionError(STOPPED)


_LETTING_GO = threading.local()
"""`is_it` in threads that release motors."""


def _each(jobs: Sequence[Callable[[], object]], seconds: float) -> list[Exception | None]:
    """Do jobs at the same time, on threads that may use shut ports, and wait so long; what is not done then, goes on.

    Returns:
        Their errors.
    """
    errors: list[Exception | None] = [TimeoutError(f"not done after {seconds:g} s") for _ in jobs]

    def work(index: int) -> None:
        _LETTING_GO.is_it = True
        try:
            jobs[index]()
            errors[index] = None
        except Exception as error:  # a driver's
            errors[index] = error

    threads = [_started(partial(work, index), is_daemon=True) for index in range(len(jobs))]
    until = time.perf_counter() + seconds
    for thread in threads:
        if thread is not None:
            thread.join(max(0.0, until - time.perf_counter()))
    return list(errors)


def _surely(work: Callable[[], None]) -> None:
    """Do it to its end: an impatient second Ctrl-C, or the end of the program, would leave the motors on."""
    is_done = threading.Event()  # `Thread.join` takes a thread for dead when it is interrupted

    def run() -> None:
        try:
            work()
        except Exception as error:  # stopping must not raise, but must not be silent either
            _say(f"could not be stopped ({type(error).__name__}: {_line(error)}): switch its power off.")
        finally:
            is_done.set()

    _started(run, is_daemon=False)
    while not is_done.is_set():
        with suppress(KeyboardInterrupt):
            is_done.wait()


def _started(work: Callable[[], None], is_daemon: bool) -> threading.Thread | None:
    """A thread; where the system gives no more of them, the work is done at once, and there is none."""
    thread = threading.Thread(target=work, name="stop", daemon=is_daemon)
    try:
        thread.start()
    except RuntimeError:
        work()
        return None
    return thread


def _parts(robot: Any, kind: type) -> dict[str, Any]:
    """A robot, and the arms that it is made of, by the prefix of their names ("left_")."""
    parts = {"": robot}
    for name, part in vars(robot).items():
        if isinstance(part, kind):
            parts |= {name.removesuffix("arm") + prefix: inner for prefix, inner in _parts(part, kind).items()}
    return parts


def _cameras(parts: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """All cameras, by their names in readings."""
    cameras: dict[str, Any] = {}
    for prefix, part in reversed(tuple(parts.items())):  # the whole robot's names of its arms' cameras may clash
        for name, camera in getattr(part, "cameras", {}).items():
            if camera not in cameras.values():
                cameras[prefix + name if prefix + name in shown else name] = camera
    return cameras


def _lets_go(part: Any) -> bool:
    return bool(getattr(getattr(part, "config", None), FLAG, True))


def _answers(port: Any) -> bool:
    """The port is there, whether motors are or not."""
    try:
        return bool(port.is_open) and port.ser.in_waiting >= 0
    except Exception:  # each SDK and system has its own
        return False


def _say(what: str) -> None:
    with suppress(OSError):
        print(f"robot: {what}", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _number(name: str, value: object) -> float:
    """It, if it is one that an action can have.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < np.finfo(np.float32).max:
        raise ConfigError(f"{name}: {value!r} must be a finite number.")
    return float(value)


def _rate(value: object) -> float:
    if (rate := _number("rate_hz", value)) <= 0:
        raise ConfigError(f"rate_hz: {rate:g} must be above zero.")
    return rate


def _bounds(names: Sequence[str], low: Bounds, high: Bounds) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bounds in the order of names.

    Raises:
        ConfigError: One is missing, unknown, not finite, or no range is left between them.
    """
    values = []
    for field, given in (("action_low", low), ("action_high", high)):
        if isinstance(given, Mapping):
            if missing := [name for name in names if name not in given]:
                raise ConfigError(f"{field}: has no value for {', '.join(missing)}.")
            if unknown := [name for name in given if name not in names]:
                raise ConfigError(f"{field}: {', '.join(unknown)} is no action of this robot: {', '.join(names)}.")
        elif not isinstance(given, list | tuple) or len(given) != len(names):
            raise ConfigError(f"{field}: must have a value for each of {', '.join(names)}.")
        ordered = [given[name] for name in names] if isinstance(given, Mapping) else given
        values.append(tuple(_number(f"{field}.{name}", value) for name, value in zip(names, ordered, strict=True)))
    for name, lowest, highest in zip(names, *values, strict=True):
        if not np.float32(lowest) < np.float32(highest):
            raise ConfigError(f"action_low.{name}: {lowest:g} must be below action_high.{name}, {highest:g}.")
    return values[0], values[1]


def _renamed(rename: Mapping[str, str], shown: Sequence[str], actions: Sequence[str]) -> dict[str, str]:
    """LeRobot's name to the policy's, of all that is shown or commanded.

    Raises:
        ConfigError: A name is unknown, or two things would have the same.
    """
    known = tuple(dict.fromkeys((*shown, *actions)))
    if not isinstance(rename, Mapping) or not all(isinstance(name, str) and name for name in rename.values()):
        raise ConfigError(f"rename: {rename!r} must map this robot's names to other names.")
    if unknown := [name for name in rename if name not in known]:
        raise ConfigError(f"rename: {', '.join(unknown)} is unknown; this robot has: {', '.join(known)}.")
    names = {name: rename.get(name, name) for name in known}
    for group in (shown, actions):
        taken: dict[str, str] = {}
        for name in group:
            if (other := taken.setdefault(names[name], name)) != name:
                raise ConfigError(f"rename: {other} and {name} would both be called {names[name]}.")
    return names


@robots.register("lerobot")
def make_lerobot(text: str, cameras: Mapping[str, tuple[int, int]]) -> LeRobotRobot:
    """A robot of LeRobot, from a file; see the module.

    Raises:
        ConfigError: The file is damaged, or LeRobot refuses it.
        MissingExtraError: LeRobot, or a package that this robot needs, is not installed.
    """
    path = Path(text)
    document = read_json(path)
    try:
        return _made(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _made(document: Mapping[str, Any]) -> LeRobotRobot:
    if unknown := [key for key in document if key not in KEYS]:
        raise ConfigError(f"{', '.join(unknown)}: unknown; there are {', '.join(KEYS)}.")
    if missing := [key for key in KEYS[:-1] if key not in document]:
        raise ConfigError(f"{', '.join(missing)}: missing; see launch/so101.json.")
    described = document["robot"]
    kind = _type("robot", described)
    try:
        config = _config(kind, described)
        robot = import_module("lerobot.robots").make_robot_from_config(config)
    except ImportError as error:
        raise _missing_package(error) from error
    except ConfigError:
        raise
    except Exception as error:  # draccus' and the drivers' errors share no base
        raise ConfigError(f"robot: LeRobot cannot make it; see to its calibration file ({_line(error)}).") from error
    return LeRobotRobot(
        robot,
        document["rate_hz"],
        document["action_low"],
        document["action_high"],
        rename=document.get("rename", {}),
        calibrate=_calibrate_command(described),
    )


def _config(kind: str, described: Mapping[str, Any]) -> Any:
    """LeRobot's configuration of a robot.

    Raises:
        ConfigError: It has no such type, or refuses a field.
        ImportError: A package is missing.
    """
    lerobot, draccus = import_module("lerobot.robots"), import_module("draccus")
    config_class = _choice("robot", lerobot.RobotConfig, "robots", kind)
    for where, camera in _cameras_in("robot", described):
        _choice(where, import_module("lerobot.cameras").CameraConfig, "cameras", _type(where, camera))
    names = [each.name for each in fields(config_class) if each.init]
    given = {name: value for name, value in described.items() if name != "type"}
    if unknown := [name for name in given if name not in names]:
        raise ConfigError(f"robot: {kind} has no {', '.join(unknown)}; it has {', '.join(names)}.")
    needed = [each.name for each in fields(config_class) if each.default is each.default_factory is MISSING]
    for name in needed:
        if given.get(name) is None:
            raise ConfigError(_missing_field(name))
    try:
        config = draccus.decode(config_class, given)
    except draccus.utils.DraccusException as error:
        # Errors of a class itself are told in the cause alone; others begin with the field in backquotes.
        told = error if isinstance(error, draccus.utils.DecodingError) else error.__cause__ or error
        raise ConfigError(f"robot: LeRobot refuses a field ({_line(told)}).") from error
    if config.id is None:
        raise ConfigError(_missing_field("id"))
    return config


def _missing_field(name: str) -> str:
    return f"robot.{name}: is missing" + (f"; {HINTS[name]}." if name in HINTS else ".")


def _type(where: str, described: object) -> str:
    """Its type.

    Raises:
        ConfigError: It has none.
    """
    kind = described.get("type") if isinstance(described, Mapping) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: {described!r} must be an object with a type, as in launch/so101.json.")
    return kind


def _cameras_in(where: str, described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All descriptions of cameras, also those of a bimanual robot's arms, with where they are."""
    for name, value in described.items():
        if name == "cameras" and isinstance(value, Mapping):
            yield from ((f"{where}.cameras.{camera}", each) for camera, each in value.items())
        elif name == "cameras":
            raise ConfigError(f"{where}.cameras: {value!r} must be an object, with a name for each camera.")
        elif isinstance(value, Mapping):
            yield from _cameras_in(f"{where}.{name}", value)


def _choice(where: str, base: Any, folder: str, kind: str) -> Any:
    """LeRobot's configuration class of a type; importing its module registers it, so those are imported until it has.

    Raises:
        ConfigError: None has it.
    """
    failures, modules = [], _modules(folder, kind)
    while kind not in base.get_known_choices() and (module := next(modules, None)):
        try:
            import_module(module)
        except Exception as error:  # somebody else's module
            failures.append(f"{module} ({type(error).__name__}: {_line(error)})")
    if kind not in base.get_known_choices():
        raise ConfigError(
            f"{where}.type: {kind!r} is unknown; lerobot {version('lerobot')} has "
            f"{', '.join(sorted(base.get_known_choices()))}. Others come with packages: install "
            f"lerobot_{folder.removesuffix('s')}_{kind}."
            + (f" These could not be imported: {', '.join(failures)}." if failures else "")
        )
    return base.get_choice_class(kind)


def _modules(folder: str, kind: str) -> Iterator[str]:
    """Modules that may register a type: LeRobot's own, those first whose name is like it; then plug-ins."""
    own = [each.name for each in iter_modules(import_module(f"lerobot.{folder}").__path__) if each.ispkg]
    own.sort(key=lambda name: SequenceMatcher(None, name, kind).ratio(), reverse=True)
    yield from (f"lerobot.{folder}.{name}" for name in own)
    installed = (str(each.metadata["Name"]).replace("-", "_") for each in distributions())
    names = dict.fromkeys((*installed, *(each.name for each in iter_modules())))
    yield from (name for name in names if name.startswith(("lerobot_robot_", "lerobot_camera_")))


def _missing_package(error: ImportError) -> DyslError:
    """What to install."""
    if error.name == "lerobot":
        python = ".".join(map(str, sys.version_info[:2]))
        return MissingExtraError(
            "LeRobot is not installed; mend it with: pip install 'lerobot[feetech]' (it needs Python 3.12 or later, "
            f"this is {python})"
        )
    told = re.search(r"'(.+?)' is required.*?(pip install '[^']+')", _line(error))
    name, command = told.groups() if told else (error.name, f"pip install {error.name}")
    if name is None:
        return ConfigError(f"robot: LeRobot cannot be imported ({_line(error)}).")
    return MissingExtraError(f"the Python package {name!r}, which this robot needs, is missing; mend it: {command}")


def _calibrate_command(described: Mapping[str, Any]) -> str:
    """Of LeRobot, for this robot: type, ports, id and what else is given, but for cameras."""

    def options(where: str, values: Mapping[str, Any]) -> Iterable[str]:
        for name, value in values.items():
            if isinstance(value, str | int | float):
                yield f"{where}.{name}={shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
            elif isinstance(value, Mapping) and name != "cameras":
                yield from options(f"{where}.{name}", value)

    return " ".join(["lerobot-calibrate", *options("--robot", described)])
