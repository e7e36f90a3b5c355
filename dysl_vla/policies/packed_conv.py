"""Convolutions for inference on a CPU that keep their weights in oneDNN's layout between calls.

PyTorch reorders a convolution's weights at every call, which for one small image costs as much as the convolution. The
operators that avoid it are private to PyTorch; where they are missing, or differ from what is known here, the plain
convolution computes the same. This module knows no policy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Geometry = tuple[Any, Any, Any, int]
"""Padding, stride, dilation and groups of a convolution."""


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps its weights, for inference on a CPU, as oneDNN wants them for the size of its input.

    It packs only float32 weights, in inference mode; everywhere else it is an `nn.Conv2d`.
    """

    _packed: tuple[object, Tensor] | None = None

    def forward(self, images: Tensor, *, is_rectified: bool = False) -> Tensor:
        """Convolve images.

        Args:
            images: (batch, channels, height, width).
            is_rectified: Whether negative results become 0, in the same pass over memory where weights are packed.

        Returns:
            (batch, channels, height, width).
        """
        weight = self.weight
        is_packable = torch.is_inference_mode_enabled() and images.device.type == "cpu" and not weight.is_inference()
        if not (is_packable and images.dtype == weight.dtype == torch.float32 and can_pack()):
            plain = super().forward(images)
            return plain.relu_() if is_rectified else plain
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed_for = (weight.data_ptr(), weight._version, images.shape[1:])
        if self._packed is None or self._packed[0] != packed_for:
            self._packed = packed_for, _pack(weight, images, geometry)
        return _convolve(images, self._packed[1], self.bias, geometry, is_rectified)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_packed"
        }  # a packed tensor cannot be copied


class RectifiedConvolutions(nn.Sequential):
    """Convolutions with a ReLU behind each, computed in the same pass over memory where that is possible.

    The `nn.ReLU` modules show what is computed, and keep the weights' names; they are never called.
    """

    def __init__(self, *convolutions: PackedConv2d) -> None:
        super().__init__(*(module for convolution in convolutions for module in (convolution, nn.ReLU())))

    def forward(self, images: Tensor) -> Tensor:
        """Map images, (batch, channels, height, width), to features of the same layout."""
        for convolution in list(self)[::2]:
            images = convolution(images, is_rectified=True)
        return images


@lru_cache(maxsize=1)
def can_pack() -> bool:
    """Tell whether PyTorch's private operators exist and agree with the plain convolution; tried once in a process."""
    images, weight, bias = (
        torch.linspace(-1, 1, count).reshape(shape)
        for count, shape in ((2 * 3 * 36, (2, 3, 6, 6)), (4 * 3 * 9, (4, 3, 3, 3)), (4, (4,)))
    )
    geometry: Geometry = ((1, 1), (2, 2), (1, 1), 1)
    expected = nn.functional.conv2d(images, weight, bias, stride=2, padding=1)
    try:
        packed = _pack(weight, images, geometry)
        for is_rectified, plain in ((False, expected), (True, expected.relu())):
            found = _convolve(images, packed, bias, geometry, is_rectified)
            if not torch.allclose(found, plain, rtol=1e-4, atol=1e-5):
                return False
    except (AttributeError, RuntimeError, TypeError):  # they are missing, or take other arguments
        return False
    return True


def _pack(weight: Tensor, images: Tensor, geometry: Geometry) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's shape
    packed: Tensor = reorder(weight.to_mkldnn(), *geometry, [1, *images.shape[1:]])
    return packed


def _convolve(images: Tensor, packed: Tensor, bias: Tensor | None, geometry: Geometry, is_rectified: bool) -> Tensor:
    after = "relu" if is_rectified else "none"
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(images, packed, bias, *geometry, after, [], "")
    return output
