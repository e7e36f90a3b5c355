"""Tiny flow policies in LeRobot's layout go through every verb that a user types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import observations
from dysl_vla.deploy.client import Client
from dysl_vla.policies import load_policy
from tests.conftest import made_once
from tests.policies.flow.bundles import acts_as_the_policy_does
from tests.policies.flow.folders import HERE, KINDS, make_folder

OPTIONS = ("state_names=x,y", "action_names=dx,dy,gripper", f"vlm={HERE / 'vlm'}", "execute_steps=2", "steps=3")

pytestmark = pytest.mark.slow


def dysl(*words: object) -> None:
    assert main([*map(str, words)]) == 0, words


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.exhaustive if kind == "pi0" else ()) for kind in KINDS],
)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder, demonstrations of the mock world, a plan and heads. Not to be written to."""
    return made_once(tmp_path_factory, f"{request.param}-verbs", lambda out: make_places(request.param, out))


def make_places(kind: str, root: Path) -> None:
    base = make_folder(kind, root / "base", states=2, actions=3, cameras={"top": (32, 32), "wrist": (28, 28)})
    demos, sizes = root / "demos", "top=32x32,wrist=28x28"
    dysl("demos", "collect", "--suite", "mock", "--out", demos, "--episodes", 6, "--cameras", sizes)
    given = ("--policy", base, "--data", demos, "--policy-options", *OPTIONS)
    dysl("calibrate", *given, "--out", root / "plan", "--frames", 32, "--static-ratio", 0.5)
    training = ("--adapter-steps", 10, "--skip-steps", 60, "--batch", 4, "--frames", 48, "--warmup", 5)
    dysl("distill", *given, "--out", root / "fast", "--plan", root / "plan", *training, "--threads", 1)


def test_heads_are_trained_measured_tuned_and_evaluated(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = shutil.copytree(places / "fast", tmp_path / "fast")
    dysl("tune", "--policy", fast, "--data", places / "demos", "--target-action-error", 10)
    assert f"dysl export --policy {fast}" in capsys.readouterr().out
    dysl("eval", "--policy", fast, "--data", places / "demos", "--out", tmp_path / "offline")
    dysl(
        "eval", "--policy", fast, "--suite", "mock", "--episodes", 1, "--variants", "full,dysl", "--out", tmp_path / "r"
    )
    layers = json.loads((tmp_path / "r" / "dysl" / "result.json").read_text())["layers"]["mean"]
    assert 2 <= layers < 4
    document = json.loads((fast / "config.json").read_text())
    assert document["base"]["name"] == str(places / "base")
    weights = sum(path.stat().st_size for path in fast.glob("*.safetensors"))
    assert weights < 0.1 * (places / "base" / "model.safetensors").stat().st_size


def test_a_server_answers_as_the_policy_does(places: Path) -> None:
    command = [sys.executable, "-m", "dysl_vla.cli", "serve", "--port", "0", "--skip", "0", "--policy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, places / "fast"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        [(_, seen)] = observations(Demonstrations(places / "demos"), np.arange(1))
        policy = load_policy(str(places / "fast"), skip=0)
        [expected] = policy.infer([dict(seen)], [policy.reset()])
        with closing(Client(address)) as client:
            answer = client.infer({**seen, "prompt": seen["task"]})
        np.testing.assert_allclose(answer["actions"], expected.actions, atol=1e-5)
    finally:
        server.kill()
        server.wait()


@pytest.mark.exhaustive  # test_mini_flow exports in every run, and test_parity compares padded words
def test_a_bundle_acts_as_the_policy_does(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it goes on from a running chunk; pi0.5, which reads more words than the instruction, is refused."""
    command = ["export", "--policy", str(places / "fast"), "--out", str(tmp_path / "bundle")]
    if places.name.startswith("pi05"):
        assert main(command) != 0
        assert "pi0.5 reads the state" in capsys.readouterr().err
        assert not (tmp_path / "bundle").exists()
        return
    dysl(*command)
    acts_as_the_policy_does(tmp_path / "bundle", places / "fast", places / "demos")
