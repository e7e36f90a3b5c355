"""How a flow policy denoises, without PyTorch: the noise, the part of the running chunk that it keeps, and the steps.

Policies in PyTorch and bundles on a controller take all of it from here, so that they denoise the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from dysl_vla.types import STATE_KEY, EpisodeState, FloatArray, Observation, PolicySpec

NOISE, BEFORE, HOLD = "noise", "before", "hold"
"""Parts of an inference's inputs: the noise, (chunk, action), the chunk before, from now on, of the same shape, and how
far each of its actions is held to, from 0 to 1, (chunk,)."""
STATE, SEEN, LEFTS = "state", "seen", "lefts"
"""What the expert's graph reads beside keys and values: the normalised and padded state, which of the prefix's tokens
are not padding, and whether the prefix left a block at each exit."""
Array = TypeVar("Array", bound=Any)
"""An array of NumPy's, or a tensor."""


def noise_generator(observation: Observation, state: EpisodeState) -> np.random.Generator:
    """Return what draws an inference's noise: a function of the arm's state and of how far the episode is."""
    seen = np.asarray(observation[STATE_KEY], np.float32)
    return np.random.default_rng([len(state.executed), zlib.crc32(seen.tobytes())])


def draw_noise(rng: np.random.Generator, spec: PolicySpec, width: int) -> FloatArray:
    """Draw an inference's noise, (chunk, width)."""
    return rng.standard_normal((spec.chunk_length, width), np.float32)


def held_chunk(state: EpisodeState, spec: PolicySpec, width: int) -> tuple[FloatArray, FloatArray]:
    """Return the running chunk from now on, normalised, (chunk, width), and how far it is held to, (chunk,).

    Actions that will have been sent are held to wholly, those behind them less and less, up to the part that is new
    (real-time chunking, Black et al. 2025, arXiv 2506.07339, equation 5).
    """
    before = np.zeros((spec.chunk_length, width), np.float32)
    hold = np.zeros(spec.chunk_length, np.float32)
    if state.leftover is None:
        return before, hold
    known = spec.action_normalisation.apply(np.asarray(state.leftover, np.float32))[: spec.chunk_length]
    count, sent = len(known), min(state.sent_before, len(known))
    before[:count, : known.shape[1]] = known
    share = (count - np.arange(sent, count)) / (count - sent + 1)
    hold[:sent] = 1
    hold[sent:count] = share * np.expm1(share) / math.expm1(1)
    return before, hold


def beginning(observation: Observation, state: EpisodeState, spec: PolicySpec, width: int) -> dict[str, FloatArray]:
    """Return the noise and what `held_chunk` does, by name: what an inference of a bundle begins from."""
    before, hold = held_chunk(state, spec, width)
    return {NOISE: draw_noise(noise_generator(observation, state), spec, width), BEFORE: before, HOLD: hold}


def denoise(noise: Array, before: Array, hold: Array, steps: int, velocity: Callable[[Array, float], Array]) -> Array:
    """Integrate a velocity from noise, at time 1, to actions, at time 0, by Euler's method.

    After each step, actions that are held to are moved to the way from the noise to them; all steps together move them
    as far as is asked.

    Args:
        noise: (..., chunk, width), an array of NumPy's or a tensor, as are the others.
        before: The chunk that is held to, (..., chunk, width).
        hold: How far each of its actions is held to, from 0 to 1, (..., chunk).
        steps: Number of steps.
        velocity: Predicts the velocity of noisy actions at a time.

    Returns:
        Normalised actions, (..., chunk, width).
    """
    noisy = noise
    pull = 1 - (1 - hold[..., None]) ** (1 / steps)
    for step in range(steps):
        noisy = noisy - velocity(noisy, 1 - step / steps) / steps
        time = 1 - (step + 1) / steps
        noisy = noisy + pull * (time * noise + (1 - time) * before - noisy)
    return noisy
