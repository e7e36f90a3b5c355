"""Statistics of success: intervals and tests for proportions, alone and paired.

Latencies are described by their quantiles instead (`report`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dysl_vla.extras import needs_extra

with needs_extra("train"):
    from scipy import stats

CONFIDENCE = 0.95


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval of a success rate; it is (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedSuccess:
    """Counts of the outcomes of two methods on the same episodes.

    Attributes:
        both: Episodes in which both succeed.
        only_first: Episodes in which only the first succeeds.
        only_second: Episodes in which only the second succeeds.
        neither: Episodes in which neither succeeds.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def episodes(self) -> int:
        """Number of pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the second minus that of the first."""
        return (self.only_second - self.only_first) / self.episodes

    def difference_ci95(self) -> tuple[float, float]:
        """Compute the 95 % interval of the difference: Newcombe's square-and-add for pairs (1998, method 10)."""
        n = self.episodes
        first, second = self.both + self.only_first, self.both + self.only_second
        low_1, high_1 = wilson(first, n)
        low_2, high_2 = wilson(second, n)
        p_1, p_2 = first / n, second / n
        correlation = self._correlation()
        below = math.sqrt(
            max(0.0, (p_2 - low_2) ** 2 - 2 * correlation * (p_2 - low_2) * (high_1 - p_1) + (high_1 - p_1) ** 2)
        )
        above = math.sqrt(
            max(0.0, (high_2 - p_2) ** 2 - 2 * correlation * (high_2 - p_2) * (p_1 - low_1) + (p_1 - low_1) ** 2)
        )
        return max(-1.0, self.difference - below), min(1.0, self.difference + above)

    def _correlation(self) -> float:
        a, b, c, d = self.both, self.only_first, self.only_second, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        if margins == 0:
            return 0.0
        product = float(a * d - b * c)
        if product > self.episodes / 2:
            product -= self.episodes / 2
        elif product >= 0:
            product = 0
        return product / math.sqrt(margins)

    def mcnemar_p(self) -> float:
        """Compute the p-value of the two-sided exact McNemar test, that the two succeed equally often."""
        changed = self.only_first + self.only_second
        return float(stats.binomtest(self.only_first, changed).pvalue) if changed else 1.0
