"""One guided inference: observe what was executed, run with skips, check what came out, verify where it is surprising.

It needs only NumPy. What runs the layers is a `Backend`: PyTorch (`torch_backend`) in training and evaluation, ONNX
Runtime (`deploy.onnx_backend`) on a robot. A batch is a list of episodes, each with a state of its own; a row's actions
do not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dysl_vla.skip_controller.guidance import WINDOW, GuidanceState, SkipGuidance
from dysl_vla.skip_controller.operating import Ablation
from dysl_vla.types import (
    ActionChunk,
    EpisodeState,
    FloatArray,
    InferenceTiming,
    PolicySpec,
    SkipTrace,
)

clock = time.perf_counter
VERIFY_TIME_DECAY = 0.95
"""Factor by which the largest time of a verification is forgotten, at each one that is asked for."""


@dataclass(frozen=True)
class PassResult:
    """The result of one pass over a batch.

    Attributes:
        actions: (batch, chunk, action), normalised.
        targets: For each row, the layers that skips jumped to: {layer skipped at: target}.
        outputs: For each row, the controllers' outputs by layer.
        layers_run: Which layers ran, (batch, layers).
        llm_s: Seconds of the decoder, adapters and controllers included.
        decode_s: Seconds from the decoder's output to actions.
        controllers_s: Seconds of `llm_s` in controllers.
        adapters_s: Seconds of `llm_s` in adapters.
        handle: What the backend needs to resume.
    """

    actions: FloatArray
    targets: Sequence[Mapping[int, int]]
    outputs: Sequence[Mapping[int, float]]
    layers_run: NDArray[np.bool_]
    llm_s: float
    decode_s: float = 0.0
    controllers_s: float = 0.0
    adapters_s: float = 0.0
    handle: Any = None

    @property
    def first_skip(self) -> int | None:
        """Return the first layer at which any row skipped; None when none did."""
        return min((layer for row in self.targets for layer in row), default=None)


@dataclass(frozen=True)
class Resumed:
    """The full model's actions for a batch that had skipped.

    Attributes:
        actions: (batch, chunk, action), normalised.
        llm_s: Seconds of the layers that ran.
        decode_s: Seconds from the decoder's output to actions.
    """

    actions: FloatArray
    llm_s: float
    decode_s: float = 0.0


class Backend(Protocol):
    """What runs a policy's layers."""

    def run(self, inputs: Any, allow_points: NDArray[np.int64]) -> PassResult:
        """Run one pass that may skip.

        Args:
            inputs: The policy's inputs for a batch.
            allow_points: (batch, blocks), the number of dynamic layers of each block that must run before skipping is
                allowed.
        """

    def resume(self, inputs: Any, passed: PassResult) -> Resumed:
        """Compute the full model's actions for the same inputs, from the first layer at which any row skipped."""

    def remember(self, inputs: Any, states: Mapping[int, EpisodeState]) -> None:
        """Let the policy keep what the next inference needs, of rows whose actions are final.

        Args:
            inputs: The inputs as they were run last.
            states: Maps a row to the state of its episode.
        """


