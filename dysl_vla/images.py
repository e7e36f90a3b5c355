"""The part of a camera's image that a policy gets: the image is resized first, then cropped.

Training, evaluation, the torch-free runtime and the server share these functions, so that all of them get the same
pixels to the bit: Pillow's box filter works in whole numbers. Simulators do not need them, as they render any size.
"""

from __future__ import annotations

import numpy as np

from dysl_vla.extras import needs_extra
from dysl_vla.types import ImageArray

Place = tuple[int, int, int, int]
"""Part of an image: top, left, height, width, in pixels."""


def resized(image: ImageArray, size: tuple[int, int] | None) -> ImageArray:
    """Resize an image; each new pixel is the mean of those that it replaces.

    Args:
        image: uint8, (height, width, 3).
        size: Height and width; None for the image's own.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    if size is None or image.shape[:2] == tuple(size):
        return image
    with needs_extra("robot"):
        from PIL import Image
    height, width = size
    down, down_rest = divmod(image.shape[0], height)
    right, right_rest = divmod(image.shape[1], width)
    whole = Image.fromarray(image)
    if down_rest or right_rest:
        return np.array(whole.resize((width, height), Image.Resampling.BOX))
    return np.array(whole.reduce((right, down)))  # the same but for rounding, and three times as fast


def looked_at(image: ImageArray, size: tuple[int, int] | None, place: Place) -> ImageArray:
    """Resize and crop a camera's image to the part that a policy gets.

    Args:
        image: uint8, (height, width, 3), as the camera gives it.
        size: Size to which it is resized first; None for none.
        place: Part of the resized image.

    Returns:
        The part, uint8, (place's height, place's width, 3).
    """
    top, left, height, width = place
    return resized(image, size)[top : top + height, left : left + width]
