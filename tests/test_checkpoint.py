from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dysl_vla.checkpoint import CONFIG, MANIFEST, PROVENANCE, TOKENIZER, WEIGHTS
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies import load_policy
from dysl_vla.policies.mini_vla import MiniVLA
from tests.conftest import make_tiny_policy

FILES = (CONFIG, WEIGHTS, TOKENIZER, PROVENANCE, MANIFEST)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    policy = make_tiny_policy()
    policy.provenance = {"data": {"origins": [{"seed": 7}]}}
    policy.save_pretrained(folder)
    return folder


def test_what_is_saved_is_loaded(saved: Path) -> None:
    first, second = MiniVLA.from_pretrained(str(saved)), load_policy(str(saved))
    assert isinstance(second, MiniVLA)
    assert first.config == make_tiny_policy().config
    assert first.fingerprint == second.fingerprint
    assert first.provenance["data"]["origins"] == [{"seed": 7}]


def test_saving_a_loaded_checkpoint_changes_no_weight(saved: Path, tmp_path: Path) -> None:
    loaded = MiniVLA.from_pretrained(str(saved))
    loaded.save_pretrained(tmp_path / "again")
    assert MiniVLA.from_pretrained(str(tmp_path / "again")).fingerprint == loaded.fingerprint


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_flipped_byte_is_refused(
    saved: Path, data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "tiny"
    shutil.copytree(saved, folder)
    content = bytearray((folder / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        MiniVLA.from_pretrained(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "tiny")
    (tmp_path / "tiny" / name).unlink()
    with pytest.raises(CheckpointError, match=name if name != CONFIG else "no checkpoint"):
        load_policy(str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("keys", "value", "field"),
    [
        (("config", "num_layers"), 3, "config.num_layers"),
        (("config", "spec", "chunk_length"), 5, "config.spec.chunk_length"),
        (("config", "spec", "state_normalisation", "std"), [1.0, 2.0], "config.spec.state_normalisation.std"),
        (("config", "surprise"), 1, "config.surprise"),
        (("policy_type",), "other", "policy_type"),
    ],
)
def test_a_hand_edited_field_is_named(
    saved: Path, keys: tuple[str, ...], value: object, field: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(saved, folder)
    document = json.loads((folder / CONFIG).read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / CONFIG).write_text(json.dumps(document))
    for load in (MiniVLA.from_pretrained, load_policy):
        with pytest.raises(CheckpointError, match=rf"config\.json: field '{field}'"):
            load(str(folder))


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match="policy_type"):
        load_policy(str(tmp_path))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'no-such-policy'"):
        load_policy("no-such-policy")
