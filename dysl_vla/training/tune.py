"""`dysl tune`: measure what skipping costs and saves, choose how much to skip, and store it in the checkpoint."""

from __future__ import annotations

import math
import tempfile
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.checkpoint import SHIPPED, has_skips
from dysl_vla.data.selection import demonstrations_for
from dysl_vla.errors import ConfigError
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.statistics import PairedSuccess
from dysl_vla.extras import needs_extra
from dysl_vla.policies import ComputeConfig, load_policy, load_skippable_policy
from dysl_vla.training.replay import Replay, Replayed
from dysl_vla.workers import use_one_inference_thread

with needs_extra("policy"):
    from dysl_vla.policies.dysl import load_dysl, save_operating_point

SETTINGS = (1.0, 0.999, 0.998, 0.997, 0.995, 0.99, 0.98, 0.96, 0.94, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.1)
"""The settings that are measured, from the fastest to the most careful."""
SIGNIFICANT = 0.05
"""McNemar's p below which two settings differ."""
TUNING_SEED = 200_000
"""Seed of the initial states for tuning, which are neither those of demonstrations nor those of results (100000)."""


@dataclass(frozen=True)
class TuneConfig:
    """Choose how much a policy skips, by a target, and store it in its checkpoint.

    Raises:
        ConfigError: Not exactly one target is given, or a value is out of range.
    """

    policy: Path
    """Folder of a checkpoint with adapters and controllers; its operating point is changed."""
    data: Path
    """Folder of demonstrations, a LeRobotDataset v3; its held-out episodes are replayed."""
    target_ms: float | None = None
    """Largest mean time of the whole policy for an inference, in milliseconds on this machine; as little is skipped as
    that allows."""
    target_success_drop: float | None = None
    """Largest loss of success rate, as a share (0.01 is a point), measured in simulation; as much is skipped as that
    allows."""
    target_action_error: float | None = None
    """Without a simulation: the largest mean distance of the executed actions from the full model's on held-out
    demonstrations, in standard deviations of the demonstrated actions; as much is skipped as that allows."""
    suite: str | None = None
    """Suite in which success is measured. When not given, it is the suite that the policy was trained in."""
    robot: str | None = None
    """Another robot than the suite's own."""
    tasks: str | None = None
    """Comma-separated tasks. When not given, they are all of the suite, or, without a suite, those that the policy was
    trained in."""
    perturb: str | None = None
    """What perturbs the world in a second measurement of success, as in `dysl eval`: `plus` is a sweep. Then the loss
    may be exceeded neither there nor without it."""
    episodes: int = 20
    """Episodes of each task in which success is measured, at each setting; a smaller loss than one of them cannot be
    seen."""
    workers: int = 1
    """Processes that run these episodes side by side."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        targets = [target for target in self.targets.values() if target is not None]
        if len(targets) != 1:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.targets)
            raise ConfigError(f"target must be given once, by one of {names}; got {len(targets)}.")
        for name, target in self.targets.items():
            if target is not None and not 0 <= target < math.inf:
                raise ConfigError(f"{name} must be finite and not negative, got {target}.")
        if self.perturb is not None and self.target_success_drop is None:
            raise ConfigError("perturb must come with target_success_drop, as only success is measured in simulation.")
        for name in ("episodes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def targets(self) -> dict[str, float | None]:
        """Return the possible targets by name, of which exactly one is given."""
        return {name: getattr(self, name) for name in ("target_ms", "target_success_drop", "target_action_error")}


@dataclass(frozen=True)
class Point:
    """One setting, measured.

    Attributes:
        skip: The setting.
        layers: Mean number of layers that an inference runs.
        llm_ms: Mean time of the backbone, with everything that skipping adds.
        total_ms: Mean time of the whole policy.
        error: Mean distance of executed actions from the full model's, in deviations of the demonstrated actions.
        verified: Share of inferences that the full model predicted again.
    """

    skip: float
    layers: float
    llm_ms: float
    total_ms: float
    error: float
    verified: float


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        curve: The measured settings, from the fastest.
        chosen: The one that was stored.
        against_shortest: Episodes of the shortest path alone (the first method) and of the chosen setting (the second);
            None where no success was measured, or the shortest path was chosen.
        is_by_time: Whether the target was a time.
    """

    curve: list[Point]
    chosen: Point
    against_shortest: PairedSuccess | None = None
    is_by_time: bool = False

    @property
    def advice(self) -> str:
        """Say whether this policy needs a depth that changes, or whether the shortest path does as well."""
        shortest = self.curve[0]
        if self.chosen == shortest and self.is_by_time:
            return (
                f"Only the shortest path, {shortest.layers:.1f} layers, is fast enough; whether it succeeds as the "
                "full model does was not measured."
            )
        if self.chosen == shortest:
            return (
                f"The shortest path alone, {shortest.layers:.1f} layers, meets the target: depth need not change from "
                "moment to moment. dysl export --prune leaves the other layers out."
            )
        if self.against_shortest is None:
            return (
                f"The shortest path alone, {shortest.layers:.1f} layers, has an action error of {shortest.error:.4f}, "
                f"the chosen setting {self.chosen.error:.4f}; whether that costs success was not measured."
            )
        pairs = self.against_shortest
        counts = (
            f"Against the shortest path alone, {shortest.layers:.1f} layers, the chosen setting won "
            f"{pairs.only_second} and lost {pairs.only_first} of {pairs.episodes} episodes "
            f"(p = {pairs.mcnemar_p():.2g})"
        )
        if pairs.only_second > pairs.only_first and pairs.mcnemar_p() < SIGNIFICANT:
            return f"{counts}: depth that changes is worth it here."
        return f"{counts}: no difference that so many episodes show. --skip 1, and dysl export --prune, are simpler."


