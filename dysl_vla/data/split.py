"""Which episodes are kept away from training: one rule for training, calibrating, distilling, tuning and evaluating.

Every so-many-th episode is held out, so that a dataset that grows keeps what it held out. A policy's training notes its
rule in the provenance, and everything that is done with the policy afterwards follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dysl_vla.errors import ConfigError

EVERY = 20
"""One episode in so many is held out, where there are as many and nothing else is asked for."""


@dataclass(frozen=True)
class Split:
    """Episodes for training, and those that are held out.

    Attributes:
        every: The last of every so many episodes is held out; 0: none is.
    """

    every: int

    def is_held_out(self, episode: int) -> bool:
        """Whether an episode is kept away from training."""
        return self.every > 0 and episode % self.every == self.every - 1

    def explain(self, episodes: int) -> str:
        """Why a dataset of so many episodes may have too few of one kind, for messages."""
        if not self.every:
            return f"there are {episodes} episodes, and none is held out; train with --held-out 0.1"
        return f"there are {episodes} episodes, and one in {self.every} is held out; record {self.every} or more"


def split_for(episodes: int, record: Any = None, share: float | None = None) -> Split:
    """The split of a dataset.

    Args:
        episodes: How many there are.
        record: Provenance of the policy that the dataset is used with, whose training may have decided it.
        share: Of episodes to hold out, from 0 to 0.5; None: as the policy's training did, else one in twenty, or two of
            fewer than twenty.

    Raises:
        ConfigError: A share out of range.
    """
    if share is not None:
        if not 0 <= share <= 0.5:
            raise ConfigError(f"held_out: {share} must be from 0 to 0.5.")
        return Split(round(1 / share) if share else 0)
    decided = _decided(record)
    if decided is not None:
        return Split(decided)
    return Split(EVERY if episodes >= EVERY else max(2, episodes // 2))


def _decided(record: Any) -> int | None:
    """What a policy's last training held out; None: it does not say."""
    if not record:
        return None
    every: int | None = record.get("data", {}).get("held_out_every")
    if every is None and record.get("method") == "behaviour cloning" and record.get("data"):
        return EVERY  # of before the rule was noted, when there was no other
    return every if every is not None else _decided(record.get("init"))
