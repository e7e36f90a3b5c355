"""LIBERO's own demonstrations, from files in the layout of both programs that write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dysl_vla.cli import main
from dysl_vla.data.hdf5 import HUMAN, NO_SEED
from dysl_vla.data.imports import ImportConfig, import_demonstrations
from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter
from dysl_vla.envs import FIRST_EVALUATION_SEED
from dysl_vla.envs.libero import LiberoEnv
from dysl_vla.errors import ConfigError, DatasetError, MissingExtraError
from dysl_vla.policies import load_policy
from dysl_vla.training.behaviour_cloning import OptimizerConfig
from dysl_vla.training.train import TrainConfig, train
from dysl_vla.types import FULL_QUALITY

TASK, OTHER = "put_the_cream_cheese_in_the_bowl", "turn_on_the_stove"
STEPS, SIDE = 6, 16
CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
SCALES = [0.05, 0.05, 0.05, 0.5, 0.5, 0.5]
ENV_ARGS = {
    "type": 1,
    "env_name": "Libero_Tabletop_Manipulation",
    "problem_name": "libero_tabletop_manipulation",
    "bddl_file": "chiliocosm/bddl_files/libero_goal/put_the_cream_cheese_on_the_bowl.bddl",
    "env_kwargs": {
        "robots": ["Panda"],
        "controller_configs": {
            "type": "OSC_POSE",
            "input_max": 1,
            "input_min": -1,
            "output_max": SCALES,
            "output_min": [-scale for scale in SCALES],
            "kp": 150,
            "damping_ratio": 1,
            "impedance_mode": "fixed",
            "kp_limits": [0, 300],
            "damping_ratio_limits": [0, 10],
            "position_limits": None,
            "orientation_limits": None,
            "uncouple_pos_ori": True,
            "control_delta": True,
            "interpolation": None,
            "ramp_ratio": 0.2,
        },
        "control_freq": 20,
        "camera_heights": 128,
        "camera_widths": 128,
    },
}


class Recording:
    """One demonstration: what was seen before each action and after the last, and the actions.

    Attributes:
        quaternions: (time + 1, 4), with the real part last, as robosuite's observations have them.
        pictures: Camera to (time + 1, height, width, 3), not turned: people see them so.
    """

    def __init__(self, seed: int, side: int = SIDE) -> None:
        rng = np.random.default_rng(seed)
        self.actions = rng.uniform(-1, 1, (STEPS, 7))
        self.joints = rng.normal(size=7) + 0.05 * np.arange(STEPS + 1)[:, None]
        self.positions, self.fingers = rng.normal(size=(STEPS + 1, 3)), rng.random((STEPS + 1, 2))
        quaternions = rng.normal(size=(STEPS + 1, 4))
        quaternions[:, 3] = np.linspace(-0.9, 0.9, STEPS + 1)  # rotations of more and of less than half a turn
        axes = quaternions[:, :3] / np.linalg.norm(quaternions[:, :3], axis=1)[:, None]
        self.quaternions = np.hstack([axes * np.sqrt(1 - quaternions[:, 3:] ** 2), quaternions[:, 3:]])
        self.rotations = axes * 2 * np.arccos(self.quaternions[:, 3:])
        down, right = np.mgrid[0:side, 0:side] * (200 // side)
        times = np.arange(STEPS + 1)[:, None, None] * 6 + seed
        self.pictures = {
            camera: np.stack(np.broadcast_arrays(down + times, right + times, shade), -1).astype(np.uint8)
            for camera, shade in zip(CAMERAS, (40, 160), strict=True)
        }

    def write(self, group: Any, *, is_behind: bool) -> None:
        rows = slice(1, None) if is_behind else slice(-1)
        rotations = np.hstack([self.positions, self.rotations])[rows]
        group["actions"] = self.actions
        group["states"] = np.hstack([np.arange(STEPS)[:, None], self.joints[:-1], np.zeros((STEPS, 12))])
        group["robot_states"] = np.hstack([self.fingers, self.positions, self.quaternions])[rows]
        group["rewards"] = group["dones"] = np.eye(STEPS, dtype=np.uint8)[-1]
        group["obs/gripper_states"], group["obs/joint_states"] = self.fingers[rows], self.joints[rows]
        group["obs/ee_states"], group["obs/ee_pos"], group["obs/ee_ori"] = rotations, rotations[:, :3], rotations[:, 3:]
        for camera, name in CAMERAS.items():
            group[f"obs/{name}"] = self.pictures[camera][rows, ::-1]
        if is_behind:
            group.attrs["num_samples"], group.attrs["init_state"] = STEPS, group["states"][0]
            group.attrs["model_file"] = "<mujoco/>"


def write_file(path: Path, recordings: list[Recording], *, is_behind: bool = False) -> Path:
    """Write recordings as LIBERO's create_dataset.py does, or as openvla-oft's program, which writes no attributes."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if is_behind:
            task = path.stem.removesuffix("_demo")
            problem = {"problem_name": "libero_tabletop_manipulation", "domain_name": "robosuite"}
            problem["language_instruction"] = task.replace("_", " ")
            data.attrs["problem_info"], data.attrs["env_name"] = json.dumps(problem), ENV_ARGS["env_name"]
            data.attrs["bddl_file_name"] = f"libero/libero/bddl_files/libero_goal/{task}.bddl"
            data.attrs["macros_image_convention"], data.attrs["tag"] = "opengl", "libero-v1"
            data.attrs["num_demos"], data.attrs["total"] = len(recordings), STEPS * len(recordings)
        for number, recording in enumerate(recordings):
            recording.write(data.create_group(f"demo_{number}"), is_behind=is_behind)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_file(tmp_path / f"{TASK}_demo.hdf5", [Recording(0), Recording(1)])


