"""The table of architectures in CONTRIBUTING: each test function is a column, each architecture of `tiny_models` a row.

A cell is "works" or "refused"; refused means that one ConfigError says why before anything wrong is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import attach
from tests.skip_controller.tiny_models import (
    ARCHITECTURES,
    COLUMNS,
    SPECIAL,
    Architecture,
    decode_without_cache,
    inputs_of,
    jumps_of,
    layers_removed,
    make,
    make_heads,
    row_of,
)

NEW_TOKENS = 5
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def column(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a column: it must hold for each architecture, or be refused where the table says so."""

    def decorate(test: Callable[[Architecture], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
        @torch.inference_mode()
        def run(architecture: Architecture) -> None:
            reason = (architecture.refused or {}).get(name)
            if reason is None:
                test(architecture)
            else:
                with pytest.raises(ConfigError, match=reason):
                    test(architecture)

        return run

    return decorate


def points_of(architecture: Architecture, rows: int) -> list[list[int]]:
    """Return allow points with which rows skip different layers: the last block, all blocks, none, the first block."""
    last = len(architecture.plan.blocks) - 1
    one, none = [99] * last + [0], [99] * (last + 1)
    return [one, [0] * (last + 1), none, [0] + [99] * last][:rows]


@contextmanager
def forced(skipper: Any, points: list[list[int]], mask: Tensor | None = None) -> Iterator[Any]:
    with skipper.step(np.array(points), mask=mask, force_skip=True) as step:
        yield step


def generate(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    tokens: Tensor = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=SPECIAL)
    return tokens[:, -NEW_TOKENS:]


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors of a cache's layer."""
    if isinstance(value, dict):
        value = list(value.values())
    parts = value if isinstance(value, list) else []
    return [value] if isinstance(value, Tensor) else [one for part in parts for one in tensors(part)]


def assert_close(architecture: Architecture, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=architecture.tolerance, atol=architecture.tolerance)


@column("bit-identical")
def test_where_nothing_is_skipped_no_bit_changes(architecture: Architecture) -> None:
    model, inputs = make(architecture), inputs_of(architecture, 3, is_padded=True)
    before = [model(**inputs, use_cache=cached).logits for cached in (False, True)]
    tokens = generate(model, inputs)
    skipper = attach(model, architecture.plan, make_heads(architecture))
    never = np.full((3, len(architecture.plan.blocks)), 99)
    for cached in (False, True):
        assert torch.equal(model(**inputs, use_cache=cached).logits, before[cached])
        with skipper.step(never):
            assert torch.equal(model(**inputs, use_cache=cached).logits, before[cached])
    assert torch.equal(generate(model, inputs), tokens)
    skipper.detach()
    assert torch.equal(model(**inputs, use_cache=False).logits, before[0])


@column("skips")
def test_a_skip_is_the_model_without_those_layers(architecture: Architecture) -> None:
    model, heads, inputs = make(architecture), make_heads(architecture), inputs_of(architecture, 1)
    full, reference = model(**inputs).logits, make(architecture)
    skipper = attach(model, architecture.plan, heads)
    for points in points_of(architecture, 4):
        with layers_removed(reference, heads, jumps_of(architecture.plan, points)):
            expected = reference(**inputs).logits
        with forced(skipper, [points]):
            assert_close(architecture, model(**inputs).logits, expected)
        assert torch.equal(expected, full) == all(point == 99 for point in points)


@column("cache")
def test_the_cache_holds_what_ran_and_nothing_else(architecture: Architecture) -> None:
    model, heads, inputs = make(architecture), make_heads(architecture), inputs_of(architecture, 1)
    reference, skipper = make(architecture), attach(model, architecture.plan, heads)
    for points in points_of(architecture, 2):
        jumps = jumps_of(architecture.plan, points)
        skipped = {layer for place, target in jumps.items() for layer in range(place, target)}
        with layers_removed(reference, heads, jumps):
            expected = reference(**inputs, use_cache=True).past_key_values
        with forced(skipper, [points]):
            cache = model(**inputs, use_cache=True).past_key_values
        for index, (one, other) in enumerate(zip(cache.layers, expected.layers, strict=True)):
            for actual, wanted in zip(tensors(one.__dict__), tensors(other.__dict__), strict=True):
                assert_close(architecture, actual, wanted)
            states = (getattr(one, "keys", None), *tensors(getattr(one, "conv_states", {})))
            assert index not in skipped or all(state is None or not state.numel() for state in states)


@column("generate")
def test_generating_in_a_step_is_recomputing_the_whole_sequence_with_the_same_skips(architecture: Architecture) -> None:
    model, heads, inputs = make(architecture), make_heads(architecture), inputs_of(architecture, 2)
    reference, skipper = make(architecture), attach(model, architecture.plan, heads)
    points = points_of(architecture, 2)
    with forced(skipper, points):
        actual = generate(model, inputs)
    for row, one in enumerate(points):
        with layers_removed(reference, heads, jumps_of(architecture.plan, one)):
            expected = decode_without_cache(reference, row_of(architecture, inputs, row), NEW_TOKENS)
        assert actual[row].tolist() == expected[0, -NEW_TOKENS:].tolist()


@column("verify")
def test_verification_is_the_full_model_with_its_cache_and_all_that_follows(architecture: Architecture) -> None:
    model, inputs = make(architecture), inputs_of(architecture, 2)
    full, tokens = model(**inputs, use_cache=True), generate(model, inputs)
    skipper = attach(model, architecture.plan, make_heads(architecture))
    points = [[99] * (len(architecture.plan.blocks) - 1) + [0]] * 2  # the last block: there is something to keep
    with forced(skipper, points) as step:
        model(**inputs, use_cache=True)
    with skipper.verify(step):
        verified = model(**inputs, use_cache=True)
    assert torch.equal(verified.logits, full.logits)
    for one, other in zip(verified.past_key_values.layers, full.past_key_values.layers, strict=True):
        assert all(map(torch.equal, tensors(one.__dict__), tensors(other.__dict__)))
        assert {k: v for k, v in one.__dict__.items() if isinstance(v, int)} == {
            k: v for k, v in other.__dict__.items() if isinstance(v, int)
        }
    if "generate" not in (architecture.refused or {}):
        with forced(skipper, points) as step:
            generate(model, inputs)  # the step's cache has grown when it is verified
        with skipper.verify(step):
            assert torch.equal(generate(model, inputs), tokens)


@column("left padding")
def test_a_padded_row_is_what_it_is_alone_and_bare(architecture: Architecture) -> None:
    model, inputs = make(architecture), inputs_of(architecture, 3, is_padded=True)
    skipper = attach(model, architecture.plan, make_heads(architecture))
    points = points_of(architecture, 2)[::-1] + points_of(architecture, 2)[:1]
    with forced(skipper, points, inputs["attention_mask"]):
        together = model(**inputs).logits
    for row, one in enumerate(points):
        with forced(skipper, [one]):
            alone = model(**row_of(architecture, inputs, row, bare=True)).logits
        assert_close(architecture, together[row, row % 3 :], alone[0])


@column("batch rows")
def test_rows_that_skip_different_layers_do_not_see_each_other(architecture: Architecture) -> None:
    model, heads, inputs = make(architecture), make_heads(architecture), inputs_of(architecture, 4)
    skipper, reference, points = attach(model, architecture.plan, heads), make(architecture), points_of(architecture, 4)
    with forced(skipper, points) as step:
        together = model(**inputs).logits
    assert len({tuple(row) for row in step.layers_run.tolist()}) > 1
    for row, one in enumerate(points):
        with layers_removed(reference, heads, jumps_of(architecture.plan, one)):
            assert_close(architecture, together[row], reference(**row_of(architecture, inputs, row)).logits[0])


def table() -> str:
    """Return the table that CONTRIBUTING shows."""
    head = ["architecture", *COLUMNS]
    rows = [[one.name, *map(one.cell, COLUMNS)] for one in ARCHITECTURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def test_contributing_shows_these_cells() -> None:
    assert table() in CONTRIBUTING.read_text()
