"""What perturbations do: their figures in a run, and a picture of each at every level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dysl_vla.envs.perturbations import LEVELS, PerturbedEnv, perturbations
from dysl_vla.eval.statistics import wilson
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write
from dysl_vla.types import IMAGE_PREFIX

with needs_extra("train"):
    from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import pyarrow as pa

SIDE, CAPTION, GAP = 128, 14, 2


def perturbation_figures(episodes: Sequence[Mapping[str, Any]], steps: pa.Table) -> dict[str, Any]:
    """Compute the figures of each perturbation: nothing where none is on record.

    Args:
        episodes: Lines of `episodes.jsonl`.
        steps: Rows of `steps.parquet`.

    Returns:
        `per_perturbation`: "light:3" to `success_rate`, `success_ci95`, `episodes` and `layers`, the mean number that
        ran in an inference (None for a policy that skips nothing).
    """
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for episode in episodes:
        if "perturbation" in episode:
            cells.setdefault(episode["perturbation"], []).append(episode)
    if not cells:
        return {}
    layers = _layers(steps)
    return {"per_perturbation": {cell: _figures(cells[cell], layers) for cell in sorted(cells)}}


def _layers(steps: pa.Table) -> dict[tuple[str, int], list[float]]:
    ran: dict[tuple[str, int], list[float]] = {}
    columns = (steps[name].to_pylist() for name in ("task", "episode_index", "layers"))
    for task, index, layers in zip(*columns, strict=True):
        if layers is not None:
            ran.setdefault((task, index), []).append(layers)
    return ran


def _figures(
    episodes: Sequence[Mapping[str, Any]], layers: Mapping[tuple[str, int], Sequence[float]]
) -> dict[str, Any]:
    successes = sum(episode["success"] for episode in episodes)
    ran = [value for one in episodes for value in layers.get((one["task"], one["episode_index"]), ())]
    return {
        "success_rate": successes / len(episodes),
        "success_ci95": list(wilson(successes, len(episodes))),
        "episodes": len(episodes),
        "layers": float(np.mean(ran)) if ran else None,
    }


def render_perturbations(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Render the figures as Markdown: a row for each perturbation and a column for each level, in per cent."""
    names = list(dict.fromkeys(cell.rpartition(":")[0] for cell in figures))
    head = [f"level {level}" for level in LEVELS]
    rows = [f"| {name} | {' | '.join(_cell(figures.get(f'{name}:{level}')) for level in LEVELS)} |" for name in names]
    lines = ["", f"| perturbation | {' | '.join(head)} |", "|---|" + "---:|" * len(LEVELS), *rows]
    return [*lines, "", "Success of so many episodes; then the layers run an inference, where layers were skipped."]


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    layers = "" if figures["layers"] is None else f"; {figures['layers']:.1f}"
    return f"{100 * figures['success_rate']:.0f} % of {figures['episodes']}{layers}"


def draw_perturbations(env: PerturbedEnv, seed: int, path: Path) -> None:
    """Draw the first camera's image under each perturbation that a picture shows, at every level.

    Args:
        env: The environment.
        seed: The seed of the episode that is shown, which has index 0.
        path: Path of the picture, which ends in `.png`.
    """
    names = dict.fromkeys(name for name, _ in env.perturbing.cells)
    shown = [name for name in names if perturbations.get(name).shows and perturbations.get(name).applies_to(env)]
    if not shown:
        return
    height = SIDE + CAPTION
    sheet = Image.new("RGB", (len(LEVELS) * (SIDE + GAP), len(shown) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(shown):
        for column, level in enumerate(LEVELS):
            one = env.only(name, level)
            one.full_quality = env.full_quality
            observation, _ = one.reset(seed=seed, options={"episode_index": 0})
            image = observation[IMAGE_PREFIX + next(iter(env.embodiment.cameras))]
            place = (column * (SIDE + GAP), row * height)
            draw.text(place, f"{name}:{level}", fill="black")
            sheet.paste(Image.fromarray(image).resize((SIDE, SIDE)), (place[0], place[1] + CAPTION))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
