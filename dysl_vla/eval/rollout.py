"""One episode: a policy in an environment, with every part of every step timed separately.

Images are rendered only for an inference; the other steps of a chunk are physics alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from dysl_vla.envs import ManipulationEnv
from dysl_vla.eval.contact_sheet import draw_caption, draw_skipping
from dysl_vla.policies import Policy
from dysl_vla.policies.execution import next_action, start_chunk
from dysl_vla.types import ActionChunk, ImageArray, SkipTrace

WARM_UP_INFERENCES = 5
VIDEO_FPS = 20.0
TIMES = ("render_ms", "encode_ms", "llm_ms", "decode_ms", "guidance_ms", "total_ms")


@dataclass(frozen=True)
class EpisodeKey:
    """The name of an episode, which decides its initial state."""

    task: str
    seed: int
    index: int


@dataclass
class Rollout:
    """The records of an episode.

    Attributes:
        success: Whether the success flag was raised at some step.
        instructions: The episode's instructions, in their order; those of most environments have one.
        completed: Number of instructions that were carried out, where there are several.
        steps: One row a step, for `steps.parquet`. Times are in milliseconds; those of the policy are None at steps
            that executed a chunk predicted before. So is what was skipped, also for policies that skip nothing.
        video: Frames for people, uint8 (256, 256, 3), higher with a strip of what was skipped or a caption; empty
            unless asked for.
        video_fps: Frames a second of that video, in real time.
    """

    success: bool = False
    instructions: tuple[str, ...] = ()
    completed: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    video: list[ImageArray] = field(default_factory=list)
    video_fps: float = VIDEO_FPS


def warm_up(policy: Policy, env: ManipulationEnv) -> None:
    """Run some inferences that are not recorded: the first ones allocate memory, and are slower."""
    observation, _ = env.reset(seed=0)
    for _ in range(WARM_UP_INFERENCES):
        policy.infer([observation], [policy.reset()])


def run_episode(env: ManipulationEnv, policy: Policy, key: EpisodeKey, *, video: bool = False) -> Rollout:
    """Run one episode to its first success or to the horizon.

    When the instruction changes, the rest of the chunk is dropped, and the policy begins as at an episode's first step.

    Args:
        env: The environment of the key's task.
        policy: A policy that fits the environment.
        key: The episode.
        video: Whether to render frames for people, too.

    Returns:
        The episode's records.

    Raises:
        ActionError: The policy's action has NaN or infinity.
    """
    clock = time.perf_counter
    every = max(1, round(env.embodiment.rate_hz / VIDEO_FPS))
    rollout = Rollout(video_fps=env.embodiment.rate_hz / every)
    camera = _VideoCamera(env, rollout.video, every if video else None)
    observation, _ = env.reset(seed=key.seed, options={"episode_index": key.index})
    render_s: float | None = None  # the first observation is part of the reset
    rollout.instructions, instruction, state = env.instructions, env.instruction, policy.reset()
    while True:
        if env.instruction != instruction:
            instruction, state = env.instruction, policy.reset()
        # Observe, and infer a chunk.
        if rollout.steps:
            started = clock()
            observation = env.observe()
            render_s = clock() - started
        chunk = start_chunk(policy, observation, state, env.embodiment)
        camera.note(chunk.skips)
        inferred: ActionChunk | None = chunk
        # Execute it: physics alone.
        while state.planned and env.instruction == instruction:
            camera.record_before(len(rollout.steps))
            action = next_action(state)
            started = clock()
            reward, truncated, info = env.advance(action)
            outcome = {"reward": reward, "success": info["success"], "physics_ms": 1e3 * (clock() - started)}
            times, skipping = _times(inferred, render_s), _skipping(inferred)
            episode = {"task": key.task, "episode_index": key.index, "step": len(rollout.steps)}
            rollout.steps.append({**episode, **outcome, **times, "action": action.tolist(), **skipping})
            inferred = None
            if info["success"] or truncated:
                rollout.success, rollout.completed = info["success"], info.get("completed", 0)
                camera.record()
                return rollout


class _VideoCamera:
    """Records frames for people, each with what was skipped since the last one: a frame stands for several inferences.

    Args:
        env: The environment.
        frames: The list that frames are appended to.
        every: Steps from one frame to the next; None: nothing is recorded.
    """

    def __init__(self, env: ManipulationEnv, frames: list[ImageArray], every: int | None) -> None:
        self._env, self._frames, self._every = env, frames, every
        self._continuities: list[float | None] = []
        self._latest: SkipTrace | None = None
        self._busiest: SkipTrace | None = None

    def note(self, trace: SkipTrace | None) -> None:
        """Remember what an inference skipped."""
        self._latest = trace
        if trace is not None:
            self._continuities.append(trace.continuity)
            if self._busiest is None or trace.layers >= self._busiest.layers:
                self._busiest = trace

    def record_before(self, step: int) -> None:
        """Record a frame if one is due before a step."""
        if self._every and step % self._every == 0:
            self.record()

    def record(self) -> None:
        """Record a frame now, above the inference since the last frame that ran the most layers."""
        if not self._every:
            return
        picture, trace = self._env.render(), self._busiest or self._latest
        if trace is not None:
            picture = draw_skipping(picture, trace, self._continuities)
        self._frames.append(
            draw_caption(picture, self._env.instruction) if len(self._env.instructions) > 1 else picture
        )
        self._busiest = None


def _times(chunk: ActionChunk | None, render_s: float | None) -> dict[str, float | None]:
    """Columns of `steps.parquet` with the times of looking and inferring; None where a chunk was only executed."""
    if chunk is None:
        return dict.fromkeys(TIMES)
    timing = chunk.timing
    seconds = (render_s, timing.encode_s, timing.llm_s, timing.decode_s, timing.guidance_s, timing.total_s)
    return {name: None if value is None else 1e3 * value for name, value in zip(TIMES, seconds, strict=True)}


def _skipping(chunk: ActionChunk | None) -> dict[str, Any]:
    """Columns of `steps.parquet` that a policy that skips layers adds, at the steps that inferred."""
    if chunk is None or chunk.skips is None:
        return {}
    trace = chunk.skips
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
