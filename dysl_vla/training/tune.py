"""`dysl tune`: choose how much to skip, from what it costs and saves, measured; keep it in the checkpoint."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.data.selection import demonstrations_for
from dysl_vla.errors import ConfigError
from dysl_vla.eval.config import EvalConfig
from dysl_vla.extras import needs_extra
from dysl_vla.policies import ComputeConfig, load_policy, load_skippable_policy
from dysl_vla.training.replay import Replay, Replayed
from dysl_vla.workers import use_one_inference_thread

with needs_extra("policy"):
    from dysl_vla.policies.dysl import has_skips, load_dysl, save_operating_point

SETTINGS = (1.0, 0.999, 0.998, 0.997, 0.995, 0.99, 0.98, 0.96, 0.94, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.1)
"""Of the knob, from fastest to most careful."""
TUNING_SEED = 200_000
"""Initial states for tuning: neither those of demonstrations, nor the ones that results are reported on (100000)."""


@dataclass(frozen=True)
class TuneConfig:
    """Choose how much a policy skips, by a target, and store it in its checkpoint."""

    policy: Path
    """Folder of a checkpoint with adapters and controllers; its operating point is changed."""
    data: Path
    """Folder of demonstrations, a LeRobotDataset v3; its held-out episodes are replayed."""
    target_ms: float | None = None
    """The whole policy's mean milliseconds an inference, at most, on this machine: skips as little as that allows."""
    target_success_drop: float | None = None
    """Success rate lost, at most, as a share (0.01: a point), measured in simulation: skips as much as that allows."""
    target_action_error: float | None = None
    """For those who have no simulation: distance of the executed actions from the full model's, at most, in deviations
    of the demonstrated actions, on held-out demonstrations: skips as much as that allows."""
    suite: str = ""
    """Where success is measured; the suite that the policy was trained in when empty."""
    robot: str = ""
    """Another robot than the suite's own."""
    tasks: str = ""
    """Comma-separated; when empty, all of the suite, or those of it that the policy was trained in when none is
    named."""
    episodes: int = 20
    """Episodes of each task for that, at each setting; a smaller loss than one episode of them cannot be seen."""
    workers: int = 1
    """Processes for that."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass(frozen=True)
class Point:
    """One setting of the knob, measured.

    Attributes:
        skip: The knob.
        layers: Layers run an inference, on average.
        llm_ms: Mean time of the backbone, with everything that skipping adds.
        total_ms: Mean time of the whole policy.
        error: Mean distance of executed actions from the full model's, in deviations of the demonstrated actions.
        verified: Share of inferences that were predicted again.
    """

    skip: float
    layers: float
    llm_ms: float
    total_ms: float
    error: float
    verified: float


def tune(config: TuneConfig) -> tuple[list[Point], Point]:
    """Measure the curve, choose, and store.

    Returns:
        The curve, from the fastest setting; the chosen point.

    Raises:
        ConfigError: Not exactly one target, or one that cannot be met: the message says what can.
        CheckpointError: The checkpoint is damaged or has no adapters.
    """
    given = (config.target_ms, config.target_success_drop, config.target_action_error)
    targets = [target for target in given if target is not None]
    if len(targets) != 1:
        raise ConfigError("target: give one of --target-ms, --target-success-drop and --target-action-error.")
    if not np.isfinite(targets[0]) or targets[0] < 0:
        raise ConfigError(f"target: {targets[0]} must be finite and not negative.")
    if not has_skips(config.policy):
        raise ConfigError(f"policy: {config.policy} has no adapters and controllers; train them with dysl distill.")
    if config.target_success_drop is not None:  # minutes before it is needed
        from dysl_vla.eval.runner import resolve_tasks

        suite, tasks = resolve_tasks(_evaluation(config, Path(), 0), load_policy(str(config.policy)).provenance)
        config = replace(config, suite=suite.name, robot="", tasks=",".join(tasks))
    curve = measure_curve(config.policy, config.data, config.compute)
    try:
        if config.target_ms is not None:
            chosen = choose_by_time(curve, config.target_ms)
        elif config.target_action_error is not None:
            chosen = choose_by_error(curve, config.target_action_error)
        else:
            chosen = _choose_by_success(config, curve)
    except ConfigError as error:  # minutes of measuring are worth showing
        raise ConfigError(f"{error}\n{render_curve(curve)}") from error
    measured = {
        "target_ms": config.target_ms,
        "target_success_drop": config.target_success_drop,
        "target_action_error": config.target_action_error,
        "seed": TUNING_SEED if config.target_success_drop is not None else None,
        "curve": [asdict(point) for point in curve],
        "machine": provenance.machine(),
        **provenance.record(),
    }
    save_operating_point(config.policy, chosen.skip, chosen.layers, measured)
    return curve, chosen


def measure_curve(folder: Path, data: Path, compute: ComputeConfig | None = None) -> list[Point]:
    """Replay held-out demonstrations at every setting of the knob, the settings taking turns on each episode."""
    use_one_inference_thread()
    policy = load_skippable_policy(str(folder), compute)
    replay = Replay(policy, demonstrations_for(data, policy.spec))
    parts: dict[float, list[Replayed]] = {skip: [] for skip in SETTINGS}
    with closing(load_dysl(policy, folder)) as dysl:
        replay.play_episode(dysl, 0)  # warms up
        for episode in tqdm(range(len(replay)), desc="replaying", unit="episode"):
            for skip in SETTINGS:
                dysl.set_skip(skip)
                parts[skip].append(replay.play_episode(dysl, episode))
    curve = []
    for skip, played in ((skip, Replayed.joined(part)) for skip, part in parts.items()):
        llm_ms, rest_ms = 1e3 * float(played.llm_s.mean()), 1e3 * float(played.rest_s.mean())
        curve.append(
            Point(
                skip=skip,
                layers=played.mean_layers,
                llm_ms=llm_ms,
                total_ms=llm_ms + rest_ms + 1e3 * replay.encode_s,
                error=float(played.errors.mean()),
                verified=float(np.mean([trace.is_verified for trace in played.traces])),
            )
        )
    return curve


def choose_by_time(curve: list[Point], target_ms: float) -> Point:
    """The most careful point within a time.

    Raises:
        ConfigError: None is.
    """
    possible = _within(curve, [point.total_ms for point in curve], target_ms, "target_ms", "on this machine")
    return min(possible, key=lambda point: point.skip)


def choose_by_error(curve: list[Point], target: float) -> Point:
    """The fastest point whose actions are near enough to the full model's.

    Raises:
        ConfigError: None is.
    """
    possible = _within(curve, [point.error for point in curve], target, "target_action_error", "at any setting")
    return max(possible, key=lambda point: point.skip)


def _within(curve: list[Point], costs: list[float], target: float, name: str, where: str) -> list[Point]:
    """The points that cost no more than a target."""
    possible = [point for point, cost in zip(curve, costs, strict=True) if cost <= target]
    if not possible:
        least, nearest = min(zip(costs, curve, strict=True), key=lambda pair: pair[0])
        raise ConfigError(
            f"{name}: {target} cannot be met {where}; the nearest possible is {least:.4g}, at skip {nearest.skip}."
        )
    return possible


def _choose_by_success(config: TuneConfig, curve: list[Point]) -> Point:
    """The fastest point that loses no more than allowed, by paired episodes."""
    from dysl_vla.eval.compare import compare

    assert config.target_success_drop is not None
    least: tuple[float, Point] | None = None
    with tempfile.TemporaryDirectory() as folder:
        full = _evaluate(config, Path(folder) / "full", 0)
        for point in curve:
            [comparison] = compare([full, _evaluate(config, Path(folder) / f"{point.skip}", point.skip)])
            drop = -comparison.success.difference
            if drop <= config.target_success_drop:
                return point
            if least is None or drop < least[0]:
                least = drop, point
    assert least is not None
    raise ConfigError(
        f"target_success_drop: {config.target_success_drop} was not met at any setting; the nearest possible is "
        f"{least[0]:.3f}, at skip {least[1].skip}."
    )


def _evaluate(config: TuneConfig, out: Path, skip: float) -> Path:
    """Measure success at a setting; the folder with its records."""
    from dysl_vla.eval import evaluate

    evaluate(_evaluation(config, out, skip))
    return out


def _evaluation(config: TuneConfig, out: Path, skip: float) -> EvalConfig:
    return EvalConfig(
        out=out,
        policy=str(config.policy),
        suite=config.suite,
        robot=config.robot,
        tasks=config.tasks,
        episodes=config.episodes,
        seed=TUNING_SEED,
        workers=config.workers,
        skip=skip,
    )


def render_curve(curve: list[Point], chosen: Point | None = None) -> str:
    """The curve as Markdown."""
    lines = ["| skip | layers | LLM ms | policy ms | action error | verified |", "|---:|---:|---:|---:|---:|---:|"]
    for point in curve:
        mark = " (chosen)" if point == chosen else ""
        lines.append(
            f"| {point.skip}{mark} | {point.layers:.2f} | {point.llm_ms:.2f} | {point.total_ms:.2f} "
            f"| {point.error:.4f} | {100 * point.verified:.1f} % |"
        )
    return "\n".join(lines)
