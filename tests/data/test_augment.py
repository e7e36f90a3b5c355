from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.augment import AS_IT_IS, Copies, varied

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


@given(st.integers(0, 2**32 - 1))
def test_what_is_varied_is_an_image_and_the_same_every_time(seed: int) -> None:
    one, again = (varied(IMAGE, np.random.default_rng(seed)) for _ in range(2))
    assert one.dtype == np.uint8
    assert one.shape == IMAGE.shape
    np.testing.assert_array_equal(one, again)


def test_some_images_stay_as_they_are_and_the_others_are_lighter_and_darker() -> None:
    rng = np.random.default_rng(0)
    images = [varied(IMAGE, rng) for _ in range(2000)]
    same = np.mean([np.array_equal(image, IMAGE) for image in images])
    assert abs(same - AS_IT_IS) < 0.04
    light = np.array([image.mean() / IMAGE.mean() for image in images])
    assert (light < 0.6).mean() > 0.1
    assert (light > 1.3).mean() > 0.1


def test_cameras_of_a_copy_vary_by_themselves_and_all_else_stays() -> None:
    seen = {
        "observation.images.a": IMAGE,
        "observation.images.b": IMAGE,
        "observation.state": np.ones(2, np.float32),
        "task": "lift it",
    }
    copy = Copies(3, is_varied=True).copy(seen, {}, index=7, number=2)
    assert not np.array_equal(copy["observation.images.a"], copy["observation.images.b"])
    assert copy["observation.state"] is seen["observation.state"]
    assert copy["task"] == "lift it"
    other = Copies(3, is_varied=True).copy(seen, {}, index=7, number=1)
    assert not np.array_equal(copy["observation.images.a"], other["observation.images.a"])
