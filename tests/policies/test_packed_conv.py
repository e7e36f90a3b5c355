from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dysl_vla.policies import packed_conv
from dysl_vla.policies.packed_conv import PackedConv2d, can_pack


def test_packed_convolutions_answer_as_plain_ones_whatever_changes() -> None:
    convolution = PackedConv2d(3, 8, 3, stride=2, padding=1)

    def agrees(images: torch.Tensor) -> None:
        with torch.no_grad():
            plain = convolution(images)
        with torch.inference_mode():
            torch.testing.assert_close(convolution(images), plain)
            torch.testing.assert_close(convolution(images, is_rectified=True), plain.relu())

    agrees(torch.randn(1, 3, 16, 16))
    agrees(torch.randn(5, 3, 16, 16))
    agrees(torch.randn(1, 3, 24, 12))
    with torch.no_grad():
        convolution.weight.mul_(-2)
    agrees(torch.randn(1, 3, 24, 12))
    convolution = copy.deepcopy(convolution)
    convolution.weight.data = convolution.weight.data * 3
    agrees(torch.randn(1, 3, 24, 12))
    convolution.load_state_dict({name: value + 1 for name, value in convolution.state_dict().items()})
    agrees(torch.randn(1, 3, 24, 12))


def test_this_machines_pytorch_packs() -> None:
    """Packing is what makes the encoder fast: a release of PyTorch that can no longer do it should be noticed."""
    assert can_pack() or not torch.backends.mkldnn.is_available()


def missing(*args: object) -> Tensor:
    raise AttributeError("no attribute '_convolution_pointwise'")


def with_other_arguments(*args: object) -> Tensor:
    raise TypeError("mkldnn_reorder_conv2d_weight(): takes 5 arguments")


def wrong(images: Tensor, *args: object) -> Tensor:
    return torch.zeros(len(images), 4, 3, 3)


@pytest.mark.parametrize(
    ("operator", "answer"),
    [("_convolve", missing), ("_pack", missing), ("_pack", with_other_arguments), ("_convolve", wrong)],
)
def test_without_the_private_operators_the_plain_convolution_computes_the_same(
    operator: str, answer: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    convolution, images = PackedConv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        packed, rectified = convolution(images), convolution(images, is_rectified=True)
    monkeypatch.setattr(packed_conv, operator, answer)
    can_pack.cache_clear()
    try:
        with torch.inference_mode():
            assert torch.equal(convolution(images), nn.Conv2d.forward(convolution, images))
            torch.testing.assert_close(convolution(images), packed)
            torch.testing.assert_close(convolution(images, is_rectified=True), rectified)
    finally:
        can_pack.cache_clear()
