"""Vision-language-action policies behind one small protocol.

Importing this subpackage imports no torch; `load_policy` does, for the policies that need it.
"""

from __future__ import annotations

from importlib import import_module
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
    original_fingerprint,
    policies,
)
from dysl_vla.policies.compute import ComputeConfig, place
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
    "original_fingerprint",
    "policies",
    "select_action",
]


OURS = {"mini-vla": "dysl_vla.policies.mini_vla", "openvla-oft": "dysl_vla.policies.openvla_oft"}
"""Type of a policy of this package to the module that registers it."""
PARTS = ("layers", "width", "followers", "has_memory", "encode", "collate", "act", "remember", "save_pretrained")
"""Attributes of a `SkippablePolicy` beyond those of a `Policy`."""


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
        skip: How much to skip, from 0, which is exactly the full model, to 1; None: the checkpoint's operating point.
        ablation: The parts of the method that are on; None: all.
        compute: Device, type of numbers and the like; None: its defaults.

    Raises:
        ConfigError: No policy has that name, it cannot skip, or this machine cannot run it so.
        CheckpointError: The checkpoint is damaged, foreign or edited.
        MissingExtraError: torch or transformers are not installed.
    """
    if name == "mock":
        from dysl_vla.policies.mock import MockPolicy

        _check_full(name, skip, ablation)
        mock = MockPolicy()
        place(name, mock, compute or ComputeConfig())
        return mock
    policy, folder = _load(name, compute or ComputeConfig())
    if hasattr(policy, "set_skip"):  # a bundle, which skips by itself
        if ablation not in (None, Ablation()):
            raise ConfigError(
                f"variants must be full and dysl for a bundle; for others, take what {name!r} was made from."
            )
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
    """Load a policy whose layers can be skipped, without its skipping; see `load_policy`.

    Raises:
        ConfigError: No policy has that name, or its layers cannot be skipped.
        CheckpointError: The checkpoint is damaged, foreign or edited.
    """
    return _skippable(name, load_policy(name, skip=0, compute=compute))


def _check_full(name: str, skip: float | None, ablation: Ablation | None) -> None:
    if skip or ablation is not None:
        raise ConfigError(
            f"skip must be 0 for {name!r}, which has no adapters and controllers; train them with dysl distill."
        )


def _skippable(name: str, policy: Policy) -> SkippablePolicy:
    missing = [part for part in PARTS if not hasattr(policy, part)]
    if missing:
        raise ConfigError(
            f"policy must be a policies.SkippablePolicy to skip layers; {name!r} offers no {missing[0]!r}."
        )
    return cast("SkippablePolicy", policy)


def _load(name: str, compute: ComputeConfig) -> tuple[Policy, Path]:
    """Load the full policy of a checkpoint, where `compute` wants it; return it with the checkpoint's folder."""
    folder = find_checkpoint(name)
    policy_type = read_policy_type(folder)
    if policy_type in OURS:
        with needs_extra("policy"):
            import_module(OURS[policy_type])  # it registers itself
    if policy_type not in policies.names():
        known = ", ".join(sorted({*OURS, *policies.names()}))
        raise CheckpointError(f"{folder / CONFIG}: the type of policy must be one of {known}, got {policy_type!r}.")
    kind = policies.get(policy_type)
    if getattr(kind, "takes_compute", False):
        return kind.from_pretrained(name, compute), folder  # type: ignore[call-arg]
    policy = kind.from_pretrained(str(folder))
    known_as = names_of(policy)  # heads were trained for the weights as the checkpoint has them
    place(name, policy, compute)
    if compute != ComputeConfig():
        policy.known_as = known_as  # type: ignore[attr-defined] # modules' attributes may be anything
    return policy, folder
