"""Demonstrations as a backbone reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.data.augment import SHIFT, Copies, shifted
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.training.encoding import encode


def test_shifted_copies_stand_behind_their_frame_and_are_the_same_every_time(
    tiny_policy: MiniVLA, mock_demos: Path
) -> None:
    demonstrations = Demonstrations(mock_demos)
    chosen = np.arange(3, 40, 2)
    plain = encode(tiny_policy, demonstrations, chosen, "frames")
    copied, again = (encode(tiny_policy, demonstrations, chosen, "frames", copies=Copies(2)) for _ in range(2))
    assert copied.indices.tolist() == np.repeat(chosen, 3).tolist()
    first, once, twice = (
        torch.stack([i["inputs_embeds"] for i in e.rows(np.arange(len(e)))]) for e in (plain, copied, again)
    )
    frames, copies = once[::3], once[1::3]
    np.testing.assert_allclose(frames, first, atol=1e-5)
    np.testing.assert_array_equal(once, twice)
    assert (abs(copies - frames).amax(dim=(1, 2)) > 1e-4).float().mean() > 0.9  # one in 81 stays where it was
    assert not np.array_equal(copies, once[2::3])


@given(seed=st.integers(0, 10_000), rows=st.integers(20, 30), columns=st.integers(20, 30))
def test_a_shift_moves_a_whole_image_and_nothing_else(seed: int, rows: int, columns: int) -> None:
    y, x = np.mgrid[:rows, :columns]
    image = np.stack([y, x, y + x], axis=2).astype(np.uint8)
    observation = {"observation.images.top": image, "observation.state": np.ones(2, np.float32), "task": "move"}
    moved = shifted(observation, {}, np.random.default_rng(seed))
    inside = (moved["observation.images.top"].astype(int) - image)[SHIFT:-SHIFT, SHIFT:-SHIFT].reshape(-1, 3)
    down, right = inside[0, :2]
    assert (inside == (down, right, down + right)).all()
    assert max(abs(down), abs(right)) <= SHIFT
    assert moved["observation.images.top"].shape == image.shape
    assert moved["task"] == "move"
    assert moved["observation.state"] is observation["observation.state"]
