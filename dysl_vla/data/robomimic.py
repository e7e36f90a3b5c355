"""Human demonstrations of robosuite's, from HDF5 files of robomimic's or of robosuite's own recorder.

These files hold the simulator's states and the actions between them. They are played in the simulator, and what the
cameras see there is written as a LeRobotDataset v3, to be trained on beside other demonstrations, or alone. Recordings
in which the task is never done, which robomimic publishes, too, are left out, as failed episodes are elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.data.hdf5 import (
    demonstration_numbers,
    human_origin,
    naming,
    read_numbers,
    recorded_file,
    write_missing,
)
from dysl_vla.data.lerobot import DemonstrationWriter, Episode, Origin, check_writable
from dysl_vla.envs import get_suite, with_robot
from dysl_vla.envs.robosuite import FIVE, INSTRUCTIONS, ROBOTS, RobosuiteEnv, controllers
from dysl_vla.envs.robosuite_world import ACTION_NAMES, RATE_HZ
from dysl_vla.errors import DatasetError
from dysl_vla.files import locked_dir
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY

POSE_CONTROLLER = "OSC_POSE"
SETTINGS = (
    "input_min",
    "input_max",
    "output_min",
    "output_max",
    "kp",
    "damping_ratio",
    "impedance_mode",
    "interpolation",
    "uncouple_pos_ori",
)
"""Settings of the controller that decide which motion an action is."""


def import_robomimic(path: Path, out: Path, cameras: Mapping[str, tuple[int, int]] | None, limit: int | None) -> None:
    """Play the demonstrations of a file, and write those that the dataset lacks.

    Args:
        path: The file.
        out: Folder of the dataset.
        cameras: Camera name to (height, width); None for the suite's own.
        limit: Demonstrations that are imported at most; None for all.

    Raises:
        ConfigError: A camera is unknown.
        DatasetError: The file has another format, or is of another robot, controller or version.
    """
    with recorded_file(path) as data:
        # Find out which demonstrations of which world the file holds.
        task, robot = _world_of(path, data)
        suite = get_suite(with_robot("robosuite-5" if task in FIVE else "robosuite-all", robot)).name
        first = human_origin(path, suite, task)
        numbers = demonstration_numbers(path, data, limit)
        with closing(RobosuiteEnv(task, cameras, robot=robot)) as env:
            # Check that they can be played, before anything is written. Scenes take long to load: only one is, here.
            check_writable(out, env.embodiment, robot)
            with naming(path, data[f"demo_{numbers[0]}"]) as recorded:
                env.load_recorded(_scene(recorded))
            for number in numbers:
                with naming(path, data[f"demo_{number}"]) as recorded:
                    _check(recorded, env)
            # Play and write what is missing.
            with locked_dir(out), closing(DemonstrationWriter(out, env.embodiment, robot)) as writer:
                origins = [replace(first, episode_index=number) for number in numbers]
                write_missing(path, data, origins, writer, lambda recorded, origin: _play(recorded, env, origin))


def _world_of(path: Path, data: Any) -> tuple[str, str]:
    """The task and the robot of a file, if this package's environment can play it."""
    # Read what the file declares: robomimic's files do it in one attribute, robosuite's recordings in two.
    try:
        if "env_args" in data.attrs:
            made = json.loads(data.attrs["env_args"])
            name, settings = made["env_name"], dict(made["env_kwargs"])
        else:
            name, settings = data.attrs["env"], dict(json.loads(data.attrs["env_info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: does not declare its environment ({error!r}); download it again.") from error
    # Check that this package has the task, and that the same action is the same motion here.
    task = re.sub(r"(?<=.)(?=[A-Z])", "-", str(name)).lower()
    known = sorted(set(INSTRUCTIONS) - {"wipe"})  # its states do not hold what has been wiped off
    if task not in known:
        raise DatasetError(f"{path}: is of robosuite's {name!r}; those that can be played: {', '.join(known)}.")
    return task, check_motion(path, settings)


def check_motion(path: Path, settings: Mapping[str, Any]) -> str:
    """Check that an action of a recording is the same motion here.

    Args:
        path: The file, for messages.
        settings: The arguments of robosuite's environment that the file declares.

    Returns:
        The robot.

    Raises:
        DatasetError: The robot, the rate or the controller is another.
    """
    robots = settings.get("robots", ROBOTS[0])
    robot = robots[0] if isinstance(robots, list) and len(robots) == 1 else robots
    if robot not in ROBOTS or settings.get("control_freq", RATE_HZ) != RATE_HZ:
        raise DatasetError(
            f"{path}: is of {robots} at {settings.get('control_freq', RATE_HZ)} Hz; it can be played for one of "
            f"{', '.join(ROBOTS)} at {RATE_HZ} Hz."
        )
    recorded, ours = _pose_controller(settings.get("controller_configs")), _pose_controller(controllers(robot))
    if recorded is None or recorded.get("input_type", "delta") != "delta" or recorded.get("control_delta") is False:
        raise DatasetError(f"{path}: its actions are not relative poses (OSC_POSE); take the file with those.")
    frame = ("input_ref_frame",) if robot == "IIWA" else ()  # the others' bases are parallel to the world
    for name in SETTINGS + frame:
        if name in recorded and not _are_same(recorded[name], ours[name]):
            raise DatasetError(
                f"{path}: the controller's {name} is {recorded[name]}, here {ours[name]}: the same action would be "
                "another motion; record it again with robosuite's own controller."
            )
    return str(robot)


def _pose_controller(found: Any) -> Any:
    """The settings of the operational-space controller, wherever a version of robosuite keeps them; or None."""
    if not isinstance(found, dict):
        return None
    if found.get("type") == POSE_CONTROLLER:
        return found
    return next((inner for inner in map(_pose_controller, found.values()) if inner), None)


def _are_same(theirs: Any, ours: Any) -> bool:
    try:
        return bool(np.allclose(np.asarray(theirs, np.float64), ours))
    except (TypeError, ValueError):  # not numbers, or not as many
        return bool(theirs == ours)


def _scene(recorded: Any) -> str:
    scene = str(recorded.attrs.get("model_file", ""))
    if "<mujoco" not in scene:
        raise DatasetError("its attribute model_file is missing, or is not a MuJoCo scene.")
    return scene


def _check(recorded: Any, env: RobosuiteEnv) -> None:
    """Refuse a recording that the loaded scene cannot show. All scenes of a file hold the same objects."""
    _scene(recorded)
    numbers = read_numbers(recorded, "states", env.recorded_width), read_numbers(recorded, "actions", len(ACTION_NAMES))
    lengths = list(map(len, numbers))
    if lengths[0] != lengths[1] or not lengths[0]:
        raise DatasetError(f"it must have one action for each state, got {lengths[0]} states and {lengths[1]} actions.")


def _play(recorded: Any, env: RobosuiteEnv, origin: Origin) -> Episode | None:
    """Play a recording and return it as an episode; None when the task is never done in it."""
    env.load_recorded(_scene(recorded))
    images: dict[str, list[Any]] = {camera: [] for camera in env.embodiment.cameras}
    shown = []
    is_done = "rewards" in recorded and np.max(recorded["rewards"], initial=0) > 0  # the last action may do it
    for state in np.asarray(recorded["states"]):
        is_done |= env.show_recorded(state)
        observation = env.observe()
        for camera, frames in images.items():
            frames.append(observation[IMAGE_PREFIX + camera])
        shown.append(observation[STATE_KEY])
    if not is_done:
        return None
    return Episode(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        states=np.stack(shown),
        actions=env.embodiment.clip(np.asarray(recorded["actions"], np.float32)),
        instruction=env.instruction,
        origin=origin,
    )
