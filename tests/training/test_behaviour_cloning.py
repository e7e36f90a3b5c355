from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch._dynamo.utils import counters

from dysl_vla.data.augment import SHIFT
from dysl_vla.data.collect import CollectConfig, collect
from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, Origin
from dysl_vla.errors import CheckpointError, ConfigError, DatasetError
from dysl_vla.files import read_lines, write_json
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.training.behaviour_cloning import (
    CURVE_FILE,
    FLOOR,
    STATE_FILE,
    BehaviourCloning,
    OptimizerConfig,
    normalisation,
)
from dysl_vla.training.train import TrainConfig, train
from dysl_vla.types import EmbodimentSpec
from tests.conftest import made_once, make_tiny_policy
from tests.data.foreign import record

FAST = OptimizerConfig(steps=12, batch=8, save_every=4, threads=1, warmup=2)


def config(data: Path, out: Path, **changes: object) -> TrainConfig:
    return replace(TrainConfig(data=data, out=out, layers=2, hidden=16, chunk=4, optimizer=FAST), **changes)  # type: ignore[arg-type]


def test_varied_images_train_another_policy_and_a_killed_training_of_it_goes_on(
    mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varying = replace(FAST, augment_images=True)
    plain, whole = (train(config(mock_demos, tmp_path / n, optimizer=o)) for n, o in (("a", FAST), ("b", varying)))
    with monkeypatch.context() as patched:
        patched.setattr(BehaviourCloning, "_validate", lambda self: 1 / 0 if self.step == 8 else (0.0, None))
        with pytest.raises(ZeroDivisionError):
            train(config(mock_demos, tmp_path / "p", optimizer=varying))
    out = train(config(mock_demos, tmp_path / "p", optimizer=varying))
    ends = [MiniVLA.from_pretrained(str(folder)).fingerprint for folder in (out, whole, plain)]
    assert ends[0] == ends[1] != ends[2]


def test_training_leaves_a_checkpoint_with_its_record(mock_demos: Path, tmp_path: Path) -> None:
    out = train(config(mock_demos, tmp_path / "p"))
    policy = MiniVLA.from_pretrained(str(out))
    assert policy.spec.chunk_length == 4
    assert policy.provenance["data"]["episodes"] == 24
    assert {origin["seed"] for origin in policy.provenance["data"]["origins"]} == {0}
    assert [point["step"] for point in read_lines(out / CURVE_FILE)] == [4, 8, 12]
    assert not (out / STATE_FILE).exists()


def test_training_learns_a_demonstration_by_heart(tmp_path: Path) -> None:
    collect(CollectConfig(out=tmp_path / "d", suite="mock", tasks="reach", episodes=1))
    learning = replace(FAST, steps=150, batch=8, save_every=50, learning_rate=5e-3)
    out = train(config(tmp_path / "d", tmp_path / "p", optimizer=learning))
    points = read_lines(out / CURVE_FILE)
    assert points[-1]["loss"] < 0.5 * points[0]["loss"]
    assert points[-1]["validation_loss"] is None  # a single episode leaves none to hold out


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Of four layers, the first and the last static."""
    write_json(tmp_path / "plan.json", {"plan": {"num_layers": 4, "static_layers": [0, 3], "exits": []}})
    return tmp_path / "plan.json"


def test_static_layers_alone_learn_to_act_as_all_layers_do(mock_demos: Path, plan: Path, tmp_path: Path) -> None:
    learning = replace(FAST, steps=60, save_every=20, learning_rate=3e-3)
    out = train(config(mock_demos, tmp_path / "p", layers=4, plan=plan, optimizer=learning))
    errors = [point["validation_short_loss"] for point in read_lines(out / CURVE_FILE)]
    assert errors[-1] < 0.5 * errors[0]
    policy = MiniVLA.from_pretrained(str(out))
    assert policy.provenance["config"]["plan"] == [0, 3]
    assert len(policy.backbone.layers) == 4


def test_a_policy_of_the_static_layers_alone_begins_as_they_act_and_is_trained_on(
    mock_demos: Path, plan: Path, tmp_path: Path
) -> None:
    deep = train(config(mock_demos, tmp_path / "deep", layers=4))
    teacher = MiniVLA.from_pretrained(str(deep))
    shallow = teacher.with_layers([0, 3])
    for new, old in enumerate((0, 3)):
        kept, whole = (one.backbone.layers[layer].state_dict() for one, layer in ((shallow, new), (teacher, old)))
        assert all(torch.equal(kept[name], whole[name]) for name in whole)
    once = TrainConfig(mock_demos, tmp_path / "p", init=str(deep), plan=plan, drop_dynamic=True, optimizer=FAST)
    trained = MiniVLA.from_pretrained(str(train(once)))
    assert trained.config.num_layers == 2
    assert trained.provenance["init"]["config"]["layers"] == 4
    assert trained.fingerprint != shallow.fingerprint
    assert [point["validation_short_loss"] for point in read_lines(tmp_path / "p" / CURVE_FILE)] == [None] * 3
    with pytest.raises(ConfigError, match="drop_dynamic must come with init and plan"):
        config(mock_demos, tmp_path / "n", plan=plan, drop_dynamic=True)


def test_layers_off_the_shortest_path_learn_from_demonstrations_alone(
    mock_demos: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path's target is cut from the graph."""
    gradients = []

    def noted(self: BehaviourCloning) -> float:
        value = update(self)
        grad = self._policy.backbone.layers[1].mlp.up_proj.weight.grad
        assert grad is not None
        gradients.append(grad.clone())
        return value

    update = BehaviourCloning._update
    monkeypatch.setattr(BehaviourCloning, "_update", noted)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: None)  # which couples all gradients
    once = replace(FAST, steps=1)
    for name, given in (("plain", None), ("both", plan)):
        train(config(mock_demos, tmp_path / name, layers=4, plan=given, optimizer=once))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
