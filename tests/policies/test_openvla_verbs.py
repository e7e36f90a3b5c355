"""A folder in OpenVLA-OFT's public layout, with tiny random weights, goes through every verb that a user types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.deploy.client import Client
from dysl_vla.policies import ComputeConfig, load_policy
from dysl_vla.policies.dysl import DyslPolicy
from dysl_vla.policies.openvla_oft import OpenVLAOFT
from tests.conftest import made_once
from tests.policies.hollow_folder import WHOLE, write_hollow_folder
from tests.policies.openvla_folder import Geometry, write_openvla_folder

MOCK = ("cameras=top,wrist", "image_size=32", "state_names=x,y", "action_names=dx,dy,gripper", "chunk_length=4")
OPTIONS = ("--policy-options", *MOCK, "execute_steps=2")
COMPUTE = ComputeConfig(policy_options=OPTIONS[1:])
SMALL = Geometry(states=2, actions=3, image_size=28, vision_layers=(2, 2))

pytestmark = pytest.mark.slow


def dysl(*words: object) -> None:
    assert main([*map(str, words)]) == 0, words


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, demonstrations of the mock world, a plan and heads, as the commands make them. Not to be written to."""
    return made_once(tmp_path_factory, "openvla-verbs", make_places)


def make_places(root: Path) -> None:
    base, demos = write_openvla_folder(root / "base", geometry=SMALL, dtype=torch.float32), root / "demos"
    sizes = "top=32x32,wrist=32x32"
    dysl("demos", "collect", "--suite", "mock", "--out", demos, "--episodes", 6, "--cameras", sizes)
    given = ("--policy", base, "--data", demos, *OPTIONS)
    dysl("calibrate", *given, "--out", root / "plan", "--frames", 32, "--static-ratio", 0.3)
    training = ("--adapter-steps", 50, "--skip-steps", 150, "--batch", 4, "--frames", 64, "--warmup", 10)
    dysl("distill", *given, "--out", root / "fast", "--plan", root / "plan", *training, "--threads", 1)


@pytest.fixture(scope="module")
def seen(places: Path) -> list[dict[str, Any]]:
    """Observations of one demonstration."""
    demonstrations = Demonstrations(places / "demos")
    return [dict(one) for _, one in observations(demonstrations, np.arange(12))]


def play(policy: Any, seen: list[dict[str, Any]]) -> Iterator[Any]:
    state = policy.reset()
    for observation in seen:
        [chunk] = policy.infer([observation], [state])
        state.executed.extend(chunk.actions[:2])
        yield chunk


