"""The policy protocol: all that evaluation, collection and control know of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dysl_vla.errors import CheckpointError
from dysl_vla.images import Place
from dysl_vla.registry import Registry
from dysl_vla.types import ActionChunk, EpisodeState, Observation, PolicySpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@runtime_checkable
class Policy(Protocol):
    """A policy: observations in, chunks of actions out, a batch at a time.

    It keeps nothing of an episode itself. The caller makes one `EpisodeState` an episode with `reset`, passes it to
    every `infer` of that episode and appends the actions to `state.executed` as it executes them.
    """

    @property
    def spec(self) -> PolicySpec:
        """What the policy expects of a world, and how it answers."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the policy was made; `data.origins` names the seeds that it was trained on. Empty when unknown."""

    @property
    def fingerprint(self) -> str:
        """Differs whenever the weights do, so that an evaluation is only continued with the policy that began it."""

    def reset(self) -> EpisodeState:
        """The state of an episode that begins."""

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch.

        Args:
            observations: One an episode.
            states: Their states, in the same order.

        Returns:
            One chunk an episode; a row's actions do not depend on its neighbours.

        Raises:
            ObservationError: An observation does not fit the spec.
        """


class BackbonePolicy(Policy, Protocol):
    """A policy in three parts, around a Hugging Face decoder: what layer skipping needs to know of it.

    `decode(backbone(**encode(observations)).last_hidden_state)` are its actions, normalised.
    """

    @property
    def backbone(self) -> nn.Module:
        """The decoder, with one list of layers; its forward answers `last_hidden_state`."""

    def encode(self, observations: Sequence[Observation]) -> dict[str, Tensor]:
        """What the backbone's forward gets: arguments by name, each with the batch first.

        Raises:
            ObservationError: An observation does not fit the spec.
        """

    def decode(self, hidden: Tensor) -> Tensor:
        """The backbone's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that the class of its type loads."""


class ExportablePolicy(BackbonePolicy, Protocol):
    """A policy that `dysl export` can take away from Python: its encoder is a function of tensors.

    `encode` must answer `{"inputs_embeds": embed(...)}` and otherwise only what the backbone would assume by itself.
    """

    @property
    def resizes(self) -> Mapping[str, tuple[int, int]]:
        """Camera name to the size, (height, width), that `dysl_vla.images.resized` gives its images; missing: none."""

    @property
    def crops(self) -> Mapping[str, Place]:
        """Camera name to the part of its resized image that `embed` gets: top, left, height, width, in pixels."""

    @property
    def text_tokens(self) -> int:
        """Tokens of an instruction: shorter ones are padded, longer ones cut."""

    def embed(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> Tensor:
        """Everything that the backbone reads.

        Args:
            images: Camera name to (batch, height, width, 3) uint8, resized and cropped.
            state: (batch, state) float32, in the world's units.
            token_ids: (batch, text) of the instruction.

        Returns:
            (batch, tokens, hidden).
        """

    def token_ids(self, instruction: str) -> list[int]:
        """An instruction's token ids, `text_tokens` of them."""


def is_known_as(policy: Policy, fingerprint: str) -> bool:
    """Whether a fingerprint is a policy's, as it is made now or as version 0.1 made it."""
    return fingerprint in (policy.fingerprint, getattr(policy, "former_fingerprint", None))


class PolicyClass(Protocol):
    """What a policy offers so that checkpoints of its type can be loaded."""

    @classmethod
    def from_pretrained(cls, name: str) -> Policy:
        """Load a checkpoint from a shipped name, a folder or a Hugging Face hub id."""


def check_fingerprint(policy: Policy, name: str, expected: str) -> None:
    """Refuse weights that changed since the run began: a worker loads its own copy.

    Raises:
        CheckpointError: Its fingerprint does not begin as expected.
    """
    if not policy.fingerprint.startswith(expected):
        raise CheckpointError(
            f"{name}: was changed while it is in use; run again with a checkpoint that stays as it is."
        )


policies: Registry[PolicyClass] = Registry("policy type", "dysl_vla.policies")
