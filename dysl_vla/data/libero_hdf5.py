"""LIBERO's own demonstrations: HDF5 files that hold the arm's state and the images of both cameras.

Two programs write this layout. Each row of LIBERO's scripts/create_dataset.py holds an action and the observation after
it; each row of openvla-oft's regenerate_libero_dataset.py holds the observation before the action. The simulator's
states, which both keep from before the action, tell the one from the other, so that here every observation gets the
action that followed it.

Images are stored upside down, and are turned by 180 degrees, as policies for LIBERO see them. They were rendered with
shadows and reflections, which the dataset says. The instruction is that of the file's name, TASK_demo.hdf5, as in
published evaluations: the names in the files themselves are partly those of before LIBERO's publication.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data.hdf5 import (
    demonstration_numbers,
    human_origin,
    naming,
    read_numbers,
    recorded_file,
    write_missing,
)
from dysl_vla.data.lerobot import DemonstrationWriter, Episode, Origin, check_writable
from dysl_vla.data.robomimic import check_motion
from dysl_vla.envs.libero import HORIZONS, folder_of, instruction_of
from dysl_vla.envs.libero_package import task_map
from dysl_vla.envs.robosuite_libero import rotation_vector
from dysl_vla.envs.robosuite_world import RATE_HZ
from dysl_vla.errors import DatasetError
from dysl_vla.files import locked_dir
from dysl_vla.types import FULL_QUALITY, LIBERO_ACTIONS, LIBERO_STATE, EmbodimentSpec, FloatArray, ImageArray

ROBOT = "Panda"
IMAGES = {"agentview": "obs/agentview_rgb", "robot0_eye_in_hand": "obs/eye_in_hand_rgb"}
"""Camera to where its images are in a demonstration."""
ARM, FINGERS, POSE = "obs/joint_states", "obs/gripper_states", "obs/ee_states"
OWN_NAMES = (*IMAGES.values(), ARM, FINGERS, POSE, "obs/ee_ori")
"""Parts of a demonstration by which a file of LIBERO's is recognised: robomimic gives its own other names."""
TO_POLICIES: dict[str, Callable[[ImageArray], ImageArray]] = {
    "opengl": lambda images: images[:, ::-1, ::-1],
    "opencv": lambda images: images[:, :, ::-1],
}
"""robosuite's convention of images, whose "opengl" is upside down, to what makes them those that policies see."""
JOINTS = slice(1, 8)
"""The arm's joints in a state of the simulator, which begins with the time."""
FAR = 0.1
"""Mean distance in radians of recorded joints from those of the simulator's states above which they do not belong
together."""
SAME_ROTATION = 0.01
"""Largest difference in radians of rotation vectors that are the same."""


@dataclass(frozen=True)
class _File:
    """What the importer has found out about a file."""

    path: Path
    origins: list[Origin]
    instruction: str
    sizes: dict[str, tuple[int, int]]
    convention: str
    is_behind: bool
    """Whether each row's observation is the one after its action."""


def is_libero(data: Any) -> bool:
    """Tell whether a file is one of LIBERO's, by what its group `data` holds."""
    demonstrations = (value for name, value in data.items() if name.startswith("demo_"))
    first = next(demonstrations, None)
    return "bddl_file_name" in data.attrs or (first is not None and any(name in first for name in OWN_NAMES))


def import_libero(paths: Sequence[Path], out: Path, limit: int | None) -> None:
    """Write those demonstrations of LIBERO's files that a dataset lacks. All files are checked first.

    Args:
        paths: The files, of one or several suites, with images of one size.
        out: Folder of the dataset.
        limit: Demonstrations of each file that are imported at most; None for all.

    Raises:
        DatasetError: A file is damaged or of no known task, or does not fit the others or the dataset.
        MissingExtraError: The packages of LIBERO's tasks are not installed.
    """
    files = [_inspect(path, limit) for path in paths]
    for file in files:
        if file.sizes != files[0].sizes:
            raise DatasetError(
                f"{file.path}: images must be of one size in all files, got {_shown(file.sizes)}, and "
                f"{_shown(files[0].sizes)} in {files[0].path.name}; import them into two datasets."
            )
    spec = EmbodimentSpec(
        cameras=files[0].sizes,
        state_names=LIBERO_STATE,
        action_names=LIBERO_ACTIONS,
        action_low=(-1.0,) * len(LIBERO_ACTIONS),
        action_high=(1.0,) * len(LIBERO_ACTIONS),
        rate_hz=float(RATE_HZ),
    )
    check_writable(out, spec, ROBOT, FULL_QUALITY)
    with locked_dir(out), closing(DemonstrationWriter(out, spec, ROBOT, FULL_QUALITY)) as writer:
        for file in files:
            with recorded_file(file.path) as data:
                write_missing(file.path, data, file.origins, writer, partial(_read, file=file, spec=spec))


