"""Collect demonstrations: scripted experts act, with noise, or a policy acts and the expert corrects it (DAgger).

In every recorded moment the label is the expert's clean action. With an expert alone, that action plus noise is
executed, so that the data also shows the way back from mistakes. With `policy` the policy acts, until at a random step
the expert takes over and finishes. Episodes that fail are dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, Origin, check_writable
from dysl_vla.data.options import SIZE, camera_options
from dysl_vla.envs import FIRST_EVALUATION_SEED, ManipulationEnv, TaskEnvs, episode_rng, get_suite, with_robot
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.files import locked_dir
from dysl_vla.policies import ComputeConfig, Policy, load_policy, select_action
from dysl_vla.policies.worker import worker_policy
from dysl_vla.types import FULL_QUALITY, IMAGE_PREFIX, STATE_KEY, FloatArray, ImageArray
from dysl_vla.workers import worker_pool

EXPERT = "expert"
DEFAULT_SUITE = "metaworld-mt10"
MAX_DEMONSTRATION = 250
"""Steps of an episode at most. An expert that needs more was thrown off by the noise, and teaches nothing."""
TAIL_STEPS = 4
"""Steps that are executed after success, so that chunks that begin before it show what follows."""
MAX_FAILURES = 20
"""Failed episodes for each that succeeded at which collecting is given up."""
TAKE_OVER_STEPS = (10, 160)
"""Range of the step at which the expert takes over from a policy."""


@dataclass(frozen=True)
class CollectConfig:
    """Collect demonstrations in simulation and append them to a LeRobotDataset v3. Resumes where it stopped."""

    out: Path
    """Folder of the dataset; an existing one is continued."""
    suite: str | None = None
    """Suite whose tasks are demonstrated: metaworld-mt10, metaworld-mt50, robosuite-5, robosuite-all, libero-spatial,
    libero-object, libero-goal. When not given, the suite that `--policy` was trained in; without a policy
    metaworld-mt10."""
    robot: str | None = None
    """Another robot than the suite's own, where its simulator has several: Sawyer, UR5e, ... in robosuite."""
    tasks: str | None = None
    """Comma-separated tasks of the suite. When not given, all of them, or those that `--policy` was trained in."""
    episodes: int = 100
    """Successful episodes of each task that the dataset shall have of this seed and actor in the end."""
    seed: int = 0
    """Seed of the initial states, below 100000: the seeds from there on are for evaluation."""
    noise: float | None = None
    """Strength of the noise on the expert's executed actions; 0 for none. The suite's own when not given."""
    policy: str | None = None
    """Let this policy act and the expert correct it (a round of DAgger): a checkpoint's name or folder."""
    cameras: str | None = None
    """Camera sizes, "corner2=144x144,gripperPOV=72x72". When not given, those that `--policy` sees; without a
    policy the suite's own."""
    workers: int = 1
    """Processes that simulate side by side."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < FIRST_EVALUATION_SEED:
            raise ConfigError(
                f"seed must be from 0 to {FIRST_EVALUATION_SEED - 1}, got {self.seed}; seeds above are for evaluation."
            )
        for name in ("episodes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise must be 0 or above and finite, got {self.noise}.")


def collect(config: CollectConfig) -> Demonstrations:
    """Collect what is missing of `config.episodes` a task.

    Returns:
        The dataset, opened.

    Raises:
        ConfigError: A value cannot work; nothing was written.
        DatasetError: The folder is of another world, or the expert fails too often.
    """
    policy = load_policy(config.policy, compute=config.compute) if config.policy is not None else None
    suite_name, task_names = config.suite or DEFAULT_SUITE, config.tasks
    if policy is not None:
        suite_name, task_names = provenance.training_suite(policy.provenance, config.suite, config.tasks)
    suite = get_suite(with_robot(suite_name, config.robot))
    if suite.perturbing is not None:
        raise ConfigError(
            f"suite: {suite.name} is perturbed, for evaluation; demonstrate in {suite_name.split('+')[0]}."
        )
    noise = suite.noise if config.noise is None else config.noise
    tasks = suite.choose(task_names)
    if lacking := [task for task in tasks if task in suite.without_expert]:
        having = ",".join(task for task in tasks if task not in suite.without_expert)
        fix = f"take --tasks {having}" if having else "take another --robot or --suite"
        raise ConfigError(
            f"tasks: {suite.robot} has no scripted expert for {', '.join(lacking)}; {fix}, or import demonstrations."
        )
    sizes = camera_options("cameras", config.cameras or "", SIZE, "144x144")
    seen = policy.spec.cameras if policy is not None else {}
    cameras = {name: (height, width) for name, (height, width) in sizes.items()} or seen or None
    actor = EXPERT
    rendering = policy.spec.rendering if policy is not None else None
    with closing(suite.make(tasks[0], cameras)) as env:
        if policy is not None and config.policy is not None:
            policy.spec.check_embodiment(env.embodiment)
            actor = f"{Path(config.policy).name}@{policy.fingerprint[:12]}"
        env.reset(seed=0)  # a machine that cannot render is found before anything is written
        spec = env.embodiment
    check_writable(config.out, spec, suite.robot, rendering)
    with locked_dir(config.out), worker_pool(config.workers) as pool:
        writer = DemonstrationWriter(config.out, spec, suite.robot, rendering)
        try:
            for task in tasks:
                first = Origin(suite.name, task, config.seed, 0, actor, 0.0 if config.policy else noise)
                _collect_task(config, first, spec.cameras, writer, pool)
        finally:
            writer.close()
    return Demonstrations(config.out)


def _collect_task(
    config: CollectConfig,
    first: Origin,
    cameras: Mapping[str, tuple[int, int]],
    writer: DemonstrationWriter,
    pool: ProcessPoolExecutor,
) -> None:
    """Append episodes like `first`, of rising index, until there are enough."""
    indices = [
        row.origin.episode_index
        for row in writer.rows
        if row.origin is not None and replace(row.origin, episode_index=0) == first
    ]
    have, next_index = len(indices), max(indices, default=-1) + 1
    failures = 0
    ahead: deque[Future[Episode | None]] = deque()
    with tqdm(total=config.episodes, initial=have, desc=first.task, unit="episode") as progress:
        while have < config.episodes:
            while len(ahead) <= config.workers:
                origin = replace(first, episode_index=next_index)
                ahead.append(pool.submit(_demonstrate, origin, cameras, config.policy, config.compute))
                next_index += 1
            episode = ahead.popleft().result()
            if episode is None:
                failures += 1
                progress.set_postfix(failures=failures)
                if failures >= MAX_FAILURES * (have + 1):
                    raise DatasetError(
                        f"{first.task}: {failures} episodes failed, {have} succeeded; lower --noise or fix the expert."
                    )
                continue
            writer.append(episode)
            have += 1
            progress.update()
    for future in ahead:
        future.cancel()


@lru_cache(maxsize=1)
def _envs(name: str, cameras: tuple[tuple[str, tuple[int, int]], ...]) -> TaskEnvs:
    suite = get_suite(name)
    return TaskEnvs(lambda task: suite.make(task, dict(cameras)))


def _demonstrate(
    origin: Origin, cameras: Mapping[str, tuple[int, int]], name: str | None, compute: ComputeConfig
) -> Episode | None:
    """Simulate an episode in a worker, which keeps the policy and the last task's environment."""
    env = _envs(origin.suite, tuple(cameras.items())).env(origin.task)
    policy = worker_policy(name, origin.actor.rpartition("@")[2], compute=compute) if name else None
    env.full_quality = policy is not None and policy.spec.rendering == FULL_QUALITY
    return demonstrate(env, origin, policy)


