"""What flow policies in LeRobot's folders share: how they are loaded, and what names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from dysl_vla.checkpoint import canonical
from dysl_vla.denoising import STATE
from dysl_vla.errors import CheckpointError, DyslError
from dysl_vla.images import Place
from dysl_vla.policies.backbone import EMBEDS, MASK
from dysl_vla.policies.base_reference import Base, find_base, save_reference
from dysl_vla.policies.compute import ComputeConfig, check_device_memory, set_attention
from dysl_vla.policies.flow.lerobot_folder import FlowOptions, LeRobotFolder
from dysl_vla.policies.flow.policy import CAUSAL, FlowPolicy
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    ImageArray,
    Observation,
    PolicySpec,
    gripper_columns,
    with_suffix,
)


class LeRobotFlowPolicy(FlowPolicy):
    """A flow policy of LeRobot's; a subclass adds what its folder holds.

    Attributes:
        kind: LeRobot's name of the type.
        instruction_suffix: What follows an instruction that does not end in it.
        base: The folder.
        cast: Type of numbers that all weights were brought to; None: each module has that of the folder.
        tokenizer: The tokenizer of instructions.
        settings: Numbers of LeRobot's config.json, `max_state_dim` and `tokenizer_max_length` among them.
        keeps_images: Whether a camera's tokens are kept, and used again while its image does not change.
        provenance: Where the policy comes from.
    """

    takes_compute = True
    kind: ClassVar[str]
    instruction_suffix: ClassVar[str] = "\n"
    base: Base
    cast: torch.dtype | None
    tokenizer: Tokenizer
    settings: dict[str, Any]
    provenance: dict[str, Any]
    _spec: PolicySpec

    def __init__(self) -> None:
        super().__init__()
        self.keeps_images = False
        self._kept: dict[str, tuple[ImageArray, Tensor]] = {}

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self._spec

    @property
    def resizes(self) -> Mapping[str, tuple[int, int]]:
        """Return no sizes, as images are resized by `inputs`; see `ExportablePolicy`."""
        return {}

    @property
    def crops(self) -> dict[str, Place]:
        """Return the whole of each image; see `ExportablePolicy`."""
        return {camera: (0, 0, *size) for camera, size in self.spec.cameras.items()}

    def see(self, images: Tensor) -> Tensor:
        """Encode a camera's images, (batch, height, width, 3) uint8, to (batch, tokens, width)."""
        raise NotImplementedError

    def words(self, token_ids: Tensor) -> Tensor:
        """Embed token ids, of any shape, to that shape and the width."""
        raise NotImplementedError

    def prompt(self, observation: Observation) -> str:
        """Return the text that the policy reads of an observation."""
        return with_suffix(str(observation[TASK_KEY]), self.instruction_suffix)

    def ids(self, observation: Observation) -> list[int]:
        """Return the token ids of an observation's prompt, cut where there are too many."""
        encoded = self.tokenizer.encode(self.prompt(observation))
        return list(encoded.ids[: sum(encoded.attention_mask)])

    def assembled(self, views: Sequence[Tensor], words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix's embeddings, (..., tokens, width), and `CAUSAL`, (..., tokens).

        Args:
            views: Each camera's tokens, (..., tokens, width).
            words: Those of the words.
            state: The normalised and padded state, (..., state).
        """
        embeds = torch.cat([*(view.to(words) for view in views), words], dim=-2)
        return embeds, torch.zeros(embeds.shape[:-1], dtype=torch.long, device=embeds.device)

    def embed_prefix(self, observations: Sequence[Observation]) -> list[dict[str, Tensor]]:
        """Embed images, words and state; see `FlowPolicy.embed_prefix`."""
        device = next(self.backbone.parameters()).device
        views = [self._view(camera, observations) for camera in self.spec.cameras]
        items = []
        for row, observation in enumerate(observations):
            words = self.words(torch.tensor(self.ids(observation), device=device))
            state = self.padded_state(observation).to(device)
            embeds, causal = self.assembled([view[row] for view in views], words, state)
            items.append({EMBEDS: embeds, CAUSAL: causal})
        return items

    def _view(self, camera: str, observations: Sequence[Observation]) -> Tensor:
        """Return a camera's tokens of some observations, (observations, tokens, width)."""
        images = np.stack([one[IMAGE_PREFIX + camera] for one in observations])
        kept = self._kept.get(camera)
        if kept is not None and np.array_equal(kept[0], images):
            return kept[1]
        view = self.see(torch.from_numpy(images).to(next(self.backbone.parameters()).device))
        if self.keeps_images:
            self._kept[camera] = images, view
        return view

    def inputs(self, images: Mapping[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """See `FlowPolicy.inputs`. Token ids are padded with one that is none, the size of the vocabulary."""
        views = [self.see(images[camera]) for camera in self.spec.cameras]
        is_word = token_ids < self.padding_id
        words = self.words(torch.where(is_word, token_ids, 0))
        padded = self._normalised(state)
        embeds, causal = self.assembled(views, words, padded)
        before = sum(view.shape[1] for view in views)
        after = embeds.shape[1] - before - is_word.shape[1]
        return {
            EMBEDS: embeds,
            CAUSAL: causal,
            MASK: functional.pad(is_word, (before, after), value=True),
            STATE: padded,
        }

    @property
    def padding_id(self) -> int:
        """Return the token id that stands for padding in `inputs`."""
        return int(self.backbone.config.vocab_size)

    def take_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Keep a tokenizer, set to pad and cut as `token_ids` does; the backbone and settings must be there."""
        length = int(self.settings["tokenizer_max_length"])
        tokenizer.enable_padding(length=length, pad_id=self.padding_id)
        tokenizer.enable_truncation(length)
        self.tokenizer = tokenizer

    def token_ids(self, instruction: str) -> list[int]:
        """Return an instruction's token ids, padded at their end; see `ExportablePolicy`."""
        found = self.ids({TASK_KEY: instruction})
        return [*found, *[self.padding_id] * (int(self.settings["tokenizer_max_length"]) - len(found))]

    def padded_state(self, observation: Observation) -> Tensor:
        """See `FlowPolicy.padded_state`."""
        return self._normalised(torch.from_numpy(np.asarray(observation[STATE_KEY], np.float32)))

    def _normalised(self, state: Tensor) -> Tensor:
        """Return states, (..., state), normalised and padded."""
        normalisation = self.spec.state_normalisation
        mean, std = (torch.tensor(values, device=state.device) for values in (normalisation.mean, normalisation.std))
        return functional.pad((state - mean) / std, (0, int(self.settings["max_state_dim"]) - state.shape[-1]))

    @classmethod
    def of_folder(cls, folder: LeRobotFolder, options: FlowOptions) -> Self:
        """Make the policy of a checkpoint, of its sizes and without its weights.

        Raises:
            CheckpointError: A tensor or file is missing or damaged, or something is not supported.
            ConfigError: An option does not fit the checkpoint.
        """
        raise NotImplementedError

    @staticmethod
    def renamed(name: str) -> str | None:
        """Return the policy's name of a tensor of LeRobot's; None for one that it does not need."""
        raise NotImplementedError

    def make_buffers(self) -> None:
        """Compute what no checkpoint stores: the decoder's rotary positions."""
        decoder = self.backbone
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)

    @property
    def fingerprint(self) -> str:
        """Return a digest of the checkpoint's files, the options and the type of numbers."""
        return self._fingerprint(canonical(self.spec), self.cast)

    @property
    def known_as(self) -> tuple[str, ...]:
        """Return the fingerprint that heads are trained for: with the folder's types of numbers, without names.

        What guidance was measured with counts: how many actions are executed, at which rate, and which are grippers.
        """
        spec = self.spec
        grippers = gripper_columns(spec.action_names)
        counted = [*spec.cameras.values()], spec.execute_steps, spec.rate_hz, grippers
        return (self._fingerprint(str(counted), None),)

    def _fingerprint(self, spec: str, cast: torch.dtype | None) -> str:
        parts = self.base.fingerprint, self.tokenizer.to_str(), spec, self.steps, cast
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that refers to LeRobot's folder, which is too large to copy."""
        save_reference(folder, self.kind, self.base, self.provenance)

    @classmethod
    def from_pretrained(cls, name: str, compute: ComputeConfig | None = None) -> Self:
        """Load a checkpoint from a folder or a Hugging Face hub id, or one that refers to it.

        Args:
            name: The checkpoint.
            compute: Device, type of numbers, attention and options. On the device "meta" no weights are read.

        Raises:
            CheckpointError: A file or tensor is missing, damaged or unknown, or the checkpoint is of another kind.
            ConfigError: An option is unknown or does not fit the checkpoint.
        """
        compute = compute or ComputeConfig()
        folder, base = find_base(name, compute.options)
        files = LeRobotFolder(folder)
        device = compute.torch_device(is_large=True)
        # The modules are made without memory and take the file's tensors, so that the weights exist once.
        flow_options = FlowOptions.parse(base.options)
        try:
            with torch.device("meta"):
                policy = cls.of_folder(files, flow_options)
        except DyslError:
            raise
        except Exception as error:  # transformers' errors for a size that cannot be are many
            raise CheckpointError(
                f"{folder} does not describe a {files.kind} ({error!r}); where it was made from another "
                "vision-language model than its authors', give the folder of that by --policy-options vlm=FOLDER."
            ) from error
        if compute.attention is not None:
            set_attention(name, policy, compute.attention)
        shapes = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
        places = files.places(cls.renamed, shapes)
        own, cast = files.dtypes(places), compute.torch_dtype()
        policy.cast = cast if set(own.values()) != {cast} else None
        dtypes = own if cast is None else dict.fromkeys(own, cast)
        for module_name, module in policy.named_children():
            module.to(dtypes[module_name])
        size = sum(value.nbytes for value in policy.state_dict().values())
        check_device_memory(device, size, "the policy's weights", "give --dtype bfloat16, or another --device")
        if device.type != "meta":
            policy.load_state_dict(dict(files.weights(places, dtypes, device)), assign=True)
        with device:
            policy.make_buffers()
        policy.base, policy.keeps_images = base, flow_options.keep_images
        policy.provenance = {"base": asdict(base)}
        return policy.eval()
