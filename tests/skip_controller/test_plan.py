from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import SkipPlan

DEPTHS = st.integers(2, 40)
PLANS = DEPTHS.flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1, max_size=n).map(tuple))
)


@given(PLANS)
def test_blocks_and_static_layers_share_the_layers_without_overlap(case: tuple[int, tuple[int, ...]]) -> None:
    depth, static = case
    try:
        plan = SkipPlan(num_layers=depth, static_layers=static)
    except ConfigError:
        assert set(static) == set(range(len(static)))  # nothing before a static layer can be skipped
        return
    assert set(plan.dynamic_layers).isdisjoint(plan.static_layers)
    assert all(block.target in plan.static_layers and block.length > 0 for block in plan.blocks)
    tail = set(range(max(static) + 1, depth))
    assert set(plan.dynamic_layers) | set(static) | tail == set(range(depth))


@pytest.mark.parametrize(
    ("depth", "static", "field"),
    [(4, (4,), "static_layers"), (4, (-1,), "static_layers"), (4, (1, 1), "static_layers"), (0, (), "num_layers")],
)
def test_a_plan_that_cannot_work_is_refused(depth: int, static: tuple[int, ...], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must"):
        SkipPlan(num_layers=depth, static_layers=static)
