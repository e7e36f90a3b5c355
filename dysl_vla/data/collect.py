"""Collect demonstrations: scripted experts act, with noise, or a policy acts and the expert corrects it (DAgger).

In every recorded moment the label is the expert's clean action. With an expert alone, what is executed is that action
plus noise, so that the data also shows the way back from mistakes. With `policy` the policy drives, until at a random
step the expert takes over and finishes. Episodes that fail are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dysl_vla.data.lerobot import Demonstrations, DemonstrationWriter, Episode, EpisodeRow, Origin
from dysl_vla.envs import FIRST_EVALUATION_SEED, ManipulationEnv, Suite, episode_rng, get_suite
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.policies.base import Policy
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, FloatArray, ImageArray

EXPERT = "expert"
LONGEST_DEMONSTRATION = 250
"""Steps. An expert that needs more was thrown off by the noise, and shows nothing worth learning."""
TAIL_STEPS = 4
"""Recorded after success, so that the last chunks are whole."""
TAKE_OVER_STEPS = (10, 160)
"""The expert takes over from a policy at a step drawn from here."""


@dataclass(frozen=True)
class CollectConfig:
    """Collect demonstrations in simulation and append them to a LeRobotDataset v3. Resumes where it stopped."""

    out: Path
    """Folder of the dataset; an existing one is continued."""
    suite: str = "metaworld-mt10"
    """Suite whose tasks are demonstrated."""
    tasks: str = ""
    """Comma-separated tasks of the suite; all of them when empty."""
    episodes: int = 100
    """Successful episodes of each task that this seed and actor shall have in the end."""
    seed: int = 0
    """Seed of the initial states, below 100000: the seeds from there on are for evaluation."""
    noise: float = 1.0
    """Strength of the noise on the expert's executed actions; 0 for none."""
    policy: str | None = None
    """Let this policy act and the expert correct it (a round of DAgger): a checkpoint's name or folder."""
    cameras: str = ""
    """Camera sizes, "corner2=144x144,gripperPOV=72x72"; the suite's own when empty."""
    workers: int = 1
    """Processes that simulate side by side."""


def parse_cameras(text: str) -> dict[str, tuple[int, int]] | None:
    """Read "name=HEIGHTxWIDTH,...".

    Raises:
        ConfigError: The text has another form.
    """
    if not text:
        return None
    try:
        pairs = (item.split("=") for item in text.split(","))
        return {name: (int(size.split("x")[0]), int(size.split("x")[1])) for name, size in pairs}
    except (ValueError, IndexError) as error:
        raise ConfigError(f"cameras: {text!r} is not of the form corner2=144x144,gripperPOV=72x72.") from error


def collect(config: CollectConfig) -> Demonstrations:
    """Collect what is missing of `config.episodes` a task.

    Returns:
        The dataset, opened.

    Raises:
        ConfigError: A value cannot work; nothing was written.
        DatasetError: The folder is of another world, or the expert fails too often.
    """
    if not 0 <= config.seed < FIRST_EVALUATION_SEED:
        raise ConfigError(
            f"seed: {config.seed} is not for demonstrations; take one from 0 to {FIRST_EVALUATION_SEED - 1}. "
            "Those above are kept for evaluation."
        )
    if config.episodes < 1 or config.workers < 1:
        raise ConfigError(f"episodes ({config.episodes}) and workers ({config.workers}) must be at least 1.")
    suite = get_suite(config.suite)
    tasks = suite.choose(config.tasks)
    cameras = parse_cameras(config.cameras)
    env = suite.make(tasks[0], cameras)
    try:
        if config.policy is not None:
            from dysl_vla.policies import load_policy

            load_policy(config.policy).spec.check_world(env.world_spec)
        writer = DemonstrationWriter(config.out, env.world_spec, robot_type=config.suite.split("-")[0])
    finally:
        env.close()
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        try:
            for task in tasks:
                _collect_task(config, suite, task, writer, pool)
        finally:
            pool.shutdown(cancel_futures=True)
            writer.close()
    return Demonstrations(config.out)


