"""Which episodes are kept away from training: one rule for training, calibrating, distilling, tuning and evaluating.

One episode in every `Split.every` is held out, so that a dataset that grows keeps what it held out. A policy's training
notes its rule in the provenance, and everything that is done with the policy afterwards follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dysl_vla.errors import ConfigError

EVERY = 20
"""By default one episode in this many is held out, in datasets with at least as many."""


@dataclass(frozen=True)
class Split:
    """The rule by which episodes are held out from training.

    Attributes:
        every: The last of every this many episodes is held out; 0: no episode is.
    """

    every: int

    def is_held_out(self, episode: int) -> bool:
        """Whether an episode is kept away from training."""
        return self.every > 0 and episode % self.every == self.every - 1

    def explain(self, episodes: int) -> str:
        """Why a dataset may have no episodes of one kind, for messages, given how many it has in all."""
        if not self.every:
            return f"there are {episodes} episodes, and none is held out; train with --held-out 0.1"
        return f"there are {episodes} episodes, and one in {self.every} is held out; record {self.every} or more"


def split_for(episodes: int, record: Any = None, share: float | None = None) -> Split:
    """The split of a dataset.

    Args:
        episodes: How many episodes the dataset has.
        record: Provenance of the policy that the dataset is used with, whose training may have decided the split.
        share: Share of episodes to hold out, from 0 to 0.5; None: as the policy's training did, else one in twenty, or
            two of fewer than twenty.

    Raises:
        ConfigError: The share is out of range.
    """
    if share is not None:
        if not 0 <= share <= 0.5:
            raise ConfigError(f"held_out must be from 0 to 0.5, got {share}.")
        return Split(round(1 / share) if share else 0)
    decided = _decided(record)
    if decided is not None:
        return Split(decided)
    return Split(EVERY if episodes >= EVERY else max(2, episodes // 2))


def _decided(record: Any) -> int | None:
    """The rule of a policy's last training; None when its provenance does not say."""
    if not record:
        return None
    every: int | None = record.get("data", {}).get("held_out_every")
    if every is None and record.get("method") == "behaviour cloning" and record.get("data"):
        return EVERY  # policies from before the rule was noted followed this one
    return every if every is not None else _decided(record.get("init"))
