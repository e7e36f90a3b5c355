"""`dysl bench bundle`: compare an exported policy with the one that it was made from, on the same moments, in turns.

The gains of skipping and of the runtime are measured separately: PyTorch and ONNX Runtime each run the full model and
the one that skips. Whole episodes are played, so that decisions and actions can be compared where they matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.envs.suites import TaskEnvs, get_suite
from dysl_vla.errors import ConfigError
from dysl_vla.policies import Policy, load_policy
from dysl_vla.provenance import known_instructions
from dysl_vla.types import ActionChunk, FloatArray
from dysl_vla.workers import use_one_inference_thread

KINDS = ("PyTorch, full", "PyTorch, skipping", "bundle, full", "bundle, skipping")
WARM_UP = 20
PAGES = Path("/proc/self/statm")
PAGE_MB = 4096 / 1e6


@dataclass(frozen=True)
class BundleBenchConfig:
    """Measure a bundle beside PyTorch: time, skip decisions and actions, over whole episodes.

    Raises:
        ConfigError: A value is out of range.
    """

    bundle: Path
    """Folder that `dysl export` wrote."""
    policy: str = "metaworld-mini"
    """The checkpoint that the bundle was made from."""
    suite: str | None = None
    """Suite in which episodes are played. When not given, it is the suite that the policy was trained in."""
    tasks: str | None = None
    """Comma-separated tasks. When not given, they are all of the suite, or, without a suite, those that the policy was
    trained in."""
    episodes: int = 1
    """Episodes of each task."""
    seed: int = 100_000
    """Seed of the initial states."""
    soak: int = 0
    """Number of inferences after the episodes, all of one observation, over which the growth of memory is measured."""

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("soak", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class BundleBench:
    """The measurement of a bundle.

    Attributes:
        llm_ms: Milliseconds of the backbone, its heads and the action head, without guidance, (kinds, moments).
        total_ms: Milliseconds of the whole policy, (kinds, moments).
        other_decisions: Number of moments at which bundle and PyTorch skipped or verified differently.
        distance: Largest difference of actions, in the embodiment's units, where they decided alike.
        full_distance: The same difference of the full models.
        grown_mb: Growth of memory in MB from the soak's first tenth to its end; None without a soak.
    """

    llm_ms: FloatArray
    total_ms: FloatArray
    other_decisions: int
    distance: float
    full_distance: float
    grown_mb: float | None


def bench_bundle(config: BundleBenchConfig) -> BundleBench:
    """Measure a bundle beside PyTorch.

    Raises:
        ConfigError: The bundle was made from another policy, or the suite is unknown.
        CheckpointError: The bundle or the checkpoint is damaged.
    """
    bundle = Bundle(config.bundle)
    if bundle.is_pruned:
        raise ConfigError(
            f"bundle must have all layers to be measured beside its checkpoint, and {config.bundle} is pruned; dysl "
            f"eval --policy {config.bundle} measures its success and its times."
        )
    policies: list[Policy] = [
        load_policy(config.policy, skip=0),
        load_policy(config.policy),
        Bundle(config.bundle, skip=0),
        bundle,
    ]
    use_one_inference_thread()
    made_from = policies[3].provenance.get("export", {}).get("policy")
    if made_from != policies[0].fingerprint:
        raise ConfigError(
            f"bundle must be exported from {config.policy}; {config.bundle} was exported from another policy."
        )
    suite_name, task_names = provenance.training_suite(policies[1].provenance, config.suite, config.tasks)
    suite = get_suite(suite_name)
    tasks = suite.choose(task_names)
    suite.check_episodes(config.episodes, config.seed)
    moments: list[list[ActionChunk]] = []
    envs = TaskEnvs(partial(suite.make_for, spec=policies[0].spec))
    try:
        with tqdm(total=len(tasks) * config.episodes, desc="playing", unit="episode") as bar:
            for task in tasks:
                for episode in range(config.episodes):
                    moments += _play(policies, envs, task, config.seed, episode)
                    bar.update()
    finally:
        envs.close()
    alike = [
        (one.skips.skips, one.skips.is_verified) == (other.skips.skips, other.skips.is_verified)
        for _, one, _, other in moments
        if one.skips is not None and other.skips is not None
    ]
    return BundleBench(
        llm_ms=_milliseconds(moments, lambda chunk: chunk.timing.llm_s + chunk.timing.decode_s),
        total_ms=_milliseconds(moments, lambda chunk: chunk.timing.total_s),
        other_decisions=alike.count(False),
        distance=max(
            (_distance(m[1], m[3]) for m, is_alike in zip(moments, alike, strict=True) if is_alike), default=np.nan
        ),
        full_distance=max(_distance(m[0], m[2]) for m in moments),
        grown_mb=_soak(policies[3], config.soak) if config.soak else None,
    )


def _play(policies: list[Policy], envs: TaskEnvs, task: str, seed: int, episode: int) -> list[list[ActionChunk]]:
    """Play one episode by the last policy's actions, and return the chunks of all policies at each moment."""
    env = envs.env(task)
    observation, _ = env.reset(seed=seed, options={"episode_index": episode})
    if len(env.instructions) > 1:
        raise ConfigError(f"suite must have tasks of one instruction to measure a bundle, and {task} has several.")
    states = [policy.reset() for policy in policies]
    for policy in policies:
        for _ in range(WARM_UP if episode == 0 else 0):
            policy.infer([observation], [policy.reset()])
    moments: list[list[ActionChunk]] = []
    is_over = False
    while not is_over:
        order = np.roll(np.arange(len(policies)), len(moments))  # so that none always follows the same other
        chunks = {int(index): policies[index].infer([observation], [states[index]])[0] for index in order}
        moments.append([chunks[index] for index in range(len(policies))])
        leader = moments[-1][-1]
        for action in env.embodiment.clip(leader.actions[: policies[0].spec.execute_steps]):
            for state in states:
                state.executed.append(action)
            _, truncated, info = env.advance(action)
            is_over = truncated or info["success"]
            if is_over:
                break
        observation = env.observe()
    return moments


