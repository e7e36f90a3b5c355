"""Guided inference with PyTorch of any policy whose layers are attached, run by its own `act`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.guided_step import PassResult, Resumed
from dysl_vla.skip_controller.skipping import Skipper
from dysl_vla.skip_controller.step import ForcedExits, Step
from dysl_vla.types import EpisodeState, FloatArray

clock = time.perf_counter


def wait_for_gpu(value: Any) -> None:
    """Wait until the GPU of a value's tensors has done what it was given: times are to be those of the work."""
    device = _device(value)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(value: Any) -> torch.device | None:
    if isinstance(value, Tensor):
        return value.device
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for part in parts if (found := _device(part)) is not None), None)


class Forward:
    """What a policy's `act` may ask while it computes actions, and what it may report.

    Args:
        step: What the decoder does in the forwards; None: the full model runs.
        timed: Inputs, for whose device to wait before times are taken; None: times do not matter.
        needs_gradient: Whether the heads are being trained.
        is_lesson: Whether the full model's answer is what heads are trained on.

    Attributes:
        needs_gradient: Whether the heads are trained: then actions must be differentiable in the decoder's output.
        is_training: Whether actions are compared in training, the full model's with those of skips. A policy that takes
            many steps may then answer with what one of them leads to, the same for both.
    """

    def __init__(
        self,
        step: Step | ForcedExits | None = None,
        *,
        timed: Any = None,
        needs_gradient: bool = False,
        is_lesson: bool = False,
    ) -> None:
        self._step, self._timed = step, timed
        self._started = clock()
        self._decoded: float | None = None
        self.needs_gradient = needs_gradient
        self.is_training = needs_gradient or is_lesson

    def rows_that_ran(self, layer: int) -> NDArray[np.bool_] | None:
        """Return which rows of the batch ran a layer of the decoder in its first forward, (batch,); None: all did.

        A policy that reads keys and values of each layer itself needs it; a row that skipped did not write any.

        Raises:
            ConfigError: The decoder has not run yet.
        """
        step = self._step
        if step is None:
            return None
        if (isinstance(step, Step) and not step.is_decided) or (isinstance(step, ForcedExits) and step.is_first):
            raise ConfigError("forward.rows_that_ran: call it when the decoder has run, which it has not yet.")
        if isinstance(step, ForcedExits):  # all rows alike
            if step.layers_run[layer]:
                return None
            return np.zeros(len(next(iter(step.outputs.values()))), np.bool_)
        ran = step.layers_run[:, layer]
        return None if ran.all() else ran

    def decoder_is_done(self) -> None:
        """Report that the decoder has run: what follows is timed as decoding. Else all time counts as the LLM's."""
        wait_for_gpu(self._timed)
        self._decoded = clock()

    def times(self) -> tuple[float, float]:
        """Return the seconds of the decoder and those of decoding, when actions have been computed."""
        now = clock()
        decoded = now if self._decoded is None else self._decoded
        return decoded - self._started, now - decoded


Act = Callable[[Any, Forward], Tensor]
"""Maps a policy's inputs to its normalised actions, (batch, chunk, action)."""


class TorchBackend:
    """An attached policy, as a `guided_step.Backend`.

    Args:
        skipper: The skipper of the policy's layers.
        act: The policy's `act`.
        remember: The policy's `remember`.
        threshold: Controllers skip where their output is above it.
        force_skip: Whether rows skip at their allow points without asking a controller.
    """

    def __init__(
        self,
        skipper: Skipper,
        act: Act,
        remember: Callable[[Any, Mapping[int, EpisodeState]], None],
        *,
        threshold: float,
        force_skip: bool = False,
    ) -> None:
        self._skipper, self._act, self._remember = skipper, act, remember
        self._threshold, self._force_skip = threshold, force_skip

    def run(self, inputs: tuple[Any, Tensor | None], allow_points: NDArray[np.int64]) -> PassResult:
        """Run one pass that may skip; see `Backend`.

        Args:
            inputs: What the policy's `collate` returned: inputs, and the padding of the first forward.
            allow_points: (batch, blocks), see `Backend`.

        Raises:
            ConfigError: The policy's `act` did not run the decoder, or did so in another thread.
        """
        batch, mask = inputs
        with self._skipper.step(
            allow_points, threshold=self._threshold, mask=mask, force_skip=self._force_skip
        ) as step:
            forward = Forward(step, timed=batch)
            actions = to_numpy(self._act(batch, forward))
            llm_s, decode_s = forward.times()
        if not step.is_decided:
            raise ConfigError("act must run all layers of the policy's `layers`, in the thread that calls it.")
        return PassResult(
            actions,
            step.targets,
            step.outputs,
            step.layers_run,
            llm_s,
            decode_s,
            step.controllers_s,
            step.adapters_s,
            step,
        )

    def resume(self, inputs: tuple[Any, Tensor | None], passed: PassResult) -> Resumed:
        """Compute the full model's actions; see `Backend`."""
        with self._skipper.verify(passed.handle):
            forward = Forward(timed=inputs[0])
            actions = to_numpy(self._act(inputs[0], forward))
            return Resumed(actions, *forward.times())

    def remember(self, inputs: tuple[Any, Tensor | None], states: Mapping[int, EpisodeState]) -> None:
        """Let the policy keep what the next inference needs; see `Backend`."""
        if states:
            self._remember(inputs[0], states)


def to_numpy(values: Tensor) -> FloatArray:
    """Convert values of any float type and device to float32 on the CPU."""
    array: FloatArray = values.detach().float().cpu().numpy()
    return array