def test_distilling_learns_and_keeps_a_reference_to_the_base(places: Path) -> None:
    curve = [json.loads(line) for line in (places / "fast" / "distill.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == 200
    weights = sum(path.stat().st_size for path in (places / "fast").glob("*.safetensors"))
    assert weights < 0.1 * sum(path.stat().st_size for path in (places / "base").glob("*.safetensors"))
    document = json.loads((places / "fast" / "config.json").read_text())
    assert document["policy_type"] == "openvla-oft"
    assert document["base"]["name"] == str(places / "base")
    policy = load_policy(str(places / "fast"))  # its options are in the checkpoint
    assert isinstance(policy, DyslPolicy)
    assert policy.spec.cameras == {"top": (32, 32), "wrist": (32, 32)}


def test_skip_0_is_the_full_model_bit_for_bit(places: Path, seen: list[dict[str, Any]]) -> None:
    base, none = load_policy(str(places / "base"), compute=COMPUTE), load_policy(str(places / "fast"), skip=0)
    assert isinstance(none, OpenVLAOFT)
    for one, other in zip(play(base, seen), play(none, seen), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


def test_a_verified_inference_is_the_full_model_s_bit_for_bit(places: Path, seen: list[dict[str, Any]]) -> None:
    full = load_policy(str(places / "base"), compute=COMPUTE)
    with closing(load_policy(str(places / "fast"), skip=1)) as policy:  # type: ignore[type-var]
        items = policy._policy.encode(seen, [policy.reset()] * len(seen))
        inputs = policy._policy.collate(items)
        with torch.inference_mode():
            passed = policy._backend.run(inputs, np.zeros((len(seen), len(policy.settings.plan.blocks)), np.int64))
            exact = policy._backend.resume(inputs, passed).actions
    assert passed.first_skip is not None
    with torch.inference_mode():
        expected = full.act(full.collate(full.encode(seen, [full.reset()] * len(seen)))[0], _whole()).float().numpy()
    np.testing.assert_array_equal(exact, expected)
    assert np.abs(passed.actions - expected).max() > 0


def _whole() -> Any:
    from dysl_vla.skip_controller.torch_backend import Forward

    return Forward()


def test_tune_and_eval_on_a_mock_world(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = shutil.copytree(places / "fast", tmp_path / "fast")
    dysl("tune", "--policy", fast, "--data", places / "demos", "--target-action-error", 10)
    assert f"dysl control --policy {fast}" in capsys.readouterr().out  # it cannot be exported
    words = ("--suite", "mock", "--episodes", 2, "--variants", "full,dysl", "--video", 1)
    dysl("eval", "--policy", fast, "--out", tmp_path / "runs", *words)
    full, skipping = (json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("full", "dysl"))
    steps = {name: pq.read_table(tmp_path / "runs" / name / "steps.parquet") for name in ("full", "dysl")}
    assert full["suite"] == skipping["suite"] == "mock"
    assert all(len(table) for table in steps.values())
    layers = [value for value in steps["dysl"]["layers"].to_pylist() if value is not None]
    assert layers
    assert min(layers) < 8


def test_eval_on_demonstrations_takes_a_base_as_it_is(places: Path, tmp_path: Path) -> None:
    dysl("eval", "--policy", places / "base", "--data", places / "demos", "--out", tmp_path / "run", *OPTIONS)
    assert (tmp_path / "run" / "result.json").is_file()


def test_serve_answers_as_the_policy_does(places: Path, seen: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "dysl_vla.cli", "serve", "--port", "0", "--skip", "0", "--policy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, places / "fast"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        expected = load_policy(str(places / "fast"), skip=0)
        [chunk] = expected.infer([seen[0]], [expected.reset()])
        with closing(Client(address)) as client:
            answer = client.infer({**seen[0], "prompt": seen[0]["task"]})
        np.testing.assert_allclose(answer["actions"], chunk.actions, atol=1e-6)
    finally:
        server.kill()
        server.wait()


def test_eval_on_robosuite_with_libero_s_observations(tmp_path: Path) -> None:
    base = write_openvla_folder(tmp_path / "libero", geometry=replace(SMALL, states=8, actions=7))
    words = ("--suite", "robosuite-5-libero", "--tasks", "lift", "--episodes", 1, "--policy-options", "image_size=64")
    dysl("eval", "--policy", base, "--out", tmp_path / "run", *words)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["execute_steps"] == 8
    actions = pq.read_table(tmp_path / "run" / "steps.parquet")["action"].to_pylist()
    assert {action[6] for action in actions} <= {-1.0, 0.0, 1.0}  # in bfloat16 it may be just between


def test_a_dry_run_of_the_true_size_reads_no_weights(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_hollow_folder(tmp_path / "base", replace(WHOLE, states=2, actions=3))
    words = ("--batch", 8, "--preset", "paper", "--dry-run")
    dysl("distill", "--policy", base, "--data", places / "demos", "--out", tmp_path / "out", *words, *OPTIONS)
    printed = capsys.readouterr().out
    [title] = [line for line in printed.splitlines() if "batch 8" in line]
    tokens = int(title.split(" tokens")[0].split()[-1])
    assert 512 + 1 + 12 < tokens < 650
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if line.startswith("|")}
    assert float(rows["backbone"][0]) == pytest.approx(32 * 2 * 202.4e6 / 1e9, rel=0.01)
    assert float(rows["activations kept for backward"][1]) < 0.2 * float(rows["activations kept for backward"][0])
    once = float(rows["stage 1: full model, forward"][1].split()[0])
    assert once == pytest.approx(8 * tokens * 32 * 2 * 202.4e6 / 1e12, rel=0.05)  # attention adds a little
    share = float(printed.split(" % of the backbone's")[0].split()[-1])
    assert share <= 1.2
    assert not (tmp_path / "out").exists()
