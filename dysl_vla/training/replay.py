"""Demonstrations replayed to a policy as if it had acted: what it would skip, and how far it is from the full model.

The full model's actions at the moments before count as executed: what guidance compares them with, the last chunk's
plan, is a model's too, and demonstrated actions differ from both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import choose_frames, evenly, observations, split_of
from dysl_vla.data.split import Split
from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy
from dysl_vla.training.encoding import encode
from dysl_vla.types import FloatArray, SkipTrace, gripper_columns

with needs_extra("policy"):
    import torch

    from dysl_vla.policies.dysl import DyslPolicy
    from dysl_vla.skip_controller.guidance import WINDOW, SkipGuidance, Thresholds
    from dysl_vla.skip_controller.operating import SkipStatistics
    from dysl_vla.skip_controller.skipping import Skipper
    from dysl_vla.skip_controller.torch_backend import Forward, TorchBackend, to_numpy
    from dysl_vla.training.encoded import BATCH

EPISODES = 60
"""Largest number of held-out episodes that are replayed."""
TIMED = 100
"""Number of observations whose encoding is timed."""


@dataclass(frozen=True)
class Replayed:
    """What a policy did at the replayed moments.

    Attributes:
        traces: What skipping did at each moment.
        errors: Mean distance of the executed actions from the full model's, normalised, (moments,).
        llm_s: Seconds of the backbone, with all that skipping adds to it, (moments,).
        rest_s: Seconds of decoding and guidance, (moments,).
    """

    traces: list[SkipTrace]
    errors: FloatArray
    llm_s: FloatArray
    rest_s: FloatArray

    @classmethod
    def joined(cls, parts: Sequence[Replayed]) -> Replayed:
        """Join several parts, in order."""
        return cls(
            [trace for part in parts for trace in part.traces],
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("errors", "llm_s", "rest_s")),
        )

    @property
    def mean_layers(self) -> float:
        """Return the mean number of layers that an inference runs, verification included."""
        return float(np.mean([trace.layers for trace in self.traces]))


class Replay:
    """Held-out demonstrations, encoded at each moment at which the policy would infer.

    Args:
        policy: The policy, without skipping.
        demonstrations: Demonstrations of an embodiment that it fits.
        stream: See `encoding.encode`; then one episode at a time is in memory.

    Attributes:
        encode_s: Mean seconds of encoding one observation.

    Raises:
        DatasetError: No episode is held out.
    """

    def __init__(self, policy: SkippablePolicy, demonstrations: Demonstrations, *, stream: bool | None = None) -> None:
        self._policy = policy
        split = split_of(demonstrations, policy.provenance)
        held_out = [row for row in demonstrations.rows if split.is_held_out(row.number)]
        rows = [held_out[index] for index in evenly(len(held_out), EPISODES)]
        if not rows:
            raise DatasetError(f"{demonstrations.root}: {split.explain(len(demonstrations.rows))}.")
        step = policy.spec.execute_steps
        self._episodes = [np.arange(row.start, row.start + row.length, step) for row in rows]
        self.encode_s = _encoding_time(policy, demonstrations, split)
        moments = np.concatenate(self._episodes)
        self._encoded = encode(policy, demonstrations, moments, "held-out episodes", stream=stream)
        self._answers = np.concatenate(
            [to_numpy(policy.act(policy.collate(items)[0], Forward())) for _, items in self._encoded.batches()]
        )
        self._read: tuple[int, list[Any]] = (-1, [])  # the episode that was asked for last, and its items

    def statistics(self, skipper: Skipper, lookahead: int, importance: str) -> SkipStatistics:
        """Measure controllers' outputs and an importance measure, while everything that may be skipped is skipped."""
        spec = self._policy.spec
        plan = skipper.plan
        guide = SkipGuidance(
            [block.length for block in plan.blocks],
            len(spec.action_names),
            Thresholds(1, 1),
            lookahead=lookahead,
            importance=importance,
            grippers=gripper_columns(spec.action_names),
        )
        backend = TorchBackend(skipper, self._policy.act, self._policy.remember, threshold=-1.0)
        points = np.zeros((1, len(plan.blocks)), np.int64)
        outputs: list[float] = []
        drops: list[float] = []
        surprises: list[float] = []
        row = 0
        with torch.inference_mode(), tqdm(total=len(self._encoded), desc="measuring", unit="inference") as bar:
            for episode in range(len(self)):
                state = guide.reset()
                for before, item in enumerate(self._items(episode)):
                    guide.observe(state, self._executed(row, before))
                    passed = backend.run(self._policy.collate([item]), points)
                    predicted = spec.action_normalisation.as_executed(passed.actions[0])
                    outputs.extend(passed.outputs[0].values())
                    if state.change is not None and state.change < 0:
                        drops.append(-state.change)
                    surprise = guide.predicted_drop(state, predicted, spec.execute_steps)
                    if surprise is not None:
                        surprises.append(surprise)
                    guide.update_and_check(state, predicted, spec.execute_steps)
                    row += 1
                    bar.update()
        return SkipStatistics.measured(outputs, drops, surprises)

    def _executed(self, row: int, before: int) -> FloatArray:
        """Return the latest actions that count as executed, normalised, at a moment with `before` others before it."""
        steps = self._policy.spec.execute_steps
        known = min(before, math.ceil((WINDOW + 1) / steps))
        taken: FloatArray = self._answers[row - known : row, :steps]
        return taken.reshape(-1, taken.shape[-1])

    def play(self, policy: DyslPolicy) -> Replayed:
        """Let a policy predict at each moment, with the full model's actions as those executed."""
        return Replayed.joined([self.play_episode(policy, episode) for episode in range(len(self._episodes))])

    def play_episode(self, policy: DyslPolicy, episode: int) -> Replayed:
        """Do as `play` does in one of the `len(replay)` episodes."""
        traces: list[SkipTrace] = []
        errors, llm, rest = [], [], []
        first = self._first_row(episode)
        state = policy.reset()
        steps = policy.spec.execute_steps
        for before, item in enumerate(self._items(episode)):
            row = first + before
            state.executed.clear()
            state.executed.extend(policy.spec.action_normalisation.undo(self._executed(row, before)))
            [chunk] = policy.infer_encoded([item], [state])
            assert chunk.skips is not None
            predicted = policy.spec.action_normalisation.apply(chunk.actions[:steps])
            answer = policy.spec.action_normalisation.as_executed(self._answers[row][:steps])
            errors.append(np.abs(predicted - answer).mean())
            traces.append(chunk.skips)
            llm.append(chunk.timing.llm_s)
            rest.append(chunk.timing.decode_s + chunk.timing.guidance_s)
        return Replayed(traces, *(np.array(values, np.float32) for values in (errors, llm, rest)))

    def __len__(self) -> int:
        return len(self._episodes)

    def _first_row(self, episode: int) -> int:
        return sum(map(len, self._episodes[:episode]))

    def _items(self, episode: int) -> list[Any]:
        if self._read[0] != episode:
            self._read = (-1, [])  # frees the memory of the one before
            first = self._first_row(episode)
            rows = np.arange(first, first + len(self._episodes[episode]))
            self._read = (
                episode,
                [item for part in np.split(rows, range(BATCH, len(rows), BATCH)) for item in self._encoded.rows(part)],
            )
        return self._read[1]


def _encoding_time(policy: SkippablePolicy, demonstrations: Demonstrations, split: Split) -> float:
    """Measure the mean seconds of encoding one observation."""
    times = []
    first = choose_frames(demonstrations, TIMED, split, held_out=True)[:TIMED]
    with torch.inference_mode():
        for _, observation in observations(demonstrations, first):
            started = time.perf_counter()
            policy.encode([observation], [policy.reset()])
            times.append(time.perf_counter() - started)
    return float(np.mean(times))