def _inspect(path: Path, limit: int | None) -> _File:
    """Check everything of a file but its pixels."""
    with recorded_file(path) as data:
        suite, task = _task_of(path, data)
        if "env_args" in data.attrs:
            _check_world(path, data)
        convention = _text(data, "macros_image_convention") or "opengl"
        if convention not in TO_POLICIES:
            known = " or ".join(TO_POLICIES)
            raise DatasetError(
                f"{path}: macros_image_convention must be {known}, got {convention!r}; take LIBERO's own."
            )
        numbers = demonstration_numbers(path, data, limit)
        sizes: dict[str, tuple[int, int]] = {}
        distances = []
        for number in numbers:
            with naming(path, data[f"demo_{number}"]) as recorded:
                found = _check(recorded)
                sizes = sizes or found
                if found != sizes:
                    raise DatasetError(
                        f"its images must be {_shown(sizes)}, as those before it are, got {_shown(found)}; take it out."
                    )
                distances.append(_distances(recorded))
        before, after = np.mean(distances, axis=0)
        if min(before, after) > FAR:
            raise DatasetError(
                f"{path}: its {ARM} are {min(before, after):.2g} rad from its states on average, so that they are of "
                "different moments; download it again."
            )
        first = human_origin(path, suite, task)
        origins = [replace(first, episode_index=number) for number in numbers]
        return _File(path, origins, instruction_of(task), sizes, convention, bool(after < before))


def _task_of(path: Path, data: Any) -> tuple[str, str]:
    """Suite and task of a file, by its name, or where that is no task's by the name of the task's file in it."""
    suites = {task: suite for suite in HORIZONS for task in task_map()[folder_of(suite)]}
    named, recorded = path.stem.removesuffix("_demo"), PurePosixPath(_text(data, "bddl_file_name")).stem
    if named in suites and recorded in suites and named != recorded:
        raise DatasetError(
            f"{path}: is named as {named}, its bddl_file_name is {recorded}'s; give it back the name "
            f"{recorded}_demo.hdf5, or download it again."
        )
    task = named if named in suites else recorded
    if task not in suites:
        near = "".join(f", such as {name}" for name in difflib.get_close_matches(named, suites, n=1))
        also = f", and neither is its bddl_file_name, {recorded}" if recorded else ""
        raise DatasetError(
            f"{path}: {named!r} is no task of {', '.join(HORIZONS)}{also}; name the file TASK_demo.hdf5{near}."
        )
    said = _language(path, data)
    if said and said.lower() != instruction_of(task):
        print(
            f"{path.name}: the instruction is {instruction_of(task)!r}, as in published evaluations; the file's "
            f"problem_info has {said!r}.",
            file=sys.stderr,
        )
    return suites[task], task


