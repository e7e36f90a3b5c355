"""Tiny flow policies in LeRobot's layout: its own small files, and weights that are a function of a tensor's name.

It needs NumPy and safetensors alone, so that `record_lerobot.py` gives LeRobot the same weights and observations.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
KINDS = ("smolvla", "pi0", "pi05")
CHUNK, ACTIONS, STATES, PADDED = 7, 5, 6, 8
CAMERAS = {"top": (24, 40), "wrist": (28, 28)}
TASKS = ("pick up the cube", "open the drawer", "put it into the box and close it")
OBSERVATIONS = 20
OPTIONS = ("state_names=a,b,c,d,e,f", "action_names=u,v,w,x,gripper", f"vlm={HERE / 'vlm'}")
"""What the folders do not say."""


def random_weights(shapes: dict[str, list[int]]) -> dict[str, NDArray[np.float32]]:
    """Weights by name; each is a function of its name and shape."""
    weights = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        is_norm = "norm" in name and len(shape) == 1
        if is_norm and name.endswith("weight"):
            centre = 1.0 if "lm_expert" in name or "text_model" in name or "vision" in name else 0.0
            weights[name] = centre + 0.1 * values
        else:
            weights[name] = values * (0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:])))
    if "model.paligemma_with_expert.paligemma.lm_head.weight" in weights:  # tied
        tied = next((name for name in weights if name.endswith("language_model.embed_tokens.weight")), None)
        if tied is not None:
            weights[tied] = weights["model.paligemma_with_expert.paligemma.lm_head.weight"]
    return weights


def observation(number: int) -> dict[str, Any]:
    """An observation, and under "noise" that of its inference, (chunk, padded action)."""
    rng = np.random.default_rng(number)
    images = {
        f"observation.images.{name}": rng.integers(0, 256, (*size, 3), np.uint8) for name, size in CAMERAS.items()
    }
    return {
        **images,
        "observation.state": rng.normal(size=STATES).astype(np.float32),
        "task": TASKS[number % len(TASKS)],
        "noise": rng.standard_normal((CHUNK, PADDED)).astype(np.float32),
    }


def make_folder(
    kind: str,
    out: Path,
    *,
    states: int = STATES,
    actions: int = ACTIONS,
    cameras: dict[str, tuple[int, int]] | None = None,
) -> Path:
    """Write a policy's folder as LeRobot wrote it when it was recorded, for as many states, actions and cameras."""
    shutil.copytree(HERE / kind, out, dirs_exist_ok=True)
    shapes = json.loads((out / "tensors.json").read_text())
    save_file(random_weights(shapes), out / "model.safetensors")
    for name in ("tensors.json", "actions.npy"):
        (out / name).unlink()
    config = json.loads((out / "config.json").read_text())
    inputs, counts = config["input_features"], {"observation.state": states, "action": actions}
    if cameras is not None:
        images = {
            f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]} for name, size in cameras.items()
        }
        inputs = config["input_features"] = images | {"observation.state": inputs["observation.state"]}
    inputs["observation.state"]["shape"], config["output_features"]["action"]["shape"] = [states], [actions]
    (out / "config.json").write_text(json.dumps(config))
    for path in out.glob("policy_*.safetensors"):
        values = load_file(path)
        cut = {name: value[: counts.get(name.rpartition(".")[0])] for name, value in values.items()}
        save_file({name: np.ascontiguousarray(value) for name, value in cut.items()}, path)
    return out


def recorded_actions(kind: str) -> NDArray[np.float32]:
    """What LeRobot's own code answered, (observations, chunk, actions)."""
    return np.asarray(np.load(HERE / kind / "actions.npy"))
