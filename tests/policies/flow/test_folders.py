"""LeRobot's folders that cannot be loaded are refused, each with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from dysl_vla.errors import DyslError
from dysl_vla.policies import ComputeConfig, is_known_as, load_skippable_policy, original_fingerprint
from dysl_vla.skip_controller.compatibility import match_heads
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import attach
from dysl_vla.types import Normalisation
from tests.policies.flow.folders import HERE, KINDS, OPTIONS, make_folder, observation


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("smolvla", tmp_path_factory.mktemp("lerobot") / "smolvla")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "policy"))


def load(folder: Path, *options: str) -> Any:
    return load_skippable_policy(str(folder), ComputeConfig(policy_options=options or OPTIONS))


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        edit(document)
        (folder / name).write_text(json.dumps(document))

    return apply


def change_tensors(pattern: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            values = load_file(path)
            edit(values)
            save_file(values, path)

    return apply


def add_step(document: dict[str, Any]) -> None:
    document["steps"].append({"registry_name": "my_own_processor", "config": {}})


def set_modes(**modes: str) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        for step in document["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"].update(modes)

    return edit


QUERY = "model.vlm_with_expert.vlm.model.text_model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("config.json", lambda d: d.update(type="pi0_fast")), "'type' must be one of .*smolvla.*got 'pi0_fast'"),
        (change("config.json", lambda d: d.update(type="groot")), "'type' must be one of .*got 'groot'"),
        (change("config.json", lambda d: d.update(adapt_to_pi_aloha=True)), "adapt_to_pi_aloha is not supported"),
        (change("config.json", lambda d: d.pop("input_features")), "input_features must name features"),
        (change("config.json", lambda d: d.pop("chunk_size")), "chunk_size must be a number, got None"),
        (
            change("policy_postprocessor.json", set_modes(ACTION="MIN_MAX")),
            "action is normalised by MIN_MAX and needs min and max of 5 dimensions",
        ),
        (change("policy_preprocessor.json", add_step), "policy_preprocessor.json: step 'my_own_processor' is not supp"),
        (
            lambda folder: (folder / "policy_preprocessor.json").unlink(),
            "no policy_preprocessor.json, .*migrate_policy",
        ),
        (
            lambda folder: next(folder.glob("policy_preprocessor_step*")).unlink(),
            r"policy_preprocessor_step_5_normalizer_processor\.safetensors is missing or damaged",
        ),
        (
            change_tensors("policy_*.safetensors", lambda v: v.pop("observation.state.mean")),
            "observation.state is normalised by MEAN_STD and needs mean and std",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
            "model.safetensors is missing or damaged",
        ),
        (change_tensors("model.safetensors", lambda v: v.pop(QUERY)), "no tensor 'backbone.layers.0.self_attn.q_proj"),
        (
            change_tensors("model.safetensors", lambda v: v.update({"model.extra": np.zeros(2, np.float32)})),
            "tensor 'extra' is not known",
        ),
        (
            change_tensors("model.safetensors", lambda v: v.update({"model.state_proj.bias": np.zeros(3, np.float32)})),
            r"tensor 'state_proj.bias' must have the shape \(48,\), got \(3,\)",
        ),
    ],
)
def test_a_folder_that_is_another_or_damaged_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DyslError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("steps=x",), "steps must be an integer, got 'x'"),
        (("speed=3",), "policy_options must be among cameras, state_names, .*got 'speed'"),
        (
            OPTIONS[1:],
            "state_names must be 6 names, as many as the policy has, got x, y, .*--policy-options state_names",
        ),
        ((*OPTIONS, "cameras=one"), "cameras must be 2 names"),
        ((*OPTIONS, "cameras=-,-"), "cameras must name at least one"),
        ((*OPTIONS, "execute_steps=9"), "execute_steps must be at most the chunk_size of 7, got 9"),
        (OPTIONS[:2], "tokenizer of tiny-vlm cannot be had .*put its tokenizer.json into .*policy-options vlm=FOLDER"),
    ],
)
def test_what_a_folder_does_not_say_is_an_option(
    whole: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else the hub is asked again and again
    with pytest.raises(DyslError, match=message):
        load(whole, *options)


def test_a_renamed_camera_has_the_environments_name(folder: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        [step] = [one for one in document["steps"] if one["registry_name"] == "rename_observations_processor"]
        step["config"]["rename_map"] = {"observation.images.front": "observation.images.top"}

    change("policy_preprocessor.json", rename)(folder)
    assert list(load(folder).spec.cameras) == ["front", "wrist"]
    assert list(load(folder, *OPTIONS, "cameras=a,b").spec.cameras) == ["a", "b"]
    assert list(load(folder, *OPTIONS, "cameras=-,b").spec.cameras) == ["b"]


def test_quantiles_map_to_one_and_identity_changes_nothing(folder: Path) -> None:
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        change(name, set_modes(ACTION="QUANTILES", STATE="IDENTITY"))(folder)
    spec = load(folder).spec
    statistics = load_file(next(folder.glob("policy_postprocessor_step*")))
    ends = np.stack([statistics["action.q01"], statistics["action.q99"]])
    np.testing.assert_allclose(spec.action_normalisation.apply(ends), [[-1] * 5, [1] * 5], atol=1e-5)
    assert spec.state_normalisation == Normalisation((0.0,) * 6, (1.0,) * 6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_module_has_the_folders_type_of_numbers_and_heads_follow(kind: str, tmp_path: Path) -> None:
    """LeRobot saves SmolVLA's prefix in bfloat16, and its expert and projections in float32."""
    path = make_folder(kind, tmp_path / kind) / "model.safetensors"
    exact = load(path.parent)
    weights = {
        name: value.bfloat16() if ".vlm." in name or ".paligemma." in name else value
        for name, value in load_tensors(path).items()
    }
    save_tensors(weights, path)
    policy = load(path.parent)
    assert policy.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert policy.expert.layers[0].self_attn.q_proj.weight.dtype == policy.action_in_proj.weight.dtype == torch.float32
    heads = SkipHeads(SkipPlan(4, (0, 3), (1,)), HeadsConfig(policy.width, 8, 4, policy.follower_sizes))
    fine = 1 + 2**-20  # which bfloat16 does not have
    for adapters in heads.followers:
        torch.nn.init.constant_(next(adapters.parameters()), fine)
    match_heads(heads, policy.layers, policy.followers)
    assert all(float(next(adapters.parameters()).detach().max()) == fine for adapters in heads.followers)
    torch.nn.init.zeros_(next(heads.followers.parameters()))
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    [near], [wanted] = (p.infer([given], [p.reset()]) for p in (policy, exact))
    np.testing.assert_allclose(near.actions, wanted.actions, atol=0.1)
    skipper = attach(policy.layers, heads.plan, heads, followers=policy.followers)
    with skipper.step(np.zeros((1, 1), np.int64), force_skip=True) as step:
        policy.infer([given], [policy.reset()])
    assert step.layers_run.sum() == 2
    # Heads are known by the folder's numbers, whatever they were brought to.
    cast = load_skippable_policy(str(path.parent), ComputeConfig(dtype="float32", policy_options=OPTIONS))
    assert cast.fingerprint != policy.fingerprint
    assert is_known_as(cast, original_fingerprint(policy))


def test_heads_know_a_policy_by_another_cameras_name_and_not_by_another_tokenizer(folder: Path) -> None:
    policy, renamed = load(folder), load(folder, *OPTIONS, "cameras=a,b")
    assert is_known_as(renamed, original_fingerprint(policy))
    assert renamed.fingerprint != policy.fingerprint  # another robot's, so that their evaluations are two
    assert not is_known_as(load(folder, *OPTIONS, "cameras=-,b"), original_fingerprint(policy))
    vlm = Path(shutil.copytree(HERE / "vlm", folder.parent / "vlm"))
    change("tokenizer.json", lambda document: document["model"].update(merges=[]))(vlm)
    assert not is_known_as(load(folder, *OPTIONS[:2], f"vlm={vlm}"), original_fingerprint(policy))
