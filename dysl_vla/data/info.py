"""The content of a dataset as text and tables. No image is decoded for it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.split import split_for
from dysl_vla.types import IMAGE_PREFIX, FloatArray

HARDLY = 0.005
"""A dimension hardly moves if its deviation is below this share of the largest deviation of its vector."""
NEVER = 1e-4
"""A dimension also hardly moves if its deviation is below this: training does not scale it up any further."""

DIGITS = 12
"""Digits behind the point that a bound has at most."""


def render_info(demonstrations: Demonstrations) -> str:
    """A dataset's cameras, dimensions and ranges, and its episodes by (suite, task, seed, actor), in Markdown.

    Raises:
        DatasetError: The dataset is damaged.
    """
    parts = [list(_head(demonstrations)), list(_episodes(demonstrations))]
    if demonstrations.rows:
        columns = demonstrations.columns()
        named = {
            "state": (demonstrations.spec.state_names, columns["states"]),
            "action": (demonstrations.spec.action_names, columns["actions"]),
        }
        parts += [list(_dimensions(named)), list(_bounds(columns["actions"]))]
    return "\n\n".join("\n".join(part) for part in parts)


def _head(demonstrations: Demonstrations) -> Iterator[str]:
    spec, rows = demonstrations.spec, demonstrations.rows
    robot = demonstrations.info.get("robot_type")
    yield (
        f"{demonstrations.root}: {len(rows)} episodes, {demonstrations.total_frames} frames, {spec.rate_hz:g} Hz"
        + (f", robot {robot}" if robot else "")
    )
    for name, (height, width) in spec.cameras.items():
        about = demonstrations.info["features"][IMAGE_PREFIX + name].get("info") or {}
        codec = about.get("video.codec") if demonstrations.storage[name] == "video" else None
        rendering = f"rendered with {demonstrations.rendering} quality" if demonstrations.rendering else None
        parts = (f"{height}x{width}", demonstrations.storage[name], codec, rendering)
        yield f"camera   {name}: {', '.join(filter(None, parts))}"
    for name, why in demonstrations.left_out.items():
        yield f"left out {name}: {why}"
    yield f"state    {', '.join(spec.state_names)}"
    yield f"action   {', '.join(spec.action_names)}"
    has_names = {"state": demonstrations.has_state_names, "action": demonstrations.has_action_names}
    if unnamed := [what for what, has in has_names.items() if not has]:
        options = " and ".join(f"--{what}-names" for what in unnamed)
        yield (
            f"unnamed  the dataset does not name the dimensions of its {' and '.join(unnamed)}, and a robot is matched "
            f"by names: give them with {options}, or write them into meta/info.json, field names"
        )
    for instruction in demonstrations.instructions:
        yield f"task     {instruction!r}"
    split = split_for(len(rows))
    held_out = sum(split.is_held_out(row.number) for row in rows)
    yield f"held out {held_out} of {len(rows)} episodes, from training, unless --held-out says otherwise"


def _episodes(demonstrations: Demonstrations) -> Iterator[str]:
    yield "| suite | task | seed | actor | episodes | frames | mean length |"
    yield "|---|---|---:|---|---:|---:|---:|"
    lengths: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for row in demonstrations.rows:
        origin = row.origin
        key = (origin.suite, origin.task, str(origin.seed), origin.actor) if origin else ("", "", "", "unknown")
        lengths[key].append(row.length)
    for key, frames in lengths.items():
        numbers = [str(len(frames)), str(sum(frames)), f"{sum(frames) / len(frames):.0f}"]
        yield "| " + " | ".join([*key, *numbers]) + " |"


def _dimensions(named: dict[str, tuple[tuple[str, ...], FloatArray]]) -> Iterator[str]:
    yield "| | name | min | 1 % | 99 % | max | std | |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    is_any_still = False
    for what, (names, values) in named.items():
        ordered = np.quantile(values, [0, 0.01, 0.99, 1], axis=0)
        std = values.std(axis=0, dtype=np.float64)
        is_still = std < max(NEVER, HARDLY * std.max())
        is_any_still |= bool(is_still.any())
        for name, numbers, deviation, still in zip(names, ordered.T, std, is_still, strict=True):
            shown = " | ".join(f"{number:.4g}" for number in (*numbers, deviation))
            yield f"| {what} | {name} | {shown} | {'hardly moves' if still else ''} |"
    if is_any_still:
        yield ""
        yield f"hardly moves: its std is below {NEVER:g}, or below {100 * HARDLY:g} % of its vector's largest."


def _bounds(actions: FloatArray) -> Iterator[str]:
    low, high = zip(*map(outwards, actions.min(axis=0), actions.max(axis=0)), strict=True)
    yield "For the file of a robot, lerobot:FILE.json: the range that was demonstrated, rounded outwards."
    yield f'"action_low": {json.dumps(low)},'
    yield f'"action_high": {json.dumps(high)}'


def outwards(low: float, high: float) -> tuple[float, float]:
    """A range with few digits that contains another and is at most a fiftieth wider.

    A single value gets a range around it of at most a fiftieth of the value, which a robot's file may have.
    """
    low, high = float(low), float(high)
    decimals = min(2 - math.floor(math.log10((high - low) or abs(high) or 1)), DIGITS)
    scale = 10.0**decimals
    if low == high:
        low, high = low - 0.5 / scale, high + 0.5 / scale
    return round(math.floor(low * scale) / scale, decimals), round(math.ceil(high * scale) / scale, decimals)
