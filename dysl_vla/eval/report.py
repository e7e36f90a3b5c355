"""From records to figures, and from figures to a table that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dysl_vla.eval.statistics import wilson

if TYPE_CHECKING:
    import pyarrow as pa

LATENCY_PARTS = ("total", "encode", "llm", "decode", "guidance")


def summarise(
    episodes: Sequence[Mapping[str, Any]], steps: pa.Table, tasks: Sequence[str], execute_steps: int
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        episodes: Lines of `episodes.jsonl`.
        steps: Rows of `steps.parquet`.
        tasks: In the order of the report.
        execute_steps: Actions executed an inference.

    Returns:
        `success_rate`, `success_ci95`, `per_task`, `episodes`, `latency_ms`, `render_ms`, `physics_ms`,
        `control_rate_hz`: the actions a second that the policy alone could sustain, by its median and its p99.
    """
    successes = sum(episode["success"] for episode in episodes)
    latency = {part: quantiles(steps[f"{part}_ms"]) for part in LATENCY_PARTS}
    total = latency["total"]
    return {
        "success_rate": successes / len(episodes),
        "success_ci95": list(wilson(successes, len(episodes))),
        "episodes": len(episodes),
        "per_task": {task: _of_task([e for e in episodes if e["task"] == task]) for task in tasks},
        "latency_ms": latency,
        "render_ms": quantiles(steps["render_ms"]),
        "physics_ms": quantiles(steps["physics_ms"]),
        "control_rate_hz": {name: 1e3 * execute_steps / total[name] for name in ("p50", "p99")},
    }


def quantiles(column: pa.ChunkedArray) -> dict[str, float]:
    """Mean, p50, p95, p99 of the values that exist; zeros when none does."""
    values = np.asarray(column.drop_null().to_numpy(), np.float64)
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p95", "p99"), 0.0)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _of_task(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    successes = sum(episode["success"] for episode in episodes)
    return {
        "success_rate": successes / len(episodes),
        "success_ci95": list(wilson(successes, len(episodes))),
        "episodes": len(episodes),
        "mean_steps": float(np.mean([episode["steps"] for episode in episodes])),
    }


def render_report(result: Mapping[str, Any]) -> str:
    """A result as Markdown."""
    low, high = result["success_ci95"]
    lines = [
        f"# {result['policy']} on {result['suite']}",
        "",
        f"Success {100 * result['success_rate']:.1f} % of {result['episodes']} episodes "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), seed {result['seed']}.",
        "",
        "| task | success | 95 % interval | episodes | mean steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, row in result["per_task"].items():
        low, high = row["success_ci95"]
        lines.append(
            f"| {task} | {100 * row['success_rate']:.0f} % | {100 * low:.0f} to {100 * high:.0f} | {row['episodes']} "
            f"| {row['mean_steps']:.0f} |"
        )
    lines += ["", "| ms | mean | p50 | p95 | p99 |", "|---|---:|---:|---:|---:|"]
    parts = {**result["latency_ms"], "rendering": result["render_ms"], "physics": result["physics_ms"]}
    for part, row in parts.items():
        name = f"policy: {part}" if part in LATENCY_PARTS else part
        lines.append("| " + " | ".join([name, *(f"{row[q]:.2f}" for q in ("mean", "p50", "p95", "p99"))]) + " |")
    rate = result["control_rate_hz"]
    lines += [
        "",
        f"With {result['execute_steps']} actions executed an inference, the policy alone sustains {rate['p50']:.0f} "
        f"actions a second by its median latency, {rate['p99']:.0f} by its p99. {result['machine']['cpu']}, one "
        f"inference thread, {result['workers']} worker(s)"
        + ("." if result["workers"] == 1 else ": latencies are only comparable with `--workers 1`."),
        "",
    ]
    return "\n".join(lines)
