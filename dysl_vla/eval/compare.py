"""`dysl eval compare`: a comparison of runs of different policies on the same episodes, paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dysl_vla.errors import ConfigError
from dysl_vla.eval.chains import average_difference
from dysl_vla.eval.records import EPISODES, read_result
from dysl_vla.eval.statistics import PairedSuccess
from dysl_vla.files import read_lines

PROTOCOL = ("suite", "seed", "horizon", "episodes")
"""Figures that must be equal for two runs' episodes to be pairs."""
SIMULATORS = ("mujoco", "metaworld", "robosuite", "rpent-liberopro", "numpy")
"""Packages whose versions decide initial states and physics."""
SPEED = ("torch", "transformers", "python")
"""Packages whose versions decide latencies."""


@dataclass(frozen=True)
class Comparison:
    """A run compared with the first one.

    Attributes:
        run: Folder of the run.
        success: The pairs of episodes; the first run is the first method.
        in_a_row: The pairs of one, two, ... instructions in a row; empty where an episode has only one instruction.
        latency_ratio: For each part of the latency, the first run's over this one's, so that above 1 is faster. None
            when the two were measured under different conditions.
    """

    run: Path
    success: PairedSuccess
    in_a_row: tuple[PairedSuccess, ...]
    latency_ratio: dict[str, dict[str, float]] | None


def compare(runs: Sequence[Path]) -> list[Comparison]:
    """Pair the episodes of each run with those of the first, by (task, seed, episode index).

    Raises:
        ConfigError: There are fewer than two runs, one is unfinished, or two cannot be compared; the message says why.
    """
    if len(runs) < 2:
        raise ConfigError("compare needs at least two folders of `dysl eval`.")
    results = [read_result(run) for run in runs]
    for run, result in zip(runs, results, strict=True):
        for name in (*PROTOCOL, "latency_ms", "machine", "workers", "versions"):
            if name not in result:
                raise ConfigError(f"compare: {run}/result.json has no {name!r}, so it is not a result of `dysl eval`.")
    outcomes = [_outcomes(run) for run in runs]
    for run, result, outcome in zip(runs[1:], results[1:], outcomes[1:], strict=True):
        for name in PROTOCOL:
            if result[name] != results[0][name]:
                raise ConfigError(
                    f"compare: {name} must be equal, got {results[0][name]} in {runs[0]} and {result[name]} in {run}; "
                    "run both with the same value."
                )
        for name in SIMULATORS:
            mine, theirs = results[0]["versions"].get(name), result["versions"].get(name)
            if mine != theirs:
                raise ConfigError(
                    f"compare: {name} was {mine} in {runs[0]} and {theirs} in {run}, which gives other episodes; "
                    "run both with one version."
                )
        if not outcome or outcome.keys() != outcomes[0].keys():
            odd = next(iter(outcome.keys() ^ outcomes[0].keys()), "none")
            raise ConfigError(
                f"compare: {runs[0]} and {run} must hold the same episodes, but {odd} is in one alone; finish both."
            )
        if any(first.instructions != outcome[key].instructions for key, first in outcomes[0].items()):
            raise ConfigError(f"compare: {runs[0]} and {run} have other instructions in one episode; run both anew.")
        if any(first.perturbation != outcome[key].perturbation for key, first in outcomes[0].items()):
            raise ConfigError(f"compare: {runs[0]} and {run} were perturbed otherwise in one episode; run both anew.")
    return [
        Comparison(run, _pair(outcomes[0], outcome), _pair_in_a_row(outcomes[0], outcome), _ratios(results[0], result))
        for run, result, outcome in zip(runs[1:], results[1:], outcomes[1:], strict=True)
    ]


@dataclass(frozen=True)
class _Outcome:
    success: bool
    completed: int
    instructions: tuple[str, ...]
    perturbation: str | None


_Outcomes = dict[tuple[str, int, int], _Outcome]


def _outcomes(run: Path) -> _Outcomes:
    return {
        (e["task"], e["seed"], e["episode_index"]): _Outcome(
            e["success"], e.get("completed", 0), tuple(e.get("instructions", ())), e.get("perturbation")
        )
        for e in read_lines(run / EPISODES)
    }


def _pair(first: _Outcomes, second: _Outcomes) -> PairedSuccess:
    return _count([(first[key].success, second[key].success) for key in first])


def _pair_in_a_row(first: _Outcomes, second: _Outcomes) -> tuple[PairedSuccess, ...]:
    length = max(len(outcome.instructions) for outcome in first.values())
    return tuple(
        _count([(first[key].completed >= n, second[key].completed >= n) for key in first]) for n in range(1, length + 1)
    )


def _count(pairs: Sequence[tuple[bool, bool]]) -> PairedSuccess:
    return PairedSuccess(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    alike = first["machine"] == second["machine"] and first["workers"] == second["workers"] == 1
    if not alike or any(first["versions"].get(name) != second["versions"].get(name) for name in SPEED):
        return None
    return {
        part: {
            name: first["latency_ms"][part][name] / (second["latency_ms"][part][name] or math.nan)
            for name in ("mean", "p50", "p99")
        }
        for part in ("total", "llm")
    }


def p_value(p: float) -> str:
    """Write a p-value for people."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def render_comparison(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    """Render comparisons as Markdown."""
    lines = [
        f"Against {runs[0]}:",
        "",
        "| run | difference in success, points (95 % interval) | episodes won : lost | McNemar p "
        "| speed-up of the policy: mean, p50, p99 | of the LLM |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for comparison in comparisons:
        pairs = comparison.success
        low, high = pairs.difference_ci95()
        ratios = comparison.latency_ratio
        shown = [
            ", ".join(f"{value:.2f}x" for value in ratios[part].values()) if ratios else "-"
            for part in ("total", "llm")
        ]
        lines.append(
            f"| {comparison.run} | {100 * pairs.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) "
            f"| {pairs.only_second} : {pairs.only_first} | {p_value(pairs.mcnemar_p())} | {shown[0]} | {shown[1]} |"
        )
    lines += _render_in_a_row(comparisons)
    if any(comparison.latency_ratio is None for comparison in comparisons):
        lines += [
            "",
            "Latencies are only compared between runs with `--workers 1`, one machine and the same versions.",
        ]
    return "\n".join(lines)


def _render_in_a_row(comparisons: Sequence[Comparison]) -> list[str]:
    """Render the differences in episodes with several instructions; no lines where they have one."""
    lengths = [n + 1 for n in range(len(comparisons[0].in_a_row))]
    if not lengths:
        return []
    columns = " | ".join(f"{n} in a row, points" for n in lengths)
    lines = [
        "",
        f"| run | difference in average length (95 % interval) | {columns} |",
        "|---|" + "---:|" * (1 + len(lengths)),
    ]
    for comparison in comparisons:
        difference, low, high = average_difference(comparison.in_a_row)
        cells = " | ".join(f"{100 * pairs.difference:+.1f}" for pairs in comparison.in_a_row)
        lines.append(f"| {comparison.run} | {difference:+.2f} ({low:+.2f} to {high:+.2f}) | {cells} |")
    return lines
