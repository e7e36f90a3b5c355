"""The figures of a run, computed from its records and rendered as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.eval.chains import chain_figures, render_chains
from dysl_vla.eval.perturbations import perturbation_figures, render_perturbations
from dysl_vla.eval.statistics import wilson
from dysl_vla.types import PolicySpec, gripper_columns

if TYPE_CHECKING:
    import pyarrow as pa

LATENCY_PARTS = ("total", "encode", "llm", "decode", "guidance")


def summarise(
    episodes: Sequence[Mapping[str, Any]], steps: pa.Table, tasks: Sequence[str], spec: PolicySpec
) -> dict[str, Any]:
    """Compute the figures of a run.

    Args:
        episodes: Lines of `episodes.jsonl`.
        steps: Rows of `steps.parquet`.
        tasks: Tasks in the order of the report.
        spec: Specification of the policy.

    Returns:
        `success_rate`, `success_ci95`, `per_task`, `episodes`, `latency_ms`, `render_ms`, `physics_ms`,
        `control_rate_hz` (the actions a second that the policy alone could sustain, by its median and its p99), and
        `layers` (see `layers_by_importance`; None for a policy that skips nothing); for episodes with several
        instructions also those of `chain_figures`, for perturbed ones those of `perturbation_figures`.
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
        "control_rate_hz": {name: 1e3 * spec.execute_steps / total[name] for name in ("p50", "p99")},
        "layers": layers_by_importance(steps, spec),
        **chain_figures(episodes),
        **perturbation_figures(episodes, steps),
    }


def layers_by_importance(steps: pa.Table, spec: PolicySpec) -> dict[str, float | None] | None:
    """Count the layers that ran, in all and near the gripper's closing and opening.

    The gripper closes or opens where its command has moved by half a deviation of the demonstrated commands since it
    last did, or since the episode began, so that noise is no event. The five steps around an event are near it.

    Returns:
        `mean`, `p99`, `near_gripper`, `free_motion` (means over inferences), `ratio` of these two, `verified` (share of
        inferences); None for a policy that skips nothing. Without events or a gripper, the three are None.
    """
    layers = np.asarray(steps["layers"].to_numpy(zero_copy_only=False), np.float64)
    inferred = np.isfinite(layers)
    if not inferred.any():
        return None
    near = near_gripper_events(steps, spec)
    means = [float(layers[inferred & part].mean()) if (inferred & part).any() else None for part in (near, ~near)]
    ratio = means[0] / means[1] if means[0] is not None and means[1] else None
    verified = np.asarray(steps["verified"].drop_null().to_numpy(zero_copy_only=False), np.float64)
    return {
        "mean": float(layers[inferred].mean()),
        "p99": float(np.percentile(layers[inferred], 99)),
        "near_gripper": means[0],
        "free_motion": means[1] if ratio is not None else None,
        "ratio": ratio,
        "verified": float(verified.mean()),
    }


def near_gripper_events(steps: pa.Table, spec: PolicySpec) -> NDArray[np.bool_]:
    """Tell which steps, (steps,), are among the five around a gripper's closing or opening."""
    near = np.zeros(len(steps), np.bool_)
    actions = np.array(steps["action"].to_pylist())
    begins = np.asarray(steps["step"].to_numpy()) == 0
    starts = np.flatnonzero(begins).tolist()
    for dimension in gripper_columns(spec.action_names):
        moved = spec.action_normalisation.std[dimension] / 2
        commands = actions[:, dimension]
        for start, end in zip(starts, [*starts[1:], len(commands)], strict=True):
            rest = commands[start]
            for step in range(start, end):
                if abs(commands[step] - rest) > moved:
                    near[max(start, step - 2) : min(end, step + 3)] = True
                    rest = commands[step]
    return near


def quantiles(column: pa.ChunkedArray) -> dict[str, float]:
    """Compute mean, p50, p95 and p99 of the values that exist; they are zero when none does."""
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
    """Render a result as Markdown."""
    low, high = result["success_ci95"]
    lines = [
        f"# {result['policy']} on {result['suite']}",
        "",
        f"Success {100 * result['success_rate']:.1f} % of {result['episodes']} episodes "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), seed {result['seed']}.",
        "",
        *(render_chains(result["chains"]) if "chains" in result else ()),
        "| task | success | 95 % interval | episodes | mean steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, row in result["per_task"].items():
        low, high = row["success_ci95"]
        lines.append(
            f"| {task} | {100 * row['success_rate']:.0f} % | {100 * low:.0f} to {100 * high:.0f} | {row['episodes']} "
            f"| {row['mean_steps']:.0f} |"
        )
    lines += render_perturbations(result["per_perturbation"]) if "per_perturbation" in result else []
    lines += ["", "| ms | mean | p50 | p95 | p99 |", "|---|---:|---:|---:|---:|"]
    parts = {**result["latency_ms"], "rendering": result["render_ms"], "physics": result["physics_ms"]}
    for part, row in parts.items():
        name = f"policy: {part}" if part in LATENCY_PARTS else part
        lines.append("| " + " | ".join([name, *(f"{row[q]:.2f}" for q in ("mean", "p50", "p95", "p99"))]) + " |")
    rate = result["control_rate_hz"]
    if result.get("layers"):
        lines += ["", _render_layers(result["layers"])]
    lines += [
        "",
        f"With {result['execute_steps']} actions executed an inference, the policy alone sustains {rate['p50']:.0f} "
        f"actions a second by its median latency, {rate['p99']:.0f} by its p99. {result['machine']['cpu']}, one "
        f"inference thread, {result['workers']} worker(s)"
        + ("." if result["workers"] == 1 else ": latencies are only comparable with `--workers 1`."),
        "",
    ]
    return "\n".join(lines)


def _render_layers(layers: Mapping[str, float | None]) -> str:
    text = (
        f"Layers run an inference: {layers['mean']:.2f} (p99 {layers['p99']:.0f}); predicted again by the full model: "
        f"{100 * (layers['verified'] or 0):.2f} %."
    )
    if layers["ratio"] is None:
        return text
    return (
        f"{text} In the five steps around the gripper's closing and opening {layers['near_gripper']:.2f} layers, in "
        f"free motion {layers['free_motion']:.2f}: {layers['ratio']:.2f} times as many."
    )