def _text(data: Any, name: str) -> str:
    value = data.attrs.get(name, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _language(path: Path, data: Any) -> str:
    """The instruction that a file holds itself, which is text or a list of words; empty when there is none."""
    try:
        problem = json.loads(_text(data, "problem_info") or "{}")
        return "".join(problem.get("language_instruction", "")).strip().strip('"')
    except (AttributeError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: its problem_info is damaged ({error!r}); download it again.") from error


def _check_world(path: Path, data: Any) -> None:
    """Refuse a file whose actions are other motions than LIBERO's."""
    try:
        settings = dict(json.loads(_text(data, "env_args"))["env_kwargs"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: its env_args are damaged ({error!r}); download it again.") from error
    if (robot := check_motion(path, settings)) != ROBOT:
        raise DatasetError(f"{path}: is of {robot}, LIBERO's robot is the {ROBOT}; take a file of that.")


def _check(recorded: Any) -> dict[str, tuple[int, int]]:
    """Refuse a demonstration that lacks something; return the sizes of its images."""
    widths = {"actions": len(LIBERO_ACTIONS), "states": None, ARM: 7, FINGERS: 2, **_pose(recorded)}
    lengths = {name: len(read_numbers(recorded, name, width)) for name, width in widths.items()}
    lengths["rewards"] = len(_rewards(recorded))
    sizes = {}
    for camera, name in IMAGES.items():
        if name not in recorded:
            raise DatasetError(f"its {name} are missing; LIBERO's scripts/create_dataset.py records them.")
        shape: tuple[int, ...] = getattr(recorded[name], "shape", ())
        kind = getattr(recorded[name], "dtype", None)
        if len(shape) != 4 or shape[3] != 3 or kind != np.uint8:
            raise DatasetError(f"its {name} must be uint8 of shape (time, height, width, 3), got {kind} of {shape}.")
        lengths[name], sizes[camera] = shape[0], (int(shape[1]), int(shape[2]))
    if len(set(lengths.values())) > 1 or lengths["actions"] < 2:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise DatasetError(f"it must have one of each for every moment, of two or more; got {found}.")
    _check_rotation(recorded)
    return sizes


def _pose(recorded: Any) -> dict[str, int]:
    """Names and widths of what holds the hand's position and rotation vector: one matrix or, without it, two."""
    halves = {"obs/ee_pos": 3, "obs/ee_ori": 3}
    return halves if POSE not in recorded and "obs/ee_pos" in recorded else {POSE: 6}


def _check_rotation(recorded: Any) -> None:
    """Refuse rotation vectors that are not those of the recorded quaternions, by the formula of the environments."""
    if "robot_states" not in recorded:
        return
    vectors = _state(recorded)[:, 3:6]
    quaternions = read_numbers(recorded, "robot_states", 9)[:, 5:]
    expected = np.array([rotation_vector(w, np.array(axis)) for *axis, w in quaternions])
    # The first row of regenerated files has the observation of another moment.
    if expected.shape != vectors.shape or np.abs(expected - vectors)[1:].max() > SAME_ROTATION:
        raise DatasetError(
            "its rotation vectors (obs/ee_ori) must be those of the quaternions in its robot_states, with angles from "
            "0 to 2 pi, got others; download the file again."
        )


def _distances(recorded: Any) -> tuple[float, float]:
    """How far the arm's recorded joints are from those of the state of their row, and from those of the next row's."""
    joints, states = read_numbers(recorded, ARM, 7), read_numbers(recorded, "states", None)[:, JOINTS]
    if states.shape != joints.shape:
        raise DatasetError(f"its states must have shape (time, 8 or more), got {states.shape[1] + 1} columns.")
    # The first observation of regenerated files is from some steps of rest after the first state.
    return float(np.abs(joints[1:] - states[1:]).mean()), float(np.abs(joints[:-1] - states[1:]).mean())


def _rewards(recorded: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(recorded["rewards"], np.float64).reshape(-1)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise DatasetError(f"its rewards are missing, damaged, or not numbers ({error}).") from error


def _state(recorded: Any) -> FloatArray:
    """The arm's states, (time, 8): position, rotation vector, fingers."""
    widths = {**_pose(recorded), FINGERS: 2}
    return np.hstack([read_numbers(recorded, name, width) for name, width in widths.items()]).astype(np.float32)


def _read(recorded: Any, origin: Origin, *, file: _File, spec: EmbodimentSpec) -> Episode | None:
    """Read a demonstration as an episode; None when the task is never done in it."""
    if _rewards(recorded).max() <= 0:
        return None
    # With observations from after the actions of their rows, the last one is followed by no action.
    shown, acted = (slice(-1), slice(1, None)) if file.is_behind else (slice(None), slice(None))
    actions = read_numbers(recorded, "actions", len(LIBERO_ACTIONS)).astype(np.float32)
    turn = TO_POLICIES[file.convention]
    return Episode(
        images={camera: np.ascontiguousarray(turn(_images(recorded, name)[shown])) for camera, name in IMAGES.items()},
        states=_state(recorded)[shown],
        actions=spec.clip(actions[acted]),
        instruction=file.instruction,
        origin=origin,
    )


def _images(recorded: Any, name: str) -> ImageArray:
    try:
        return np.asarray(recorded[name])
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"its {name} are damaged ({error}); download the file again.") from error


def _shown(sizes: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{camera} {height}x{width}" for camera, (height, width) in sizes.items())
