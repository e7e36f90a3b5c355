"""How much to skip: one knob, turned into thresholds by what happened on demonstrations. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.guidance import Thresholds
from dysl_vla.skip_controller.plan import SkipPlan

VERIFIED = 0.002
"""Share of inferences that are verified, unless everything is skipped: one that is costs more than the full model."""
MIN_CHANGE, LARGEST = 0.005, 1e300
"""Changes of an importance measure, in deviations a step, below which it is noise, and above which none is."""


@dataclass(frozen=True)
class OperatingPoint:
    """What decides.

    Attributes:
        threshold: A controller's output above it skips.
        thresholds: Of continuity.
    """

    threshold: float
    thresholds: Thresholds


@dataclass(frozen=True)
class SkipStatistics:
    """What controllers and continuity said over held-out demonstrations: evenly spaced quantiles, from least to most.

    Attributes:
        outputs: Of controllers, at the first dynamic layer of each block; later ones are held to the same threshold.
        drops: Of continuity from one inference to the next, where it fell.
        surprises: Of continuity by newly predicted actions; at or below zero where it did not fall.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    outputs: tuple[float, ...]
    drops: tuple[float, ...]
    surprises: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("outputs", "drops", "surprises"):
            values = getattr(self, name)
            if len(values) < 2 or not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise ConfigError(f"statistics.{name}: must be at least two finite values that do not fall.")

    @classmethod
    def measured(cls, outputs: Sequence[float], drops: Sequence[float], surprises: Sequence[float]) -> SkipStatistics:
        """From single values; where importance never dropped, or nothing surprised, any drop beyond noise counts."""
        shares = np.linspace(0, 1, 1001)
        tables = [
            tuple(map(float, np.quantile(np.asarray(values, np.float64), shares)))
            for values in (outputs, drops or (0.0,), surprises or (0.0,))
        ]
        return cls(*tables)

    def point(self, skip: float) -> OperatingPoint:
        """The thresholds of a setting of the knob.

        Args:
            skip: Above 0, where nothing is skipped, to 1, where everything is that may be. In between: the share of
                controllers' outputs that skip, and of falls of continuity that are too small to move an allow point.

        Raises:
            ConfigError: Out of range.
        """
        if not 0 < skip <= 1:
            raise ConfigError(f"skip: {skip} must be above 0, where nothing is skipped, and at most 1.")
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
    """Settings of skipping from a file, under the names that they have now; version 0.1 called some otherwise."""
    return {
        FORMER_NAMES.get(name, name): with_present_names(value) if name == "statistics" else value
        for name, value in values.items()
    }


def _at(quantiles: Sequence[float], share: float) -> float:
    return float(np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles))


@dataclass(frozen=True)
class Ablation:
    """Which parts of the method are on: each can be left out to see what it is worth.

    Attributes:
        guidance: Allow points move; off: controllers are always asked, from each block's first layer on.
        verification: Surprising actions are predicted again by the full model.
        random: Blocks are left at random places, no controller is asked and nothing is protected.
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
"""Names for the command line."""


class RandomExits:
    """The comparator that knows nothing of the action: blocks are left at random, as often as a real setting does.

    Args:
        plan: Names the exits.
        mean_layers: To run an inference, on average.
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
        """For each block how many of its layers run."""
        rng = np.random.default_rng(seed)
        return [places[min(rng.geometric(self._probability), len(places)) - 1] for places in self._places]