def demonstrate(env: ManipulationEnv, origin: Origin, policy: Policy | None) -> Episode | None:
    """Simulate one episode and keep every moment with the expert's action.

    Args:
        env: The environment of the origin's task.
        origin: The origin, which decides the initial state and the noise on the expert's actions.
        policy: A policy that acts until the expert takes over; None: the expert acts from the beginning.

    Returns:
        The episode; None when it failed.
    """
    rng = episode_rng(origin.task + "/actor", origin.seed, origin.episode_index)
    take_over = int(rng.integers(*TAKE_OVER_STEPS)) if policy else 0
    disturb = ActionNoise(env.embodiment.action_names, origin.noise, rng)
    observation, _ = env.reset(seed=origin.seed, options={"episode_index": origin.episode_index})
    state = policy.reset() if policy else None
    images: dict[str, list[ImageArray]] = {camera: [] for camera in env.embodiment.cameras}
    states, actions = [], []
    left = None
    for step in range(min(env.horizon, MAX_DEMONSTRATION)):
        label = env.expert_action()
        for camera, frames in images.items():
            frames.append(observation[IMAGE_PREFIX + camera])
        states.append(observation[STATE_KEY])
        actions.append(label)
        if left == 0:
            break
        if policy and state and step < take_over:
            executed = select_action(policy, observation, state, env.embodiment)
        else:
            executed = label + disturb()
        observation, _, _, _, info = env.step(executed)
        if left is not None:
            left -= 1
        elif info["success"]:
            left = TAIL_STEPS
    if left is None:
        return None
    return Episode(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        states=np.stack(states),
        actions=np.stack(actions),
        instruction=env.instruction,
        origin=origin,
    )


class ActionNoise:
    """Noise on executed actions: jitter at every step, and pushes that last some steps, of a strength drawn once.

    Args:
        action_names: Names of the action's dimensions; a gripper stays undisturbed.
        strength: Upper end of the range from which an episode's strength is drawn; actions are in [-1, 1].
        rng: The random numbers of the episode.
    """

    PUSH_PROBABILITY = 0.04
    PUSH_STEPS = (3, 11)
    JITTER = 0.4

    def __init__(self, action_names: tuple[str, ...], strength: float, rng: np.random.Generator) -> None:
        self._rng = rng
        self._scale = strength * rng.random() * np.array(["gripper" not in name for name in action_names])
        self._push = np.zeros(len(action_names))
        self._left = 0

    def __call__(self) -> FloatArray:
        """The noise of the next step, (action,)."""
        if self._left == 0 and self._rng.random() < self.PUSH_PROBABILITY:
            self._left = int(self._rng.integers(*self.PUSH_STEPS))
            self._push = self._rng.uniform(-1, 1, len(self._push))
        self._left = max(0, self._left - 1)
        push = self._push if self._left else 0.0
        noise = self._scale * (self._rng.normal(0, self.JITTER, len(self._push)) + push)
        return np.asarray(noise, np.float32)
