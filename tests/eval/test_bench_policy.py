"""`dysl bench policy` measures each part of an inference, in kinds that compute what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dysl_vla.errors import ConfigError
from dysl_vla.eval import bench_policy as module
from dysl_vla.eval.bench_policy import PolicyBenchConfig, Reprojecting, as_class, bench_policy, render_policy
from dysl_vla.policies import ComputeConfig, load_skippable_policy
from dysl_vla.skip_controller.torch_backend import Forward
from tests.policies.flow.folders import OPTIONS, make_folder, observation


@pytest.fixture(params=["smolvla", "pi0"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    folder = make_folder(request.param, tmp_path / request.param)
    return load_skippable_policy(str(folder), ComputeConfig(policy_options=OPTIONS))


def test_the_kinds_take_turns_and_each_part_takes_time(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.POLICIES, "smolvla", lambda _: policy)
    config = PolicyBenchConfig(rounds=3, keep=2, threads=1)
    kinds = bench_policy(config)
    names = [kind.name.partition(",")[2] or kind.name for kind in kinds]
    assert names[0] == "full"
    assert names[-1] == "skipping"
    assert len(kinds) == (4 if policy.kind == "smolvla" else 3)
    assert [kind.layers for kind in kinds] == [4] * (len(kinds) - 1) + [2]
    assert all(kind.ms.shape == (3, 3) and (kind.ms > 0).all() for kind in kinds)
    assert render_policy(config, kinds).count("\n") == 3 + len(kinds)
    assert not hasattr(policy.layers, "_skipper")


def test_projecting_in_each_step_gives_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = make_folder("smolvla", tmp_path / "smolvla")
    policy: Any = load_skippable_policy(str(folder), ComputeConfig(policy_options=OPTIONS))
    given = {key: value for key, value in observation(0).items() if key != "noise"}
    with torch.no_grad():
        inputs, _ = policy.collate(policy.encode([given], [policy.reset()]))
        once = policy.act(inputs, Forward())
        with as_class([layer.self_attn for layer in policy.expert.layers if layer.crosses], Reprojecting):
            each = policy.act(inputs, Forward())
    np.testing.assert_array_equal(once.numpy(), each.numpy())


def test_values_that_cannot_work_are_refused(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.POLICIES, "smolvla", lambda _: policy)
    with pytest.raises(ConfigError, match="keep must be below the depth of 4, got 4"):
        bench_policy(PolicyBenchConfig(keep=4))
    with pytest.raises(ConfigError, match="config must be one of smolvla, pi0, got 'gpt'"):
        PolicyBenchConfig(config="gpt")
