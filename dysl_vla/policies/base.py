"""The policy protocol: all that evaluation, collection and control know of a policy, and what skipping adds to it."""

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

    from dysl_vla.skip_controller.torch_backend import Forward


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


class SkippablePolicy(Policy, Protocol):
    """A policy whose decoder's layers can be skipped: its inference in four steps, so that one of them can be repeated.

    `infer` does the same: encode each observation, collate the batch, act and remember. Skipping calls `act` again
    where the full model must predict again. `policies.backbone.BackbonePolicy` does most of it for a policy whose
    action comes from one forward of a Hugging Face decoder.
    """

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, by whose running `act` is made faster."""

    @property
    def width(self) -> int:
        """Width of the decoder's hidden states."""

    @property
    def followers(self) -> Sequence[nn.ModuleList]:
        """Layers of other decoders, of the same depth and run after it, which skip what the decoder skips."""

    @property
    def has_memory(self) -> bool:
        """Whether an inference depends on those before it, by way of `remember`."""

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[Any]:
        """Everything before the decoder: one item an episode, which `collate` understands. It remembers nothing.

        Raises:
            ObservationError: An observation does not fit the spec.
        """

    def collate(self, items: Sequence[Any]) -> tuple[Any, Tensor | None]:
        """A batch of items as `act` takes it.

        Returns:
            The inputs, and which tokens of the decoder's first forward are no padding, (batch, tokens); None: all.
        """

    def act(self, inputs: Any, forward: Forward) -> Tensor:
        """Run the decoder, as often as it takes, and decode its answer. It is pure: the same inputs, the same answer.

        Args:
            inputs: Of `collate`. What `remember` needs may be left in them.
            forward: Says what ran, and whether the answer must be differentiable.

        Returns:
            Normalised actions, (batch, chunk, action).
        """

    def remember(self, inputs: Any, states: Mapping[int, EpisodeState]) -> None:
        """Keep what the next inference needs, in the states of the rows whose actions are final.

        Args:
            inputs: Of the `act` that computed the actions.
            states: Row of the batch to the state of its episode.
        """

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that the class of its type loads."""


class ExportablePolicy(SkippablePolicy, Protocol):
    """A policy that `dysl export` can take away from Python: one forward, and an encoder that is a function of tensors.

    What `encode` and `collate` make of observations must be what `inputs` makes of the same, resized and cropped.
    """

    @property
    def backbone(self) -> nn.Module:
        """The decoder; its forward answers `last_hidden_state`."""

    @property
    def resizes(self) -> Mapping[str, tuple[int, int]]:
        """Camera name to the size, (height, width), that `dysl_vla.images.resized` gives its images; missing: none."""

    @property
    def crops(self) -> Mapping[str, Place]:
        """Camera name to the part of its resized image that `inputs` gets: top, left, height, width, in pixels."""

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of instructions, with its padding and truncation."""

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """The decoder's arguments, `inputs_embeds` among them; others may be left out that it would assume by itself.

        Args:
            images: Camera name to (batch, height, width, 3) uint8, resized and cropped.
            state: (batch, state) float32, in the world's units.
            token_ids: (batch, text) of the instruction.
        """

    def decode(self, hidden: Tensor) -> Tensor:
        """The decoder's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""

    def token_ids(self, instruction: str) -> list[int]:
        """An instruction's token ids, of one length for all instructions."""


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
