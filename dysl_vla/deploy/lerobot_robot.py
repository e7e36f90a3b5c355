"""Robots of LeRobot, imported when it is installed: "lerobot:FILE.json".

The file holds what LeRobot's own command line takes for the robot, and what this package must know of it:

    {"robot": {"type": "so101_follower", "port": "/dev/ttyACM0", "cameras": {...}},
     "rate_hz": 30, "action_low": [...], "action_high": [...]}

State and actions have LeRobot's names ("shoulder_pan.pos"), in its order; bounds are in its units. The instruction
comes from `dysl control --instruction`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.deploy.robot import Reading, robots
from dysl_vla.errors import ConfigError, MissingExtraError, RobotFault
from dysl_vla.files import read_json
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, FloatArray, WorldSpec


class LeRobotRobot:
    """Implements `Robot` with an object of LeRobot's `Robot` class.

    Args:
        robot: Not connected yet.
        rate_hz: At which it takes actions.
        action_low: Smallest action, in its units.
        action_high: Largest.

    Raises:
        ConfigError: The bounds do not fit its actions.
    """

    def __init__(
        self, robot: Any, rate_hz: float, action_low: tuple[float, ...], action_high: tuple[float, ...]
    ) -> None:
        self._robot = robot
        shown: Mapping[str, Any] = robot.observation_features
        names = tuple(robot.action_features)
        if len(names) != len(action_low) or len(names) != len(action_high):
            raise ConfigError(f"action_low, action_high: must have a value for each of {', '.join(names)}.")
        self.world = WorldSpec(
            cameras={name: tuple(kind[:2]) for name, kind in shown.items() if isinstance(kind, tuple)},
            state_names=tuple(name for name, kind in shown.items() if not isinstance(kind, tuple)),
            action_names=names,
            action_low=action_low,
            action_high=action_high,
            rate_hz=rate_hz,
        )
        self._latest: dict[str, float] = {}
        self._bus = threading.Lock()  # motors answer one question at a time
        self._is_stopped = False

    def connect(self, rate_hz: float) -> None:
        """See `Robot.connect`."""
        if rate_hz != self.world.rate_hz:
            raise ConfigError(f"rate: this robot takes {self.world.rate_hz:g} actions a second, not {rate_hz:g}.")
        with _faults("connect"):
            self._robot.connect(calibrate=False)  # which would ask questions; LeRobot has a command for it

    def observe(self, after: float) -> Reading:
        """See `Robot.observe`; LeRobot reads all sensors now."""
        if (left := after - time.perf_counter()) > 0:
            time.sleep(left)
        with self._bus, _faults("read"):
            taken_at = time.perf_counter()
            shown: Mapping[str, Any] = self._robot.get_observation()
        state = np.array([shown[name] for name in self.world.state_names], np.float32)
        self._latest = dict(zip(self.world.state_names, state.tolist(), strict=True))
        images = {IMAGE_PREFIX + camera: np.asarray(shown[camera]) for camera in self.world.cameras}
        return Reading({**images, STATE_KEY: state, TASK_KEY: ""}, taken_at)

    def act(self, action: FloatArray) -> None:
        """See `Robot.act`."""
        with self._bus, _faults("command"):
            self._robot.send_action(dict(zip(self.world.action_names, action.tolist(), strict=True)))

    def hold(self, last: FloatArray | None) -> FloatArray | None:
        """The last command, which is a position; before it, where the joints are."""
        if last is not None:
            return last
        if not set(self.world.action_names) <= set(self._latest):
            return None
        return np.array([self._latest[name] for name in self.world.action_names], np.float32)

    def report(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def stop(self) -> None:
        """Disconnect, which takes the torque off, as LeRobot is configured."""
        if self._is_stopped:
            return
        self._is_stopped = True
        try:
            with self._bus:
                if self._robot.is_connected:
                    self._robot.disconnect()
        except Exception as error:  # nothing more can be done from here, and stopping must not raise
            print(f"robot: LeRobot could not disconnect ({error}); switch it off.")


class _faults:  # noqa: N801 # reads as a statement
    """Errors of a driver, as faults of the robot."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise RobotFault(f"robot: could not {self._what} ({type(error).__name__}: {error}).") from error


@robots.register("lerobot")
def make_lerobot(text: str, cameras: Mapping[str, tuple[int, int]]) -> LeRobotRobot:
    """A robot of LeRobot, from a file; see the module.

    Raises:
        ConfigError: The file is damaged, or LeRobot refuses it.
        MissingExtraError: LeRobot is not installed.
    """
    path = Path(text)
    document = read_json(path)
    try:
        made_of = dict(document["robot"])
        kind = made_of.pop("type")
        rate = float(document["rate_hz"])
        low, high = (tuple(map(float, document[name])) for name in ("action_low", "action_high"))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}; see dysl_vla.deploy.lerobot_robot.") from error
    try:
        lerobot = import_module("lerobot.robots")
        draccus = import_module("draccus")
        with suppress(ModuleNotFoundError):  # some configurations register themselves when their module is imported
            import_module(f"lerobot.robots.{kind}")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the Python package {error.name!r} is not installed; mend it with: pip install lerobot (Python 3.12)"
        ) from error
    try:
        config = draccus.decode(lerobot.RobotConfig.get_choice_class(kind), made_of)
        robot = lerobot.make_robot_from_config(config)
    except Exception as error:  # draccus' and the drivers' errors share no base
        raise ConfigError(f"{path}: LeRobot refuses field 'robot' ({error}).") from error
    return LeRobotRobot(robot, rate, low, high)
