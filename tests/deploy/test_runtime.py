from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.deploy.export import ExportConfig, export, robot_to_try
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.files import sha256
from dysl_vla.policies import load_policy
from dysl_vla.skip_controller.operating import Switches
from tests.conftest import MOCK_INSTRUCTIONS
from tests.policies.test_dysl import observe, play


@pytest.fixture
def copied(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "b"))


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
    full, skipping = load_policy(str(bundle_folder), skip=0), load_policy(str(bundle_folder), switches=Switches())
    assert isinstance(full, Bundle)
    assert isinstance(skipping, Bundle)
    assert full.fingerprint != skipping.fingerprint == Bundle(bundle_folder).fingerprint
    assert all(chunk.skips.layers_run.all() for chunk in play(full, range(5)))
    assert not all(chunk.skips.layers_run.all() for chunk in play(skipping, range(5)))
    with pytest.raises(ConfigError, match="left out"):
        load_policy(str(bundle_folder), switches=Switches(guidance=False))


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
        (edit("config.json", lambda data: data.replace(b'"format": 2', b'"format": 9')), "is of format 9"),
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
    with pytest.raises(ConfigError, match="skip: 2"):
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
    for robot, task in (("robosuite-5", "door"), ("robosuite-5@UR5e", "door@UR5e"), ("metaworld-mt10", "door")):
        origins = [{"suite": robot, "task": name, "seed": 0, "episodes": 1} for name in ("lift", "door")]
        document["provenance"]["data"] = {"origins": origins}
        (copied / "config.json").write_text(json.dumps(document))
        assert robot_to_try(copied) == f"mujoco:{robot.partition('-')[0]}-{task}"


def test_eight_bits_are_smaller_and_close(skipping_checkpoint: Path, bundle_folder: Path, tmp_path: Path) -> None:
    folder = export(ExportConfig(tmp_path / "b", str(skipping_checkpoint), precision="int8"))
    exact, coarse = Bundle(bundle_folder, skip=0), Bundle(folder, skip=0)
    errors = [
        np.abs(mine.actions - other.actions).mean()
        for mine, other in zip(play(exact, range(20)), play(coarse, range(20)), strict=True)
    ]
    assert 0 < np.mean(errors) < 0.05
