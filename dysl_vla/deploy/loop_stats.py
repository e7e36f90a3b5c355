"""What became of a control loop's cycles: counts, percentiles, and their rendering as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HISTOGRAM_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
COUNTS = (
    "cycles",
    "on_time",
    "late",
    "missed",
    "clamped",
    "approaching",
    "inferences",
    "verified",
    "unverified",
)


@dataclass
class LoopStats:
    """What became of the cycles.

    Attributes:
        cycles: Number of all cycles.
        on_time: Cycles whose action was sent within a tenth of a period of its time.
        late: Cycles whose action was sent later, but within the period.
        missed: Cycles whose action was sent after its period, or that had no fresh action.
        clamped: Actions that a limit changed.
        approaching: Cycles in which the robot was still on its way from where it stood to what the policy wants.
        inferences: Chunks predicted.
        verified: Chunks that the full model predicted again.
        unverified: Chunks that the full model should have predicted again, for which there was no time.
        stopped: Why the robot was stopped early; empty when the time was over.
        jitter_ms: By how much each cycle's action was sent after its time.
        inference_ms: Duration of each inference.
        age_ms: Age of the oldest part of the observation behind each action that was sent.
        robot: What the robot reports.
    """

    cycles: int = 0
    on_time: int = 0
    late: int = 0
    missed: int = 0
    clamped: int = 0
    approaching: int = 0
    inferences: int = 0
    verified: int = 0
    unverified: int = 0
    stopped: str = ""
    jitter_ms: list[float] = field(default_factory=list)
    inference_ms: list[float] = field(default_factory=list)
    age_ms: list[float] = field(default_factory=list)
    robot: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Counts, percentiles and the histogram of jitter."""
        counts = {name: getattr(self, name) for name in COUNTS}
        parts = {name: _percentiles(getattr(self, name)) for name in ("jitter_ms", "inference_ms", "age_ms")}
        edges = [0.0, *HISTOGRAM_MS, np.inf]
        histogram = np.histogram(np.maximum(self.jitter_ms, 0), edges)[0].tolist() if self.jitter_ms else []
        return {**counts, "stopped": self.stopped, "robot": dict(self.robot), **parts, "jitter_histogram": histogram}


def render_stats(stats: LoopStats) -> str:
    """The statistics as text."""
    summary = stats.summary()
    lines = [
        f"{summary['cycles']} cycles: {summary['on_time']} on time, {summary['late']} late, "
        f"{summary['missed']} missed; {summary['clamped']} clamped by a limit, "
        f"{summary['approaching']} on the way from where the robot stood.",
        f"{summary['inferences']} inferences; surprising actions predicted again: {summary['verified']}; not predicted "
        f"again, for lack of time: {summary['unverified']}.",
        "",
        "| ms | p50 | p95 | p99 | max |",
        "|---|---:|---:|---:|---:|",
    ]
    names = {"jitter_ms": "sent after its time", "inference_ms": "inference", "age_ms": "age of the observation"}
    for key, name in names.items():
        values = summary[key]
        if values:
            numbers = " | ".join(f"{values[part]:.2f}" for part in ("p50", "p95", "p99", "max"))
            lines.append(f"| {name} | {numbers} |")
    edges = [*(f"< {edge:g} ms" for edge in HISTOGRAM_MS), f">= {HISTOGRAM_MS[-1]:g} ms"]
    most = max(summary["jitter_histogram"], default=0)
    lines.append("")
    for edge, count in zip(edges, summary["jitter_histogram"], strict=False):
        if count:
            lines.append(f"{edge:>10}  {count:6d}  {'#' * math.ceil(40 * count / most)}")
    if stats.robot:
        lines += [
            "",
            "On the robot's side: " + ", ".join(f"{value} {name}" for name, value in stats.robot.items()) + ".",
        ]
    if stats.stopped:
        lines.append(f"Stopped early: {stats.stopped}")
    return "\n".join(lines)


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "max": round(max(values), 3)}
