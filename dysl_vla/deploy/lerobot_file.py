"""The file that describes a robot of LeRobot, "lerobot:FILE.json": checked, and turned into LeRobot's own object.

It holds what LeRobot's own command line takes for the robot, and what this package must know of it; for an SO-101 with
two cameras (launch/so101.json):

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
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import SequenceMatcher
from importlib import import_module
from importlib.metadata import distributions, version
from pkgutil import iter_modules
from typing import Any

import numpy as np

from dysl_vla.deploy.lerobot_motors import one_line
from dysl_vla.errors import ConfigError, DyslError, MissingExtraError

KEYS = ("robot", "rate_hz", "action_low", "action_high", "rename")
"""Keys of the file; the last may be left out."""
HINTS = {
    "port": "it is the arm's serial port, which `lerobot-find-port` finds",
    "id": "it is the name under which `lerobot-calibrate` has stored its calibration",
}
Bounds = Sequence[float] | Mapping[str, float]


def make_described(document: Mapping[str, Any]) -> tuple[Any, str]:
    """Make LeRobot's object of the robot that a document describes.

    Args:
        document: The file's content.

    Returns:
        An object of LeRobot's `Robot` class, not connected; LeRobot's command that calibrates it.

    Raises:
        ConfigError: The document has a mistake, or LeRobot refuses it.
        MissingExtraError: LeRobot, or a package that this robot needs, is not installed.
    """
    if unknown := [key for key in document if key not in KEYS]:
        raise ConfigError(f"{', '.join(unknown)}: unknown; the keys are {', '.join(KEYS)}.")
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
        raise ConfigError(f"robot: LeRobot cannot make it ({one_line(error)}); check its calibration file.") from error
    return robot, _calibrate_command(described)


def _config(kind: str, described: Mapping[str, Any]) -> Any:
    """LeRobot's configuration of a robot.

    Raises:
        ConfigError: LeRobot has no such type, or refuses a field.
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
        # Only the cause tells what is wrong with a class itself; other errors begin with the field in backquotes
        cause = error if isinstance(error, draccus.utils.DecodingError) else error.__cause__ or error
        raise ConfigError(f"robot: LeRobot refuses a field ({one_line(cause)}).") from error
    if config.id is None:
        raise ConfigError(_missing_field("id"))
    return config


def _missing_field(name: str) -> str:
    return f"robot.{name} is missing" + (f"; {HINTS[name]}." if name in HINTS else ".")


def _type(where: str, described: object) -> str:
    """The type in the description of a robot or a camera.

    Raises:
        ConfigError: The description has no type.
    """
    kind = described.get("type") if isinstance(described, Mapping) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{where} must be an object with a type, as in launch/so101.json; got {described!r}.")
    return kind


