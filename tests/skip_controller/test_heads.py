from __future__ import annotations

import pytest
import torch

from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan
from dysl_vla.skip_controller.heads import Controller, _pool, default_adapter_size


@pytest.mark.parametrize(("layers", "width"), [(24, 2048), (32, 4096), (18, 1536), (80, 8192)])
def test_heads_are_small_beside_a_wide_backbone(layers: int, width: int) -> None:
    backbone = layers * (4 * width**2 + 3 * width * (width * 11 // 4))
    plan = SkipPlan(layers, (0, layers // 2, layers - 1))
    size = default_adapter_size(width, backbone, len(plan.dynamic_layers))
    with torch.device("meta"):
        heads = SkipHeads(plan, HeadsConfig(width, size))
    for part in (heads.adapters, heads.controllers):
        assert sum(p.numel() for p in part.parameters()) <= 0.015 * backbone


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
        pooled = _pool(hidden, torch.ones(2, 7) if is_masked else None)
    wanted = torch.cat([hidden[:, -1].float(), hidden.float().mean(dim=1)], dim=1)
    torch.testing.assert_close(pooled.float(), wanted, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)
    hidden.requires_grad_()
    _pool(hidden, None).sum().backward()  # what inference made and kept can be trained through
    assert hidden.grad is not None
