"""A bundle's graphs, run by ONNX Runtime for a batch of one, as `guided_step.Backend`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.denoising import BEFORE, HOLD, LEFTS, NOISE, SEEN, STATE, denoise
from dysl_vla.errors import CheckpointError
from dysl_vla.extras import needs_extra
from dysl_vla.skip_controller.guided_step import PassResult, Resumed
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.types import EpisodeState, FloatArray

with needs_extra("robot"):
    import onnxruntime

ENCODER, BACKBONE, EXPERT = "encoder.onnx", "backbone.onnx", "expert.onnx"
EMBEDS = "inputs_embeds"
PASSING = ("allow_points", "threshold", "resume_from")
"""What a graph with conditions gets beside the policy's inputs; see `ConditionalDecoder`."""
DECIDED = ("asked", "log_odds", "lefts", "first_hidden")
"""What it returns behind its answer."""
NOISY, TIME, VELOCITY = "noisy", "time", "velocity"
"""What a denoising step's graph gets beside the prefix, and what it returns."""


class OnnxBackend:
    """The backbone's graph.

    Args:
        session: The graph.
        plan: What may be skipped.
        is_pruned: Whether it is the shortest path alone.

    Attributes:
        threshold: Log-odds of a controller above which a block is left.
    """

    def __init__(self, session: onnxruntime.InferenceSession, plan: SkipPlan, *, is_pruned: bool = False) -> None:
        self.threshold = math.inf
        self._is_pruned = is_pruned
        self._session, self._depth = session, plan.num_layers
        self._target_of = {e: block.target for block in plan.blocks for e in plan.exits_of(block)}
        self._all_layers = np.array([block.length for block in plan.blocks], np.int64)
        self._from_start = np.array(0, np.int64)
        self._first_exits = np.array([layer in plan.first_exits for layer in self._target_of])

    def run(self, inputs: Mapping[str, NDArray[Any]], allow_points: NDArray[np.int64]) -> PassResult:
        """Run one pass that may skip; the graph's inputs and outputs are those of `ConditionalDecoder`."""
        started = time.perf_counter()
        actions, *decided, first = self._answers(inputs, allow_points[0], self._from_start)
        llm_s = time.perf_counter() - started  # the action head is part of the graph
        return self._passed(actions, decided, llm_s, first)

    def _passed(self, actions: FloatArray, decided: Sequence[NDArray[Any]], llm_s: float, handle: Any) -> PassResult:
        """Return a pass's result.

        Args:
            actions: Normalised actions, (1, chunk, action).
            decided: For each exit whether its controller was asked, its log-odds, and whether the block was left there.
            llm_s: Seconds that it took.
            handle: What resuming needs.
        """
        asked, logits, lefts = decided
        exits = list(zip(self._target_of.items(), asked.tolist(), logits, lefts.tolist(), strict=True))
        targets = {layer: target for (layer, target), _, _, is_left in exits if is_left}
        layers_run = np.ones((1, self._depth), np.bool_)
        for layer, target in targets.items():
            layers_run[0, layer:target] = False
        outputs = {layer: _probability(logit) for (layer, _), is_asked, logit, _ in exits if is_asked}
        return PassResult(actions, [targets], [outputs], layers_run, llm_s, handle=handle)

    def resume(self, inputs: Mapping[str, NDArray[Any]], passed: PassResult) -> Resumed:
        """Compute the full model's actions, from the input of the first layer that was skipped."""
        started = time.perf_counter()
        first_skip = np.array(passed.first_skip, np.int64)
        answers = self._answers({**inputs, EMBEDS: passed.handle}, self._all_layers, first_skip)
        return Resumed(answers[0], time.perf_counter() - started)

    def remember(self, inputs: Mapping[str, NDArray[Any]], states: Mapping[int, EpisodeState]) -> None:
        """Keep nothing: a policy with memory is not exported."""

    def _answers(
        self, inputs: Mapping[str, NDArray[Any]], points: NDArray[np.int64], resume_from: NDArray[np.int64]
    ) -> list[NDArray[Any]]:
        if self._is_pruned:  # its graph decides nothing
            [actions] = self._session.run(None, dict(inputs))
            return [actions, np.zeros_like(self._first_exits), self._first_exits, self._first_exits, actions]
        passing = points, np.array(self.threshold, np.float32), resume_from
        answers: list[NDArray[Any]] = self._session.run(None, {**inputs, **dict(zip(PASSING, passing, strict=True))})
        return answers


@dataclass(frozen=True)
class _Read:
    """What reading a prefix left behind.

    Attributes:
        pairs: The expert's keys and values of each layer in turn, as ONNX Runtime holds them.
        first: The decoder's hidden state where it was left first, (1, tokens, hidden).
    """

    pairs: list[Any]
    first: NDArray[Any]


