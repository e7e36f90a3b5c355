"""Properties of loading: where a policy runs, what its variants share, and bases that are only referred to."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import save_file

from dysl_vla.checkpoint import read_policy_type
from dysl_vla.cli import main
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies import ComputeConfig, can_skip, load_policy, load_variants
from dysl_vla.policies import compute as compute_module
from dysl_vla.policies.base_reference import SMALL, find_base, quick_fingerprint, save_reference
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.operating import ABLATIONS


def pointers(policy: Any) -> set[int]:
    return {value.data_ptr() for value in policy.state_dict().values()}


def test_variants_share_their_weights_and_nothing_else() -> None:
    full, dysl, other = load_variants("metaworld-mini", [(0, None), (None, None), (0.5, ABLATIONS["no-guidance"])])
    assert isinstance(full, MiniVLA)
    assert pointers(full) == pointers(dysl._policy) == pointers(other._policy)  # type: ignore[attr-defined]
    observation = full.spec.blank_observation("push the puck to the goal")
    rng = np.random.default_rng(0)
    for key in observation:
        if key.startswith("observation.images"):
            observation[key] = rng.integers(0, 256, observation[key].shape, np.uint8)

    def actions(policy: Any) -> Any:
        return policy.infer([observation], [policy.reset()])[0].actions

    together = [actions(policy) for policy in (full, dysl, other, full)]
    alone = [
        actions(load_policy("metaworld-mini", skip=0)),
        actions(load_policy("metaworld-mini")),
        actions(load_policy("metaworld-mini", skip=0.5, ablation=ABLATIONS["no-guidance"])),
    ]
    for one, expected in zip(together, [*alone, alone[0]], strict=True):
        np.testing.assert_array_equal(one, expected)


def test_a_policy_that_can_skip_is_known_without_loading_it(tiny_policy: MiniVLA, tmp_path: Path) -> None:
    tiny_policy.save_pretrained(tmp_path)
    assert can_skip("metaworld-mini")
    assert not can_skip(str(tmp_path))
    assert not can_skip("mock")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nowhere", "mps"])
def test_a_device_that_this_machine_has_not_is_named_with_those_that_it_has(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=rf"device must be one of this machine's, got '{device}'; PyTorch finds cpu"):
        load_policy("metaworld-mini", compute=ComputeConfig(device=device))


def test_auto_is_the_checkpoint_s_type_on_what_there_is() -> None:
    plain, auto = (
        load_policy("metaworld-mini", skip=0, compute=ComputeConfig(*given)) for given in ((), ("auto",) * 2)
    )
    assert isinstance(plain, MiniVLA)
    assert isinstance(auto, MiniVLA)
    assert plain.read_out.dtype == auto.read_out.dtype
    assert auto.read_out.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_processes_of_one_command_take_turns_on_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = []
    for identity in ((), (1,), (2,), (3,)):
        monkeypatch.setattr(compute_module, "current_process", lambda i=identity: SimpleNamespace(_identity=i))
        seen.append(compute_module._found())
    assert seen == ["cuda:0", "cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compute_module._found() == "cuda:1"


def test_attention_changes_how_and_not_what() -> None:
    observation: Any = None
    answers = []
    for attention in ("eager", "sdpa"):
        policy = load_policy("metaworld-mini", skip=0, compute=ComputeConfig(attention=attention))
        assert isinstance(policy, MiniVLA)
        assert policy.backbone.config._attn_implementation == attention
        observation = observation or policy.spec.blank_observation("close the drawer")
        answers.append(policy.infer([observation], [policy.reset()])[0].actions)
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention": "magic"}, "attention must be one that transformers offers here, got 'magic'"),
        ({"policy_options": ("chunk_length=8",)}, "policy_options must be left out for 'metaworld-mini'"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32"),
        ({"policy_options": ("chunk_length",)}, "policy_options must be of the form name=value, got 'chunk_length'"),
        ({"policy_options": ("a=1", "a=2")}, "policy_options must name each option once, got a twice"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy("metaworld-mini", compute=ComputeConfig(**given))


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"policy_type": "mini-vla", "model_type": "llama"}, "mini-vla"),
        ({"type": "smolvla"}, "smolvla"),
        ({"model_type": "openvla"}, "openvla-oft"),
    ],
)
def test_the_type_is_read_wherever_others_write_it(document: dict[str, str], found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_policy_type(tmp_path) == found


@pytest.mark.parametrize(("field", "value"), [("type", "pi0fast"), ("model_type", "mpt")])
def test_a_foreign_policy_that_is_not_supported_is_refused_by_its_name(field: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=rf"field '{field}' must be one of .*openvla-oft.*, got '{value}'"):
        load_policy(str(tmp_path))


def large_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    weights = {"a": torch.zeros(SMALL // 4 + 100), "b": torch.ones(3)}
    save_file(weights, folder / "model.safetensors")
    torch.save({"head": torch.zeros(SMALL // 4 + 100)}, folder / "action_head--1_checkpoint.pt")
    return folder


def test_a_base_that_changed_has_another_fingerprint(tmp_path: Path) -> None:
    folder = large_folder(tmp_path / "base")
    before = quick_fingerprint(folder)
    assert before == quick_fingerprint(folder)
    (folder / "README.md").write_text("words")
    assert before == quick_fingerprint(folder)
    # a large tensor that was trained, a small one, a head, a setting
    changes: list[tuple[str, Any]] = [
        ("model.safetensors", {"a": torch.full((SMALL // 4 + 100,), 0.01), "b": torch.ones(3)}),
        ("model.safetensors", {"a": torch.zeros(SMALL // 4 + 100), "b": torch.tensor([1, 1, 1.001])}),
        ("model.safetensors", {"c": torch.zeros(SMALL // 4 + 100), "b": torch.ones(3)}),
    ]
    for name, tensors in changes:
        original = (folder / name).read_bytes()
        save_file(tensors, folder / name)
        assert quick_fingerprint(folder) != before
        (folder / name).write_bytes(original)
    head = torch.zeros(SMALL // 4 + 100)
    head[12345] = 1  # one number: a .pt file keeps a checksum of all
    torch.save({"head": head}, folder / "action_head--1_checkpoint.pt")
    assert quick_fingerprint(folder) != before


def test_a_reference_leads_to_its_base_wherever_that_is(tmp_path: Path) -> None:
    folder = large_folder(tmp_path / "base")
    found, base = find_base(str(folder), {"chunk_length": "8"})
    assert found == folder
    assert base.name == str(folder.resolve())
    save_reference(tmp_path / "fast", "openvla-oft", base, {"made": "here"})
    again, same = find_base(str(tmp_path / "fast"), {})
    assert (again, same) == (folder, base)
    assert find_base(str(tmp_path / "fast"), {"num_images": "3"})[1].options == {"chunk_length": "8", "num_images": "3"}
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the base .*base is not there .* give --policy-options base=FOLDER"):
        find_base(str(tmp_path / "fast"), {})
    assert find_base(str(tmp_path / "fast"), {"base": str(moved)})[0] == moved
    (moved / "config.json").write_text(json.dumps({"model_type": "openvla", "changed": True}))
    with pytest.raises(CheckpointError, match=r"the base was changed since the heads in .* were trained"):
        find_base(str(tmp_path / "fast"), {"base": str(moved)})


@pytest.mark.parametrize("name", ["model.safetensors", "action_head--1_checkpoint.pt"])
def test_a_damaged_base_is_one_clear_error(name: str, tmp_path: Path) -> None:
    folder = large_folder(tmp_path / "base")
    (folder / name).write_bytes(b"\xff" * (SMALL + 1))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        quick_fingerprint(folder)


def test_options_are_printed_as_they_are_typed() -> None:
    given = ComputeConfig("cpu", "bfloat16", policy_options=("norm_stats=my data", "num_images=3"))
    for compute in (given, ComputeConfig()):
        assert tyro.cli(ComputeConfig, args=shlex.split(compute.words)) == compute


@pytest.mark.parametrize("verb", ["eval --out x", "distill --data x --out x", "calibrate --data x --out x", "serve"])
def test_no_command_computes_on_a_device_without_contents(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--policy", "metaworld-mini", "--device", "meta"]) == 2
    assert "device must be one of this machine's, got 'meta'" in capsys.readouterr().err
