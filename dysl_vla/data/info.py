"""What a dataset holds, as a table."""

from __future__ import annotations

from collections import defaultdict

from dysl_vla.data.lerobot import Demonstrations


def render_info(demonstrations: Demonstrations) -> str:
    """A dataset's cameras, state, actions, and its episodes by (suite, task, seed, actor)."""
    spec = demonstrations.spec
    cameras = ", ".join(f"{name} {height}x{width}" for name, (height, width) in spec.cameras.items())
    lines = [
        f"{demonstrations.root}: {len(demonstrations.rows)} episodes, {demonstrations.total_frames} frames, "
        f"{spec.rate_hz:g} Hz",
        f"cameras  {cameras}",
        f"state    {', '.join(spec.state_names)}",
        f"action   {', '.join(spec.action_names)}",
        "",
        "| suite | task | seed | actor | episodes | frames | mean length |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    lengths: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for row in demonstrations.rows:
        origin = row.origin
        key = (origin.suite, origin.task, str(origin.seed), origin.actor) if origin else ("", "", "", "unknown")
        lengths[key].append(row.length)
    for key, frames in lengths.items():
        numbers = [str(len(frames)), str(sum(frames)), f"{sum(frames) / len(frames):.0f}"]
        lines.append("| " + " | ".join([*key, *numbers]) + " |")
    return "\n".join(lines)