def pictures_of(read: Demonstrations, camera: str) -> np.ndarray:
    return np.stack([picture for *_, picture in read.frames(camera)]).astype(float)


@pytest.mark.parametrize("is_behind", [True, False])
def test_each_observation_is_stored_turned_with_the_action_that_followed_it(tmp_path: Path, is_behind: bool) -> None:
    recordings = [Recording(0), Recording(1)]
    path = write_file(tmp_path / f"{TASK}_demo.hdf5", recordings, is_behind=is_behind)
    read = import_demonstrations(ImportConfig(path, tmp_path / "out"))
    rows = slice(1, -1) if is_behind else slice(-1)
    states = [np.hstack([each.positions, each.rotations, each.fingers])[rows] for each in recordings]
    np.testing.assert_allclose(read.columns()["states"], np.vstack(states), atol=1e-6)
    actions = [each.actions[1 if is_behind else 0 :] for each in recordings]
    np.testing.assert_allclose(read.columns()["actions"], np.vstack(actions), atol=1e-6)
    for camera in CAMERAS:
        expected = np.vstack([each.pictures[camera][rows, :, ::-1] for each in recordings]).astype(float)
        assert np.abs(pictures_of(read, camera) - expected).mean((1, 2, 3)).max() < 3
    assert read.instructions == ["put the cream cheese in the bowl"]
    origins = [row.origin for row in read.rows if row.origin]
    assert [origin.episode_index for origin in origins] == [0, 1]
    assert {(each.suite, each.task, each.seed) for each in origins} == {("libero-goal", TASK, NO_SEED)}
    assert NO_SEED < FIRST_EVALUATION_SEED
    assert {origin.actor.partition("@")[0] for origin in origins} == {HUMAN}
    assert read.spec.rate_hz == 20
    assert read.rendering == FULL_QUALITY


