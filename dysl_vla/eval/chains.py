"""The figures of episodes with several instructions, as CALVIN reports them: success of 1, 2, ... in a row.

The average number of instructions that are carried out is the sum of these success rates, and its 95 % interval is the
sum of their intervals' bounds, as the deviation of a sum is at most the sum of the deviations. Differences between two
runs on the same episodes are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dysl_vla.eval.statistics import PairedSuccess, wilson


def chain_figures(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the figures of a run's chains.

    Args:
        episodes: Lines of `episodes.jsonl`.

    Returns:
        `chains`, with `in_a_row` and `in_a_row_ci95` (for one, two, ... instructions in a row), `average_length`,
        `average_length_ci95`, and `per_instruction` (how often each was begun and completed); empty for a run whose
        episodes have one instruction.
    """
    if "completed" not in episodes[0]:
        return {}
    lengths = [episode["completed"] for episode in episodes]
    counts = [sum(length >= n for length in lengths) for n in range(1, len(episodes[0]["instructions"]) + 1)]
    intervals = [wilson(count, len(episodes)) for count in counts]
    return {
        "chains": {
            "in_a_row": [count / len(episodes) for count in counts],
            "in_a_row_ci95": [list(interval) for interval in intervals],
            "average_length": sum(counts) / len(episodes),
            "average_length_ci95": [sum(low for low, _ in intervals), sum(high for _, high in intervals)],
            "per_instruction": _per_instruction(episodes),
        }
    }


def _per_instruction(episodes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for episode in episodes:
        for position, instruction in enumerate(episode["instructions"][: episode["completed"] + 1]):
            count = counts.setdefault(instruction, {"begun": 0, "completed": 0})
            count["begun"] += 1
            count["completed"] += position < episode["completed"]
    return dict(sorted(counts.items()))


def render_chains(chains: Mapping[str, Any]) -> list[str]:
    """Render the figures of chains as lines of Markdown."""
    low, high = chains["average_length_ci95"]
    lines = [
        f"Instructions carried out in a row: {chains['average_length']:.2f} of {len(chains['in_a_row'])} on average "
        f"(95 % interval {low:.2f} to {high:.2f}).",
        "",
        "| in a row | success | 95 % interval |",
        "|---:|---:|---:|",
    ]
    for n, (rate, (low, high)) in enumerate(zip(chains["in_a_row"], chains["in_a_row_ci95"], strict=True), start=1):
        lines.append(f"| {n} | {100 * rate:.1f} % | {100 * low:.1f} to {100 * high:.1f} |")
    lines += ["", "| instruction | begun | completed |", "|---|---:|---:|"]
    for instruction, count in chains["per_instruction"].items():
        lines.append(f"| {instruction} | {count['begun']} | {count['completed']} |")
    return [*lines, ""]


def average_difference(in_a_row: Sequence[PairedSuccess]) -> tuple[float, float, float]:
    """Compute the second run's average length minus the first's, and its 95 % interval.

    Args:
        in_a_row: The pairs of one, two, ... instructions in a row.

    Returns:
        The difference and the interval's bounds.
    """
    bounds = [pairs.difference_ci95() for pairs in in_a_row]
    difference = sum(pairs.difference for pairs in in_a_row)
    return difference, sum(low for low, _ in bounds), sum(high for _, high in bounds)
