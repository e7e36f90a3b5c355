from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dysl_vla.checkpoint import add_to_manifest
from dysl_vla.deploy.export import ExportConfig, export, robot_to_try
from dysl_vla.deploy.runtime import FORMAT, Bundle
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import sha256
from dysl_vla.policies import load_policy
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.operating import Ablation
from tests.conftest import MOCK_INSTRUCTIONS, made_once
from tests.deploy.conftest import without_tracing
from tests.policies.test_dysl import observe, play


@pytest.fixture
def copied(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "b"))


def test_a_bundle_of_format_2_is_read(copied: Path) -> None:
    """It has other names for settings of skipping, and does not say whether it takes other instructions."""
    now = Bundle(copied).infer([observe(1)], [Bundle(copied).reset()])
    document = json.loads((copied / "config.json").read_text()) | {"format": 2}
    skipping = document["skipping"]
    skipping |= {"foresight": skipping.pop("lookahead"), "signal": skipping.pop("importance")}
    skipping["statistics"]["falls"] = skipping["statistics"].pop("drops")
    del document["takes_other_instructions"]
    (copied / "config.json").write_text(json.dumps(document))
    add_to_manifest(copied, ("config.json",))
    before = Bundle(copied)
    np.testing.assert_array_equal(before.infer([observe(1)], [before.reset()])[0].actions, now[0].actions)


@pytest.mark.parametrize("skip", [0.0, 0.3, 0.6, 1.0])
def test_a_bundle_answers_and_decides_as_pytorch_does(
    bundle_folder: Path, skipping_checkpoint: Path, skip: float
) -> None:
    bundle, policy = Bundle(bundle_folder, skip=skip), load_policy(str(skipping_checkpoint), skip=skip)
    ours, theirs = play(bundle, range(40)), play(policy, range(40))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.actions, other.actions, atol=1e-4)
        if other.skips is None:
            assert mine.skips.layers_run.all()
            continue
        assert mine.skips.skips == other.skips.skips
        assert mine.skips.allow_points == other.skips.allow_points
        assert mine.skips.is_verified == other.skips.is_verified
        assert mine.skips.resumed_from == other.skips.resumed_from
        assert mine.skips.layers == other.skips.layers
        assert mine.skips.outputs == pytest.approx(other.skips.outputs, abs=1e-5)
    if 0 < skip < 1:
        assert len({chunk.skips.layers for chunk in ours}) > 1
        assert any(chunk.skips.is_verified for chunk in ours)


def test_a_bundle_is_a_policy_like_any_other(bundle_folder: Path) -> None:
    full, skipping = load_policy(str(bundle_folder), skip=0), load_policy(str(bundle_folder), ablation=Ablation())
    assert isinstance(full, Bundle)
    assert isinstance(skipping, Bundle)
    assert full.fingerprint != skipping.fingerprint == Bundle(bundle_folder).fingerprint
    assert all(chunk.skips.layers_run.all() for chunk in play(full, range(5)))
    assert not all(chunk.skips.layers_run.all() for chunk in play(skipping, range(5)))
    with pytest.raises(ConfigError, match="variants must be full and dysl"):
        load_policy(str(bundle_folder), ablation=Ablation(guidance=False))


def test_a_bundle_holds_no_path_of_the_machine_that_made_it(bundle_folder: Path) -> None:
    for path in bundle_folder.iterdir():
        data = path.read_bytes()
        assert b"site-packages" not in data, path.name
        assert b"skip_controller" not in data, path.name


def test_an_instruction_that_the_bundle_does_not_list_is_tokenized(
    bundle_folder: Path, skipping_checkpoint: Path
) -> None:
    bundle, policy = Bundle(bundle_folder, skip=0), load_policy(str(skipping_checkpoint), skip=0)
    observation = {**observe(1), "task": MOCK_INSTRUCTIONS[1]}
    [mine], [other] = (p.infer([observation], [p.reset()]) for p in (bundle, policy))
    np.testing.assert_allclose(mine.actions, other.actions, atol=1e-4)


def test_verification_is_left_out_when_there_is_no_time_for_it(bundle_folder: Path, skipping_checkpoint: Path) -> None:
    for policy in (Bundle(bundle_folder, skip=0.3), load_policy(str(skipping_checkpoint), skip=0.3)):
        assert any(chunk.skips.is_verified for chunk in play(policy, range(40)))
        state = policy.reset()
        late = 0
        for number in range(40):
            state.needed_at = 0.0
            [chunk] = policy.infer([observe(number)], [state])
            state.executed.extend(chunk.actions[:2])
            assert not chunk.skips.is_verified
            late += chunk.skips.is_verification_late
        assert late


