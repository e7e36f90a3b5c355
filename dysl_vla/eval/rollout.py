"""One episode: a policy in an environment, with every part of every step timed apart.

Images are rendered only when the policy looks, at each inference; the steps of a chunk in between are physics alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dysl_vla.envs import ManipulationEnv
from dysl_vla.eval.contact_sheet import draw_skipping
from dysl_vla.policies import Policy
from dysl_vla.types import ImageArray, SkipTrace, check_actions

WARM_UP_INFERENCES = 5
FILM_FPS = 20.0


@dataclass(frozen=True)
class EpisodeKey:
    """Which episode: decides its initial state."""

    task: str
    seed: int
    index: int


@dataclass
class Rollout:
    """What an episode left.

    Attributes:
        success: The success flag was raised at some step.
        steps: One row a step, for `steps.parquet`. Times are in milliseconds; those of the policy are None at steps
            that executed a chunk predicted before. What was skipped is None likewise, and for
            policies that skip nothing.
        video: Frames for people, uint8 (256, 256, 3), higher with a strip of what was skipped; empty unless asked for.
        video_fps: Their rate in real time.
    """

    success: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)
    video: list[ImageArray] = field(default_factory=list)
    video_fps: float = FILM_FPS


def warm_up(policy: Policy, env: ManipulationEnv) -> None:
    """Run some inferences that nobody times: the first ones allocate, and are slower."""
    observation, _ = env.reset(seed=0)
    for _ in range(WARM_UP_INFERENCES):
        policy.infer([observation], [policy.reset()])


def run_episode(env: ManipulationEnv, policy: Policy, key: EpisodeKey, *, video: bool = False) -> Rollout:
    """Run one episode to its first success or to the horizon.

    Args:
        env: Of the key's task.
        policy: Checked against the environment before.
        key: The episode.
        video: Also render frames for people.

    Returns:
        Its records.

    Raises:
        ActionError: The policy's action has NaN or infinity.
    """
    clock = time.perf_counter
    every = max(1, round(env.embodiment.rate_hz / FILM_FPS))
    rollout = Rollout(video_fps=env.embodiment.rate_hz / every)
    started = clock()
    observation, _ = env.reset(seed=key.seed, options={"episode_index": key.index})
    render_s = clock() - started
    state = policy.reset()
    continuities: list[float | None] = []
    busiest: SkipTrace | None = None  # since the last frame: a video shows one inference in several
    while True:
        [chunk] = policy.infer([observation], [state])
        timing = chunk.timing
        if chunk.skips is not None:
            continuities.append(chunk.skips.continuity)
            busiest = chunk.skips if busiest is None or chunk.skips.layers >= busiest.layers else busiest
        check_actions(chunk.actions, len(env.embodiment.action_names))
        executed = env.embodiment.clip(chunk.actions[: policy.spec.execute_steps])
        for offset, action in enumerate(executed):
            if video and len(rollout.steps) % every == 0:
                rollout.video.append(_frame(env, busiest or chunk.skips, continuities))
                busiest = None
            started = clock()
            reward, truncated, info = env.advance(action)
            physics_s = clock() - started
            state.executed.append(action)
            inferred = offset == 0
            rollout.steps.append(
                {
                    "task": key.task,
                    "episode_index": key.index,
                    "step": len(rollout.steps),
                    "reward": reward,
                    "success": info["success"],
                    "physics_ms": 1e3 * physics_s,
                    "render_ms": 1e3 * render_s if inferred and rollout.steps else None,
                    "encode_ms": 1e3 * timing.encode_s if inferred else None,
                    "llm_ms": 1e3 * timing.llm_s if inferred else None,
                    "decode_ms": 1e3 * timing.decode_s if inferred else None,
                    "guidance_ms": 1e3 * timing.guidance_s if inferred else None,
                    "total_ms": 1e3 * timing.total_s if inferred else None,
                    "action": action.tolist(),
                    **(_skipping(chunk.skips) if inferred and chunk.skips is not None else {}),
                }
            )
            if info["success"] or truncated:
                rollout.success = info["success"]
                if video:
                    rollout.video.append(_frame(env, busiest or chunk.skips, continuities))
                return rollout
        started = clock()
        observation = env.observe()
        render_s = clock() - started


def _frame(env: ManipulationEnv, trace: SkipTrace | None, continuities: Sequence[float | None]) -> ImageArray:
    frame = env.render()
    return frame if trace is None else draw_skipping(frame, trace, continuities)


def _skipping(trace: SkipTrace) -> dict[str, Any]:
    """Columns of `steps.parquet` that a policy that skips layers adds."""
    return {
        "layers": trace.layers,
        "layers_run": trace.layers_run.tolist(),
        "skipped_at": list(trace.skips),
        "landed_on": list(trace.skips.values()),
        "controllers_asked": list(trace.outputs),
        "controller_outputs": list(trace.outputs.values()),
        "allow_points": list(trace.allow_points),
        "continuity": trace.continuity,
        "verified": trace.is_verified,
        "controllers_ms": 1e3 * trace.controllers_s,
        "adapters_ms": 1e3 * trace.adapters_s,
        "verify_ms": 1e3 * trace.verify_s,
    }
