"""Human demonstrations of robosuite's, from HDF5 files of robomimic's or of robosuite's own recorder.

These files hold the simulator's states and the actions between them. They are played in the simulator, and what the
cameras see there is written as a LeRobotDataset v3, to be trained on beside other demonstrations, or alone. Recordings
in which the task is never done, which robomimic publishes, too, are left out, as failed episodes are elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, Origin, check_writable
from dysl_vla.data.options import SIZE, camera_options
from dysl_vla.envs import get_suite, with_robot
from dysl_vla.envs.robosuite import ACTION_NAMES, FIVE, INSTRUCTIONS, RATE_HZ, ROBOTS, RobosuiteEnv, controllers
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import locked_dir, sha256
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY

HUMAN = "human"
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
NO_SEED = -1
"""The seed of demonstrations whose initial states this package did not draw."""


@dataclass(frozen=True)
class ImportConfig:
    """Write an HDF5 file of robomimic's or robosuite's as a LeRobotDataset v3. Resumes where it stopped."""

    file: Path
    """HDF5 file that was recorded with robosuite 1.5, such as robomimic's demo_v15.hdf5; its states are rendered."""
    out: Path
    """Folder of the dataset; an existing one of the same world is continued."""
    episodes: int | None = None
    """Demonstrations that are imported at most. All when not given."""
    cameras: str | None = None
    """Camera sizes, "agentview=128x128,robot0_eye_in_hand=96x96"; the suite's own when not given."""

    def __post_init__(self) -> None:
        if self.episodes is not None and self.episodes < 1:
            raise ConfigError(f"episodes must be at least 1, got {self.episodes}; leave it out to import all.")


def import_robomimic(config: ImportConfig) -> Demonstrations:
    """Play the file's demonstrations, and write those that the dataset lacks.

    Returns:
        The dataset, opened.

    Raises:
        ConfigError: A value of the configuration is wrong.
        DatasetError: The file has another format, or is of another robot, controller or version.
    """
    sizes = camera_options("cameras", config.cameras or "", SIZE, "128x128")
    cameras = {name: (height, width) for name, (height, width) in sizes.items()} or None
    with _recorded(config.file) as data:
        # Find out which demonstrations of which world the file holds.
        task, robot = _world_of(config.file, data)
        suite = get_suite(with_robot("robosuite-5" if task in FIVE else "robosuite-all", robot)).name
        first = Origin(suite, task, NO_SEED, 0, f"{HUMAN}@{sha256(config.file)[:12]}", 0.0)
        numbers = sorted(int(found[1]) for name in data if (found := re.fullmatch(r"demo_(\d+)", name)))
        numbers = numbers[: config.episodes]
        if not numbers:
            raise DatasetError(f"{config.file}: holds no demonstrations (groups data/demo_0 and so on).")
        with closing(RobosuiteEnv(task, cameras, robot=robot)) as env:
            # Check that they can be played, before anything is written. Scenes take long to load: only one is, here.
            check_writable(config.out, env.embodiment, robot)
            with _naming(config.file, data[f"demo_{numbers[0]}"]) as recorded:
                env.load_recorded(_scene(recorded))
            for number in numbers:
                with _naming(config.file, data[f"demo_{number}"]) as recorded:
                    _check(recorded, env)
            # Play and write what is missing.
            with locked_dir(config.out), closing(DemonstrationWriter(config.out, env.embodiment, robot)) as writer:
                origins = [replace(first, episode_index=number) for number in numbers]
                _write_missing(config.file, data, env, origins, writer)
    return Demonstrations(config.out)


def _write_missing(
    path: Path, data: Any, env: RobosuiteEnv, origins: Sequence[Origin], writer: DemonstrationWriter
) -> None:
    done = {row.origin for row in writer.rows}
    failed = 0
    with tqdm(origins, desc=env.task, unit="episode") as progress:
        for origin in progress:
            if origin in done:
                continue
            with _naming(path, data[f"demo_{origin.episode_index}"]) as recorded:
                episode = _play(recorded, env, origin)
            if episode is None:
                failed += 1
                progress.set_postfix(failures=failed)
            else:
                writer.append(episode)
    if failed:
        progress.write(f"{failed} of {len(origins)} were left out, since the task is never done in them.")


@contextmanager
def _recorded(path: Path) -> Iterator[Any]:
    with needs_extra("hdf5"):
        import h5py
    if not path.is_file():
        raise ConfigError(f"file: {path} does not exist.")
    try:
        opened = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read as HDF5 ({error}); download it again.") from error
    with opened:
        if "data" not in opened:
            raise DatasetError(f"{path}: has no group 'data'; robomimic's files and robosuite's recordings have.")
        yield opened["data"]


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
    # Check that this package has the task, the robot and the rate.
    task = re.sub(r"(?<=.)(?=[A-Z])", "-", str(name)).lower()
    known = sorted(set(INSTRUCTIONS) - {"wipe"})  # its states do not hold what has been wiped off
    if task not in known:
        raise DatasetError(f"{path}: is of robosuite's {name!r}; those that can be played: {', '.join(known)}.")
    robots = settings.get("robots", ROBOTS[0])
    robot = robots[0] if isinstance(robots, list) and len(robots) == 1 else robots
    if robot not in ROBOTS or settings.get("control_freq", RATE_HZ) != RATE_HZ:
        raise DatasetError(
            f"{path}: is of {robots} at {settings.get('control_freq', RATE_HZ)} Hz; it can be played for one of "
            f"{', '.join(ROBOTS)} at {RATE_HZ} Hz."
        )
    # Check that the same action is the same motion here.
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
    return task, robot


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


@contextmanager
def _naming(path: Path, recorded: Any) -> Iterator[Any]:
    """Add the name of a recording to the message of an error."""
    try:
        yield recorded
    except DatasetError as error:
        raise DatasetError(f"{path}: {recorded.name}: {error}") from error


def _scene(recorded: Any) -> str:
    scene = str(recorded.attrs.get("model_file", ""))
    if "<mujoco" not in scene:
        raise DatasetError("its attribute model_file is missing, or is not a MuJoCo scene.")
    return scene


def _check(recorded: Any, env: RobosuiteEnv) -> None:
    """Refuse a recording that the loaded scene cannot show. All scenes of a file hold the same objects."""
    _scene(recorded)
    numbers = _numbers(recorded, "states", env.recorded_width), _numbers(recorded, "actions", len(ACTION_NAMES))
    lengths = list(map(len, numbers))
    if lengths[0] != lengths[1] or not lengths[0]:
        raise DatasetError(f"it must have one action for each state, got {lengths[0]} states and {lengths[1]} actions.")


def _numbers(recorded: Any, name: str, width: int) -> NDArray[np.float64]:
    try:
        values = np.asarray(recorded[name], np.float64)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DatasetError(f"its {name} are missing, damaged, or not numbers ({error}).") from error
    if values.ndim != 2 or values.shape[1] != width:
        raise DatasetError(f"its {name} must have shape (time, {width}), got {values.shape}.")
    if not np.isfinite(values).all():
        raise DatasetError(f"its {name} have a value that is not finite.")
    return values


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
