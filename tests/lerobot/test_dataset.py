"""Datasets that go to and fro between this package and LeRobot's own recorder, reader and tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("lerobot", reason="lerobot is not installed, it needs Python 3.12: `make test-lerobot` runs these")

from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from dysl_vla.data.info import render_info
from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, Origin
from dysl_vla.errors import DatasetError
from dysl_vla.types import EmbodimentSpec

SIZES = {"front": (48, 64), "wrist": (64, 64)}
NAMES = ("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos")
SPEC = EmbodimentSpec(
    cameras=SIZES,
    state_names=NAMES,
    action_names=NAMES,
    action_low=(-100.0,) * 3,
    action_high=(100.0,) * 3,
    rate_hz=30.0,
)


def picture(camera: str, episode: int, frame: int) -> NDArray[np.uint8]:
    """Another one for each camera, episode and frame, and smooth, so that videos keep it."""
    height, width = SIZES[camera]
    image = np.full((height, width, 3), 30 + 9 * frame, np.uint8)
    image[:, : width // 2] = 220 - 50 * episode if camera == "front" else 20 + 50 * episode
    return image


def numbers(episode: int, frame: int) -> NDArray[np.float32]:
    return np.array([episode, frame / 7, -frame], np.float32)


def features(kind: str) -> dict[str, Any]:
    vector = {"dtype": "float32", "shape": (3,), "names": list(NAMES)}
    images = {
        f"observation.images.{name}": {"dtype": kind, "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for name, size in SIZES.items()
    }
    return {"observation.state": vector, "action": dict(vector)} | images


def record(dataset: LeRobotDataset, episodes: Sequence[int], **extra: Any) -> None:
    """What `lerobot-record` does; episode e has 5 + e frames."""
    for episode in episodes:
        for frame in range(5 + episode):
            images = {f"observation.images.{name}": picture(name, episode, frame) for name in SIZES}
            state, action = numbers(episode, frame), -numbers(episode, frame)
            task = f"task {episode % 2}"
            dataset.add_frame({"observation.state": state, "action": action, "task": task, **images, **extra})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def collect(root: Path, episodes: Sequence[int]) -> None:
    """What `dysl demos collect` does."""
    writer = DemonstrationWriter(root, SPEC, "so101_follower")
    for episode in episodes:
        frames = range(5 + episode)
        states = np.stack([numbers(episode, frame) for frame in frames])
        writer.append(
            Episode(
                images={name: np.stack([picture(name, episode, frame) for frame in frames]) for name in SIZES},
                states=states,
                actions=-states,
                instruction=f"task {episode % 2}",
                origin=Origin("mock", f"t{episode % 2}", 0, episode, "expert", 1.0),
            )
        )
    writer.close()


def opened(root: Path, **how: Any) -> LeRobotDataset:
    return LeRobotDataset("someone/something", root=root, video_backend="pyav", **how)


def check_same(root: Path, episodes: Sequence[int]) -> Demonstrations:
    """LeRobot, as its training does it, and this package read the same, and what was recorded."""
    demonstrations, theirs = Demonstrations(root), opened(root, delta_timestamps={"action": [-1 / 30, 0, 1 / 30]})
    columns = demonstrations.columns()
    assert [row.length for row in demonstrations.rows] == [5 + episode for episode in episodes]
    assert len(theirs) == demonstrations.total_frames == theirs.meta.total_frames
    seen = dict.fromkeys(SIZES, 0)
    for camera in SIZES:
        for row, frame, image in demonstrations.frames(camera):
            index = demonstrations.rows[row].start + frame
            item = theirs[index]
            episode = episodes[row]
            np.testing.assert_array_equal(
                (item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255).round(), image
            )
            assert np.abs(image.astype(int) - picture(camera, episode, frame)).mean() < 3
            np.testing.assert_array_equal(columns["states"][index], numbers(episode, frame))
            np.testing.assert_array_equal(item["observation.state"].numpy(), columns["states"][index])
            chunk = [-numbers(episode, min(max(frame + step, 0), 4 + episode)) for step in (-1, 0, 1)]
            np.testing.assert_array_equal(columns["actions"][index], chunk[1])
            np.testing.assert_array_equal(item["action"].numpy(), chunk)
            task = demonstrations.instructions[columns["task_index"][index]]
            assert item["task"] == task == f"task {episode % 2}"
            seen[camera] += 1
    assert set(seen.values()) == {demonstrations.total_frames}
    return demonstrations


@pytest.mark.parametrize(
    ("kind", "how"), [("video", {}), ("image", {}), ("video", {"streaming_encoding": True}), ("video", {"small": True})]
)
def test_what_lerobot_records_is_read(tmp_path: Path, kind: str, how: dict[str, Any]) -> None:
    how = {"video_files_size_in_mb": 1e-4, "data_files_size_in_mb": 1e-4} if how.pop("small", False) else how
    root = tmp_path / "d"
    dataset = LeRobotDataset.create(
        "someone/something",
        30,
        features(kind),
        root=root,
        robot_type="so101_follower",
        use_videos=kind == "video",
        **how,
    )
    record(dataset, (0, 1, 2))
    demonstrations = check_same(root, (0, 1, 2))
    assert demonstrations.spec.cameras == SIZES
    assert demonstrations.spec.action_names == NAMES
    assert demonstrations.has_action_names
    assert [row.origin for row in demonstrations.rows] == [None] * 3
    assert "robot so101_follower" in render_info(demonstrations)
    with pytest.raises(DatasetError, match="another program"):
        DemonstrationWriter(root, SPEC, "so101_follower")


def test_a_depth_camera_of_lerobot_is_left_out(tmp_path: Path) -> None:
    depth = {"dtype": "video", "shape": (64, 64, 1), "names": ["height", "width", "channels"]}
    depth["info"] = {"is_depth_map": True}
    described = features("video") | {"observation.images.depth": depth}
    dataset = LeRobotDataset.create("someone/something", 30, described, root=tmp_path / "d")
    far = np.full((64, 64, 1), 700, np.uint16)
    record(dataset, (0, 1), **{"observation.images.depth": far})
    demonstrations = check_same(tmp_path / "d", (0, 1))
    assert list(demonstrations.spec.cameras) == list(SIZES)
    assert demonstrations.left_out == {"depth": "it is a depth map"}


def test_what_this_package_writes_is_read_by_lerobot(tmp_path: Path) -> None:
    collect(tmp_path, (0, 1, 2))
    check_same(tmp_path, (0, 1, 2))
    theirs = opened(tmp_path)
    assert theirs.meta.robot_type == "so101_follower"
    assert {"q01", "q10", "q50", "q90", "q99"} <= set(theirs.meta.stats["action"])
    assert theirs.meta.stats["observation.images.front"]["q99"].shape == (3, 1, 1)


def test_statistics_are_where_and_as_lerobot_has_them(tmp_path: Path) -> None:
    collect(tmp_path / "ours", (0, 1, 2))
    record(LeRobotDataset.create("a/b", 30, features("video"), root=tmp_path / "theirs"), (0, 1, 2))
    ours, theirs = (opened(tmp_path / name).meta.stats for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, of in theirs.items():
        assert ours[key].keys() == of.keys(), key
        for name, value in of.items():
            assert ours[key][name].shape == value.shape, (key, name)
            if not name.startswith(
                "q"
            ):  # LeRobot's of all episodes are means of the episodes', ours those of all frames
                np.testing.assert_allclose(ours[key][name], value, rtol=1e-4, atol=1e-4, err_msg=f"{key} {name}")


@pytest.mark.parametrize("how", [{}, {"streaming_encoding": True}])
def test_a_dataset_of_this_package_is_continued_by_lerobot(tmp_path: Path, how: dict[str, Any]) -> None:
    collect(tmp_path, (0, 1))
    record(LeRobotDataset.resume("someone/something", root=tmp_path, **how), (2, 3))
    record(LeRobotDataset.resume("someone/something", root=tmp_path), (4,))
    demonstrations = check_same(tmp_path, (0, 1, 2, 3, 4))
    assert [row.origin is not None for row in demonstrations.rows] == [True, True, False, False, False]
    with pytest.raises(DatasetError, match="another program"):
        DemonstrationWriter(tmp_path, SPEC, "so101_follower")
    assert "| mock | t0 | 0 | expert | 1 |" in render_info(demonstrations)


def test_what_lerobots_tools_make_of_datasets_is_read(tmp_path: Path) -> None:
    collect(tmp_path / "ours", (0, 1, 2))
    delete_episodes(opened(tmp_path / "ours"), [1], output_dir=tmp_path / "less", repo_id="a/b")
    check_same(tmp_path / "less", (0, 2))
    record(LeRobotDataset.create("a/b", 30, features("video"), root=tmp_path / "theirs"), (0, 1, 2))
    delete_episodes(opened(tmp_path / "theirs"), [0], output_dir=tmp_path / "fewer", repo_id="a/b")
    check_same(tmp_path / "fewer", (1, 2))
    both = [opened(tmp_path / name) for name in ("theirs", "fewer")]
    merge_datasets(both, output_repo_id="a/b", output_dir=tmp_path / "more")
    check_same(tmp_path / "more", (0, 1, 2, 1, 2))


def test_a_recording_that_was_not_finalized_is_refused(tmp_path: Path) -> None:
    dataset = LeRobotDataset.create("someone/something", 30, features("image"), root=tmp_path / "d", use_videos=False)
    for frame in range(3):
        images = {f"observation.images.{name}": picture(name, 0, frame) for name in SIZES}
        dataset.add_frame({"observation.state": numbers(0, 0), "action": numbers(0, 0), "task": "t", **images})
    dataset.save_episode()
    with pytest.raises(DatasetError, match="finalized"):
        Demonstrations(tmp_path / "d")
    dataset.finalize()
    assert len(Demonstrations(tmp_path / "d").columns()["states"]) == 3
