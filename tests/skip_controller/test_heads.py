from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan
from dysl_vla.skip_controller.heads import Controller, default_adapter_size, pool
from dysl_vla.skip_controller.layer_similarity import choose_static_layers


@given(
    layers=st.integers(3, 96),
    width=st.integers(9, 128).map(lambda heads: 128 * heads),
    widening=st.floats(1, 4),
    static=st.floats(0.01, 0.5),
    shares_keys=st.booleans(),
    controller_size=st.sampled_from([1, 8, 16]),
)
@settings(max_examples=200, deadline=None)
def test_heads_at_all_dynamic_layers_have_a_hundredth_of_a_wide_backbones_weights(
    *, layers: int, width: int, widening: float, static: float, shares_keys: bool, controller_size: int
) -> None:
    attention = 2 * width**2 + 2 * width * (128 if shares_keys else width)
    backbone = layers * (attention + 3 * width * int(widening * width))
    plan = SkipPlan(layers, choose_static_layers(np.ones(layers), static))
    size = default_adapter_size(width, backbone, len(plan.dynamic_layers), controller_size)
    with torch.device("meta"):
        heads = SkipHeads(plan, HeadsConfig(width, size, controller_size))
    assert sum(p.numel() for p in heads.parameters()) <= 0.012 * backbone
    assert size >= 8


def test_adapters_beside_a_narrow_backbone_have_one_width() -> None:
    assert [default_adapter_size(width, 10**6, 20) for width in (32, 128, 1024)] == [32, 88, 88]


def test_an_untrained_adapter_is_the_identity() -> None:
    heads = SkipHeads(SkipPlan(4, (0, 3)), HeadsConfig(8))
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(heads.adapters["1"](hidden), hidden)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_a_controller(side: str) -> None:
    torch.manual_seed(0)
    controller = Controller(HeadsConfig(8))
    hidden = torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.long)
    padding = slice(0, 2) if side == "left" else slice(3, 5)
    mask[1, padding] = 0
    tokens = hidden[1:, 2:] if side == "left" else hidden[1:, :3]
    torch.testing.assert_close(controller(hidden, mask)[1:], controller(tokens))
    torch.testing.assert_close(controller(hidden, mask)[:1], controller(hidden[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_controllers_read_the_last_token_and_the_mean(dtype: torch.dtype, is_masked: bool) -> None:
    hidden = torch.randn(2, 7, 8).to(dtype)
    with torch.inference_mode():
        pooled = pool(hidden, torch.ones(2, 7) if is_masked else None)
    wanted = torch.cat([hidden[:, -1].float(), hidden.float().mean(dim=1)], dim=1)
    torch.testing.assert_close(pooled.float(), wanted, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)
    hidden.requires_grad_()
    pool(hidden, None).sum().backward()  # what inference made and kept can be trained through
    assert hidden.grad is not None
