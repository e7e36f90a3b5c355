"""How much to skip: one setting, turned into thresholds by what happened on demonstrations.

It needs only NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.guidance import Thresholds
from dysl_vla.skip_controller.plan import SkipPlan

VERIFIED = 0.002
"""Share of inferences that are verified, unless everything is skipped: each of them costs more than the full model."""
MIN_CHANGE, LARGEST = 0.005, 1e300
"""Changes of an importance measure, in deviations a step, below which it is noise, and above which none is."""


@dataclass(frozen=True)
class OperatingPoint:
    """The thresholds that belong to a setting.

    Attributes:
        threshold: Controllers skip where their output is above it.
        thresholds: Thresholds of continuity.
    """

    threshold: float
    thresholds: Thresholds


@dataclass(frozen=True)
class SkipStatistics:
    """What controllers and continuity said over held-out demonstrations: evenly spaced quantiles, from least to most.

    Attributes:
        outputs: Outputs of the controllers at the first dynamic layer of each block; later ones are held to the same
            threshold.
        drops: Falls of continuity from one inference to the next, where it fell.
        surprises: Falls of continuity by newly predicted actions; at or below zero where it did not fall.

    Raises:
        ConfigError: The values of one are fewer than two, not finite, or fall.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    outputs: tuple[float, ...]
    drops: tuple[float, ...]
    surprises: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("outputs", "drops", "surprises"):
            values = getattr(self, name)
            if len(values) < 2 or not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise ConfigError(
                    f"statistics.{name} must be at least two finite values in rising order; distill the policy again."
                )

    @classmethod
    def measured(cls, outputs: Sequence[float], drops: Sequence[float], surprises: Sequence[float]) -> SkipStatistics:
        """Make statistics from single values.

        Where importance never dropped, or nothing surprised, any drop beyond noise counts.
        """
        shares = np.linspace(0, 1, 1001)
        tables = [
            tuple(map(float, np.quantile(np.asarray(values, np.float64), shares)))
            for values in (outputs, drops or (0.0,), surprises or (0.0,))
        ]
        return cls(*tables)

    def point(self, skip: float) -> OperatingPoint:
        """Return the thresholds of a setting.

        Args:
            skip: The setting, from above 0, where nothing is skipped, to 1, where everything is that may be. In between
                it is the share of controllers' outputs that skip, and of falls of continuity that are too small to move
                an allow point.

        Raises:
            ConfigError: The setting is out of range.
        """
        if not 0 < skip <= 1:
            raise ConfigError(f"skip must be above 0, where nothing is skipped, and at most 1, got {skip}.")
        everything = skip == 1
        return OperatingPoint(
            threshold=-1.0 if everything else _at(self.outputs, 1 - skip),
            thresholds=Thresholds(
                eta=LARGEST if everything else max(MIN_CHANGE, _at(self.drops, skip)),
                eta_verify=LARGEST if everything else max(MIN_CHANGE, _at(self.surprises, 1 - VERIFIED)),
            ),
        )


FORMER_NAMES = {"foresight": "lookahead", "signal": "importance", "falls": "drops"}


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a file's settings of skipping to the names that they have now; version 0.1 had others for some."""
    return {
        FORMER_NAMES.get(name, name): with_present_names(value) if name == "statistics" else value
        for name, value in values.items()
    }


def _at(quantiles: Sequence[float], share: float) -> float:
    return float(np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles))


@dataclass(frozen=True)
class Ablation:
    """The parts of the method that are on: each can be left out to measure what it contributes.

    Attributes:
        guidance: Whether allow points move; without it, controllers are always asked, from each block's first layer on.
        verification: Whether surprising actions are predicted again by the full model.
        random: Whether blocks are left at random exits; then no controller is asked and nothing is protected.
    """

    guidance: bool = True
    verification: bool = True
    random: bool = False


ABLATIONS = {
    "dysl": Ablation(),
    "no-guidance": Ablation(guidance=False),
    "no-verification": Ablation(verification=False),
    "controllers": Ablation(guidance=False, verification=False),
    "random": Ablation(guidance=False, verification=False, random=True),
}
"""Ablations by their names on the command line."""


class RandomExits:
    """The comparator that ignores the action: blocks are left at random, as often as at a real setting.

    Args:
        plan: The plan, which names the exits.
        mean_layers: Number of layers that an inference runs on average.
    """

    def __init__(self, plan: SkipPlan, mean_layers: float) -> None:
        self._places = [
            [*(layer - block.first for layer in plan.exits_of(block)), block.length] for block in plan.blocks
        ]
        exits_before = [
            sum(left <= layer for left in plan.exits_of(block))
            for block in plan.blocks
            for layer in range(block.first, block.target)
        ]
        dynamic_layers = mean_layers - (plan.num_layers - len(plan.dynamic_layers))
        low, high = 0.0, 1.0  # leave at an exit with probability p: a layer runs with (1 - p) ** exits_before
        for _ in range(50):
            middle = (low + high) / 2
            run = sum((1 - middle) ** exits for exits in exits_before)
            low, high = (middle, high) if run > dynamic_layers else (low, middle)
        self._probability = (low + high) / 2

    def draw(self, seed: int) -> list[int]:
        """Draw how many layers of each block run."""
        rng = np.random.default_rng(seed)
        return [places[min(rng.geometric(self._probability), len(places)) - 1] for places in self._places]