def test_a_folder_s_files_are_one_dataset_which_is_continued(tmp_path: Path, file: Path) -> None:
    write_file(tmp_path / f"{OTHER}_demo.hdf5", [Recording(2), Recording(3)], is_behind=True)
    (tmp_path / f"._{OTHER}_demo.hdf5").write_text("macOS leaves these")
    out = tmp_path / "out"
    assert len(import_demonstrations(ImportConfig(tmp_path, out, episodes=1)).rows) == 2
    read = import_demonstrations(ImportConfig(tmp_path, out))
    tasks = [(row.origin.task, row.origin.episode_index) for row in read.rows if row.origin]
    assert tasks == [(TASK, 0), (OTHER, 0), (TASK, 1), (OTHER, 1)]
    before = (out / "meta/info.json").read_bytes()
    assert len(import_demonstrations(ImportConfig(tmp_path, out)).rows) == 4
    assert (out / "meta/info.json").read_bytes() == before


def change(path: Path, edit: Callable[[Any], object]) -> Path:
    with h5py.File(path, "a") as opened:
        edit(opened["data"])
    return path


def replace_values(group: Any, name: str, values: Any) -> None:
    del group[name]
    group[name] = values


def test_actions_are_clipped_and_failures_left_out(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(file, lambda data: replace_values(data["demo_0"], "actions", np.full((STEPS, 7), 1.25)))
    change(file, lambda data: replace_values(data["demo_1"], "rewards", np.zeros(STEPS)))
    read = import_demonstrations(ImportConfig(file, tmp_path / "out"))
    assert len(read.rows) == 1
    assert np.all(read.columns()["actions"] == 1)
    assert "1 of 2 were left out, since the task is never done in them" in "".join(capsys.readouterr())


def test_the_name_of_the_file_says_what_is_done(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The distributed files name the task partly as it was called before LIBERO's publication."""

    def of_before(data: Any) -> None:
        data.attrs["bddl_file_name"] = "chiliocosm/bddl_files/libero_goal/put_the_cream_cheese_on_the_bowl.bddl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": ['"', "Put the cheese on the bowl", '"']})

    read = import_demonstrations(ImportConfig(change(file, of_before), tmp_path / "out"))
    assert read.instructions == ["put the cream cheese in the bowl"]
    assert "'Put the cheese on the bowl'" in capsys.readouterr().err
    # Without a task's name, the file's own counts.
    change(file, lambda data: data.attrs.__setitem__("bddl_file_name", f"libero_goal/{OTHER}.bddl"))
    read = import_demonstrations(ImportConfig(file.rename(tmp_path / "demo.hdf5"), tmp_path / "other"))
    assert read.instructions == ["turn on the stove"]


def test_images_that_are_stored_upright_are_mirrored(tmp_path: Path, file: Path) -> None:
    def of_opencv(data: Any) -> None:
        data.attrs["macros_image_convention"] = np.bytes_("opencv")
        for number in range(2):
            for name in CAMERAS.values():
                replace_values(data[f"demo_{number}/obs"], name, data[f"demo_{number}/obs/{name}"][()][:, ::-1])

    expected = import_demonstrations(ImportConfig(file, tmp_path / "out"))
    read = import_demonstrations(ImportConfig(change(file, of_opencv), tmp_path / "opencv"))
    for camera in CAMERAS:
        np.testing.assert_array_equal(pictures_of(read, camera), pictures_of(expected, camera))


def test_position_and_rotation_may_be_apart(tmp_path: Path, file: Path) -> None:
    expected = import_demonstrations(ImportConfig(file, tmp_path / "out")).columns()["states"]
    change(file, lambda data: [data[f"demo_{number}/obs"].__delitem__("ee_states") for number in range(2)])
    read = import_demonstrations(ImportConfig(file, tmp_path / "apart"))
    np.testing.assert_array_equal(read.columns()["states"], expected)


