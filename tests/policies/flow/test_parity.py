"""SmolVLA, pi0 and pi0.5 act as LeRobot's own code does, which `record_lerobot.py` has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dysl_vla.denoising import NOISE
from dysl_vla.errors import ConfigError
from dysl_vla.policies import ComputeConfig, load_skippable_policy
from dysl_vla.policies.backbone import MASK
from dysl_vla.skip_controller.torch_backend import Forward
from tests.policies.flow.folders import (
    CAMERAS,
    KINDS,
    OBSERVATIONS,
    OPTIONS,
    make_folder,
    observation,
    recorded_actions,
)


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = make_folder(request.param, tmp_path_factory.mktemp("lerobot") / request.param)
    return request.param, load_skippable_policy(str(folder), ComputeConfig(policy_options=OPTIONS))


def test_twenty_observations_give_lerobots_actions(loaded: tuple[str, Any]) -> None:
    kind, policy = loaded
    assert policy.spec.cameras == CAMERAS
    recorded = recorded_actions(kind)
    assert len(recorded) == OBSERVATIONS
    for number, expected in enumerate(recorded):
        given = observation(number)
        noise = torch.from_numpy(given.pop("noise"))[None]
        with torch.no_grad():
            inputs, _ = policy.collate(policy.encode([given], [policy.reset()]))
            actions = policy.act({**inputs, "noise": noise}, Forward())
        actions = policy.spec.action_normalisation.undo(actions.numpy())[0]
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_padded_words_as_in_a_bundle_change_nothing(loaded: tuple[str, Any]) -> None:
    kind, policy = loaded
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    if kind == "pi05":
        with pytest.raises(ConfigError, match=r"pi0\.5 reads the state, too"):
            policy.token_ids(given["task"])
        return
    token_ids = policy.token_ids(given["task"])
    assert token_ids[-1] == policy.padding_id
    images = {name: torch.from_numpy(given[f"observation.images.{name}"])[None] for name in CAMERAS}
    state = torch.from_numpy(given["observation.state"])[None]
    with torch.no_grad():
        batch, _ = policy.collate(policy.encode([given], [policy.reset()]))
        padded = policy.inputs(images, state, torch.tensor([token_ids]))
        assert padded[MASK].shape[1] > batch[MASK].shape[1]
        wanted = policy.act(batch, Forward())
        actions = policy.denoise(batch[NOISE], policy.read_prefix(padded), {**batch, **padded})
    np.testing.assert_allclose(actions[..., : wanted.shape[-1]], wanted, atol=1e-5)


def test_an_image_that_does_not_change_is_encoded_once_and_gives_the_same_actions(
    loaded: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, policy = loaded
    first, other = ({k: v for k, v in observation(n).items() if k != "noise"} for n in (0, 1))
    moved = {**first, "observation.images.wrist": other["observation.images.wrist"]}
    wanted = [policy.infer([given], [policy.reset()])[0].actions for given in (first, first, moved)]
    encoded, see = [], policy.see
    monkeypatch.setattr(policy, "keeps_images", True)
    monkeypatch.setattr(policy, "_kept", {})
    monkeypatch.setattr(policy, "see", lambda images: encoded.append(images.shape) or see(images))
    for given, actions, count in zip((first, first, moved), wanted, (2, 2, 3), strict=True):
        [chunk] = policy.infer([given], [policy.reset()])
        np.testing.assert_array_equal(chunk.actions, actions)
        assert len(encoded) == count


def test_the_last_layer_of_the_prefix_writes_what_a_whole_one_does_to_the_bit(loaded: tuple[str, Any]) -> None:
    _, policy = loaded
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    [fast] = policy.infer([given], [policy.reset()])
    last = policy.backbone.layers[-1]
    kind = type(last)
    try:
        last.__class__ = type(policy.backbone.layers[0])
        [whole] = policy.infer([given], [policy.reset()])
    finally:
        last.__class__ = kind
    np.testing.assert_array_equal(fast.actions, whole.actions)


def test_a_row_does_not_depend_on_its_neighbours(loaded: tuple[str, Any]) -> None:
    """Their instructions differ in length, so that all but one prefix are padded."""
    _, policy = loaded
    given = [{key: value for key, value in observation(number).items() if key != "noise"} for number in range(3)]
    together = policy.infer(given, [policy.reset() for _ in given])
    for one, chunk in zip(given, together, strict=True):
        [alone] = policy.infer([one], [policy.reset()])
        np.testing.assert_allclose(chunk.actions, alone.actions, atol=1e-5)
    again = policy.infer(given, [policy.reset() for _ in given])
    for one, other in zip(together, again, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


def test_the_noise_changes_from_one_inference_to_the_next(loaded: tuple[str, Any]) -> None:
    _, policy = loaded
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    state = policy.reset()
    [first] = policy.infer([given], [state])
    state.executed.extend(first.actions[:2])
    [second] = policy.infer([given], [state])
    assert np.abs(first.actions - second.actions).max() > 1e-3


def test_a_checkpoint_refers_to_lerobots_folder(loaded: tuple[str, Any], tmp_path: Path) -> None:
    _, policy = loaded
    policy.save_pretrained(tmp_path)
    again = load_skippable_policy(str(tmp_path))
    assert again.fingerprint == policy.fingerprint
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    [one], [other] = (p.infer([given], [p.reset()]) for p in (policy, again))
    np.testing.assert_array_equal(one.actions, other.actions)


def test_a_chunk_goes_on_from_the_one_before(loaded: tuple[str, Any]) -> None:
    """What will have been sent stays as it is; behind it the chunk leaves the one before little by little."""
    _, policy = loaded
    given, later = ({k: v for k, v in observation(n).items() if k != "noise"} for n in (0, 1))
    [before] = policy.infer([given], [policy.reset()])
    state = policy.reset()
    [free] = policy.infer([later], [state])
    state.leftover, state.sent_before = before.actions[2:], 2
    [going_on] = policy.infer([later], [state])
    np.testing.assert_allclose(going_on.actions[:2], before.actions[2:4], atol=1e-4)
    apart = [np.abs(chunk.actions[:5] - before.actions[2:]).mean(axis=1) for chunk in (free, going_on)]
    assert (apart[1][2:5] < apart[0][2:5]).all()
    assert np.abs(going_on.actions[5:] - before.actions[5:]).max() > 1e-3