def _cameras_in(where: str, described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All descriptions of cameras, also those of a bimanual robot's arms, and the keys that lead to them."""
    for name, value in described.items():
        if name == "cameras" and isinstance(value, Mapping):
            yield from ((f"{where}.cameras.{camera}", each) for camera, each in value.items())
        elif name == "cameras":
            raise ConfigError(f"{where}.cameras must be an object with a name for each camera, got {value!r}.")
        elif isinstance(value, Mapping):
            yield from _cameras_in(f"{where}.{name}", value)


def _choice(where: str, base: Any, folder: str, kind: str) -> Any:
    """LeRobot's configuration class of a type; modules register types when imported, so they are until one has it.

    Raises:
        ConfigError: No module registers the type.
    """
    failures, modules = [], _modules(folder, kind)
    while kind not in base.get_known_choices() and (module := next(modules, None)):
        try:
            import_module(module)
        except Exception as error:  # somebody else's module
            failures.append(f"{module} ({type(error).__name__}: {one_line(error)})")
    if kind not in base.get_known_choices():
        raise ConfigError(
            f"{where}.type must be a known type, got {kind!r}; lerobot {version('lerobot')} has "
            f"{', '.join(sorted(base.get_known_choices()))}. Others come with packages: install "
            f"lerobot_{folder.removesuffix('s')}_{kind}."
            + (f" These could not be imported: {', '.join(failures)}." if failures else "")
        )
    return base.get_choice_class(kind)


def _modules(folder: str, kind: str) -> Iterator[str]:
    """Modules that may register a type: LeRobot's own, beginning with names like the type's; then plug-ins."""
    own = [each.name for each in iter_modules(import_module(f"lerobot.{folder}").__path__) if each.ispkg]
    own.sort(key=lambda name: SequenceMatcher(None, name, kind).ratio(), reverse=True)
    yield from (f"lerobot.{folder}.{name}" for name in own)
    installed = (str(each.metadata["Name"]).replace("-", "_") for each in distributions())
    names = dict.fromkeys((*installed, *(each.name for each in iter_modules())))
    yield from (name for name in names if name.startswith(("lerobot_robot_", "lerobot_camera_")))


def _missing_package(error: ImportError) -> DyslError:
    """The error that says what to install."""
    if error.name == "lerobot":
        python = ".".join(map(str, sys.version_info[:2]))
        return MissingExtraError(
            "LeRobot is not installed here; make an environment with it (bash launch/lerobot_env.sh .venv-lerobot), "
            f"and run .venv-lerobot/bin/dysl (LeRobot needs Python 3.12 or later, this is {python})"
        )
    hint = re.search(r"'(.+?)' is required.*?(pip install '[^']+')", one_line(error))
    name, command = hint.groups() if hint else (error.name, f"pip install {error.name}")
    if name is None:
        return ConfigError(f"robot: LeRobot cannot be imported ({one_line(error)}); install it again.")
    return MissingExtraError(
        f"the Python package {name!r}, which this robot needs, is missing; install it with: {command}"
    )


def _calibrate_command(described: Mapping[str, Any]) -> str:
    """LeRobot's command that calibrates this robot, with all that is given but cameras."""

    def options(where: str, values: Mapping[str, Any]) -> Iterable[str]:
        for name, value in values.items():
            if isinstance(value, str | int | float):
                yield f"{where}.{name}={shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
            elif isinstance(value, Mapping) and name != "cameras":
                yield from options(f"{where}.{name}", value)

    return " ".join(["lerobot-calibrate", *options("--robot", described)])


def _number(name: str, value: object) -> float:
    """The value, if it is a number that an action can have.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < np.finfo(np.float32).max:
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    return float(value)


def checked_rate(value: object) -> float:
    """The rate of a file.

    Raises:
        ConfigError: It is not a number above zero.
    """
    if (rate := _number("rate_hz", value)) <= 0:
        raise ConfigError(f"rate_hz must be above zero, got {rate:g}.")
    return rate


def ordered_bounds(names: Sequence[str], low: Bounds, high: Bounds) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bounds of actions in the order of their names.

    Args:
        names: Names of the actions.
        low: Smallest actions, by name or in that order.
        high: Largest actions, likewise.

    Raises:
        ConfigError: A bound is missing, unknown or not finite, or no range is left between two.
    """
    values = []
    for field, given in (("action_low", low), ("action_high", high)):
        if isinstance(given, Mapping):
            if missing := [name for name in names if name not in given]:
                raise ConfigError(f"{field} must have a value for each action, got none for {', '.join(missing)}.")
            if unknown := [name for name in given if name not in names]:
                raise ConfigError(f"{field} must name actions among {', '.join(names)}; got {', '.join(unknown)}.")
        elif not isinstance(given, list | tuple) or len(given) != len(names):
            raise ConfigError(f"{field} must have a value for each of {', '.join(names)}; got {given!r}.")
        ordered = [given[name] for name in names] if isinstance(given, Mapping) else given
        values.append(tuple(_number(f"{field}.{name}", value) for name, value in zip(names, ordered, strict=True)))
    for name, lowest, highest in zip(names, *values, strict=True):
        if not np.float32(lowest) < np.float32(highest):
            raise ConfigError(f"action_low.{name} must be below action_high.{name}, got {lowest:g} and {highest:g}.")
    return values[0], values[1]


def renamed(rename: Mapping[str, str], observed: Sequence[str], actions: Sequence[str]) -> dict[str, str]:
    """The policy's name for each of LeRobot's.

    Args:
        rename: The policy's names for some of them; the others are the same.
        observed: LeRobot's names of cameras and state.
        actions: LeRobot's names of actions.

    Raises:
        ConfigError: A name is unknown, or two would become the same.
    """
    known = tuple(dict.fromkeys((*observed, *actions)))
    if not isinstance(rename, Mapping) or not all(isinstance(name, str) and name for name in rename.values()):
        raise ConfigError(f"rename must map this robot's names to other names, got {rename!r}.")
    if unknown := [name for name in rename if name not in known]:
        raise ConfigError(f"rename must name what this robot has, {', '.join(known)}; got {', '.join(unknown)}.")
    names = {name: rename.get(name, name) for name in known}
    for group in (observed, actions):
        taken: dict[str, str] = {}
        for name in group:
            if (other := taken.setdefault(names[name], name)) != name:
                raise ConfigError(f"rename: {other} and {name} would both be called {names[name]}.")
    return names
