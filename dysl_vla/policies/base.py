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
    """A policy, which maps a batch of observations to chunks of actions.

    It keeps nothing of an episode itself. The caller makes one `EpisodeState` for each episode with `reset`, passes it
    to every `infer` of that episode and appends the actions to `state.executed` as it executes them.
    """

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return how the policy was made; `data.origins` names the seeds that it was trained on. It may be empty."""

    @property
    def fingerprint(self) -> str:
        """Return a digest of all that decides actions, so that only the policy that began a run continues it."""

    def reset(self) -> EpisodeState:
        """Return the state of an episode that begins."""

    def infer(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[ActionChunk]:
        """Predict a chunk for each episode of a batch.

        Args:
            observations: One observation for each episode.
            states: The episodes' states, in the same order.

        Returns:
            One chunk for each episode; a row's actions do not depend on its neighbours.

        Raises:
            ObservationError: An observation does not fit the spec.
        """


class SkippablePolicy(Policy, Protocol):
    """A policy whose decoder's layers can be skipped: its inference in four steps, so that one of them can be repeated.

    `infer` takes the same steps: encode each observation, collate the batch, act and remember. Skipping calls `act`
    again where the full model must predict again. `policies.backbone.BackbonePolicy` does most of this for a policy
    whose action comes from one forward of a Hugging Face decoder.
    """

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder's layers, which `act` runs and skipping leaves out."""

    @property
    def width(self) -> int:
        """Return the width of the decoder's hidden states."""

    @property
    def followers(self) -> Sequence[nn.ModuleList]:
        """Return layers of other decoders, of the same depth and run after it, which skip what the decoder skips."""

    @property
    def has_memory(self) -> bool:
        """Tell whether an inference depends on those before it, by way of `remember`."""

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[Any]:
        """Compute everything before the decoder: one item for each episode, for `collate`. It remembers nothing.

        Raises:
            ObservationError: An observation does not fit the spec.
        """

    def collate(self, items: Sequence[Any]) -> tuple[Any, Tensor | None]:
        """Combine items into a batch as `act` takes it.

        Returns:
            The inputs, and which tokens of the decoder's first forward are not padding, (batch, tokens); None: all.
        """

    def act(self, inputs: Any, forward: Forward) -> Tensor:
        """Run the decoder, as often as it takes, and decode its output. The same inputs give the same actions.

        Args:
            inputs: What `collate` returned. What `remember` needs may be left in them.
            forward: What tells which layers ran, and whether actions must be differentiable.

        Returns:
            Normalised actions, (batch, chunk, action).
        """

    def remember(self, inputs: Any, states: Mapping[int, EpisodeState]) -> None:
        """Keep what the next inference needs, in the states of the rows whose actions are final.

        Args:
            inputs: The inputs of the `act` that computed the actions.
            states: Row of the batch to the state of its episode.
        """

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that the class of its type loads."""


class ExportablePolicy(SkippablePolicy, Protocol):
    """A policy that `dysl export` can export: an encoder that is a function of tensors, then one forward.

    A `FlowPolicy` is exported, too: in place of `decode`, its expert denoises.

    `encode` and `collate` must compute the same from observations as `inputs` does from them, resized and cropped.
    """

    @property
    def backbone(self) -> nn.Module:
        """Return the decoder; its forward returns `last_hidden_state`."""

    @property
    def resizes(self) -> Mapping[str, tuple[int, int]]:
        """Return a camera's image size, (height, width), for `dysl_vla.images.resized`; others are not resized."""

    @property
    def crops(self) -> Mapping[str, Place]:
        """Return the part of a camera's resized image that `inputs` gets: top, left, height, width, in pixels."""

    @property
    def tokenizer(self) -> Any:
        """Return the `tokenizers.Tokenizer` of instructions, with its padding and truncation."""

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """Compute the decoder's arguments, `inputs_embeds` among them; those with its own defaults may be left out.

        Args:
            images: Camera name to (batch, height, width, 3) uint8, resized and cropped.
            state: (batch, state) float32, in the embodiment's units.
            token_ids: The instruction's token ids, (batch, text).
        """

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the decoder's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action)."""

    def token_ids(self, instruction: str) -> list[int]:
        """Return an instruction's token ids, of one length for all instructions."""


def original_fingerprint(policy: Policy) -> str:
    """Return the fingerprint of a policy's checkpoint, also where the policy was brought to other numbers since."""
    known_as: tuple[str, ...] = getattr(policy, "known_as", ())
    return known_as[0] if known_as else policy.fingerprint


def names_of(policy: Policy) -> tuple[str, ...]:
    """Return the fingerprints that heads may name: the policy's own, that of version 0.1, and those before a cast."""
    former = getattr(policy, "former_fingerprint", None)
    return (policy.fingerprint, *([former] if former else []), *getattr(policy, "known_as", ()))


def is_known_as(policy: Policy, fingerprint: str) -> bool:
    """Tell whether heads that were trained for a policy of a fingerprint belong to this one."""
    return fingerprint in names_of(policy)


class PolicyClass(Protocol):
    """The class of a policy, which loads checkpoints of its type.

    A policy is brought to its device and type of numbers when it is loaded. A class with `takes_compute = True` does
    that itself as it loads, so that billions of weights are never in memory twice: its `from_pretrained` gets a
    `ComputeConfig` as second argument, with the options of policies whose checkpoints do not say everything.
    """

    @classmethod
    def from_pretrained(cls, name: str) -> Policy:
        """Load a checkpoint from a shipped name, a folder or a Hugging Face hub id."""


def check_fingerprint(policy: Policy, name: str, expected: str) -> None:
    """Refuse weights that changed since the run began: a worker loads its own copy.

    Raises:
        CheckpointError: Its fingerprint does not begin as expected.
    """
    if not policy.fingerprint.startswith(expected):
        raise CheckpointError(f"{name} was changed while it is in use; run again when it stays the same.")


policies: Registry[PolicyClass] = Registry("policy type", "dysl_vla.policies")
