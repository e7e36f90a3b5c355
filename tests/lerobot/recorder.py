"""A small dataset of a scripted SO-101, written by LeRobot's own recorder as `lerobot-record` does it.

    python -m tests.lerobot.recorder FOLDER --episodes 4 --seconds 6

Features are made from LeRobot's robot object, and frames go through its writer and its codec; arm and images are
computed, not waited for, so that it takes as long as encoding does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.lerobot.fake_cameras import HEIGHT, WIDTH, Noise, picture
from tests.lerobot.feetech_bus import MOTORS, RESOLUTION

INSTRUCTION = "pick up the cube"
CAMERAS = {"front": 0, "wrist": 2}
"""Name to number, as in launch/so101.json."""
# Phases of an episode: when it ends (share of the episode), and where the joints are then, in degrees; the gripper in
# per cent. The first joint's are for a cube straight ahead.
PHASES = (
    (0.25, (0.0, 20.0, -30.0, 40.0, 0.0, 80.0)),
    (0.45, (0.0, 45.0, -40.0, 60.0, 10.0, 80.0)),
    (0.55, (0.0, 45.0, -40.0, 60.0, 10.0, 20.0)),
    (0.75, (0.0, -10.0, 10.0, 20.0, 10.0, 20.0)),
    (0.90, (30.0, 10.0, 0.0, 30.0, 0.0, 20.0)),
    (1.00, (30.0, 10.0, 0.0, 30.0, 0.0, 80.0)),
)
REST = (0.0, -60.0, 60.0, 30.0, 0.0, 50.0)
LAG_S = 0.1
"""Time by which a joint lags behind its goal."""


def goals(seconds: float, fps: int, cube: float) -> NDArray[np.float32]:
    """Goals of one episode.

    Args:
        seconds: Length of the episode.
        fps: Goals a second.
        cube: Position of the cube, in degrees of the first joint.

    Returns:
        (frames, 6), in LeRobot's units.
    """
    times = [0.0, *(share * seconds for share, _ in PHASES)]
    points = np.array([REST, *(point for _, point in PHASES)])
    points[1:, 0] += cube
    now = np.arange(round(seconds * fps)) / fps
    return np.stack([np.interp(now, times, joint) for joint in points.T], axis=1).astype(np.float32)


def steps(position: NDArray[np.float32]) -> list[int]:
    """Encoder steps of a position in LeRobot's units, as its driver computes them."""
    values = []
    for motor, value in zip(MOTORS, position.tolist(), strict=True):
        low, high = MOTORS[motor].range_min, MOTORS[motor].range_max
        share = value / 100 * (high - low) + low if motor == "gripper" else value * (RESOLUTION - 1) / 360
        values.append(round(share if motor == "gripper" else share + (low + high) / 2))
    return values


def frames(seconds: float, fps: int, episode: int) -> Iterator[tuple[dict[str, object], dict[str, float]]]:
    """What LeRobot's robot would observe, and what its teleoperator would command, for each frame of an episode."""
    wanted = goals(seconds, fps, cube=float(np.random.default_rng(episode).uniform(-30, 30)))
    noise = {name: Noise(number) for name, number in CAMERAS.items()}
    state = wanted[0].copy()
    names = [f"{motor}.pos" for motor in MOTORS]
    for index, goal in enumerate(wanted):
        images = {
            name: cv2.cvtColor(noise[name].add(picture(number, index / fps, steps(state))), cv2.COLOR_BGR2RGB)
            for name, number in CAMERAS.items()
        }
        yield (
            {**dict(zip(names, state.tolist(), strict=True)), **images},
            dict(zip(names, goal.tolist(), strict=True)),
        )
        state = state + (goal - state) * np.float32(min(1.0, 1 / (fps * LAG_S)))


def _create(root: Path, fps: int, use_videos: bool) -> Any:
    """An empty dataset with the features of the robot."""
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.datasets import LeRobotDataset, aggregate_pipeline_dataset_features, create_initial_features
    from lerobot.processor import make_default_processors
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
    from lerobot.utils.feature_utils import combine_feature_dicts

    cameras = {
        name: OpenCVCameraConfig(index_or_path=number, width=WIDTH, height=HEIGHT, fps=fps)
        for name, number in CAMERAS.items()
    }
    with tempfile.TemporaryDirectory() as folder:  # for a calibration, which features do not need
        robot = SO101Follower(
            SO101FollowerConfig(port="/dev/null", id="recorder", cameras=cameras, calibration_dir=Path(folder))
        )
    for_action, _, for_observation = make_default_processors()
    features = combine_feature_dicts(
        aggregate_pipeline_dataset_features(
            pipeline=for_action,
            initial_features=create_initial_features(action=robot.action_features),
            use_videos=use_videos,
        ),
        aggregate_pipeline_dataset_features(
            pipeline=for_observation,
            initial_features=create_initial_features(observation=robot.observation_features),
            use_videos=use_videos,
        ),
    )
    return LeRobotDataset.create(
        "local/so101",
        fps,
        features=features,
        root=root,
        robot_type=robot.name,
        use_videos=use_videos,
        image_writer_threads=4 * len(cameras),
        video_backend="pyav",  # for reading it back; the default depends on the machine
    )


def record(root: Path, episodes: int = 2, seconds: float = 4.0, fps: int = 30, use_videos: bool = True) -> Path:
    """Write a dataset.

    Args:
        root: New folder.
        episodes: Number of episodes, which differ in where the cube lies.
        seconds: Length of each.
        fps: Frames a second.
        use_videos: Whether frames are stored as videos; False: as images.

    Returns:
        The folder.
    """
    from lerobot.utils.constants import ACTION, OBS_STR
    from lerobot.utils.feature_utils import build_dataset_frame

    dataset = _create(root, fps, use_videos)
    try:
        for episode in range(episodes):
            for observation, action in frames(seconds, fps, episode):
                dataset.add_frame(
                    {
                        **build_dataset_frame(dataset.features, observation, prefix=OBS_STR),
                        **build_dataset_frame(dataset.features, action, prefix=ACTION),
                        "task": INSTRUCTION,
                    }
                )
            dataset.save_episode()
    finally:
        dataset.finalize()
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--images", action="store_true", help="images instead of videos")
    given = parser.parse_args()
    print(record(given.folder, given.episodes, given.seconds, given.fps, not given.images))