def test_a_policy_is_rendered_for_as_its_demonstrations_were(tmp_path: Path, file: Path) -> None:
    read = import_demonstrations(ImportConfig(file, tmp_path / "data"))
    optimizer = OptimizerConfig(steps=1, batch=4)
    config = TrainConfig(tmp_path / "data", tmp_path / "policy", layers=2, hidden=16, optimizer=optimizer)
    assert load_policy(str(train(config))).spec.rendering == FULL_QUALITY
    # Demonstrations with other rendering are neither put beside them, nor trained on from their policy.
    with pytest.raises(DatasetError, match="rendering is full, the new demonstrations have None"):
        DemonstrationWriter(tmp_path / "data", read.spec, "Panda")
    info = tmp_path / "data/meta/info.json"
    declared = json.loads(info.read_text())
    for camera in CAMERAS:
        del declared["features"][f"observation.images.{camera}"]["info"]["rendering"]
    info.write_text(json.dumps(declared))
    assert Demonstrations(tmp_path / "data").rendering is None
    with pytest.raises(ConfigError, match=r"data: rendering must be that of .*policy, full, got fast"):
        train(TrainConfig(tmp_path / "data", tmp_path / "more", init=str(tmp_path / "policy"), optimizer=optimizer))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["demo_1/obs"].__delitem__("agentview_rgb"), r"demo_1: its obs/agentview_rgb are missing"),
        (lambda data: data["demo_1"].__delitem__("obs"), r"demo_1: its obs/joint_states are missing"),
        (lambda data: [data["demo_1/obs"].__delitem__(n) for n in ("ee_states", "ee_ori")], r"obs/ee_ori are missing"),
        (lambda data: data["demo_1"].__delitem__("rewards"), r"demo_1: its rewards are missing"),
        (lambda data: replace_values(data["demo_1"], "actions", np.zeros((STEPS, 8))), r"actions must have .*\(6, 8\)"),
        (lambda data: replace_values(data["demo_1"], "actions", np.full((STEPS, 7), np.nan)), r"demo_1.*not finite"),
        (lambda data: replace_values(data["demo_1"], "actions", np.zeros((2, 7))), r"one of each.*2 actions, 6 states"),
        (lambda data: replace_values(data["demo_1"], "states", np.zeros((STEPS, 4))), r"states must have shape"),
        (
            lambda data: replace_values(data["demo_1/obs"], "eye_in_hand_rgb", np.zeros((STEPS, 8, 8, 3), np.uint8)),
            r"demo_1: its images must be .*robot0_eye_in_hand 16x16.*got .*robot0_eye_in_hand 8x8",
        ),
        (
            lambda data: replace_values(data["demo_1/obs"], "agentview_rgb", np.zeros((STEPS, 8, 8, 3))),
            r"obs/agentview_rgb must be uint8",
        ),
        (lambda data: data["demo_0/obs/ee_states"].__setitem__((3, 4), 0.2), r"demo_0: its rotation vectors"),
        (lambda data: data["demo_0/obs/joint_states"].__setitem__(..., 9), r"joint_states are .* rad from its states"),
        (lambda data: data.attrs.__setitem__("bddl_file_name", f"a/{OTHER}.bddl"), rf"is named as {TASK}.*{OTHER}"),
        (lambda data: data.attrs.__setitem__("problem_info", "{"), r"problem_info is damaged"),
        (lambda data: data.attrs.__setitem__("env_args", "{"), r"env_args are damaged"),
        (lambda data: data.attrs.__setitem__("macros_image_convention", "other"), r"opengl or opencv, got 'other'"),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_written(
    tmp_path: Path, file: Path, edit: Callable[[Any], object], message: str
) -> None:
    change(file, edit)
    with pytest.raises(DatasetError, match=message) as caught:
        import_demonstrations(ImportConfig(file, tmp_path / "out"))
    assert file.name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit_each_other_or_the_dataset_are_refused(tmp_path: Path, file: Path) -> None:
    import_demonstrations(ImportConfig(file, tmp_path / "out"))
    large = write_file(tmp_path / f"{OTHER}_demo.hdf5", [Recording(2, side=32)])
    with pytest.raises(DatasetError, match=rf"{OTHER}_demo.*of one size.*got agentview 32x32.* 16x16.*{TASK}"):
        import_demonstrations(ImportConfig(tmp_path, tmp_path / "both"))
    assert not (tmp_path / "both").exists()
    with pytest.raises(DatasetError, match=r"cameras is .*16, 16.*new .* have .*32, 32.*--out a new folder"):
        import_demonstrations(ImportConfig(large, tmp_path / "out"))
    with pytest.raises(ConfigError, match="cameras must be left out for LIBERO's files"):
        import_demonstrations(ImportConfig(large, tmp_path / "both", cameras="agentview=32x32"))
    with h5py.File(tmp_path / "can.hdf5", "w") as other:
        other["data/demo_0/states"] = np.zeros((3, 3))
    with pytest.raises(DatasetError, match=rf"files of one kind; {TASK}_demo.hdf5 is LIBERO's, can.hdf5 is not"):
        import_demonstrations(ImportConfig(tmp_path, tmp_path / "both"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no \*\.hdf5 file"):
        import_demonstrations(ImportConfig(tmp_path / "empty", tmp_path / "both"))
    assert not (tmp_path / "both").exists()


def test_an_unknown_task_is_named_with_one_like_it(tmp_path: Path, file: Path) -> None:
    path = file.rename(tmp_path / "turn_on_a_stove_demo.hdf5")
    with pytest.raises(DatasetError, match=r"'turn_on_a_stove' is no task of libero-sp.*such as turn_on_the_stove"):
        import_demonstrations(ImportConfig(path, tmp_path / "out"))


def test_a_cut_file_is_refused_in_one_line(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["demos", "import", "--file", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read as HDF5" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_h5py_is_named(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dysl-vla\[hdf5\]'"):
        import_demonstrations(ImportConfig(file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_imported_is_what_the_environment_observes(tmp_path: Path) -> None:
    """The environment is recorded as LIBERO records: by robosuite's own observations, each after its action."""
    from robosuite.utils.transform_utils import quat2axisangle

    recording, seen = Recording(0, side=64), []
    with closing(LiberoEnv(TASK, dict.fromkeys(CAMERAS, (64, 64)), suite="libero-goal")) as env:
        seen.append(env.reset(seed=3)[0])
        states = []
        for moment in range(STEPS + 1):
            found = env._world._get_observations(force_update=True)
            recording.joints[moment] = found["robot0_joint_pos"]
            recording.positions[moment], recording.fingers[moment] = (
                found["robot0_eef_pos"],
                found["robot0_gripper_qpos"],
            )
            recording.quaternions[moment] = found["robot0_eef_quat"]
            recording.rotations[moment] = quat2axisangle(np.array(found["robot0_eef_quat"], np.float64))
            for camera in CAMERAS:
                recording.pictures[camera][moment] = env._renderer.render(env._data, camera, 64, 64)
            states.append(env._world.sim.get_state().flatten())
            if moment < STEPS:
                seen.append(env.step(recording.actions[moment])[0])
    path = write_file(tmp_path / f"{TASK}_demo.hdf5", [recording], is_behind=True)

    def complete(data: Any) -> None:
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        replace_values(data["demo_0"], "states", np.array(states[:-1]))

    read = import_demonstrations(ImportConfig(change(path, complete), tmp_path / "out"))
    observed = seen[1:-1]
    np.testing.assert_allclose(
        read.columns()["states"], [each["observation.state"] for each in observed], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(read.columns()["actions"], recording.actions[1:], atol=1e-6)
    for camera in CAMERAS:
        expected = np.stack([each[f"observation.images.{camera}"] for each in observed]).astype(float)
        distances = np.abs(pictures_of(read, camera) - expected).mean((1, 2, 3))
        assert distances.max() < 3
        assert np.abs(pictures_of(read, camera)[:, :, ::-1] - expected).mean() > 3 * distances.max()
    assert read.instructions == [observed[0]["task"]]
    other = json.loads(json.dumps(ENV_ARGS).replace('"kp": 150', '"kp": 300'))
    change(path, lambda data: data.attrs.__setitem__("env_args", json.dumps(other)))
    with pytest.raises(DatasetError, match="kp is 300, here 150: the same action would be another motion"):
        import_demonstrations(ImportConfig(path, tmp_path / "more"))
