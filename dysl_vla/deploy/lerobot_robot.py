"""A robot of LeRobot, driven by LeRobot's own driver: "lerobot:FILE.json", see `lerobot_file`.

Stopping takes the torque off the motors, unless the file has LeRobot's "disable_torque_on_disconnect": false. It does
so whatever cameras, or calls that have not come back, are doing.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.lerobot_file import Bounds, checked_rate, make_described, ordered_bounds, renamed
from dysl_vla.deploy.lerobot_motors import (
    NAP_S,
    RELEASE_S,
    STOPPED,
    TURN_S,
    GuardedPort,
    Motors,
    one_line,
    print_line,
    run_all,
    run_to_end,
)
from dysl_vla.deploy.robot import TimedObservation, hold_action, robots
from dysl_vla.errors import ConfigError, RobotFault
from dysl_vla.files import read_json
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EmbodimentSpec, FloatArray, action_kinds

FRAME_S = 0.5
"""How long an observation waits for new frames."""
CLOSE_S = 1.0
"""How long LeRobot is given to disconnect, and then cameras to close; the motors are released by then."""
POLL_S = 0.001
UNFINISHED = "it was not stopped to the end: switch its power off."
FLAG = "disable_torque_on_disconnect"


class LeRobotRobot:
    """Implements `Robot` with an object of LeRobot's `Robot` class.

    Args:
        robot: LeRobot's object, not connected yet.
        rate_hz: Rate at which it takes actions.
        action_low: Smallest action in LeRobot's units, by LeRobot's names or in its order.
        action_high: Largest action, given likewise.
        rename: LeRobot's names of cameras, state and actions to the policy's.
        calibrate: The command that calibrates the robot, for messages.

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
        features: Mapping[str, Any] = robot.observation_features
        sizes = {name: kind[:2] for name, kind in features.items() if isinstance(kind, tuple) and kind[2:] == (3,)}
        self._states = tuple(name for name, kind in features.items() if not isinstance(kind, tuple))
        self._actions = tuple(robot.action_features)
        names = renamed({} if rename is None else rename, (*sizes, *self._states), self._actions)
        low, high = ordered_bounds(self._actions, action_low, action_high)
        self.embodiment = EmbodimentSpec(
            cameras={names[name]: size for name, size in sizes.items()},
            state_names=tuple(names[name] for name in self._states),
            action_names=tuple(names[name] for name in self._actions),
            action_low=low,
            action_high=high,
            rate_hz=checked_rate(rate_hz),
            action_kinds=action_kinds(self._actions),
        )
        self._robot, self._calibrate = robot, calibrate
        self._images = {name: names[name] for name in sizes}
        self._parts = _parts(robot, import_module("lerobot.robots").Robot)
        self._not_connected: type[Exception] = import_module("lerobot.utils.errors").DeviceNotConnectedError
        self._cameras = _cameras(self._parts, features)
        self._known_motors: list[Motors] = []
        self._ports = [
            GuardedPort(each.bus.port_handler) for each in self._motors() if hasattr(each.bus, "port_handler")
        ]
        self._latest: dict[str, float] = {}
        self._turn = threading.Lock()  # LeRobot answers one call at a time
        self._doing = ""
        self._ending = threading.Lock()
        self._is_used = self._is_stopped = self._is_overtaken = self._has_disconnected = False
        self._problem = ""

    def connect(self, rate_hz: float) -> None:
        """See `Robot.connect`. Where it fails, the robot is stopped."""
        if not math.isclose(rate_hz, self.embodiment.rate_hz):
            raise ConfigError(
                f"rate must be the {self.embodiment.rate_hz:g} actions a second of this robot's file, got {rate_hz:g}."
            )
        try:
            with self._alone("connect"):
                if kept := [prefix + FLAG for prefix, part in self._parts.items() if not _releases(part)]:
                    print_line(f"{', '.join(kept)} is false: motors keep their torque when the robot is stopped.")
                if not self._motors():
                    print_line(
                        "releasing its motors is left to its own driver, which may not do so: check that they are "
                        "released."
                    )
                # Calibrating would ask questions, and some robots' connect does not take the argument
                takes_calibrate = "calibrate" in inspect.signature(self._robot.connect).parameters
                self._is_used = True  # from here on, motors may be switched on
                self._robot.connect(**({"calibrate": False} if takes_calibrate else {}))
                for motors in self._motors():
                    motors.was_open = True
                is_calibrated = self._robot.is_calibrated is not False
        except RobotFault:
            with suppress(RobotFault):  # stop has printed its own; why the robot could not be connected is to be raised
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
        """See `Robot.observe`; a camera without timestamps of its own counts as read now."""
        self._await_frames(after)
        with self._alone("read"):
            stamps = [getattr(camera, "latest_timestamp", None) for camera in self._colour_cameras().values()]
            timestamp = min([time.perf_counter(), *(stamp for stamp in stamps if stamp is not None)])
            observed: Mapping[str, Any] = self._robot.get_observation()
            state = np.array([observed[name] for name in self._states], np.float32)
            images = {IMAGE_PREFIX + name: np.asarray(observed[theirs]) for theirs, name in self._images.items()}
        self._latest = dict(zip(self.embodiment.state_names, state.tolist(), strict=True))
        return TimedObservation({**images, STATE_KEY: state, TASK_KEY: ""}, timestamp)

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        with self._alone("command"):
            self._robot.send_action(dict(zip(self._actions, action.tolist(), strict=True)))

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """See `hold_action`; before the first command, positions are where the joints are."""
        return hold_action(self.embodiment, last, self._latest)

    def report(self) -> dict[str, Any]:
        """Nothing: LeRobot keeps no record."""
        return {}

    def stop(self) -> None:
        """See `Robot.stop`: the motors are released first, then LeRobot disconnects, then cameras are closed.

        Returns within some seconds. What could not be done is also printed on stderr. A further call tries again what
        has failed.

        Raises:
            RobotFault: Motors may still hold torque; all else has been done.
        """
        problems: list[str] = []
        run_to_end(lambda: problems.append(self._stop()))
        if problem := "".join(problems or [UNFINISHED]):
            raise RobotFault(f"robot: {problem}")

    def _stop(self) -> str:
        """Stop, unless an earlier call has succeeded.

        Returns:
            What could not be done; empty: all was.
        """
        with self._ending:  # a second caller waits for the first
            if self._is_stopped and not self._problem:
                return ""
            self._is_stopped = True
            has_turn = self._turn.acquire(timeout=TURN_S)
            self._is_overtaken |= not has_turn
            try:
                self._release()
            finally:
                if has_turn:
                    self._turn.release()
            return self._problem

    def _stop_again(self) -> None:
        with self._ending:
            self._release()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Have LeRobot's object to oneself; its errors become faults. What comes back after a stop is undone."""
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
            closed = "" if what == "connect" else self._closed_cameras()
            raise RobotFault(f"robot: could not {what} ({type(error).__name__}: {one_line(error)}{closed}).") from error
        finally:
            self._turn.release()
            if self._is_overtaken:
                run_to_end(self._stop_again)
        if self._is_overtaken:
            raise RobotFault(STOPPED)

    def _closed_cameras(self) -> str:
        """Which cameras are not open, for a message: LeRobot only says that the whole robot is not connected."""
        closed = []
        for name, camera in self._cameras.items():
            with suppress(Exception):
                if not camera.is_connected:
                    closed.append(name)
        return f"; not open: camera {', '.join(closed)}" if closed else ""

    def _colour_cameras(self) -> dict[str, Any]:
        """The cameras whose images are in observations: not those that only measure depth."""
        return {name: camera for name, camera in self._cameras.items() if getattr(camera, "use_rgb", True)}

    def _await_frames(self, after: float) -> None:
        """Wait until that time is over, and each camera whose own thread stamps its frames has a later one.

        Raises:
            RobotFault: A camera has no later frame in time.
        """
        stamped = {name: camera for name, camera in self._colour_cameras().items() if hasattr(camera, "thread")}
        until = max(after, time.perf_counter()) + FRAME_S
        while not self._is_stopped:
            old = [name for name, camera in stamped.items() if not (camera.latest_timestamp or -math.inf) > after]
            now = time.perf_counter()
            if now > after and not old:
                return
            if now > until:
                raise RobotFault(
                    f"robot: camera {', '.join(old)} has shown nothing new for {FRAME_S:g} s; check its cable."
                )
            time.sleep(max(POLL_S, min(after - now, NAP_S)))
        raise RobotFault(STOPPED)

    def _motors(self) -> list[Motors]:
        """The motors on LeRobot's buses, some of which are made when it connects; other drivers have no buses."""
        known = self._known_motors  # they know which of them may still have torque
        for prefix, part in self._parts.items():
            for bus in tuple(vars(part).values()):  # another thread may be connecting it
                is_bus = hasattr(bus, "motors") and hasattr(bus, "disable_torque")
                if is_bus and not any(motors.bus is bus for motors in known):
                    known.append(Motors(prefix, part, bus))
        return list(known)

    def _release(self) -> None:
        """Release the motors first, whatever cameras and `is_connected` say. Each step has its time; none can raise."""
        if not self._is_used:
            return
        self._problem = UNFINISHED
        # Keep calls that are under way off the ports, and cameras out of LeRobot's way
        for port in self._ports:
            port.shut()
        for part in self._parts.values():
            with suppress(AttributeError):
                part.cameras = {}  # a closed one would keep LeRobot from disconnecting, a stuck one delay it
        # Release the motors, disconnect, close the buses
        motors = self._motors()
        ours = [each for each in motors if _releases(each.owner)]
        run_all([each.release for each in ours], RELEASE_S + CLOSE_S)
        [error] = run_all([self._robot.disconnect], CLOSE_S)
        run_all([partial(each.bus.disconnect, False) for each in motors], CLOSE_S)
        # Say what may still hold torque
        is_disconnected = error is None or (self._has_disconnected and isinstance(error, self._not_connected))
        self._has_disconnected |= is_disconnected
        if held := [name for each in ours for name in each.held]:
            why = next(each.error for each in ours if each.held)
            self._problem = (
                f"{', '.join(held)} may still hold torque, which could not be taken off ({why}): switch the arm's "
                "power off."
            )
        elif not ours and not is_disconnected:
            assert error is not None
            self._problem = (
                f"LeRobot could not disconnect ({one_line(error)}): it may still hold or move: switch its power off."
            )
        else:
            self._problem = ""
        if self._problem:
            print_line(self._problem)
        # Close the cameras last
        run_all([camera.disconnect for camera in self._cameras.values()], CLOSE_S)


