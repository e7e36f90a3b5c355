"""Which episodes are kept away from training: one rule for training, calibrating, distilling, tuning and evaluating.

One episode in every `Split.every` is held out, so that a dataset that grows keeps what it held out. A policy's training
notes its rule in the provenance, and everything that is done with the policy afterwards follows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dysl_vla.errors import ConfigError

EVERY = 20
"""By default one episode in this many is held out, where that makes two or more."""

NEAR = 0.06
"""How far the share that is held out may be from the one that was asked for, as a part of that."""


@dataclass(frozen=True)
class Split:
    """The rule by which episodes are held out from training.

    Attributes:
        every: The last of every this many episodes is held out; 0: no episode is.
    """

    every: int

    def is_held_out(self, episode: int) -> bool:
        """Whether an episode is kept away from training.

        Args:
            episode: The episode's number, `EpisodeRow.number`, which stays when others are removed from the dataset.
        """
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
            two of fewer than forty.

    Raises:
        ConfigError: The share is out of range, or one episode in a whole number is far from it.
    """
    if share is not None:
        if not 0 <= share <= 0.5:
            raise ConfigError(f"held_out must be from 0 to 0.5, got {share}.")
        every = round(1 / share) if share else 0
        if abs(every * share - 1) > NEAR and share:
            below, above = math.ceil(1 / share), math.floor(1 / share)
            raise ConfigError(
                f"held_out must be near 1/n, because one episode in n is held out, got {share:g}; give {1 / below:.3g} "
                f"or {1 / above:.3g}."
            )
        return Split(every)
    decided = _decided(record)
    if decided is not None:
        return Split(decided)
    return Split(min(EVERY, max(2, episodes // 2)))


def trained_episodes(record: Any) -> int | None:
    """How many episodes a policy's last training had; None when its provenance does not say."""
    if not record:
        return None
    count: int | None = record.get("data", {}).get("episodes")
    return count if count is not None else trained_episodes(record.get("init"))


def _decided(record: Any) -> int | None:
    """The rule of a policy's last training; None when its provenance does not say."""
    if not record:
        return None
    every: int | None = record.get("data", {}).get("held_out_every")
    if every is None and record.get("method") == "behaviour cloning" and record.get("data"):
        return EVERY  # policies from before the rule was noted followed this one
    return every if every is not None else _decided(record.get("init"))
