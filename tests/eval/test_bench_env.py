from __future__ import annotations

import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.eval.bench_env import EnvBenchConfig, bench_env, render_env_times


def test_every_task_is_measured_and_its_parts_make_the_whole() -> None:
    config = EnvBenchConfig(suite="mock", steps=7)
    rows = list(bench_env(config))
    assert [row.task for row in rows] == ["reach", "linger"]
    for row in rows:
        assert row.steps_per_s == pytest.approx(1 / (row.expert_s + row.physics_s + row.cameras_s))
        assert min(row.make_s, row.reset_s, row.expert_s, row.physics_s, row.cameras_s) > 0
    text = render_env_times(config, rows)
    assert all(f"| {row.task} |" in text for row in rows)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps.*0"):
        EnvBenchConfig(steps=0)
    with pytest.raises(ConfigError, match=r"robot.*only its own"):
        list(bench_env(EnvBenchConfig(suite="mock", robot="Panda")))
