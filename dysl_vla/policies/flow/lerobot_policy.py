"""What flow policies in LeRobot's folders share: how they are loaded, and what names them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tokenizers import Tokenizer

from dysl_vla.checkpoint import canonical
from dysl_vla.errors import CheckpointError, DyslError
from dysl_vla.policies.base_reference import Base, find_base, save_reference
from dysl_vla.policies.compute import ComputeConfig, check_device_memory, set_attention
from dysl_vla.policies.flow.lerobot_folder import FlowOptions, LeRobotFolder
from dysl_vla.policies.flow.policy import FlowPolicy
from dysl_vla.types import PolicySpec


class LeRobotFlowPolicy(FlowPolicy):
    """A flow policy of LeRobot's; a subclass adds what its folder holds.

    Attributes:
        kind: LeRobot's name of the type.
        base: The folder.
        cast: Type of numbers that all weights were brought to; None: each module has that of the folder.
        provenance: Where the policy comes from.
    """

    takes_compute = True
    kind: ClassVar[str]
    base: Base
    cast: torch.dtype | None
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    _spec: PolicySpec

    @property
    def spec(self) -> PolicySpec:
        """Return what the policy expects of an embodiment, and what it predicts."""
        return self._spec

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
        """Return the fingerprint that heads are trained for: with the folder's types of numbers, without names."""
        return (self._fingerprint(str([*self.spec.cameras.values()]), None),)

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
        policy.base = base
        policy.provenance = {"base": asdict(base)}
        return policy.eval()
