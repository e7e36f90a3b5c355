"""Recordings in the layout of robomimic's and robosuite's files, made here by their simulator."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dysl_vla.data.hdf5 import HUMAN
from dysl_vla.data.imports import ImportConfig, import_demonstrations
from dysl_vla.envs.robosuite import RobosuiteEnv
from dysl_vla.errors import ConfigError, DatasetError

SMALL = "agentview=32x32"
STEPS = 6
SCALES = [0.05, 0.05, 0.05, 0.5, 0.5, 0.5]
ARGUMENTS = {
    "env_name": "Door",
    "env_version": "1.5.1",
    "type": 1,
    "env_kwargs": {
        "robots": ["Panda"],
        "control_freq": 20,
        "controller_configs": {
            "type": "BASIC",
            "body_parts": {"right": {"type": "OSC_POSE", "input_type": "delta", "input_max": 1, "output_max": SCALES}},
        },
    },
}

pytestmark = pytest.mark.slow


def replace_values(group: Any, name: str, values: Any) -> None:
    del group[name]
    group[name] = values


@dataclass
class Seen:
    """Observations of the environment while it was recorded."""

    states: list[np.ndarray] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """Two short recordings, and the observations while they were made."""
    path = tmp_path_factory.mktemp("robomimic") / "demo_v15.hdf5"
    seen = Seen()
    with closing(RobosuiteEnv("door", {"agentview": (32, 32)})) as env, h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ARGUMENTS)
        for index in range(2):
            env.reset(seed=1, options={"episode_index": index})
            sim = env._world.sim
            # Of a recording's own: where the door stands is in its scene.
            model = sim.model.get_xml()
            states, actions = [], []
            for _ in range(STEPS):
                states.append(sim.get_state().flatten())
                sim.forward()  # a step leaves poses as they were 2 ms before
                observation = env.observe()
                seen.states.append(observation["observation.state"])
                seen.pictures.append(observation["observation.images.agentview"])
                actions.append(env.expert_action())
                env.advance(actions[-1])
            seen.actions += actions
            demo = data.create_group(f"demo_{index}")
            demo.attrs["model_file"], demo.attrs["num_samples"] = model, STEPS
            demo["states"], demo["actions"] = np.array(states), np.array(actions, np.float64)
            demo["rewards"] = np.eye(STEPS)[-1]  # too short to end well: said to be done by the last action
    return path, seen


def test_a_recording_becomes_demonstrations(recording: tuple[Path, Seen], tmp_path: Path) -> None:
    path, seen = recording
    first = import_demonstrations(ImportConfig(path, tmp_path / "out", episodes=1, cameras=SMALL))
    assert [row.length for row in first.rows] == [STEPS]
    both = import_demonstrations(ImportConfig(path, tmp_path / "out", cameras=SMALL))
    assert {row.origin.actor.partition("@")[0] for row in both.rows if row.origin} == {HUMAN}
    assert both.instructions == ["open the door"]
    assert {row.origin.suite for row in both.rows if row.origin} == {"robosuite-5"}
    np.testing.assert_allclose(both.columns()["states"], np.array(seen.states), atol=1e-6)
    np.testing.assert_allclose(both.columns()["actions"], np.array(seen.actions), atol=1e-6)
    pictures = np.stack([picture for *_, picture in both.frames("agentview")]).astype(float)
    distances = [np.abs(pictures - picture).mean((1, 2, 3)) for picture in np.array(seen.pictures, float)]
    assert np.max([distances[moment][moment] for moment in range(2 * STEPS)]) < 4
    other = np.array(distances)[:STEPS, STEPS:]  # the other door
    assert other.min() > 4
    another = tmp_path / "another.hdf5"
    another.write_bytes(path.read_bytes())
    with h5py.File(another, "a") as file:
        file["data/demo_0/actions"][0] = 0
    more = import_demonstrations(ImportConfig(another, tmp_path / "out", cameras=SMALL))
    assert len(more.rows) == 4, "a second file's demonstrations are its own"


def test_a_recording_of_robosuites_own_is_read_too(recording: tuple[Path, Seen], tmp_path: Path) -> None:
    path = changed(recording[0], tmp_path, told_by_robosuite)
    read = import_demonstrations(ImportConfig(path, tmp_path / "out", cameras=SMALL))
    np.testing.assert_allclose(read.columns()["states"], np.array(recording[1].states), atol=1e-6)


def told_by_robosuite(data: Any) -> None:
    """Such recordings declare their environment as `collect_human_demonstrations.py` of robosuite 1.5 does."""
    del data.attrs["env_args"]
    settings = {**ARGUMENTS["env_kwargs"], "env_name": "Door", "robots": "Panda"}
    del settings["control_freq"]
    data.attrs["env"], data.attrs["env_info"] = "Door", json.dumps(settings)


def test_recordings_in_which_the_task_is_never_done_are_left_out(
    recording: tuple[Path, Seen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(data: Any) -> None:
        del data["demo_0/rewards"]
        replace_values(data["demo_1"], "rewards", np.zeros(STEPS))
        states = np.array(data["demo_0/states"])
        with closing(RobosuiteEnv("door", {"agentview": (32, 32)})) as env:
            env.load_recorded(data["demo_0"].attrs["model_file"])
            states[-1, 1 + env._world.hinge_qpos_addr] = 0.5  # radians: open
        replace_values(data["demo_0"], "states", states)

    path = changed(recording[0], tmp_path, fail)
    read = import_demonstrations(ImportConfig(path, tmp_path / "out", cameras=SMALL))
    assert [row.origin.episode_index for row in read.rows if row.origin] == [0]
    assert "1 of 2 were left out, since the task is never done in them" in "".join(capsys.readouterr())


def changed(recording: Path, folder: Path, change: Any) -> Path:
    path = folder / "changed.hdf5"
    path.write_bytes(recording.read_bytes())
    with h5py.File(path, "a") as file:
        change(file["data"])
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.attrs.__setitem__("env_args", "{"), "not declare its environment"),
        (lambda data: data.attrs.__setitem__("env_args", json.dumps({**ARGUMENTS, "env_name": "Kitchen"})), "Kitchen"),
        (
            lambda data: data.attrs.__setitem__(
                "env_args", json.dumps(ARGUMENTS).replace('"OSC_POSE"', '"JOINT_POSITION"')
            ),
            "relative poses",
        ),
        (
            lambda data: data.attrs.__setitem__(
                "env_args", json.dumps(ARGUMENTS).replace(json.dumps(SCALES), "[0.1, 0.1, 0.1, 0.5, 0.5, 0.5]")
            ),
            r"output_max is \[0\.1.*another motion",
        ),
        (
            lambda data: data.attrs.__setitem__("env_args", json.dumps(ARGUMENTS).replace('"delta"', '"absolute"')),
            "relative poses",
        ),
        (
            lambda data: data.attrs.__setitem__("env_args", json.dumps({**ARGUMENTS, "env_kwargs": None})),
            "not declare its env",
        ),
        (
            lambda data: data.attrs.__setitem__("env_args", json.dumps(ARGUMENTS).replace("Panda", "Baxter")),
            r"Baxter.*Panda",
        ),
        (
            lambda data: data.attrs.__setitem__(
                "env_args", json.dumps(ARGUMENTS).replace('"input_max"', '"kp": 300, "x"')
            ),
            r"kp is 300",
        ),
        (
            lambda data: data.attrs.__setitem__(
                "env_args", json.dumps(ARGUMENTS).replace('"input_max"', '"interpolation": "linear", "x"')
            ),
            r"interpolation is linear, here None",
        ),
        (
            lambda data: data.attrs.__setitem__(
                "env_args",
                json.dumps(ARGUMENTS).replace("Panda", "IIWA").replace('"input_max"', '"input_ref_frame": "base", "x"'),
            ),
            r"input_ref_frame is base, here world",
        ),
        (lambda data: data.attrs.__setitem__("env_args", json.dumps(ARGUMENTS).replace("Door", "Wipe")), "'Wipe'"),
        (lambda data: data["demo_1"].__delitem__("actions"), r"demo_1: its actions are missing"),
        (
            lambda data: replace_values(data["demo_1"], "states", np.zeros((STEPS, 2))),
            r"demo_1: its states must have shape",
        ),
        (lambda data: replace_values(data["demo_1"], "states", np.float64(1)), r"demo_1: its states must have shape"),
        (lambda data: replace_values(data["demo_1"], "actions", np.full((STEPS, 7), np.nan)), r"demo_1.*not finite"),
        (lambda data: replace_values(data["demo_1"], "actions", np.array([b"a"])), r"demo_1.*not numbers"),
        (lambda data: replace_values(data["demo_1"], "actions", np.zeros((2, 7))), r"demo_1.*6 states and 2 actions"),
        (lambda data: data["demo_1"].attrs.__setitem__("model_file", "rubbish"), r"demo_1.*not a MuJoCo scene"),
        (lambda data: [data.__delitem__(f"demo_{index}") for index in range(2)], "no demonstrations"),
        (lambda data: data["demo_0"].attrs.__setitem__("model_file", "<mujoco/>"), r"robosuite 1\.5"),
    ],
)
def test_a_foreign_recording_is_refused_and_nothing_written(
    recording: tuple[Path, Seen], tmp_path: Path, change: Any, message: str
) -> None:
    path = changed(recording[0], tmp_path, change)
    with pytest.raises(DatasetError, match=message):
        import_demonstrations(ImportConfig(path, tmp_path / "out", cameras=SMALL))
    assert not (tmp_path / "out").exists()


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        import_demonstrations(ImportConfig(tmp_path / "nothing.hdf5", tmp_path / "out"))
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(DatasetError, match="cannot be read as HDF5"):
        import_demonstrations(ImportConfig(tmp_path / "text.hdf5", tmp_path / "out"))
