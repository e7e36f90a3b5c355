from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.eval.statistics import PairedSuccess, wilson

COUNTS = st.integers(0, 60)
PAIRS = st.tuples(COUNTS, COUNTS, COUNTS, COUNTS).filter(any)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_rate_and_stays_in_bounds(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_wilsons_interval_has_its_published_value() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_paired_interval_has_its_published_value() -> None:
    pairs = PairedSuccess(both=36, only_first=12, only_second=2, neither=0)
    low, high = pairs.difference_ci95()
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=2e-4)  # Newcombe 1998 (paired), method 10


@given(PAIRS)
def test_the_paired_interval_holds_the_difference(counts: tuple[int, int, int, int]) -> None:
    pairs = PairedSuccess(*counts)
    low, high = pairs.difference_ci95()
    assert -1 <= low <= pairs.difference + 1e-12
    assert pairs.difference - 1e-12 <= high <= 1


@given(PAIRS)
def test_exchanging_the_methods_mirrors_everything(counts: tuple[int, int, int, int]) -> None:
    a, b, c, d = counts
    one, other = PairedSuccess(a, b, c, d), PairedSuccess(a, c, b, d)
    assert one.difference == -other.difference
    assert one.difference_ci95() == pytest.approx(tuple(-x for x in reversed(other.difference_ci95())))
    assert one.mcnemar_p() == pytest.approx(other.mcnemar_p())


@given(PAIRS)
def test_mcnemar_looks_at_changes_alone(counts: tuple[int, int, int, int]) -> None:
    pairs = PairedSuccess(*counts)
    assert 0 < pairs.mcnemar_p() <= 1
    assert pairs.mcnemar_p() == PairedSuccess(0, counts[1], counts[2], 1).mcnemar_p()


def test_mcnemar_is_exact() -> None:
    assert PairedSuccess(10, 0, 5, 3).mcnemar_p() == pytest.approx(2 * 0.5**5)
    assert PairedSuccess(10, 0, 0, 3).mcnemar_p() == 1


def test_the_paired_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.80, 0.06, 0.03, 0.11])
    samples = rng.multinomial(100, truth, size=1500)
    hits = 0
    for sample in samples:
        low, high = PairedSuccess(*map(int, sample)).difference_ci95()
        hits += low <= truth[2] - truth[1] <= high
    assert 0.93 <= hits / len(samples) <= 0.985
