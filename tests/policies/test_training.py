from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from dysl_vla.data.cloning import TrainConfig, train
from dysl_vla.data.collect import CollectConfig, collect
from dysl_vla.errors import CheckpointError, ConfigError, DatasetError
from dysl_vla.files import read_lines, write_json
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.policies.training import CURVE_FILE, STATE_FILE, BehaviourCloning, OptimizerConfig

FAST = OptimizerConfig(steps=12, batch=8, save_every=4, threads=1, warmup=2)


def config(data: Path, out: Path, **changes: object) -> TrainConfig:
    return replace(TrainConfig(data=data, out=out, layers=2, hidden=16, chunk=4, optimizer=FAST), **changes)  # type: ignore[arg-type]


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
    learning = replace(FAST, steps=150, batch=16, save_every=50, learning_rate=5e-3)
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
    learning = replace(FAST, steps=120, save_every=40, learning_rate=3e-3)
    out = train(config(mock_demos, tmp_path / "p", layers=4, plan=plan, optimizer=learning))
    errors = [point["validation_short_loss"] for point in read_lines(out / CURVE_FILE)]
    assert errors[-1] < 0.5 * errors[0]
    policy = MiniVLA.from_pretrained(str(out))
    assert policy.provenance["config"]["plan"] == [0, 3]
    assert len(policy.backbone.layers) == 4


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


@pytest.mark.parametrize("awaited", ["training_run.json", STATE_FILE])
def test_a_killed_training_ends_in_the_same_weights(mock_demos: Path, tmp_path: Path, awaited: str) -> None:
    """SIGKILL before the first saved state, and after it; the same command then goes on."""
    longer = replace(FAST, steps=60)
    whole = train(config(mock_demos, tmp_path / "whole", optimizer=longer))
    out = tmp_path / "killed"
    arguments = f"--data {mock_demos} --out {out} --layers 2 --hidden 16 --chunk 4 --steps 60 --batch 8 --save-every 4"
    command = [sys.executable, "-m", "dysl_vla.cli", "train", *arguments.split(), "--threads", "1", "--warmup", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / awaited).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(config(mock_demos, out, optimizer=longer))
    assert MiniVLA.from_pretrained(str(out)).fingerprint == MiniVLA.from_pretrained(str(whole)).fingerprint
    assert [point["step"] for point in read_lines(out / CURVE_FILE)] == [*range(4, 61, 4)]


def test_an_interruption_between_checkpoint_and_state_is_not_taken_for_the_end(
    mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dysl_vla.policies.training.save_file", interrupt)
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
        ({"init": "nobody"}, "layers: nobody decides it"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    mock_demos: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(mock_demos, tmp_path / "p", **changes))
    assert not (tmp_path / "p").exists()


def test_a_plan_for_another_depth_is_refused(mock_demos: Path, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for 4 layers, the policy has 2"):
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
        {"threads": -1},
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(changes))}:"):
        replace(FAST, **changes)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training(mock_demos: Path, tmp_path: Path) -> None:
    wild = replace(FAST, learning_rate=1e30, warmup=0)
    with pytest.raises(ConfigError, match="learning_rate: the loss is"):
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
