"""How a policy is loaded: where it is computed, with which numbers, and what its checkpoint does not say.

Most commands share these options. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from multiprocessing import current_process
from typing import TYPE_CHECKING, Any

from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import available_memory

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"


@dataclass(frozen=True)
class ComputeConfig:
    """How a policy is loaded: where it is computed, with which numbers, and what its checkpoint does not say.

    Raises:
        ConfigError: A value is unknown, or `policy_options` are not of the form name=value.
    """

    device: str | None = None
    """Device on which the policy runs: cpu, cuda, cuda:1, or auto, which is a GPU where there is one. When not given,
    auto for policies of billions of weights, and the CPU for others."""
    dtype: str | None = None
    """Type of the policy's weights: float32, bfloat16, float16, or auto, which is that of its checkpoint. It is auto
    when not given."""
    attention: str | None = None
    """How a transformers decoder computes attention: sdpa, eager, flash_attention_2, or another that transformers
    offers. It is transformers' choice when not given."""
    policy_options: tuple[str, ...] = ()
    """What the checkpoint of a foreign policy does not say, as name=value: for OpenVLA-OFT chunk_length=8
    num_images=2 norm_stats=libero_spatial_no_noops. An unknown name is refused with those that are known."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, AUTO, *DTYPES):
            raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}.")
        self.options  # noqa: B018 # refuses what is no name=value

    @property
    def options(self) -> dict[str, str]:
        """Return `policy_options` by name."""
        options: dict[str, str] = {}
        for text in self.policy_options:
            name, separator, value = text.partition("=")
            if not (name and separator and value):
                raise ConfigError(f"policy_options must be of the form name=value, got {text!r}.")
            if options.setdefault(name, value) != value:
                raise ConfigError(f"policy_options must name each option once, got {name} twice.")
        return options

    @property
    def words(self) -> str:
        """Return the options as they are typed, each after a blank; nothing for those that are not given."""
        given = {"device": self.device, "dtype": self.dtype, "attention": self.attention}
        words = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
        return words + (f" --policy-options {shlex.join(self.policy_options)}" if self.policy_options else "")

    def torch_device(self, *, is_large: bool = False) -> torch.device:
        """Return the device that the policy runs on.

        Args:
            is_large: Whether the policy has billions of weights, so that it runs on a GPU unless told otherwise.

        Raises:
            ConfigError: This machine has no such device.
        """
        with needs_extra("policy"):
            import torch
        wanted = self.device or (AUTO if is_large else "cpu")
        wanted = _found() if wanted == AUTO else wanted
        try:
            device = torch.device(wanted)
            device = torch.empty(1, device=device).device  # a GPU's has its number
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not there
            count = torch.cuda.device_count()
            there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"device must be one of this machine's, got {wanted!r}; PyTorch finds {there} ({reason}). Leave it "
                "out, or install a PyTorch and a driver that find it."
            ) from error
        return device

    def torch_dtype(self) -> torch.dtype | None:
        """Return the type of the policy's weights; None for that of its checkpoint."""
        if self.dtype in (None, AUTO):
            return None
        with needs_extra("policy"):
            import torch
        dtype: torch.dtype = getattr(torch, str(self.dtype))
        return dtype


def _found() -> str:
    """Return the device that "auto" means: the processes of a command share the GPUs in turns."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" in os.environ:  # set by accelerate and torchrun
        turn = int(os.environ["LOCAL_RANK"])
    else:
        turn = max(getattr(current_process(), "_identity", (1,)) or (1,)) - 1  # a worker's number, from 1
    return f"cuda:{turn % torch.cuda.device_count()}"


def place(name: str, policy: Any, compute: ComputeConfig) -> None:
    """Bring a loaded policy to a device, a type of numbers and a kind of attention.

    Args:
        name: The policy's name, for messages.
        policy: The policy.
        compute: Where it shall be, without options: those are for policies that take them as they load.

    Raises:
        ConfigError: The policy is not computed by torch, has no such options, or the device or attention is not there.
    """
    if compute.options:
        raise ConfigError(f"policy_options must be left out for {name!r}, whose checkpoint says everything.")
    if compute == ComputeConfig():
        return
    with needs_extra("policy"):
        import torch
    if not isinstance(policy, torch.nn.Module):
        raise ConfigError(f"device, dtype and attention must be left out for {name!r}, which runs without torch.")
    policy.to(device=compute.torch_device(), dtype=compute.torch_dtype())
    if compute.attention is not None:
        set_attention(name, policy, compute.attention)


def set_attention(name: str, policy: Any, attention: str) -> None:
    """Let all transformers models inside a policy compute attention in one way.

    Raises:
        ConfigError: The policy has no such model, or transformers does not offer it here.
    """
    from transformers import PreTrainedModel

    models = [module for module in policy.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise ConfigError(f"attention must be left out for {name!r}, which has no decoder of transformers.")
    try:
        for model in models:
            model.set_attn_implementation(attention)
    except (ValueError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"attention must be one that transformers offers here, got {attention!r} ({reason})."
        ) from error


def free_memory(device: torch.device, local_count: int = 1) -> int | None:
    """Return the free bytes of a device; None where they are unknown.

    Args:
        device: The device.
        local_count: Number of processes that share the memory of a CPU; a GPU is for one alone.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, free to it
        return torch.cuda.mem_get_info(device)[0] + kept
    free = available_memory() if device.type == "cpu" else None
    return None if free is None else free // local_count


def check_device_memory(device: torch.device, needed: int, what: str, fix: str) -> None:
    """Refuse to load what does not fit into a device's free memory.

    Args:
        device: The device.
        needed: Bytes.
        what: What needs them, in the plural, for the message.
        fix: What to do about it, for the message.

    Raises:
        ConfigError: Less memory is free.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise ConfigError(f"memory: {what} need {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} free; {fix}.")
