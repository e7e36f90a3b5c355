from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaModel

from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ConfigError, ObservationError
from dysl_vla.policies import ComputeConfig, Policy, load_policy
from dysl_vla.policies.mini_policy import Crop
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.skip_controller.torch_backend import Forward
from dysl_vla.types import Normalisation
from tests.conftest import make_tiny_policy

ENV = MockEnv("reach")
POLICY = make_tiny_policy()


def observations(count: int) -> list[dict[str, object]]:
    return [ENV.reset(seed=0, options={"episode_index": index})[0] for index in range(count)]


def infer(policy: Policy, batch: list[dict[str, object]]) -> np.ndarray:
    return np.stack([chunk.actions for chunk in policy.infer(batch, [policy.reset() for _ in batch])])


def test_policies_speak_the_protocol(tiny_policy: MiniVLA) -> None:
    assert isinstance(tiny_policy, Policy)
    assert isinstance(MockPolicy(), Policy)
    assert type(tiny_policy.backbone) is LlamaModel


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)), st.integers(1, 5))
def test_a_rows_actions_do_not_depend_on_its_neighbours(order: list[int], count: int) -> None:
    batch = observations(5)
    alone = np.concatenate([infer(POLICY, [row]) for row in batch])
    together = infer(POLICY, [batch[i] for i in order[:count]])
    np.testing.assert_allclose(together, alone[order[:count]], rtol=1e-4, atol=1e-5)


def test_actions_have_the_specs_shape_and_the_datas_units(tiny_policy: MiniVLA) -> None:
    assert infer(tiny_policy, observations(3)).shape == (3, 4, 3)
    far = replace(tiny_policy.spec, action_normalisation=Normalisation((10.0, 20.0, 30.0), (1e-6, 1e-6, 1e-6)))
    moved = make_tiny_policy(spec=far)
    np.testing.assert_allclose(infer(moved, observations(1))[0, 0], [10, 20, 30], rtol=1e-4)


def test_everything_that_is_observed_matters(tiny_policy: MiniVLA) -> None:
    [fine] = observations(1)
    before = infer(tiny_policy, [fine])
    for key in ("observation.images.top", "observation.images.wrist", "observation.state"):
        assert np.abs(infer(tiny_policy, [fine | {key: fine[key] + 1}]) - before).max() > 0  # type: ignore[operator]
    assert np.abs(infer(tiny_policy, [fine | {"task": "move the dot"}]) - before).max() > 0


def test_time_is_accounted_for_by_part(tiny_policy: MiniVLA) -> None:
    batch, states = observations(1), [tiny_policy.reset()]
    started = time.perf_counter()
    [chunk] = tiny_policy.infer(batch, states)
    around = time.perf_counter() - started
    timing = chunk.timing
    assert min(timing.encode_s, timing.llm_s, timing.decode_s) > 0
    assert 0.5 * around < timing.total_s <= around


def test_an_instruction_of_any_length_and_alphabet_is_read(tiny_policy: MiniVLA) -> None:
    for text in ("", "go", "öffne die Tür, 请打开门, " * 20):
        assert len(tiny_policy.token_ids(text)) == tiny_policy.config.text_tokens
        assert max(tiny_policy.token_ids(text)) < tiny_policy.config.vocab_size


def test_a_wrong_observation_is_refused(tiny_policy: MiniVLA) -> None:
    [fine] = observations(1)
    with pytest.raises(ObservationError, match=r"observation\.images\.wrist"):
        infer(tiny_policy, [fine | {"observation.images.wrist": np.zeros((8, 8, 3), np.uint8)}])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"crops": {"top": Crop(1, 0, 32, 32), "wrist": Crop(0, 0, 16, 16)}}, "crops.top"),
        ({"crops": {"top": Crop(0, 0, 24, 32), "wrist": Crop(0, 0, 16, 16)}}, "crops.top"),
        ({"crops": {"top": Crop(0, 0, 32, 32)}}, "crops"),
        ({"num_heads": 3}, "hidden_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 5}, "vocab_size"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        make_tiny_policy(**changes)


def test_the_fingerprint_follows_everything_that_decides_actions() -> None:
    spec = make_tiny_policy().spec
    changed = [
        make_tiny_policy(2),
        make_tiny_policy(1, spec=replace(spec, execute_steps=1)),
        make_tiny_policy(1, text_tokens=8),
        make_tiny_policy(1, crops={"top": Crop(0, 0, 16, 32), "wrist": Crop(0, 0, 16, 16)}),
    ]
    fingerprints = {policy.fingerprint for policy in (make_tiny_policy(1), make_tiny_policy(1), *changed)}
    assert len(fingerprints) == 1 + len(changed)


def test_gradients_reach_every_weight(tiny_policy: MiniVLA) -> None:
    images = {"top": torch.randint(0, 255, (2, 32, 32, 3)), "wrist": torch.randint(0, 255, (2, 16, 16, 3))}
    inputs = tiny_policy.inputs(images, torch.ones(2, 2), torch.ones(2, 9, dtype=torch.long))
    tiny_policy.act(inputs, Forward()).abs().sum().backward()
    assert [n for n, p in tiny_policy.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_backbone_is_told_what_it_would_find_out_itself(tiny_policy: MiniVLA) -> None:
    with torch.inference_mode():
        inputs, _ = tiny_policy.collate(tiny_policy.encode(observations(2), [tiny_policy.reset()] * 2))
        told = tiny_policy.backbone(**inputs).last_hidden_state
        alone = tiny_policy.backbone(inputs_embeds=inputs["inputs_embeds"]).last_hidden_state
    assert torch.equal(told, alone)
    assert all(len(value) == 2 for value in inputs.values())


def test_every_tensor_is_made_where_the_policy_is(tiny_policy: MiniVLA) -> None:
    """On torch's device without memory, an operation with a tensor of the CPU fails."""
    tiny_policy.backbone.set_attn_implementation("eager")  # the other reads the mask's values
    policy = tiny_policy.to("meta")
    inputs, _ = policy.collate(policy.encode(observations(2), [policy.reset()] * 2))
    assert {value.device.type for value in inputs.values()} == {"meta"}
    assert policy.act(inputs, Forward()).device.type == "meta"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_policy_is_loaded_with_other_numbers(tiny_policy: MiniVLA, tmp_path: Path, dtype: str) -> None:
    tiny_policy.save_pretrained(tmp_path)
    plain, other = load_policy(str(tmp_path)), load_policy(str(tmp_path), compute=ComputeConfig(dtype=dtype))
    [one], [two] = (p.infer(observations(1), [p.reset()]) for p in (plain, other))
    np.testing.assert_allclose(one.actions, two.actions, atol=0.05)
    assert plain.fingerprint != other.fingerprint


def test_a_device_that_is_not_there_is_refused(tiny_policy: MiniVLA, tmp_path: Path) -> None:
    tiny_policy.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="device must be one of this machine's, got 'nowhere'"):
        load_policy(str(tmp_path), compute=ComputeConfig(device="nowhere"))
    with pytest.raises(ConfigError, match="dtype must be one of"):
        ComputeConfig(dtype="int3")
    with pytest.raises(ConfigError, match="must be left out"):
        load_policy("mock", compute=ComputeConfig(dtype="bfloat16"))