class VerificationBudget:
    """Decides whether there is time to verify, which is expected to take as long as the slowest verification lately."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def affords(self, state: EpisodeState) -> bool:
        """Tell whether a verification can still end in time."""
        return state.has_time(self._seconds)

    def took(self, seconds: float) -> None:
        """Record that a verification was run, and how long it took."""
        self._seconds = max(seconds, VERIFY_TIME_DECAY * self._seconds)

    def was_refused(self) -> None:
        """Record that no verification could be run: one that was slow by chance must not forbid all that follow."""
        self._seconds *= VERIFY_TIME_DECAY


class GuidedStep:
    """Guided inference of one policy; it holds no episode.

    Args:
        spec: The policy's specification.
        guidance: What moves the allow points.
        block_lengths: Number of dynamic layers of each block.
        ablation: The parts of the method that are on; None: all.
        budget: Budget of the time for verification; None: a new one.
    """

    def __init__(
        self,
        spec: PolicySpec,
        guidance: SkipGuidance,
        block_lengths: Sequence[int],
        ablation: Ablation | None = None,
        budget: VerificationBudget | None = None,
    ) -> None:
        self._spec = spec
        self._guidance = guidance
        self._no_layer = np.zeros(len(block_lengths), np.int64)
        self._ablation = ablation or Ablation()
        self._budget = budget or VerificationBudget()

    def infer(
        self,
        backend: Backend,
        inputs: Any,
        states: Sequence[EpisodeState],
        *,
        encode_s: float = 0.0,
        allow_points: NDArray[np.int64] | None = None,
    ) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch.

        Args:
            backend: What runs the layers.
            inputs: The inputs that the backend takes.
            states: The episodes' states, whose `guidance` comes from `SkipGuidance.reset`.
            encode_s: Seconds that making the inputs took, for the record.
            allow_points: (batch, blocks), used in place of the guidance's.

        Raises:
            TypeError: A state was made by another policy.
        """
        started = clock()
        # Take in what was executed, and move the allow points.
        memories = [self._memory(state) for state in states]
        for memory, state in zip(memories, states, strict=True):
            self._guidance.observe(memory, latest_executed(state, self._spec))
        if allow_points is None:
            allow_points = np.stack([self._points(memory) for memory in memories])
        # Run, skipping as far as the controllers and allow points let it.
        passed = backend.run(inputs, allow_points)
        # Check which rows' actions are surprising, and for which of them there is time to verify.
        wanted = [
            self._check(memory, row) and bool(targets) and self._ablation.verification
            for memory, row, targets in zip(memories, passed.actions, passed.targets, strict=True)
        ]
        verified = [ask and self._budget.affords(state) for ask, state in zip(wanted, states, strict=True)]
        if any(wanted) and not any(verified):
            self._budget.was_refused()
        backend.remember(inputs, {row: states[row] for row, is_verified in enumerate(verified) if not is_verified})
        # Verify: the full model goes on from the first skip, and guidance sees what will be executed.
        exact = Resumed(passed.actions, 0.0)
        if any(verified):
            exact = self._verify(backend.resume(inputs, passed), passed, memories, verified)
            backend.remember(inputs, {row: states[row] for row, is_verified in enumerate(verified) if is_verified})
        # Account for time and layers.
        world = self._spec.action_normalisation.undo(exact.actions)
        llm_s, decode_s = passed.llm_s + exact.llm_s, passed.decode_s + exact.decode_s
        timing = InferenceTiming(encode_s, llm_s, decode_s, guidance_s=clock() - started - llm_s - decode_s)
        traces = _traces(passed, exact, allow_points, memories, zip(wanted, verified, strict=True))
        return [ActionChunk(row, timing, trace) for row, trace in zip(world, traces, strict=True)]

    def _verify(
        self, full: Resumed, passed: PassResult, memories: Sequence[GuidanceState], verified: Sequence[bool]
    ) -> Resumed:
        """Return what is executed of every row: the full model's actions where they were verified."""
        self._budget.took(full.llm_s + full.decode_s)
        actions = np.where(np.array(verified)[:, None, None], full.actions, passed.actions)
        for memory, row, is_verified in zip(memories, actions, verified, strict=True):
            if is_verified:
                self._check(memory, row)
        return replace(full, actions=actions)

    def _check(self, memory: GuidanceState, actions: FloatArray) -> bool:
        """Tell whether predicted actions are surprising; guidance remembers them."""
        executed = self._spec.action_normalisation.as_executed(actions)
        return self._guidance.update_and_check(memory, executed, self._spec.execute_steps)

    def _points(self, memory: GuidanceState) -> NDArray[np.int64]:
        """Return the allow points of an episode, (blocks,)."""
        return memory.allow_points if self._ablation.guidance else self._no_layer

    def _memory(self, state: EpisodeState) -> GuidanceState:
        """Return what guidance remembers of an episode."""
        memory = state.guidance
        if not isinstance(memory, GuidanceState) or memory.allow_points.shape != self._no_layer.shape:
            raise TypeError("states must be made by this policy's reset().")
        return memory


def latest_executed(state: EpisodeState, spec: PolicySpec) -> FloatArray:
    """Return the executed actions that guidance looks back on, normalised, (at most WINDOW + 1, action)."""
    actions = list(state.executed)[-WINDOW - 1 :]
    nothing = np.empty((0, len(spec.action_names)), np.float32)
    return spec.action_normalisation.apply(np.array(actions, np.float32) if actions else nothing)


def _traces(
    passed: PassResult,
    exact: Resumed,
    allow_points: NDArray[np.int64],
    memories: Sequence[GuidanceState],
    verification: Iterable[tuple[bool, bool]],
) -> Iterator[SkipTrace]:
    """Yield what skipping did in each row; `verification` holds whether it was wanted, and whether it was done."""
    for row, (memory, (is_wanted, is_verified)) in enumerate(zip(memories, verification, strict=True)):
        yield SkipTrace(
            layers_run=passed.layers_run[row],
            skips=passed.targets[row],
            outputs=passed.outputs[row],
            allow_points=tuple(allow_points[row].tolist()),
            continuity=memory.continuity,
            is_verified=is_verified,
            is_verification_late=is_wanted and not is_verified,
            resumed_from=passed.first_skip if is_verified else None,
            controllers_s=passed.controllers_s,
            adapters_s=passed.adapters_s,
            verify_s=exact.llm_s,
        )
