"""`dysl eval`: run a policy on a suite, in one process or several, resumable at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.envs import Suite, TaskEnvs, get_suite, with_perturbation, with_robot
from dysl_vla.envs.perturbations import PerturbedEnv, describe, perturbations
from dysl_vla.errors import ConfigError
from dysl_vla.eval.config import EvalConfig, Variant, load_all, variants_of
from dysl_vla.eval.perturbations import draw_perturbations
from dysl_vla.eval.records import PERTURBATIONS, RUN, RunFolder, read_result
from dysl_vla.eval.report import render_report, summarise
from dysl_vla.eval.rollout import EpisodeKey, Rollout, run_episode, warm_up
from dysl_vla.policies import Policy
from dysl_vla.policies.worker import worker_policy
from dysl_vla.types import check_actions
from dysl_vla.video import write_video
from dysl_vla.workers import use_one_inference_thread, worker_pool

VIDEO_CRF = 18


def evaluate_in_simulation(config: EvalConfig) -> dict[str, Any]:
    """Evaluate on a suite; see `eval.evaluate`."""
    variants = variants_of(config)
    if config.variants and (config.out / RUN).exists():
        raise ConfigError(f"out: {config.out} holds another run; give a new folder.")
    # Load the variants, and decide on suite and tasks.
    if config.suite is not None:  # an unknown one is found before policies are loaded, which takes longer
        resolve_tasks(config, None)
    policies = load_all(config, variants)
    record = max((policy.provenance for policy in policies), key=len)  # that of a variant with heads says more
    suite, tasks = resolve_tasks(config, record)
    suite.check_episodes(config.episodes, config.seed)
    config = replace(config, suite=suite.name, robot=None, perturb=None, tasks=",".join(tasks))
    for policy in policies:
        check_seed(config.seed, policy)
    _try(policies, suite, tasks[0])
    _check_perturbing(suite, tasks, policies[0])
    # Run what is missing, and write the figures.
    runs = [
        VariantRun(
            variant, policy, RunFolder(variant.folder(config.out), _identity(config, variant, suite, tasks, policy))
        )
        for variant, policy in zip(variants, policies, strict=True)
    ]
    if not all(run.folder.is_finished() for run in runs):
        keys = [EpisodeKey(task, config.seed, index) for task in tasks for index in range(config.episodes)]
        with ExitStack() as claims:
            for run in runs:
                claims.enter_context(run.folder.locked())
            _run(config, runs, keys)
            if suite.perturbing is not None and not (config.out / PERTURBATIONS).exists():
                _show_perturbations(config, suite, tasks[0], policies[0])
            for run in runs:
                _finish(config, run, suite, tasks, keys)
    return {"variants": {run.variant.name or "policy": read_result(run.folder.root) for run in runs}}


def _try(policies: Sequence[Policy], suite: Suite, task: str) -> None:
    """Infer once. A machine that cannot render, or a policy that answers NaN, is found before anything is written."""
    with closing(suite.make_for(task, policies[0].spec)) as env:
        policies[0].spec.check_embodiment(env.embodiment)
        if env.horizon != suite.horizon:
            raise ConfigError(f"horizon: suite {suite.name} says {suite.horizon}, its environment {env.horizon}.")
        observation, _ = env.reset(seed=0)
        for policy in policies:
            [chunk] = policy.infer([observation], [policy.reset()])
            check_actions(chunk.actions, len(env.embodiment.action_names))


def _check_perturbing(suite: Suite, tasks: Sequence[str], policy: Policy) -> None:
    """Refuse what perturbs some tasks alone, before anything is written.

    Raises:
        ConfigError: A perturbation that was asked for does not apply to a task.
    """
    if suite.perturbing is None or not any(
        perturbations.get(name).varies_by_task for name, _ in suite.perturbing.cells
    ):
        return
    missed: dict[str, list[str]] = {}
    for task in tasks:
        with closing(suite.make_for(task, policy.spec)) as env:
            missed[task] = suite.perturbing.misses(env)
    fitting = ",".join(task for task, names in missed.items() if not names)
    for task, names in missed.items():
        if names:
            fix = f"take --tasks {fitting}" if fitting else "take another"
            raise ConfigError(f"perturb: {names[0]} does not apply to {task}, which has nothing to change; {fix}.")


def resolve_tasks(config: EvalConfig, record: Any) -> tuple[Suite, tuple[str, ...]]:
    """The suite and the tasks of an evaluation.

    Args:
        config: The evaluation's configuration.
        record: The policy's provenance, which decides where the configuration does not.

    Raises:
        ConfigError: The suite, a task or the robot is unknown.
    """
    suite_name, tasks = provenance.training_suite(record, config.suite, config.tasks)
    suite = get_suite(with_perturbation(with_robot(suite_name, config.robot), config.perturb))
    return suite, suite.choose(tasks)


def _show_perturbations(config: EvalConfig, suite: Suite, task: str, policy: Policy) -> None:
    with closing(suite.make_for(task, policy.spec)) as env:
        assert isinstance(env, PerturbedEnv)
        draw_perturbations(env, config.seed, config.out / PERTURBATIONS)


@dataclass(frozen=True)
class VariantRun:
    """A variant of the policy that takes part in an evaluation, and the folder of its records."""

    variant: Variant
    policy: Policy
    folder: RunFolder


def _finish(
    config: EvalConfig, run: VariantRun, suite: Suite, tasks: tuple[str, ...], keys: Sequence[EpisodeKey]
) -> None:
    folder = run.folder
    if folder.is_finished():
        return
    order = {(key.task, key.index): position for position, key in enumerate(keys)}
    episodes = sorted(folder.episodes(), key=lambda e: order[e["task"], e["episode_index"]])
    steps = folder.steps(episodes)
    spec = run.policy.spec
    result = {
        "policy": config.policy,
        "variant": run.variant.name or None,
        "suite": config.suite,
        "seed": config.seed,
        **summarise(episodes, steps, tasks, spec),
        "horizon": suite.horizon,
        "execute_steps": spec.execute_steps,
        "workers": config.workers,
        "machine": provenance.machine(),
        "config": {**asdict(config), "out": str(config.out)},
        **provenance.record(),
    }
    folder.finish(steps, result, render_report(result))


def check_seed(seed: int, policy: Policy) -> None:
    """Refuse a seed whose initial states the policy may have been trained on.

    Raises:
        ConfigError: The seed belongs to demonstrations, or was used in training or tuning the policy.
    """
    trained = {origin["seed"] for origin in provenance.origins(policy.provenance)}
    if seed in trained:
        raise ConfigError(f"seed: the policy was trained on seed {seed}; take another.")
    if seed == policy.provenance.get("skipping", {}).get("operating_point", {}).get("seed"):
        raise ConfigError(f"seed: how much the policy skips was chosen on seed {seed}; take another.")


def _identity(
    config: EvalConfig, variant: Variant, suite: Suite, tasks: tuple[str, ...], policy: Policy
) -> dict[str, Any]:
    perturbing = suite.perturbing
    return {
        "policy": config.policy,
        "weights": policy.fingerprint,
        "perturbations": describe(perturbing.cells) if perturbing else None,
        "variants": config.variants,
        "variant": variant.name,
        "suite": config.suite,
        "tasks": list(tasks),
        "episodes": config.episodes,
        "seed": config.seed,
        "horizon": suite.horizon,
        "video": config.video,
        "workers": config.workers,
        "compute": asdict(config.compute),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def _run(config: EvalConfig, runs: Sequence[VariantRun], keys: Sequence[EpisodeKey]) -> None:
    """Run the episodes that have not ended. Every variant runs an episode before any variant runs the next one."""
    records = {run.variant.name: run.folder.episodes() for run in runs}
    ended = {(name, e["task"], e["episode_index"]) for name, ends in records.items() for e in ends}
    todo = [(e, key) for key in keys for e in runs if (e.variant.name, key.task, key.index) not in ended]
    total = len(keys) * len(runs)
    with tqdm(total=total, initial=total - len(todo), desc="evaluating", unit="episode") as progress:
        for run, record in _episodes(config, todo):
            run.folder.append(record)
            ends = records[run.variant.name]
            ends.append(record)
            progress.update()
            rates = {
                name: f"{100 * np.mean([e['success'] for e in ends]):.0f} %" for name, ends in records.items() if ends
            }
            progress.set_postfix(task=record["task"], success=" ".join(f"{n} {r}".strip() for n, r in rates.items()))


def _episodes(
    config: EvalConfig, todo: Sequence[tuple[VariantRun, EpisodeKey]]
) -> Iterator[tuple[VariantRun, dict[str, Any]]]:
    """Run episodes and yield their records, in the order in which they end."""
    assert config.suite is not None  # `evaluate_in_simulation` has resolved it
    if config.workers == 1:
        use_one_inference_thread()
        with closing(_EpisodeRunner(get_suite(config.suite))) as runner:
            for run, key in todo:
                yield run, runner.run(run.policy, run.folder, key, video=key.index < config.video)
        return
    fingerprints = {run.variant.name: run.policy.fingerprint for run, _ in todo}  # hashes all weights: once
    with worker_pool(config.workers) as pool:
        futures = {
            pool.submit(_run_in_worker, config, run.variant, fingerprints[run.variant.name], run.folder, key): run
            for run, key in todo
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


class _EpisodeRunner:
    """Runs episodes, and keeps between them what is slow to begin: warm policies and the last task's environment."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._envs: TaskEnvs | None = None
        self._warm: list[Policy] = []

    def run(self, policy: Policy, folder: RunFolder, key: EpisodeKey, *, video: bool) -> dict[str, Any]:
        """Run one episode, write its steps and video, and return its record, which the caller writes."""
        if self._envs is None:
            self._envs = TaskEnvs(partial(self._suite.make_for, spec=policy.spec))
        env = self._envs.env(key.task)
        if policy not in self._warm:
            warm_up(policy, env)
            self._warm.append(policy)
        rollout = run_episode(env, policy, key, video=video)
        folder.write_part(key, rollout.steps)
        if video:
            write_video(folder.video(key, rollout.success), rollout.video, rollout.video_fps, crf=VIDEO_CRF)
        return {
            "task": key.task,
            "seed": key.seed,
            "episode_index": key.index,
            "success": rollout.success,
            "steps": len(rollout.steps),
            "inferences": sum(row["total_ms"] is not None for row in rollout.steps),
            **({"perturbation": env.perturbation} if env.perturbation else {}),
            **_chain(rollout),
        }

    def close(self) -> None:
        """Free the environment's renderers."""
        if self._envs is not None:
            self._envs.close()


def _chain(rollout: Rollout) -> dict[str, Any]:
    """Return what the record of an episode with several instructions has in addition."""
    if len(rollout.instructions) == 1:
        return {}
    return {"completed": rollout.completed, "instructions": list(rollout.instructions)}


@lru_cache(maxsize=1)
def _worker_runner(suite: str) -> _EpisodeRunner:
    use_one_inference_thread()
    return _EpisodeRunner(get_suite(suite))


def _run_in_worker(
    config: EvalConfig, variant: Variant, fingerprint: str, folder: RunFolder, key: EpisodeKey
) -> dict[str, Any]:
    assert config.suite is not None
    policy = worker_policy(
        config.policy, fingerprint, skip=variant.skip, ablation=variant.ablation, compute=config.compute
    )
    return _worker_runner(config.suite).run(policy, folder, key, video=key.index < config.video)
