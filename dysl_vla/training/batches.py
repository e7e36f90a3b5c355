"""The batches of a distillation, each with the full model's answer: computed once where it can be kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy

with needs_extra("policy"):
    import torch

    from dysl_vla.processes import Processes
    from dysl_vla.skip_controller.baselines import BaselineTrainer
    from dysl_vla.skip_controller.heads_trainer import Batch, FullModelAnswer, HeadsTrainer
    from dysl_vla.training.encoded import Encoded, StreamedFrames
    from dysl_vla.training.encoding import memory_to_keep, tensor_bytes

Step = tuple[Batch, FullModelAnswer | None, np.random.Generator]
"""What `HeadsTrainer.update` takes."""


class Batches:
    """The batches of a trainer's steps, or this process's share of them.

    Args:
        policy: The policy.
        trainer: The trainer, whose step decides the batch.
        frames: The frames to draw from.
        size: Number of frames of a batch, over all processes.
        processes: The processes that share each batch.
        reserve: Bytes that are left free for training when answers are kept.
    """

    def __init__(
        self,
        policy: SkippablePolicy,
        trainer: HeadsTrainer | BaselineTrainer,
        frames: Encoded,
        size: int,
        processes: Processes,
        *,
        reserve: int = 0,
    ) -> None:
        self._policy, self._trainer, self._frames = policy, trainer, frames
        self._size, self._processes, self._reserve = size, processes, reserve
        self._drawn: deque[tuple[np.random.Generator, NDArray[np.int64]]] = deque()

    def until(self, last: int) -> Generator[Step]:
        """Yield what each step from the coming one to before `last` takes; the trainer does the step in between."""
        answers: FullModelAnswer | None = None
        are_asked = False  # whether the full model's answers to all frames have been computed
        trainer = self._trainer
        with closing(self._frames.ahead(self._rows(last))) as batches:
            for items in batches:
                rng, rows = self._drawn.popleft()
                batch = self._policy.collate(items)
                answer: FullModelAnswer | None = None
                if not trainer.is_first_stage:
                    if not are_asked:
                        answers, are_asked = self._answers(), True
                    answer = trainer.answer(batch) if answers is None else _rows(answers, rows)
                yield batch, answer, rng

    def _rows(self, last: int) -> Iterator[NDArray[np.int64]]:
        """Draw the rows of each step, which may be some steps ahead."""
        for step in range(self._trainer.step, last):
            rng = self._trainer.rng(step)
            rows = self._processes.share(np.sort(rng.integers(0, len(self._frames), self._size)))
            self._drawn.append((rng, rows))
            yield rows

    def _answers(self) -> FullModelAnswer | None:
        """Compute the full model's answer to every frame once.

        Returns:
            The answers; None where each batch has to be asked: frames are streamed, the answers do not fit into memory,
            or batches are padded, each in its own way.
        """
        if isinstance(self._frames, StreamedFrames):
            return None
        everything: FullModelAnswer | None = None
        count, processes = len(self._frames), self._processes
        with tqdm(total=count, desc="asking the full model", unit="frame", disable=not processes.is_main) as progress:
            for rows, items in self._frames.batches():
                batch = self._policy.collate(items)
                if batch[1] is not None and not batch[1].all():
                    return None
                answer = self._trainer.answer(batch)
                parts = [answer.actions, *answer.targets]
                if everything is None:
                    needed = count * tensor_bytes([part[0] for part in parts])
                    if needed > memory_to_keep(parts, self._reserve, processes):
                        return None
                    actions, *targets = [part.new_empty((count, *part.shape[1:])) for part in parts]
                    everything = FullModelAnswer(actions, targets)
                pairs = zip(everything.targets, answer.targets, strict=True)
                if any(kept.shape[1:] != part.shape[1:] for kept, part in pairs):
                    return None
                for kept, part in zip([everything.actions, *everything.targets], parts, strict=True):
                    kept[rows] = part
                progress.update(rows.stop - rows.start)
        return everything


def _rows(answer: FullModelAnswer, rows: NDArray[np.int64]) -> FullModelAnswer:
    chosen = torch.from_numpy(rows)
    return FullModelAnswer(answer.actions[chosen], [target[chosen] for target in answer.targets])
