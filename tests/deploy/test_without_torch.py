"""An environment with what `pip install 'dysl-vla[robot,serve]'` brings, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import dysl_vla
from dysl_vla.deploy.client import Client
from tests.conftest import MOCK_INSTRUCTIONS

BROUGHT = ("numpy", "tqdm", "tyro", "onnxruntime", "msgpack", "prometheus-client", "websockets")
"""Not tokenizers: the instructions that a bundle lists do without."""

CONTROL = """
import importlib.util, sys, time
from pathlib import Path
import numpy as np
for name in ("torch", "transformers", "mujoco", "gymnasium", "pydantic", "tokenizers", "onnx"):
    assert importlib.util.find_spec(name) is None, name
from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.robot import TimedObservation
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.types import EmbodimentSpec

bundle = Bundle(Path(sys.argv[1]))
spec = bundle.spec

class Robot:
    embodiment = EmbodimentSpec(spec.cameras, spec.state_names, spec.action_names, (-1.0,) * 3, (1.0,) * 3, spec.rate_hz)
    sent = 0
    def connect(self, rate_hz): pass
    def observe(self, after):
        time.sleep(max(0.0, after - time.perf_counter()))
        images = {"observation.images." + name: np.zeros((*size, 3), np.uint8) for name, size in spec.cameras.items()}
        observation = {**images, "observation.state": np.zeros(2, np.float32), "task": sys.argv[2]}
        return TimedObservation(observation, time.perf_counter())
    def act(self, action): self.sent += 1
    def hold(self, last): return None
    def report(self): return {"sent": self.sent}
    def stop(self): pass

account = ControlLoop(bundle, Robot(), 20.0, Limits(), LoopConfig(stop_after=1000)).run(0.5)
assert account.robot["sent"] > 0 and account.inferences > 2
"""


def needed(name: str, found: set[str]) -> set[str]:
    """A distribution and all that it requires, recursively."""
    if name not in found:
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name.lower(), found)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("robot")
    venv.create(root, with_pip=False)
    [packages] = root.glob("lib/python*/site-packages")
    names: set[str] = set()
    for name in BROUGHT:
        needed(name, names)
    for name in names:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    (packages / "dysl_vla").symlink_to(Path(dysl_vla.__file__).parent)
    return root / "bin" / "python"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_the_control_loop_runs(python: Path, bundle_folder: Path, tmp_path: Path) -> None:
    command = [python, "-c", CONTROL, bundle_folder, MOCK_INSTRUCTIONS[0]]
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path, env=environment())


def test_the_server_answers_and_says_what_another_instruction_needs(
    python: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    command = [python, "-m", "dysl_vla.cli", "serve", "--bundle", bundle_folder, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment())
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        observation = {
            "observation.images.top": np.zeros((32, 32, 3), np.uint8),
            "observation.images.wrist": np.zeros((16, 16, 3), np.uint8),
            "observation.state": np.zeros(2, np.float32),
            "prompt": MOCK_INSTRUCTIONS[0],
        }
        with Client(address) as client:
            assert client.infer(observation)["actions"].shape == (4, 3)
            with pytest.raises(Exception, match="pip install tokenizers"):
                client.infer({**observation, "prompt": "something else"})
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 0
    finally:
        server.kill()
        server.wait()
