"""`dysl bench env`: how fast a suite simulates, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dysl_vla.envs import ManipulationEnv, get_suite, with_robot
from dysl_vla.errors import ConfigError

RESETS = 3


@dataclass(frozen=True)
class EnvBenchConfig:
    """Measure a suite's environments: steps a second as demonstrations are collected, and where the time goes."""

    suite: str = "metaworld-mt10"
    """Suite that is measured: metaworld-mt10, metaworld-mt50, robosuite-5, robosuite-all, libero-spatial,
    libero-object, libero-goal, libero-10, libero-90, mock."""
    robot: str | None = None
    """Another robot than the suite's own."""
    tasks: str | None = None
    """Comma-separated tasks of the suite. All of them when not given."""
    steps: int = 100
    """Steps of each task."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.")


@dataclass(frozen=True)
class EnvTimes:
    """Times of a task's environment in seconds: means over steps, or over some resets.

    Attributes:
        task: The task.
        make_s: Time to make the environment, once a task and process.
        reset_s: Time to start an episode, its first picture included.
        expert_s: Time to ask the expert for an action; 0 without an expert.
        physics_s: Time to simulate a control period.
        cameras_s: Time to render all cameras.
    """

    task: str
    make_s: float
    reset_s: float
    expert_s: float
    physics_s: float
    cameras_s: float

    @property
    def steps_per_s(self) -> float:
        """Steps a second of an episode in which every step is rendered, as in demonstrations."""
        return 1 / (self.expert_s + self.physics_s + self.cameras_s)


def bench_env(config: EnvBenchConfig) -> Iterator[EnvTimes]:
    """Measure task after task.

    Raises:
        ConfigError: The suite, the robot or a task is unknown.
    """
    suite = get_suite(with_robot(config.suite, config.robot))
    for task in tqdm(suite.choose(config.tasks), desc=suite.name, unit="task"):
        started = time.perf_counter()
        with closing(suite.make(task, None)) as env:
            yield _measure(env, time.perf_counter() - started, config.steps, task not in suite.without_expert)


def _measure(env: ManipulationEnv, make_s: float, steps: int, has_expert: bool) -> EnvTimes:
    spent: dict[str, list[float]] = {"reset": [], "expert": [], "physics": [], "cameras": []}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name].append(time.perf_counter() - started)

    env.reset(seed=0)  # what is compiled or allocated once is not measured
    action = env.embodiment.clip(np.zeros(len(env.embodiment.action_names), np.float32))
    env.advance(action)
    for index in range(RESETS):
        with timed("reset"):
            env.reset(seed=0, options={"episode_index": index})
    for step in range(steps):
        if step and step % env.horizon == 0:
            env.reset()
        if has_expert:
            with timed("expert"):
                action = env.expert_action()
        with timed("physics"):
            env.advance(action)
        with timed("cameras"):
            env.observe()
    mean = {name: float(np.mean(seconds)) if seconds else 0.0 for name, seconds in spent.items()}
    return EnvTimes(env.task, make_s, mean["reset"], mean["expert"], mean["physics"], mean["cameras"])


def render_env_times(config: EnvBenchConfig, rows: list[EnvTimes]) -> str:
    """The measured times as a table in Markdown."""
    lines = [
        f"{with_robot(config.suite, config.robot)}, {config.steps} steps of each task, one process:",
        "",
        "| task | steps/s with every step shown | physics ms | cameras ms | expert ms | reset ms | make s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines.extend(
        f"| {row.task} | {row.steps_per_s:.0f} | {1e3 * row.physics_s:.1f} | {1e3 * row.cameras_s:.1f} "
        f"| {1e3 * row.expert_s:.1f} | {1e3 * row.reset_s:.0f} | {row.make_s:.1f} |"
        for row in rows
    )
    return "\n".join(lines)
