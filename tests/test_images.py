from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.images import looked_at, resized

IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(8, 40), st.integers(8, 40), st.just(3)))


@given(IMAGES, st.integers(1, 8), st.integers(1, 8))
def test_a_whole_factor_is_the_mean_of_the_pixels(image: Any, down: int, right: int) -> None:
    """To within the rounding of half a grey value in each direction."""
    height, width = image.shape[0] // down, image.shape[1] // right
    image = image[: height * down, : width * right]
    means = image.reshape(height, down, width, right, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resized(image, (height, width)) - means).max() <= 1.0


@given(IMAGES)
def test_an_image_of_the_right_size_is_the_very_same(image: Any) -> None:
    assert resized(image, None) is image
    assert resized(image, image.shape[:2]) is image


@given(IMAGES, st.integers(4, 8), st.integers(4, 8), st.data())
def test_crops_lie_in_the_resized_image(image: Any, height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    place = (top, left, height - top, width - left)
    view = looked_at(image, (height, width), place)
    np.testing.assert_array_equal(view, resized(image, (height, width))[top:, left:])
    assert view.dtype == np.uint8


def test_a_camera_at_real_resolution_is_resized_in_both_directions_alike() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (480, 640, 3), np.uint8)
    small = resized(image, (96, 128))
    assert small.shape == (96, 128, 3)
    turned = resized(np.ascontiguousarray(image.swapaxes(0, 1)), (128, 96)).swapaxes(0, 1)
    assert np.abs(turned.astype(int) - small).max() <= 1