def _collect_task(
    config: CollectConfig, suite: Suite, task: str, writer: DemonstrationWriter, pool: ProcessPoolExecutor
) -> None:
    from tqdm import tqdm

    actor = config.policy or EXPERT
    mine = [row.origin for row in writer.rows if row.origin and _is_of(row, suite.name, task, config.seed, actor)]
    first = max((origin.episode_index for origin in mine), default=-1) + 1
    missing = config.episodes - len(mine)
    tried = 0
    with tqdm(total=config.episodes, initial=len(mine), desc=task, unit="episode") as progress:
        for episode in _in_order(config, suite, task, first, pool):
            if missing <= 0:
                return
            tried += 1
            if episode is not None:
                writer.append(episode)
                missing -= 1
                progress.update()
            progress.set_postfix(tried=tried)
            if tried >= 20 and missing > 0 and progress.n == 0:
                raise DatasetError(f"{task}: none of {tried} episodes succeeded; lower --noise, or mend the expert.")


def _is_of(row: EpisodeRow, suite: str, task: str, seed: int, actor: str) -> bool:
    origin = row.origin
    return origin is not None and (origin.suite, origin.task, origin.seed, origin.actor) == (suite, task, seed, actor)


def _in_order(
    config: CollectConfig, suite: Suite, task: str, first: int, pool: ProcessPoolExecutor
) -> Iterator[Episode | None]:
    """Episodes in the order of their index, a few of them simulated ahead. None is one that failed."""
    ahead: deque[Future[Episode | None]] = deque()
    index = first
    cameras = parse_cameras(config.cameras)
    try:
        while True:
            while len(ahead) <= config.workers:
                origin = Origin(suite.name, task, config.seed, index, config.policy or EXPERT)
                ahead.append(pool.submit(_demonstrate, origin, cameras, config.noise))
                index += 1
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _one_thread() -> None:
    """A worker's inference uses one thread: with more, the workers would fight for the cores."""
    import os

    os.environ["OMP_NUM_THREADS"] = "1"


@lru_cache(maxsize=1)
def _env(suite: str, task: str, cameras: tuple[tuple[str, tuple[int, int]], ...] | None) -> ManipulationEnv:
    return get_suite(suite).make(task, None if cameras is None else dict(cameras))


@lru_cache(maxsize=1)
def _policy(name: str) -> Policy:
    from dysl_vla.policies import load_policy

    return load_policy(name)


def _demonstrate(origin: Origin, cameras: Mapping[str, tuple[int, int]] | None, noise: float) -> Episode | None:
    env = _env(origin.suite, origin.task, None if cameras is None else tuple(cameras.items()))
    policy = None if origin.actor == EXPERT else _policy(origin.actor)
    return demonstrate(env, origin, policy, noise)


def demonstrate(env: ManipulationEnv, origin: Origin, policy: Policy | None, noise: float) -> Episode | None:
    """Simulate one episode and keep every moment with the expert's action.

    Args:
        env: Of the origin's task.
        origin: Decides the initial state and the noise.
        policy: Drives until the expert takes over; None: the expert drives, with noise.
        noise: Strength of that noise.

    Returns:
        The episode; None when it failed.
    """
    rng = episode_rng(origin.task + "/actor", origin.seed, origin.episode_index)
    take_over = int(rng.integers(*TAKE_OVER_STEPS)) if policy else 0
    disturb = ActionNoise(env.world_spec.action_names, noise, rng)
    observation, _ = env.reset(seed=origin.seed, options={"episode_index": origin.episode_index})
    state = policy.reset() if policy else None
    plan: deque[FloatArray] = deque()
    images: dict[str, list[ImageArray]] = {camera: [] for camera in env.world_spec.cameras}
    states, actions = [], []
    left = None
    for step in range(min(env.horizon, LONGEST_DEMONSTRATION)):
        label = env.expert_action()
        for camera, frames in images.items():
            frames.append(observation[IMAGE_PREFIX + camera])
        states.append(observation[STATE_KEY])
        actions.append(label)
        if left == 0:
            break
        if policy and state and step < take_over:
            if not plan:
                [chunk] = policy.infer([observation], [state])
                plan.extend(chunk.actions[: policy.spec.execute_steps])
            executed = plan.popleft()
            state.executed.append(executed)
        else:
            executed = label if policy else label + disturb()
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
        action_names: The world's; a gripper stays undisturbed.
        strength: The largest strength of an episode; 1 moves an action in [-1, 1] visibly.
        rng: The episode's.
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
        """The next step's noise, (action,)."""
        if self._left == 0 and self._rng.random() < self.PUSH_PROBABILITY:
            self._left = int(self._rng.integers(*self.PUSH_STEPS))
            self._push = self._rng.uniform(-1, 1, len(self._push))
        self._left = max(0, self._left - 1)
        push = self._push if self._left else 0.0
        noise = self._scale * (self._rng.normal(0, self.JITTER, len(self._push)) + push)
        return np.asarray(noise, np.float32)