def _soak(policy: Policy, inferences: int) -> float:
    """Measure the growth of the resident memory, in MB."""
    spec = policy.spec
    observation = spec.blank_observation(next(iter(known_instructions(policy.provenance)), "do it"))
    state = policy.reset()
    first = 0.0
    for number in tqdm(range(inferences), desc="soaking", unit="inference"):
        [chunk] = policy.infer([observation], [state])
        state.executed.extend(chunk.actions[: spec.execute_steps])
        if number == inferences // 10:
            first = _resident_mb()
    return _resident_mb() - first


def _resident_mb() -> float:
    return int(PAGES.read_text().split()[1]) * PAGE_MB


def _milliseconds(moments: list[list[ActionChunk]], seconds: Callable[[ActionChunk], float]) -> FloatArray:
    return np.array([[1e3 * seconds(chunk) for chunk in moment] for moment in moments], np.float32).T


def _distance(one: ActionChunk, other: ActionChunk) -> float:
    return float(np.abs(one.actions - other.actions).max())


def render_bundle(measured: BundleBench) -> str:
    """Return the measurement as Markdown."""
    moments = measured.llm_ms.shape[1]
    lines = [
        f"{moments} moments, one thread, in turns; times faster than PyTorch's full model:",
        "",
        "| | LLM and head: mean, p50, p99 ms | times faster, mean | policy: mean, p50, p99 ms | times faster, mean |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, name in enumerate(KINDS):
        cells = []
        for values in (measured.llm_ms, measured.total_ms):
            p50, p99 = np.percentile(values[kind], (50, 99))
            cells += [
                f"{values[kind].mean():.2f}, {p50:.2f}, {p99:.2f}",
                f"{values[0].mean() / values[kind].mean():.2f}",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Skipping gives {measured.llm_ms[2].mean() / measured.llm_ms[3].mean():.2f} times within ONNX Runtime, and "
        f"{measured.llm_ms[0].mean() / measured.llm_ms[1].mean():.2f} within PyTorch.",
        f"Decided differently: {measured.other_decisions} of {moments} moments. Actions differ by at most "
        f"{measured.distance:.1e} elsewhere, those of the full models by {measured.full_distance:.1e}.",
    ]
    if measured.grown_mb is not None:
        lines.append(f"Memory grew by {measured.grown_mb:.1f} MB in the soak, after its first tenth.")
    return "\n".join(lines)