def test_compiled_training_learns_the_same_and_compiles_once(mock_demos: Path, plan: Path, tmp_path: Path) -> None:
    before = counters["stats"]["unique_graphs"]
    both = {"layers": 4, "plan": plan}
    plain = train(config(mock_demos, tmp_path / "plain", **both))
    assert counters["stats"]["unique_graphs"] == before
    compiled = train(config(mock_demos, tmp_path / "compiled", **both, optimizer=replace(FAST, compile=True)))
    assert counters["stats"]["unique_graphs"] == before + 1
    for key in ("loss", "validation_loss", "validation_short_loss"):
        losses = [[point[key] for point in read_lines(folder / CURVE_FILE)] for folder in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


LONGER = replace(FAST, steps=32)


@pytest.fixture(scope="module")
def whole(mock_demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose training was not interrupted."""
    return made_once(tmp_path_factory, "whole", lambda out: train(config(mock_demos, out, optimizer=LONGER)))


@pytest.mark.parametrize("awaited", ["training_run.json", STATE_FILE])
def test_a_killed_training_ends_in_the_same_weights(
    mock_demos: Path, whole: Path, tmp_path: Path, awaited: str
) -> None:
    """SIGKILL before the first saved state, and after it; the same command then goes on."""
    out = tmp_path / "killed"
    arguments = f"--data {mock_demos} --out {out} --layers 2 --hidden 16 --chunk 4 --steps 32 --batch 8 --save-every 4"
    command = [sys.executable, "-m", "dysl_vla.cli", "train", *arguments.split(), "--threads", "1", "--warmup", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / awaited).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(config(mock_demos, out, optimizer=LONGER))
    assert MiniVLA.from_pretrained(str(out)).fingerprint == MiniVLA.from_pretrained(str(whole)).fingerprint
    assert [point["step"] for point in read_lines(out / CURVE_FILE)] == [*range(4, 33, 4)]


def test_an_interruption_between_checkpoint_and_state_is_not_taken_for_the_end(
    mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dysl_vla.training.behaviour_cloning.save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config(mock_demos, tmp_path / "p"))
    assert (tmp_path / "p/config.json").exists()
    train(config(mock_demos, tmp_path / "p"))
    assert [point["step"] for point in read_lines(tmp_path / "p" / CURVE_FILE)] == [4, 8, 12]


def test_a_resumed_training_takes_the_saved_steps_and_no_others(
    mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = BehaviourCloning._update
    seen: list[int] = []

    def counted(self: BehaviourCloning) -> float:
        if self.step == 9 and 9 not in seen:
            seen.append(9)
            raise KeyboardInterrupt
        seen.append(self.step)
        return update(self)

    monkeypatch.setattr(BehaviourCloning, "_update", counted)
    with pytest.raises(KeyboardInterrupt):
        train(config(mock_demos, tmp_path / "p"))
    train(config(mock_demos, tmp_path / "p"))
    assert seen == [*range(9), 9, *range(8, 12)]


def test_a_resumed_training_of_both_paths_ends_in_the_same_weights(
    mock_demos: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"layers": 4, "plan": plan}
    whole = train(config(mock_demos, tmp_path / "whole", **both))
    with monkeypatch.context() as patched:
        patched.setattr(BehaviourCloning, "_validate", lambda self: 1 / 0 if self.step == 8 else (0.0, 0.0))
        with pytest.raises(ZeroDivisionError):
            train(config(mock_demos, tmp_path / "p", **both))
    out = train(config(mock_demos, tmp_path / "p", **both))
    assert MiniVLA.from_pretrained(str(out)).fingerprint == MiniVLA.from_pretrained(str(whole)).fingerprint


def test_a_state_of_another_run_is_refused(mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BehaviourCloning, "_validate", lambda self: 1 / 0 if self.step == 8 else (0.0, None))
    with pytest.raises(ZeroDivisionError):
        train(config(mock_demos, tmp_path / "p"))
    with pytest.raises(ConfigError, match="another run: its steps"):
        train(config(mock_demos, tmp_path / "p", optimizer=replace(FAST, steps=20)))
    (tmp_path / "p" / STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        train(config(mock_demos, tmp_path / "p"))


def test_training_can_start_from_a_checkpoint(mock_demos: Path, tmp_path: Path) -> None:
    first = train(config(mock_demos, tmp_path / "first"))
    second = train(TrainConfig(data=mock_demos, out=tmp_path / "second", init=str(first), optimizer=FAST))
    assert MiniVLA.from_pretrained(str(second)).config == MiniVLA.from_pretrained(str(first)).config
    record = MiniVLA.from_pretrained(str(second)).provenance
    assert record["init"]["data"]["episodes"] == 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"execute": 9}, "execute"),
        ({"crops": "top=1x2"}, "crops"),
        ({"crops": "side=8x8+0+0"}, "no camera 'side'"),
        ({"crops": "top=64x64+0+0"}, r"crops\.top"),
        ({"grids": "top=x"}, "grids"),
        ({"init": "nobody", "layers": 24, "hidden": 128, "chunk": 8}, "unknown policy"),
        ({"init": "nobody"}, "layers must not be given with init"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    mock_demos: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(mock_demos, tmp_path / "p", **changes))
    assert not (tmp_path / "p").exists()


def test_a_blank_instruction_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data = record(tmp_path / "d")
    tasks = pa.table({"task_index": [0, 1], "task": ["", ""]})
    pq.write_table(tasks, data / "meta/tasks.parquet")
    with pytest.raises(DatasetError, match=r"meta/tasks\.parquet: a task must say what to do, got a blank one"):
        train(config(data, tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_a_plan_for_another_depth_is_refused(mock_demos: Path, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the policy's 2 layers; .* is for 4"):
        train(config(mock_demos, tmp_path / "p", plan=plan))
    assert not (tmp_path / "p").exists()


def test_a_used_folder_is_left_alone(mock_demos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        train(config(mock_demos, tmp_path))
    with pytest.raises(DatasetError, match="holds no demonstrations"):
        train(config(tmp_path, tmp_path / "p"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch": 0},
        {"save_every": 0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"ema": 1.0},
        {"threads": 0},
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(changes))} must"):
        replace(FAST, **changes)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training(mock_demos: Path, tmp_path: Path) -> None:
    wild = replace(FAST, learning_rate=1e30, warmup=0)
    with pytest.raises(ConfigError, match="learning_rate must be lower: the loss is"):
        train(config(mock_demos, tmp_path / "p", optimizer=wild))


def test_a_damaged_dataset_leaves_no_training_behind(mock_demos: Path, tmp_path: Path) -> None:
    shutil.copytree(mock_demos, tmp_path / "d")
    video = next((tmp_path / "d/videos").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:500])
    with pytest.raises(DatasetError, match="mp4"):
        train(config(tmp_path / "d", tmp_path / "p"))
    assert not (tmp_path / "p").exists()


def test_a_finished_training_is_not_run_again(mock_demos: Path, tmp_path: Path) -> None:
    out = train(config(mock_demos, tmp_path / "p"))
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert train(config(mock_demos, tmp_path / "p")) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


NAMES = ("shoulder.pos", "elbow.pos", "parked.pos", "temperature")


def test_a_parked_joint_does_not_make_two_degrees_a_hundred_deviations() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, (20, 30, 0.02, 0.5), (1000, 4)).astype(np.float32)
    found = normalisation(values, NAMES)
    spans = np.ptp(values, axis=0)
    assert found.std[2] == pytest.approx(FLOOR * spans[:3].max())
    assert 2 / found.std[2] < 2
    assert np.array(found.std)[[0, 1, 3]] == pytest.approx(values.std(axis=0)[[0, 1, 3]], rel=1e-5)
    alone = normalisation(values[:, 2:3], ("x",))
    assert alone.std[0] == pytest.approx(0.02, rel=0.1)  # in metres, say: nothing of its kind says that it is little
    mixed = normalisation(values[:, :3], ("theta.vel", "1", "x.vel"))  # of different units, for all that is known
    assert mixed.std[2] == pytest.approx(0.02, rel=0.1)
    still = normalisation(np.ones((5, 2), np.float32), ("a.pos", "b.pos"))
    assert still.std == (1.0, 1.0)


def test_a_policy_is_not_shown_a_state_far_beyond_what_it_was_trained_on() -> None:
    policy = make_tiny_policy(state_clip=3.0)
    assert policy.fingerprint != make_tiny_policy().fingerprint
    rng = np.random.default_rng(0)
    images = {
        "observation.images.top": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "observation.images.wrist": rng.integers(0, 256, (16, 16, 3), np.uint8),
        "task": "move the dot to the mark",
    }

    def act(*state: float) -> Any:
        [chunk] = policy.infer([{**images, "observation.state": np.array(state, np.float32)}], [policy.reset()])
        return chunk.actions

    np.testing.assert_array_equal(act(97, -1), act(3, -1))
    assert (act(2.9, -1) != act(3, -1)).any()


def large_dataset(root: Path, episodes: int = 6, size: tuple[int, int] = (240, 320)) -> Path:
    """Demonstrations at a camera's resolution: what is to be done depends on where a square is."""
    cameras = {"front": size, "side": (32, 32)}
    spec = EmbodimentSpec(cameras, ("a.pos", "b.pos"), ("a.pos", "gripper.pos"), (-1.0,) * 2, (1.0,) * 2, 30)
    writer = DemonstrationWriter(root, spec, "arm")
    rng = np.random.default_rng(0)
    for number in range(episodes):
        values = np.cumsum(rng.normal(0, 0.1, (15, 2)), axis=0).astype(np.float32)
        front = np.full((15, *size, 3), 40, np.uint8)
        for frame, place in enumerate(np.clip(100 + 50 * values[:, 0], 0, 200).astype(int)):
            front[frame, place : place + 40, 100:140] = 200
        side = np.repeat(rng.integers(0, 256, (15, 1, 1, 3), np.uint8), 32, axis=1).repeat(32, axis=2)
        origin = Origin("none", "none", 0, number, "person", 0.0)
        writer.append(Episode({"front": front, "side": side}, values, values, "put it away", origin))
    writer.close()
    return root


def test_large_images_are_resized_and_training_sees_what_inference_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = large_dataset(tmp_path / "d")
    seen: dict[str, Any] = {}

    def keep(self: BehaviourCloning) -> None:
        seen.update({name: np.array(images) for name, images in self._arrays.images.items()})
        run(self)

    run = BehaviourCloning.run
    monkeypatch.setattr(BehaviourCloning, "run", keep)
    out = train(config(data, tmp_path / "p"))
    policy = MiniVLA.from_pretrained(str(out))
    assert policy.resizes == {"front": (96, 128)}
    assert policy.spec.cameras == {"front": (240, 320), "side": (32, 32)}
    assert policy.crops == {"front": (0, 0, 96, 128), "side": (0, 0, 32, 32)}
    assert seen["front"].shape == (90, 96 + 2 * SHIFT, 128 + 2 * SHIFT, 3)
    for episode, frame, image in Demonstrations(data).frames("front"):
        kept = seen["front"][15 * episode + frame, SHIFT:-SHIFT, SHIFT:-SHIFT]
        np.testing.assert_array_equal(kept, policy._images("front", [{"observation.images.front": image}])[0])
    assert not (out / "frames").exists()
    assert policy.provenance["data"]["held_out_every"] == 3
    assert len(policy.provenance["data"]["action_change"]) == 2


def test_what_is_looked_at_can_be_chosen(tmp_path: Path) -> None:
    data = large_dataset(tmp_path / "d")
    chosen = config(data, tmp_path / "p", cameras="front", resize="front=48x64", crops="front=32x48+8+8", held_out=0.5)
    policy = MiniVLA.from_pretrained(str(train(chosen)))
    assert policy.resizes == {"front": (48, 64)}
    assert policy.crops == {"front": (8, 8, 32, 48)}
    assert policy.provenance["data"]["held_out_every"] == 2
    whole = MiniVLA.from_pretrained(str(train(config(data, tmp_path / "w", cameras="side", resize="side=32x32"))))
    assert whole.resizes == {}
    for values, words in (
        ({"cameras": "back"}, "back"),
        ({"resize": "front=480x640"}, r"resizes\.front"),
        ({"resize": "back=8x8"}, "back"),
        ({"resize": "front=4x4"}, r"resizes\.front"),
        ({"held_out": 0.9}, "held_out"),
        ({"state_names": "x,y"}, "names"),
    ):
        with pytest.raises((ConfigError, DatasetError), match=words):
            train(config(data, tmp_path / "n", **values))  # type: ignore[arg-type]
        assert not (tmp_path / "n").exists()


def test_frames_are_decoded_once_and_kept_while_training_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = large_dataset(tmp_path / "d", 3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(BehaviourCloning, "_update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "p"))
    assert {path.name for path in (tmp_path / "p/frames").iterdir()} == {"front.npy", "side.npy"}

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Demonstrations, "frames", fail)
    train(config(data, tmp_path / "p"))
    assert not (tmp_path / "p/frames").exists()


def test_a_disk_that_is_too_small_is_found_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = large_dataset(tmp_path / "d", 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"45 frames of 2 cameras need 0\.0 GB"):
        train(config(data, tmp_path / "p"))
