"""Images as flow policies get them: resized without distortion, padded with black, from -1 to 1."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def padded(images: Tensor, height: int, width: int, *, is_centred: bool) -> Tensor:
    """Resize images bilinearly into a frame, and fill the rest with black.

    Args:
        images: (images, 3, height, width), from 0 to 1.
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
        is_centred: Whether the picture is in the middle of the frame, as in openpi; else it is at the lower right, as
            in SmolVLA.

    Returns:
        (images, 3, height, width), from -1 to 1.
    """
    ratio = max(images.shape[3] / width, images.shape[2] / height)
    if ratio != 1:
        size = int(images.shape[2] / ratio), int(images.shape[3] / ratio)
        images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False).clamp(0, 1)
    above, left = height - images.shape[2], width - images.shape[3]
    top, start = (above // 2, left // 2) if is_centred else (above, left)
    return 2 * functional.pad(images, (start, left - start, top, above - top)) - 1