def edit(name: str, change: Callable[[bytes], bytes], keeps_manifest: bool = False) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        if not keeps_manifest:
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps({**manifest, name: sha256(path)}))

    return apply


CURRENT = f'"format": {FORMAT}'.encode()


def other_example(data: bytes) -> bytes:
    import io

    with np.load(io.BytesIO(data)) as file:
        values = dict(file)
    values["full"] = values["full"] + np.float32(0.01)
    out = io.BytesIO()
    np.savez(out, **values)
    return out.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("backbone.onnx", lambda data: data[:-1] + b"x", True), "backbone.onnx: is damaged or edited"),
        (edit("backbone.onnx", lambda data: data[: len(data) // 2]), "ONNX Runtime .* refuses"),
        (edit("config.json", lambda data: data.replace(CURRENT, b'"format": 9')), "must be of format .* got 9"),
        (edit("config.json", lambda data: data.replace(b'"spec"', b'"sepc"')), "KeyError: 'spec'"),
        (edit("example.npz", other_example), "differ from the recorded"),
        (edit("example.npz", lambda data: data[:100]), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "is no bundle"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    ],
)
def test_a_damaged_bundle_does_not_start(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        Bundle(copied)


def test_values_that_cannot_work_are_refused(bundle_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"skip must be above 0.*at most 1, got 2"):
        Bundle(bundle_folder, skip=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no bundle"):
        export(ExportConfig(tmp_path))
    with pytest.raises(ConfigError, match="mock"):
        export(ExportConfig(tmp_path / "x", "mock"))
    assert not (tmp_path / "x").exists()


def test_a_bundle_says_what_to_simulate(copied: Path) -> None:
    assert robot_to_try(copied) == "lerobot:FILE.json --instruction TEXT"
    document = json.loads((copied / "config.json").read_text())
    for robot, named in (
        ("robosuite-5", "robosuite-door"),
        ("robosuite-5@UR5e", "robosuite-door@UR5e"),
        ("metaworld-mt10", "metaworld-door"),
        ("libero-goal", "libero-goal-door"),
    ):
        origins = [{"suite": robot, "task": name, "seed": 0, "episodes": 1} for name in ("lift", "door")]
        document["provenance"]["data"] = {"origins": origins}
        (copied / "config.json").write_text(json.dumps(document))
        assert robot_to_try(copied) == f"mujoco:{named}"


@pytest.fixture(scope="module")
def coarse_folder(skipping_checkpoint: Path, traced: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 8 bits. Not to be written to."""
    with without_tracing(traced):
        config = ExportConfig(Path(), str(skipping_checkpoint), precision="int8")
        return made_once(tmp_path_factory, "int8", lambda out: export(replace(config, out=out)))


@pytest.fixture(scope="module")
def parted_folder(skipping_checkpoint: Path, traced: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose graphs are too large for one file each. Not to be written to."""
    with without_tracing(traced, one_file=10_000):
        config = ExportConfig(Path(), str(skipping_checkpoint))
        return made_once(tmp_path_factory, "parted", lambda out: export(replace(config, out=out)))


@pytest.fixture(scope="module")
def pruned_folder(skipping_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the shortest path alone. Not to be written to."""
    config = ExportConfig(Path(), str(skipping_checkpoint), skip=1.0, prune=True)
    return made_once(tmp_path_factory, "pruned", lambda out: export(replace(config, out=out)))


def test_a_pruned_bundle_acts_as_the_shortest_path_does_and_is_smaller(
    pruned_folder: Path, bundle_folder: Path, skipping_checkpoint: Path
) -> None:
    policy = load_policy(str(skipping_checkpoint), skip=1.0)
    ours, theirs = play(Bundle(pruned_folder), range(20)), play(policy, range(20))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.actions, other.actions, atol=1e-4)
        assert mine.skips.skips == other.skips.skips
        assert 0 < mine.skips.layers == other.skips.layers < 6
        assert not mine.skips.outputs
    assert (pruned_folder / "backbone.onnx").stat().st_size < 0.7 * (bundle_folder / "backbone.onnx").stat().st_size


def test_a_pruned_bundle_can_do_nothing_else(pruned_folder: Path, skipping_checkpoint: Path, tmp_path: Path) -> None:
    for skip in (0.0, 0.5):
        with pytest.raises(ConfigError, match=f"skip must be 1 for .* exported with --prune .* got {skip}"):
            Bundle(pruned_folder, skip=skip)
    with pytest.raises(ConfigError, match=r"skip must be 1 to prune, .* got 0.5; add --skip 1"):
        export(ExportConfig(tmp_path / "x", str(skipping_checkpoint), prune=True))
    assert not (tmp_path / "x").exists()


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def check_same_actions(one: Path, other: Path) -> None:
    for skip in (0.0, 0.5):
        ours, theirs = (play(Bundle(folder, skip=skip), range(20)) for folder in (one, other))
        for mine, their in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine.actions, their.actions)


ONE_FILE_EACH = {"config.json", "encoder.onnx", "backbone.onnx", "tokenizer.json", "example.npz", "manifest.json"}


def test_eight_bits_are_smaller_and_close(coarse_folder: Path, bundle_folder: Path) -> None:
    exact, coarse = Bundle(bundle_folder, skip=0), Bundle(coarse_folder, skip=0)
    errors = [
        np.abs(mine.actions - other.actions).mean()
        for mine, other in zip(play(exact, range(20)), play(coarse, range(20)), strict=True)
    ]
    assert 0 < np.mean(errors) < 0.05
    assert (coarse_folder / "backbone.onnx").stat().st_size < (bundle_folder / "backbone.onnx").stat().st_size


def test_a_graph_that_is_too_large_for_one_file_keeps_its_weights_beside_it(
    parted_folder: Path, bundle_folder: Path
) -> None:
    data = {"encoder.onnx.data", "backbone.onnx.data"}
    assert files_of(bundle_folder) == ONE_FILE_EACH
    assert files_of(parted_folder) == ONE_FILE_EACH | data
    assert data < json.loads((parted_folder / "manifest.json").read_text()).keys()
    for name in data:
        graph = parted_folder / name.removesuffix(".data")
        assert graph.stat().st_size < (bundle_folder / graph.name).stat().st_size
        assert (parted_folder / name).stat().st_mode == graph.stat().st_mode
    check_same_actions(parted_folder, bundle_folder)


def test_a_bundle_leaves_nothing_of_the_one_that_it_replaces(
    parted_folder: Path, coarse_folder: Path, skipping_checkpoint: Path, traced: Any, tmp_path: Path
) -> None:
    """Here of 8 bits, which fit into one file where the exact ones, and the encoder's, do not."""
    folder = Path(shutil.copytree(parted_folder, tmp_path / "b"))
    with without_tracing(traced, one_file=30_000):
        export(ExportConfig(folder, str(skipping_checkpoint), precision="int8"))
    assert files_of(folder) == ONE_FILE_EACH | {"encoder.onnx.data"}
    assert json.loads((folder / "manifest.json").read_text()).keys() == files_of(folder) - {"manifest.json"}
    assert (folder / "backbone.onnx").read_bytes() == (coarse_folder / "backbone.onnx").read_bytes()
    check_same_actions(folder, coarse_folder)


def forget(name: str) -> Callable[[Path], None]:
    """Neither the file nor its entry in the manifest."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != name}))

    return apply


@pytest.mark.parametrize("name", ["encoder.onnx.data", "backbone.onnx.data"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name: edit(name, lambda data: data[:-1] + bytes([data[-1] ^ 1]), True), "{}: is damaged or edited"),
        (lambda name: edit(name, lambda data: data[:-1], True), "{}: is damaged or edited"),
        (lambda name: edit(name, lambda data: bytes(len(data))), "differ from the recorded"),
        (lambda name: edit(name, lambda data: data[:9]), "ONNX Runtime .* refuses"),
        (lambda name: lambda folder: (folder / name).unlink(), "{}: is missing"),
        (forget, "ONNX Runtime .* refuses .*{}"),
    ],
)
def test_weights_that_are_missing_or_damaged_are_named(
    parted_folder: Path, tmp_path: Path, name: str, damage: Callable[[str], Callable[[Path], None]], message: str
) -> None:
    folder = Path(shutil.copytree(parted_folder, tmp_path / "b"))
    damage(name)(folder)
    with pytest.raises(CheckpointError, match=message.format(name.replace(".", r"\."))):
        Bundle(folder)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("int8", 1.25)])
def test_a_disk_without_room_is_told_before_tracing_begins(
    skipping_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, share: float
) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise InterruptedError

    policy = load_policy(str(skipping_checkpoint), skip=0)
    assert isinstance(policy, MiniVLA)
    needed = int(share * sum(parameter.nbytes for parameter in policy.parameters()))
    folder, killed = tmp_path / "b", tmp_path / "b" / ".killed.tmp"
    killed.mkdir(parents=True)
    config = ExportConfig(folder, str(skipping_checkpoint), precision=precision)
    monkeypatch.setattr("torch.export.export", begin)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 9 - 9999 * killed.exists()))
    with pytest.raises(ConfigError, match=rf"{folder} needs about {needed / 1e6:.1f} MB while .* free; free some"):
        export(config)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    killed.mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed + 9999 - 9999 * killed.exists()))
    with pytest.raises(InterruptedError):
        export(config)
