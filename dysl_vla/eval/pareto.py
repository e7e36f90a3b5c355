"""`dysl plot pareto`: success against the LLM's latency of many runs, paired with the first of each suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dysl_vla.errors import ConfigError
from dysl_vla.eval.compare import Comparison, compare, p_value
from dysl_vla.eval.records import read_result, runs_in
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write

with needs_extra("train"):
    from matplotlib.figure import Figure

STATISTICS = ("mean", "p99")
"""The LLM's latencies that have a panel."""


@dataclass(frozen=True)
class Point:
    """A run in the figure.

    Attributes:
        run: Its folder.
        result: Its figures.
        comparison: It against the first run of its suite; None for that one.
    """

    run: Path
    result: dict[str, Any]
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """The name in the legend: the last two parts of the folder."""
        return "/".join(self.run.parts[-2:])

    @property
    def success(self) -> tuple[float, float, float]:
        """Success in per cent, and its interval: the first run's own, and the others' difference from it, paired."""
        rate = 100 * self.result["success_rate"]
        if self.comparison is None:
            low, high = self.result["success_ci95"]
            return rate, 100 * low, 100 * high
        pairs = self.comparison.success
        low, high = pairs.difference_ci95()
        first = rate - 100 * pairs.difference
        return rate, first + 100 * low, first + 100 * high


def pareto(folders: Sequence[Path], out: Path) -> str:
    """Draw the runs, and return them as Markdown.

    Args:
        folders: Folders of runs, or of several runs (`--variants`). Those of one suite must be of the same episodes.
        out: Path of the picture, which ends in `.png`.

    Returns:
        A table for each suite.

    Raises:
        ConfigError: A folder holds no finished run, or two runs of one suite are of other episodes.
    """
    if out.suffix != ".png":
        raise ConfigError(f"out must be the path of a picture, which ends in .png, got {out}.")
    suites: dict[str, list[Path]] = {}
    for run in (run for folder in folders for run in sorted(runs_in(folder), key=lambda one: one.name != "full")):
        suite = read_result(run).get("suite")
        if suite is None:
            raise ConfigError(f"{run}: is an evaluation on demonstrations, which has no success; give runs of a suite.")
        suites.setdefault(suite, []).append(run)
    if not suites:
        raise ConfigError("pareto needs at least one folder of `dysl eval`.")
    points = {suite: _points(runs) for suite, runs in suites.items()}
    _draw(points, out)
    return "\n".join(line for suite, group in points.items() for line in _table(suite, group))


def _points(runs: Sequence[Path]) -> list[Point]:
    comparisons = compare(runs) if len(runs) > 1 else []
    for one in comparisons:
        if one.latency_ratio is None:
            raise ConfigError(
                f"{one.run}: its latencies cannot be compared with those of {runs[0]}; run both with --workers 1 on "
                "one machine with the same versions."
            )
    return [Point(run, read_result(run), one) for run, one in zip(runs, [None, *comparisons], strict=True)]


def _draw(suites: dict[str, list[Point]], path: Path) -> None:
    figure = Figure(figsize=(11, 4 * len(suites)), layout="constrained")
    panels = figure.subplots(len(suites), len(STATISTICS), squeeze=False, sharey="row")
    for row, (suite, points) in zip(panels, suites.items(), strict=True):
        for axes, statistic in zip(row, STATISTICS, strict=True):
            for number, point in enumerate(points):
                rate, low, high = point.success
                axes.errorbar(
                    point.result["latency_ms"]["llm"][statistic],
                    rate,
                    yerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]],
                    fmt="osD^vP*X<>"[number % 10],
                    capsize=3,
                    label=point.name,
                )
            axes.set(xlabel=f"LLM, {statistic} ms an inference", title=suite, xlim=(0, None))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("success (%)")
        row[-1].legend(fontsize=7, loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _table(suite: str, points: Sequence[Point]) -> list[str]:
    lines = [
        f"{suite}, {points[0].result['episodes']} episodes, against {points[0].name}:",
        "",
        "| run | success | points (95 % interval, paired) | McNemar p | layers | LLM mean, p99 ms | LLM speed-up |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        skipped, llm = point.result.get("layers"), point.result["latency_ms"]["llm"]
        layers = f"{skipped['mean']:.2f}" if skipped else "all"
        difference = chance = ratio = "-"
        if point.comparison is not None:
            low, high = point.comparison.success.difference_ci95()
            difference = f"{100 * point.comparison.success.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            chance = p_value(point.comparison.success.mcnemar_p())
            assert point.comparison.latency_ratio is not None  # `_points` refuses it
            ratio = f"{point.comparison.latency_ratio['llm']['mean']:.2f}x"
        lines.append(
            f"| {point.name} | {100 * point.result['success_rate']:.1f} % | {difference} | {chance} "
            f"| {layers} | {llm['mean']:.2f}, {llm['p99']:.2f} | {ratio} |"
        )
    return [*lines, ""]