def tune(config: TuneConfig) -> Tuned:
    """Measure the curve, choose a setting, and store it.

    Returns:
        The curve, the chosen point, and how the shortest path compares with it.

    Raises:
        ConfigError: The policy has no adapters, or the target cannot be met; then the message says what can.
        CheckpointError: The checkpoint is damaged.
    """
    if not config.policy.is_dir() and (SHIPPED / config.policy).is_dir():
        raise ConfigError(
            f"policy must be a folder, because tune changes it, and {config.policy} comes with the package; copy "
            f"{SHIPPED / config.policy} and tune the copy."
        )
    if not has_skips(config.policy):
        raise ConfigError(f"policy must have adapters and controllers; {config.policy} has none, so use dysl distill.")
    if config.target_success_drop is not None:  # refuse what cannot be played before minutes of measuring
        from dysl_vla.eval.runner import resolve_tasks

        try:
            made = load_policy(str(config.policy), compute=config.compute).provenance
            suite, tasks = resolve_tasks(_evaluation(config, Path(), 0, None), made)
            if config.perturb is not None:
                resolve_tasks(_evaluation(config, Path(), 0, config.perturb), made)
        except ConfigError as error:
            raise ConfigError(f"{error} Without a simulator, give --target-action-error instead.") from error
        config = replace(config, suite=suite.name, robot=None, tasks=",".join(tasks))
    curve = measure_curve(config.policy, config.data, config.compute)
    try:
        if config.target_ms is not None:
            tuned = Tuned(curve, choose_by_time(curve, config.target_ms), is_by_time=True)
        elif config.target_action_error is not None:
            tuned = Tuned(curve, choose_by_error(curve, config.target_action_error))
        else:
            tuned = _choose_by_success(config, curve)
    except ConfigError as error:  # minutes of measuring are worth showing
        raise ConfigError(f"{error}\n{render_curve(curve)}") from error
    measured = {
        **config.targets,
        "seed": TUNING_SEED if config.target_success_drop is not None else None,
        "perturb": config.perturb,
        "curve": [asdict(point) for point in curve],
        "advice": tuned.advice,
        "machine": provenance.machine(),
        **provenance.record(),
    }
    save_operating_point(config.policy, tuned.chosen.skip, tuned.chosen.layers, measured)
    return tuned