class FlowBackend(OnnxBackend):
    """The graphs of a flow policy: its decoder reads the prefix, then its expert denoises step by step.

    Keys and values stay with ONNX Runtime, so that no step copies them.

    Args:
        session: The decoder's graph.
        expert: The graph of one denoising step.
        plan: What may be skipped.
        steps: Number of steps.
        actions: Dimensions of an action; further ones are padding.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        expert: onnxruntime.InferenceSession,
        plan: SkipPlan,
        *,
        steps: int,
        actions: int,
    ) -> None:
        super().__init__(session, plan)
        self._expert, self._steps, self._actions = expert, steps, actions
        self._names = [node.name for node in session.get_outputs()]
        self._taken, self._expert_takes = ({node.name for node in one.get_inputs()} for one in (session, expert))

    def run(self, inputs: Mapping[str, NDArray[Any]], allow_points: NDArray[np.int64]) -> PassResult:
        """Run one pass that may skip; the graphs are those of `ConditionalPrefix` and `ConditionalVelocity`."""
        started = time.perf_counter()
        pairs, decided, first = self._read(inputs, allow_points[0], self._from_start)
        actions = self._denoised(inputs, pairs, decided[2])
        return self._passed(actions, decided, time.perf_counter() - started, _Read(pairs, first))

    def resume(self, inputs: Mapping[str, NDArray[Any]], passed: PassResult) -> Resumed:
        """Compute the full model's actions; the prefix goes on from the first layer that was skipped."""
        started = time.perf_counter()
        kept, first_skip = passed.handle, passed.first_skip
        assert isinstance(kept, _Read)
        assert first_skip is not None
        resumed = {**inputs, EMBEDS: kept.first}
        pairs, decided, _ = self._read(resumed, self._all_layers, np.array(first_skip, np.int64))
        pairs[: 2 * first_skip] = kept.pairs[: 2 * first_skip]
        actions = self._denoised(inputs, pairs, np.zeros_like(decided[2]))
        return Resumed(actions, time.perf_counter() - started)

    def _read(
        self, inputs: Mapping[str, NDArray[Any]], points: NDArray[np.int64], resume_from: NDArray[np.int64]
    ) -> tuple[list[Any], list[NDArray[Any]], NDArray[Any]]:
        """Read the prefix, and return keys and values, what was decided, and the hidden state at the first skip."""
        passing = points, np.array(self.threshold, np.float32), resume_from
        given: dict[str, NDArray[Any]] = {**inputs, **dict(zip(PASSING, passing, strict=True))}
        feeds = {name: _value(value) for name, value in given.items() if name in self._taken}
        answers = self._session.run_with_ort_values(self._names, feeds)
        pairs, others = answers[: -len(DECIDED)], answers[-len(DECIDED) :]
        *decided, first = (answer.numpy() for answer in others)
        return pairs, decided, first

    def _denoised(self, inputs: Mapping[str, NDArray[Any]], pairs: list[Any], lefts: NDArray[Any]) -> FloatArray:
        """Integrate from noise to normalised actions, (1, chunk, action)."""
        kept = {SEEN: _value(inputs[SEEN]), STATE: _value(inputs[STATE]), LEFTS: _value(lefts)}
        kept |= dict(zip(self._names, pairs, strict=False))
        kept = {name: value for name, value in kept.items() if name in self._expert_takes}

        def velocity(noisy: FloatArray, when: float) -> FloatArray:
            now = {NOISY: _value(noisy[None]), TIME: _value(np.array([when], np.float32))}
            [answer] = self._expert.run_with_ort_values([VELOCITY], kept | now)
            return np.asarray(answer.numpy()[0])

        actions = denoise(inputs[NOISE], inputs[BEFORE], inputs[HOLD], self._steps, velocity)
        return actions[None, :, : self._actions]


def open_backend(
    folder: Path, plan: SkipPlan, *, actions: int, denoising_steps: int = 0, is_pruned: bool = False, threads: int = 1
) -> OnnxBackend:
    """Open the graphs of a bundle that run its layers.

    Args:
        folder: The bundle.
        plan: What may be skipped.
        actions: Dimensions of an action.
        denoising_steps: Denoising steps of a flow policy; 0: it is none.
        is_pruned: Whether the bundle has the shortest path alone.
        threads: Threads of ONNX Runtime for one operation.

    Raises:
        CheckpointError: ONNX Runtime refuses a graph.
    """
    backbone = open_graph(folder / BACKBONE, threads)
    if not denoising_steps:
        return OnnxBackend(backbone, plan, is_pruned=is_pruned)
    return FlowBackend(backbone, open_graph(folder / EXPERT, threads), plan, steps=denoising_steps, actions=actions)


def open_graph(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Open a graph.

    Raises:
        CheckpointError: ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no other base
        raise CheckpointError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} refuses this file ({error}); export it again."
        ) from error


def _value(array: NDArray[Any]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))


def _probability(logit: float) -> float:
    return 1 / (1 + math.exp(-float(np.clip(logit, -50, 50))))
