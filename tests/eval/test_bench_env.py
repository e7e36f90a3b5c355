from __future__ import annotations

import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.eval.bench_env import EnvBenchConfig, EnvTimes, bench_env, render_env_times


def test_every_task_is_measured() -> None:
    config = EnvBenchConfig(suite="mock", steps=7)
    rows = list(bench_env(config))
    assert [row.task for row in rows] == ["reach", "linger"]
    for row in rows:
        assert min(row.make_s, row.reset_s, row.expert_s, row.physics_s, row.cameras_s) > 0


def test_a_step_is_what_is_asked_moved_and_shown() -> None:
    row = EnvTimes("push", make_s=9.0, reset_s=7.0, expert_s=0.01, physics_s=0.02, cameras_s=0.07)
    assert row.steps_per_s == pytest.approx(10)
    assert "| push | 10 | 20.0 | 70.0 | 10.0 | 7000 | 9.0 |" in render_env_times(EnvBenchConfig(), [row])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps.*0"):
        EnvBenchConfig(steps=0)
    with pytest.raises(ConfigError, match=r"robot.*only its own"):
        list(bench_env(EnvBenchConfig(suite="mock", robot="Panda")))
