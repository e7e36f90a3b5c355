"""`dysl plot`: pictures of the layers that ran in an evaluation, and of success over latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.eval.records import RESULT, STEPS, read_result, runs_in
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write

with needs_extra("train"):
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

LAYERS_PICTURE, SPEED_PICTURE = "layers.png", "speed_success.png"
BINS = 20


def plot(folder: Path) -> list[Path]:
    """Draw the runs in a folder of `dysl eval`, into that folder.

    Args:
        folder: Folder of one run, or of the several runs of `--variants`.

    Returns:
        Paths of the pictures.

    Raises:
        ConfigError: The folder holds no finished run, or none that skips layers.
    """
    if (folder / RESULT).is_file() and "suite" not in read_result(folder):
        raise ConfigError(f"{folder}: is an evaluation on demonstrations, whose pictures are drawn already: see there.")
    runs = runs_in(folder)
    results = [read_result(run) for run in runs]
    skipping = [(run, result) for run, result in zip(runs, results, strict=True) if result.get("layers")]
    if not skipping:
        raise ConfigError(f"{folder}: holds no run that skips layers; evaluate with --variants full,dysl.")
    pictures = [folder / LAYERS_PICTURE]
    _draw_layers(skipping, pictures[0])
    if len(runs) > 1:
        pictures.append(folder / SPEED_PICTURE)
        _draw_speed(runs, results, pictures[1])
    return pictures


def _draw_layers(runs: Sequence[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Draw the layers an inference over the episode's progress, with a line for each task and a panel for each run."""
    figure = Figure(figsize=(8, 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, (run, result) in zip(panels, runs, strict=True):
        table = pq.read_table(run / STEPS, columns=["task", "episode_index", "step", "layers"]).to_pylist()
        lengths: dict[tuple[str, int], int] = {}
        for row in table:
            key = row["task"], row["episode_index"]
            lengths[key] = max(lengths.get(key, 0), row["step"] + 1)
        for task in result["per_task"]:
            rows = [row for row in table if row["task"] == task and row["layers"] is not None]
            progress = [row["step"] / lengths[task, row["episode_index"]] for row in rows]
            bins = np.minimum((np.array(progress) * BINS).astype(int), BINS - 1)
            layers = np.array([row["layers"] for row in rows], float)
            means = [layers[bins == b].mean() if (bins == b).any() else np.nan for b in range(BINS)]
            axes.plot((np.arange(BINS) + 0.5) / BINS * 100, means, label=task, linewidth=1.2)
        axes.set(title=run.name, xlabel="progress of the episode (%)", ylabel="layers an inference", ylim=(0, None))
        axes.legend(fontsize=6, ncols=2)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_speed(runs: Sequence[Path], results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw success over the LLM's mean latency, with a point for each run."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run, result in zip(runs, results, strict=True):
        low, high = result["success_ci95"]
        rate, latency = 100 * result["success_rate"], result["latency_ms"]["llm"]["mean"]
        axes.errorbar(latency, rate, yerr=[[rate - 100 * low], [100 * high - rate]], fmt="o", capsize=3, label=run.name)
    axes.set(xlabel="LLM, mean ms an inference", ylabel="success (%)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
