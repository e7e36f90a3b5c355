"""Vision-language-action policies behind one small protocol, and their training.

Importing this room imports no torch; `load_policy` does, for the policies that need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from dysl_vla.checkpoint import CONFIG, find_checkpoint, read_policy_type
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import (
    ExportablePolicy,
    Policy,
    SkippablePolicy,
    check_fingerprint,
    is_known_as,
    names_of,
    policies,
)
from dysl_vla.policies.compute import ComputeConfig
from dysl_vla.policies.execution import select_action
from dysl_vla.skip_controller.operating import Ablation

__all__ = [
    "ComputeConfig",
    "ExportablePolicy",
    "Policy",
    "SkippablePolicy",
    "check_fingerprint",
    "is_known_as",
    "load_policy",
    "load_skippable_policy",
    "policies",
    "select_action",
]


PARTS = ("layers", "width", "followers", "has_memory", "encode", "collate", "act", "remember", "save_pretrained")
"""What a `SkippablePolicy` offers beside a `Policy`."""


def load_policy(
    name: str,
    *,
    skip: float | None = None,
    ablation: Ablation | None = None,
    compute: ComputeConfig | None = None,
) -> Policy:
    """Load a policy, ready to infer. One whose checkpoint has adapters and controllers skips layers.

    Args:
        name: A shipped name ("metaworld-mini"), a checkpoint's folder, a Hugging Face hub id, or "mock".
        skip: How much to skip, from 0, the full model, exactly, to 1; None: the checkpoint's operating point.
        ablation: Parts of the method to leave out.
        compute: Device and type of numbers; None: the CPU, and the checkpoint's.

    Raises:
        ConfigError: There is none of that name, or it cannot skip.
        CheckpointError: It is damaged, foreign or edited.
        MissingExtraError: torch or transformers are not installed.
    """
    if name == "mock":
        from dysl_vla.policies.mock import MockPolicy

        _check_full(name, skip, ablation)
        mock = MockPolicy()
        _move(name, mock, compute or ComputeConfig())
        return mock
    policy, folder = _load(name)
    _move(name, policy, compute or ComputeConfig())
    if hasattr(policy, "set_skip"):  # a bundle, which skips by itself
        if ablation not in (None, Ablation()):
            raise ConfigError(f"skip: no part of {name!r} can be left out; take the checkpoint that it was made from.")
        if skip is not None:
            policy.set_skip(skip)
        return policy
    if skip == 0:
        return policy
    from dysl_vla.policies.dysl import has_skips, load_dysl

    if not has_skips(folder):
        _check_full(name, skip, ablation)
        return policy
    return load_dysl(_skippable(name, policy), folder, skip, ablation)


def load_skippable_policy(name: str, compute: ComputeConfig | None = None) -> SkippablePolicy:
    """Load a policy, without its skipping, whose layers can be skipped; see `load_policy`.

    Raises:
        ConfigError: There is none of that name, or its layers cannot be skipped.
        CheckpointError: It is damaged, foreign or edited.
    """
    return _skippable(name, load_policy(name, skip=0, compute=compute))


def _move(name: str, policy: Policy, compute: ComputeConfig) -> None:
    """Bring a policy to a device and a type of numbers."""
    if compute == ComputeConfig():
        return
    import torch

    if not isinstance(policy, torch.nn.Module):
        raise ConfigError(f"device, dtype: policy {name!r} runs on the CPU as it was exported; leave them out.")
    known_as = names_of(policy)  # heads were trained for the weights as the checkpoint has them
    try:
        policy.to(device=compute.device, dtype=getattr(torch, compute.dtype) if compute.dtype else None)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {compute.device!r} cannot be used here ({error}).") from error
    policy.known_as = known_as  # type: ignore[assignment] # modules' attributes may be anything


def _check_full(name: str, skip: float | None, ablation: Ablation | None) -> None:
    if skip or ablation is not None:
        raise ConfigError(f"skip: policy {name!r} has no adapters and controllers; train them with dysl distill.")


def _skippable(name: str, policy: Policy) -> SkippablePolicy:
    missing = [part for part in PARTS if not hasattr(policy, part)]
    if missing:
        raise ConfigError(
            f"policy: {name!r} offers no {missing[0]!r}; layer skipping needs a policies.SkippablePolicy."
        )
    return cast("SkippablePolicy", policy)


def _load(name: str) -> tuple[Policy, Path]:
    folder = find_checkpoint(name)
    policy_type = read_policy_type(folder)
    with needs_extra("policy"):
        import dysl_vla.policies.mini_vla  # noqa: F401 # it registers itself
    if policy_type not in policies.names():
        known = ", ".join(policies.names())
        raise CheckpointError(f"{folder / CONFIG}: field 'policy_type' is {policy_type!r}; this reads: {known}.")
    return policies.get(policy_type).from_pretrained(str(folder)), folder
