"""`dysl eval`: run a policy on a suite, in one process or several, resumable at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.envs import FIRST_EVALUATION_SEED, Suite, TaskEnvs, get_suite
from dysl_vla.errors import ConfigError
from dysl_vla.eval.records import RunFolder, read_result
from dysl_vla.eval.report import render_report, summarise
from dysl_vla.eval.rollout import EpisodeKey, run_episode, warm_up
from dysl_vla.policies import Policy, check_fingerprint, load_policy
from dysl_vla.types import check_actions
from dysl_vla.video import write_video
from dysl_vla.workers import use_one_inference_thread, worker_pool

FILM_CRF = 18


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy in simulation. The same command continues a run that was interrupted."""

    out: Path
    """Folder for records, figures and videos."""
    policy: str = "metaworld-mini"
    """A shipped checkpoint's name, a checkpoint's folder, a Hugging Face hub id, or mock (for the mock suite)."""
    suite: str = "metaworld-mt10"
    """What is evaluated: metaworld-mt10, metaworld-mt50, mock."""
    tasks: str = ""
    """Comma-separated tasks of the suite; all of them when empty."""
    episodes: int = 10
    """Episodes of each task."""
    seed: int = FIRST_EVALUATION_SEED
    """Seed of the initial states; from 100000 on, those below are for demonstrations."""
    workers: int = 1
    """Processes that run episodes side by side, one inference thread each. Latencies are only comparable with 1."""
    video: int = 0
    """Film this many episodes of each task."""


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run what is missing of an evaluation, and write its figures.

    Returns:
        `result.json`.

    Raises:
        ConfigError: A value cannot work, the policy does not fit the suite, or `out` holds another run. Nothing was
            written.
    """
    for name in ("episodes", "workers"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} must be at least 1.")
    suite = get_suite(config.suite)
    tasks = suite.choose(config.tasks)
    policy = load_policy(config.policy)
    check_seed(config.seed, policy)
    with closing(suite.make(tasks[0], policy.spec.cameras)) as env:
        policy.spec.check_world(env.world_spec)
        if env.horizon != suite.horizon:
            raise ConfigError(f"horizon: suite {suite.name} says {suite.horizon}, its environment {env.horizon}.")
        # A machine that cannot render, or a policy that answers NaN, is found out before anything is written.
        observation, _ = env.reset(seed=0)
        [chunk] = policy.infer([observation], [policy.reset()])
        check_actions(chunk.actions, len(env.world_spec.action_names))
    folder = RunFolder(config.out, _identity(config, suite, tasks, policy))
    if folder.is_finished():
        return read_result(config.out)
    keys = [EpisodeKey(task, config.seed, index) for task in tasks for index in range(config.episodes)]
    order = {(key.task, key.index): position for position, key in enumerate(keys)}
    with folder.claimed():
        ended = {(e["task"], e["episode_index"]) for e in folder.episodes()}
        _run(config, policy, folder, [key for key in keys if (key.task, key.index) not in ended], len(keys))
        episodes = sorted(folder.episodes(), key=lambda e: order[e["task"], e["episode_index"]])
        steps = folder.steps(episodes)
        result = {
            "policy": config.policy,
            "suite": config.suite,
            "seed": config.seed,
            **summarise(episodes, steps, tasks, policy.spec.execute_steps),
            "horizon": suite.horizon,
            "execute_steps": policy.spec.execute_steps,
            "workers": config.workers,
            "machine": provenance.machine(),
            "config": {**asdict(config), "out": str(config.out)},
            **provenance.record(),
        }
        folder.finish(steps, result, render_report(result))
    return result


def check_seed(seed: int, policy: Policy) -> None:
    """Refuse a seed whose initial states the policy may have been trained on.

    Raises:
        ConfigError: Naming the seed.
    """
    if seed < FIRST_EVALUATION_SEED:
        raise ConfigError(
            f"seed: {seed} belongs to demonstrations; evaluation takes seeds from {FIRST_EVALUATION_SEED} on."
        )
    trained = {origin["seed"] for origin in _origins(policy.provenance)}
    if seed in trained:
        raise ConfigError(f"seed: the policy was trained on seed {seed}; take another.")


def _origins(record: Any) -> Iterator[dict[str, Any]]:
    """All origins of demonstrations in a provenance, and in those that it started from."""
    if record:
        yield from record.get("data", {}).get("origins", [])
        yield from _origins(record.get("init"))


def _identity(config: EvalConfig, suite: Suite, tasks: tuple[str, ...], policy: Policy) -> dict[str, Any]:
    return {
        "policy": config.policy,
        "weights": policy.fingerprint,
        "suite": config.suite,
        "tasks": list(tasks),
        "episodes": config.episodes,
        "seed": config.seed,
        "horizon": suite.horizon,
        "video": config.video,
        "workers": config.workers,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def _run(config: EvalConfig, policy: Policy, folder: RunFolder, keys: list[EpisodeKey], total: int) -> None:
    records = folder.episodes()
    successes = sum(record["success"] for record in records)
    with tqdm(total=total, initial=len(records), desc="evaluating", unit="episode") as progress:
        for record in _episodes(config, policy, folder, keys):
            folder.append(record)
            records.append(record)
            successes += record["success"]
            progress.update()
            progress.set_postfix(task=record["task"], success=f"{100 * successes / len(records):.0f} %")


def _episodes(
    config: EvalConfig, policy: Policy, folder: RunFolder, keys: list[EpisodeKey]
) -> Iterator[dict[str, Any]]:
    """Records of episodes, in the order in which they end."""
    if config.workers == 1:
        use_one_inference_thread()
        with closing(_Bench(policy, get_suite(config.suite))) as bench:
            for key in keys:
                yield bench.run(folder, key, film=key.index < config.video)
        return
    fingerprint = policy.fingerprint  # hashes all weights: once, not once an episode
    with worker_pool(config.workers) as pool:
        futures = [pool.submit(_run_in_worker, config, fingerprint, folder, key) for key in keys]
        for future in as_completed(futures):
            yield future.result()


class _Bench:
    """What one process keeps between episodes: the warm policy, and the environment of the last task."""

    def __init__(self, policy: Policy, suite: Suite) -> None:
        self._policy = policy
        self._envs = TaskEnvs(suite, policy.spec.cameras)
        self._is_warm = False

    def run(self, folder: RunFolder, key: EpisodeKey, *, film: bool) -> dict[str, Any]:
        """Run one episode and write its steps and film; the caller counts it as ended."""
        env = self._envs.env(key.task)
        if not self._is_warm:
            warm_up(self._policy, env)
            self._is_warm = True
        rollout = run_episode(env, self._policy, key, film=film)
        folder.write_part(key, rollout.steps)
        if film:
            write_video(folder.video(key, rollout.success), rollout.film, rollout.film_fps, crf=FILM_CRF)
        return {
            "task": key.task,
            "seed": key.seed,
            "episode_index": key.index,
            "success": rollout.success,
            "steps": len(rollout.steps),
            "inferences": sum(row["total_ms"] is not None for row in rollout.steps),
        }

    def close(self) -> None:
        """Free the environment's renderers."""
        self._envs.close()


@lru_cache(maxsize=1)
def _worker_bench(name: str, fingerprint: str, suite: str) -> _Bench:
    policy = load_policy(name)
    check_fingerprint(policy, name, fingerprint)
    bench = _Bench(policy, get_suite(suite))
    use_one_inference_thread()
    return bench


def _run_in_worker(config: EvalConfig, fingerprint: str, folder: RunFolder, key: EpisodeKey) -> dict[str, Any]:
    return _worker_bench(config.policy, fingerprint, config.suite).run(folder, key, film=key.index < config.video)
