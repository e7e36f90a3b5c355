"""The policies that come with the package."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import dysl_vla
from dysl_vla.envs import FIRST_EVALUATION_SEED, get_suite
from dysl_vla.policies import load_policy
from dysl_vla.provenance import origins, training_suite

SHIPPED = sorted((Path(dysl_vla.__file__).parent / "policies/shipped").iterdir())

pytestmark = pytest.mark.slow


@pytest.fixture(params=SHIPPED, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_it_is_small_and_says_nothing_of_the_machine_it_was_trained_on(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    for path in folder.iterdir():
        if path.suffix in (".json", ".jsonl"):
            assert not re.search(r"/(root|tmp|home|work)/", path.read_text()), path


def test_it_acts_where_it_was_trained_and_skips_most_layers(folder: Path) -> None:
    policy, full = load_policy(folder.name), load_policy(folder.name, skip=0)
    suite_name, tasks = training_suite(policy.provenance, "", "")
    suite = get_suite(suite_name)
    with closing(suite.make(suite.choose(tasks)[0], policy.spec.cameras)) as env:
        policy.spec.check_embodiment(env.embodiment)
        observation, _ = env.reset(seed=FIRST_EVALUATION_SEED)
        state = policy.reset()
        [skipping], [whole] = policy.infer([observation], [state]), full.infer([observation], [full.reset()])
    assert skipping.skips is not None
    assert skipping.skips.layers < 0.5 * len(skipping.skips.layers_run)
    assert whole.skips is None
    scale = np.asarray(policy.spec.action_normalisation.std)
    assert np.abs((skipping.actions - whole.actions) / scale).mean() < 0.5


def test_it_has_seen_no_evaluation_seed(folder: Path) -> None:
    seeds = {origin["seed"] for origin in origins(load_policy(folder.name).provenance)}
    assert seeds
    assert max(seeds) < FIRST_EVALUATION_SEED


def test_it_acts_as_it_did_when_it_was_first_shipped(folder: Path) -> None:
    """shipped_actions.json was written by version 0.1, before names and fingerprints changed."""
    expected = json.loads(Path(__file__).with_name("shipped_actions.json").read_text())[folder.name]
    policy = load_policy(folder.name)
    state, rng = policy.reset(), np.random.default_rng(0)
    instruction = policy.provenance["data"]["instructions"][0]
    for moment in expected:
        observation = policy.spec.blank_observation(instruction)
        for key in sorted(observation):
            if key.startswith("observation.images."):
                observation[key] = rng.integers(0, 256, observation[key].shape, dtype=np.uint8)
        [chunk] = policy.infer([observation], [state])
        state.executed.extend(chunk.actions[: policy.spec.execute_steps])
        np.testing.assert_allclose(chunk.actions[0], moment["action"], atol=1e-3)
        assert chunk.skips is not None
        assert chunk.skips.layers == moment["layers"]