def measure_curve(folder: Path, data: Path, compute: ComputeConfig | None = None) -> list[Point]:
    """Replay held-out demonstrations at every setting; the settings take turns on each episode."""
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
    """Choose the most careful point within a time.

    Raises:
        ConfigError: No point is.
    """
    possible = _within(curve, [point.total_ms for point in curve], target_ms, "target_ms", "on this machine")
    return min(possible, key=lambda point: point.skip)


def choose_by_error(curve: list[Point], target: float) -> Point:
    """Choose the fastest point whose actions are near enough to the full model's.

    Raises:
        ConfigError: No point has such actions.
    """
    possible = _within(curve, [point.error for point in curve], target, "target_action_error", "at any setting")
    return max(possible, key=lambda point: point.skip)


def _within(curve: list[Point], costs: list[float], target: float, name: str, where: str) -> list[Point]:
    """Return the points that cost no more than a target."""
    note = " Skip 0, the full model, has none at all." if name == "target_action_error" else ""
    possible = [point for point, cost in zip(curve, costs, strict=True) if cost <= target]
    if not possible:
        least, nearest = min(zip(costs, curve, strict=True), key=lambda pair: pair[0])
        raise ConfigError(
            f"{name} must be higher, got {target}, which cannot be met {where}; the nearest possible is {least:.4g}, "
            f"at skip {nearest.skip}.{note}"
        )
    return possible


def _choose_by_success(config: TuneConfig, curve: list[Point]) -> Tuned:
    """Choose the fastest point that loses no more than allowed in any world, by paired episodes."""
    assert config.target_success_drop is not None
    least: tuple[float, Point] | None = None
    with tempfile.TemporaryDirectory() as folder:
        full = _evaluate(config, Path(folder) / "full", 0)
        shortest: list[Path] = []
        for point in curve:
            runs = _evaluate(config, Path(folder) / f"{point.skip}", point.skip)
            drop = max(-pairs.difference for pairs in _paired(full, runs))
            if drop <= config.target_success_drop:
                return Tuned(curve, point, _together(_paired(shortest, runs)) if shortest else None)
            shortest = shortest or runs
            if least is None or drop < least[0]:
                least = drop, point
    assert least is not None
    raise ConfigError(
        f"target_success_drop must be higher, got {config.target_success_drop}, which was not met at any setting; the "
        f"nearest possible is {least[0]:.3f}, at skip {least[1].skip}."
    )


def _evaluate(config: TuneConfig, out: Path, skip: float) -> list[Path]:
    """Measure success at a setting, and return the folders with its records: without and with perturbations."""
    from dysl_vla.eval import evaluate

    runs = {out / "nominal": None} | ({out / "perturbed": config.perturb} if config.perturb is not None else {})
    for run, perturb in runs.items():
        evaluate(_evaluation(config, run, skip, perturb))
    return list(runs)


def _paired(first: list[Path], second: list[Path]) -> list[PairedSuccess]:
    """Pair the episodes of two settings, world by world."""
    from dysl_vla.eval.compare import compare

    return [compare([one, other])[0].success for one, other in zip(first, second, strict=True)]


def _together(worlds: list[PairedSuccess]) -> PairedSuccess:
    """Add the counts of all worlds."""
    return PairedSuccess(*(sum(counts) for counts in zip(*map(astuple, worlds), strict=True)))


def _evaluation(config: TuneConfig, out: Path, skip: float, perturb: str | None) -> EvalConfig:
    return EvalConfig(
        out=out,
        policy=str(config.policy),
        suite=config.suite,
        robot=config.robot,
        perturb=perturb,
        tasks=config.tasks,
        episodes=config.episodes,
        seed=TUNING_SEED,
        workers=config.workers,
        compute=config.compute,
        skip=skip,
    )


def render_curve(curve: list[Point], chosen: Point | None = None) -> str:
    """Return the curve as Markdown."""
    lines = ["| skip | layers | LLM ms | policy ms | action error | verified |", "|---:|---:|---:|---:|---:|---:|"]
    for point in curve:
        mark = " (chosen)" if point == chosen else ""
        lines.append(
            f"| {point.skip}{mark} | {point.layers:.2f} | {point.llm_ms:.2f} | {point.total_ms:.2f} "
            f"| {point.error:.4f} | {100 * point.verified:.1f} % |"
        )
    return "\n".join(lines)