def _parts(robot: Any, kind: type) -> dict[str, Any]:
    """The robot and the arms that it is made of, by the prefix of their names ("left_")."""
    parts = {"": robot}
    for name, part in vars(robot).items():
        if isinstance(part, kind):
            parts |= {name.removesuffix("arm") + prefix: inner for prefix, inner in _parts(part, kind).items()}
    return parts


def _cameras(parts: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """All cameras, by their names in observations."""
    cameras: dict[str, Any] = {}
    for prefix, part in reversed(tuple(parts.items())):  # the whole robot's names of its arms' cameras may clash
        for name, camera in getattr(part, "cameras", {}).items():
            if camera not in cameras.values():
                cameras[prefix + name if prefix + name in features else name] = camera
    return cameras


def _releases(part: Any) -> bool:
    """Whether stopping takes the torque off its motors."""
    return bool(getattr(getattr(part, "config", None), FLAG, True))


@robots.register("lerobot")
def make_lerobot(text: str, cameras: Mapping[str, tuple[int, int]]) -> LeRobotRobot:
    """The robot that a file describes; see `lerobot_file`.

    Args:
        text: Path of the file.
        cameras: Ignored: the file names the robot's cameras and their sizes.

    Raises:
        ConfigError: The file is damaged, or LeRobot refuses it.
        MissingExtraError: LeRobot, or a package that this robot needs, is not installed.
    """
    path = Path(text)
    document = read_json(path)
    try:
        robot, calibrate = make_described(document)
        return LeRobotRobot(
            robot,
            document["rate_hz"],
            document["action_low"],
            document["action_high"],
            rename=document.get("rename", {}),
            calibrate=calibrate,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
