"""Demonstrations as a policy needs them: opened with its cameras, their frames chosen and read as observations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.lerobot_format import TASKS
from dysl_vla.data.split import Split, split_for, trained_episodes
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, Observation, PolicySpec


def demonstrations_for(root: Path, spec: PolicySpec) -> Demonstrations:
    """Demonstrations as a policy needs them: its cameras alone, and its names where the dataset has none.

    Raises:
        DatasetError: The dataset is damaged, or does not have the policy's cameras.
        ConfigError: The dataset is of another embodiment than the policy's.
    """
    found = Demonstrations(root)
    names: dict[str, Sequence[str]] = {}
    if not found.has_state_names and len(found.spec.state_names) == len(spec.state_names):
        names["state_names"] = spec.state_names
    if not found.has_action_names and len(found.spec.action_names) == len(spec.action_names):
        names["action_names"] = spec.action_names
    demonstrations = Demonstrations(root, cameras=list(spec.cameras), **names)
    spec.check_embodiment(demonstrations.spec)
    return demonstrations


def split_of(demonstrations: Demonstrations, record: Any = None, share: float | None = None) -> Split:
    """The split of a dataset; see `split_for`. A dataset that seems to have lost episodes is reported on stderr.

    Args:
        demonstrations: The dataset.
        record: Provenance of the policy that the dataset is used with.
        share: Share of episodes to hold out.

    Raises:
        ConfigError: The share cannot be.
    """
    episodes, trained = len(demonstrations.rows), trained_episodes(record)
    if trained is not None and episodes < trained:
        print(
            f"{demonstrations.root}: has {episodes} episodes, the policy was trained on a dataset of {trained}. If it "
            "is that one, and LeRobot has numbered its episodes again since some were removed, episodes that count as "
            "held out may have been trained on.",
            file=sys.stderr,
        )
    return split_for(episodes, record, share)


def check_instructions(demonstrations: Demonstrations, task_index: NDArray[np.int64]) -> None:
    """Refuse frames without an instruction.

    Args:
        demonstrations: The dataset.
        task_index: Which of its instructions the frames have, (frames,).

    Raises:
        DatasetError: An instruction is blank.
    """
    if any(not demonstrations.instructions[task].strip() for task in np.unique(task_index)):
        raise DatasetError(
            f"{demonstrations.root / TASKS}: a task must say what to do, got a blank one, which frames have; write the "
            "instruction there."
        )


def observations(demonstrations: Demonstrations, chosen: NDArray[np.int64]) -> Iterator[tuple[int, Observation]]:
    """Read chosen frames as observations.

    Args:
        demonstrations: The dataset.
        chosen: Indices of frames in rising order.

    Yields:
        Index and observation of each frame.

    Raises:
        DatasetError: A file is damaged, an instruction is blank, or the cameras' videos are not in one order.
    """
    columns = demonstrations.columns()
    check_instructions(demonstrations, columns["task_index"][chosen])
    wanted = set(chosen.tolist())
    episodes = set(columns["episode_index"][chosen].tolist())
    cameras = list(demonstrations.spec.cameras)
    for views in zip(*(demonstrations.frames(camera, episodes) for camera in cameras), strict=True):
        if len({view[:2] for view in views}) > 1:
            raise DatasetError(f"{demonstrations.root}: its cameras' videos hold episodes in different orders.")
        episode, frame, _ = views[0]
        index = demonstrations.rows[episode].start + frame
        if index in wanted:
            yield (
                index,
                {
                    **{IMAGE_PREFIX + camera: view[2] for camera, view in zip(cameras, views, strict=True)},
                    STATE_KEY: columns["states"][index],
                    TASK_KEY: demonstrations.instructions[columns["task_index"][index]],
                },
            )


def choose_frames(demonstrations: Demonstrations, count: int, split: Split, *, held_out: bool) -> NDArray[np.int64]:
    """Choose frames, evenly spread over the episodes that are, or are not, held out.

    Args:
        demonstrations: The dataset.
        count: How many frames to choose; all, if there are fewer.
        split: The rule by which episodes are held out.
        held_out: Whether the frames come from the episodes that are held out, or from the others.

    Returns:
        Indices of frames in rising order, (frames,).

    Raises:
        ConfigError: `count` is less than one.
        DatasetError: There are no such episodes.
    """
    if count < 1:
        raise ConfigError(f"frames must be at least 1, got {count}.")
    kept = [row for row in demonstrations.rows if split.is_held_out(row.number) == held_out]
    frames = np.concatenate([np.arange(row.start, row.start + row.length) for row in kept] or [np.empty(0, np.int64)])
    if not len(frames):
        raise DatasetError(f"{demonstrations.root}: {split.explain(len(demonstrations.rows))}.")
    return np.asarray(frames[evenly(len(frames), count)], np.int64)


def evenly(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` indices of a sequence, evenly spread, in rising order."""
    return np.arange(min(length, count)) * length // max(1, min(length, count))
