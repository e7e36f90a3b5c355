"""An evaluation on demonstrations, as text and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.eval.offline_summary import Played
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write
from dysl_vla.types import PolicySpec

COLUMNS = 3


def render_offline(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    variants: Mapping[str, Any] = result["variants"]
    first = next(iter(variants))
    lines = [
        f"{len(result['episodes'])} held-out episodes of {result['data']}, {result['moments']} inferences, each "
        f"executing {result['execute_steps']} actions. Errors are mean distances of executed actions from those "
        "demonstrated, in deviations of the demonstrated actions; repeating the last action would be "
        f"{result['repeating']:.3f} off. Intervals are over seconds of these episodes. What is skipped was chosen on "
        "held-out episodes (dysl calibrate, distill, tune), which these may be among.",
        "",
        "| | " + " | ".join(variants) + " |",
        "|---|" + "---:|" * len(variants),
        _row("action error (95 %)", [_with_interval(variant["error"], "{:.3f}") for variant in variants.values()]),
    ]
    if len(variants) > 1:
        differences = [
            _with_interval(w["difference"], "{:+.3f}") if "difference" in w else "" for w in variants.values()
        ]
        lines.append(_row(f"minus {first}'s, paired by frame", differences))
        apart = [f"{variant['distance']:.3f}" if "distance" in variant else "" for variant in variants.values()]
        lines.append(_row(f"distance from {first}'s actions", apart))
    lines.append(_row("layers", ["all" if w["layers"] is None else f"{w['layers']:.2f}" for w in variants.values()]))
    lines.append(_row("predicted again", [f"{100 * variant['verified']:.1f} %" for variant in variants.values()]))
    for key, name in (("llm_ms", "LLM ms: mean, p50, p99"), ("total_ms", "policy ms: mean, p50, p99")):
        numbers = [
            ", ".join(f"{variant[key][part]:.2f}" for part in ("mean", "p50", "p99")) for variant in variants.values()
        ]
        lines.append(_row(name, numbers))
    heads = " | ".join(f"{name}: error" for name in variants)
    lines += ["", f"| dimension | deviation of the demonstrated | {heads} |"]
    lines.append("|---|---:|" + "---:|" * len(variants))
    for name, std in result["action_std"].items():
        errors = [f"{variant['per_dimension'][name]:.4g}" for variant in variants.values()]
        lines.append(_row(f"{name} | {std:.4g}", errors))
    lines += ["", f"| action of the chunk | {heads} |"]
    lines.append("|---|" + "---:|" * len(variants))
    for place in range(1, 1 + len(variants[first]["horizon"])):
        mark = " (executed)" if place <= result["execute_steps"] else ""
        errors = [variant["horizon"][place - 1] for variant in variants.values()]
        lines.append(_row(f"{place}{mark}", ["-" if error is None else f"{error:.3f}" for error in errors]))
    return "\n".join(lines)


def draw_actions(part: Played, names: Sequence[str], spec: PolicySpec, path: Path) -> None:
    """One episode: in each dimension what was demonstrated, and what each variant would have executed."""
    with needs_extra("train"):
        from matplotlib.figure import Figure
    rows = -(-len(spec.action_names) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
    seconds = np.arange(len(part.demonstrated)) / spec.rate_hz
    places = (part.frames[:, None] + np.arange(spec.execute_steps)).ravel()
    inside = places < len(part.demonstrated)
    for dimension, (axes, name) in enumerate(zip(panels, spec.action_names, strict=False)):
        axes.plot(seconds, part.demonstrated[:, dimension], color="black", linewidth=2, label="demonstrated")
        for variant, label in enumerate(names):
            values = part.predicted[variant, :, : spec.execute_steps, dimension].ravel()
            axes.plot(places[inside] / spec.rate_hz, values[inside], linewidth=1, label=label)
        axes.set_title(name, fontsize=9)
    for axes in panels[len(spec.action_names) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize=8)
    figure.supxlabel("seconds")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_horizon(result: Mapping[str, Any], path: Path) -> None:
    """How the error grows along the chunk."""
    with needs_extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name, variant in result["variants"].items():
        errors = np.array(variant["horizon"], np.float64)  # None becomes NaN, which is not drawn
        axes.plot(np.arange(1, len(errors) + 1), errors, marker=".", label=name)
    axes.axvspan(0.5, result["execute_steps"] + 0.5, alpha=0.15, color="tab:gray", label="executed")
    axes.set(xlabel="action of the chunk", ylabel="error, deviations", ylim=(0, None))
    axes.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _row(name: str, values: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def _with_interval(value: Mapping[str, Any], form: str) -> str:
    if value["ci95"] is None:
        return f"{form.format(value['mean'])} (too few moments for an interval)"
    low, high = value["ci95"]
    return f"{form.format(value['mean'])} ({form.format(low)} to {form.format(high)})"
