"""Vision-language-action policies behind one small protocol.

Importing this subpackage imports no torch; `load_policy` does, for the policies that need it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dysl_vla.checkpoint import CONFIG, find_checkpoint, has_skips, read_policy_type, read_type_field
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

if TYPE_CHECKING:
    import torch

__all__ = [
    "ComputeConfig",
    "ExportablePolicy",
    "Policy",
    "SkippablePolicy",
    "can_export",
    "can_skip",
    "check_fingerprint",
    "device_for",
    "is_known_as",
    "load_policy",
    "load_skippable_policy",
    "load_variants",
    "original_fingerprint",
    "policies",
    "select_action",
    "size_of",
]


OURS = {
    "mini-vla": "dysl_vla.policies.mini_vla",
    "openvla-oft": "dysl_vla.policies.openvla_oft",
    "smolvla": "dysl_vla.policies.flow.smolvla",
    "pi0": "dysl_vla.policies.flow.pi0",
    "pi05": "dysl_vla.policies.flow.pi0",
    "baseline": "dysl_vla.policies.baseline",
    "mini-flow": "dysl_vla.policies.flow.mini_flow",
}
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
    [policy] = load_variants(name, [(skip, ablation)], compute)
    return policy


def load_variants(
    name: str, variants: Sequence[tuple[float | None, Ablation | None]], compute: ComputeConfig | None = None
) -> list[Policy]:
    """Load a policy as several variants, which share one copy of its weights where it is computed by torch.

    Args:
        name: See `load_policy`.
        variants: For each variant `skip` and `ablation` of `load_policy`.
        compute: See `load_policy`.
    """
    compute = compute or ComputeConfig()
    full = _load_full(name, compute)
    others = [_sharing_weights(full) or _load_full(name, compute) for _ in variants[1:]]
    return [_as_variant(name, one, *variant) for one, variant in zip([full, *others], variants, strict=True)]


def load_skippable_policy(name: str, compute: ComputeConfig | None = None) -> SkippablePolicy:
    """Load a policy whose layers can be skipped, without its skipping; see `load_policy`.

    Raises:
        ConfigError: No policy has that name, or its layers cannot be skipped.
        CheckpointError: The checkpoint is damaged, foreign or edited.
    """
    return _skippable(name, _load_full(name, compute or ComputeConfig()))


def _skippable(name: str, policy: Policy) -> SkippablePolicy:
    missing = [part for part in PARTS if not hasattr(policy, part)]
    if missing:
        raise ConfigError(
            f"policy must be a policies.SkippablePolicy to skip layers; {name!r} offers no {missing[0]!r}."
        )
    return cast("SkippablePolicy", policy)


def can_skip(name: str) -> bool:
    """Tell whether a policy's checkpoint has adapters and controllers, or it is a bundle, which has them.

    Raises:
        ConfigError: No policy has that name.
        CheckpointError: The checkpoint is damaged or foreign.
    """
    if name == "mock":
        return False
    folder = find_checkpoint(name)
    return has_skips(folder) or hasattr(_class_of(folder), "set_skip")


def can_export(name: str) -> bool:
    """Tell whether a policy's class has what `dysl export` needs.

    Raises:
        ConfigError: No policy has that name.
        CheckpointError: The checkpoint is foreign.
    """
    return hasattr(_class_of(find_checkpoint(name)), "inputs")


def device_for(name: str, compute: ComputeConfig) -> torch.device:
    """Return the device that a policy is loaded to.

    Raises:
        ConfigError: No policy has that name, or this machine has no such device.
        CheckpointError: The checkpoint is foreign.
    """
    return compute.torch_device(is_large=getattr(_class_of(find_checkpoint(name)), "takes_compute", False))


def size_of(name: str, compute: ComputeConfig) -> int:
    """Return the bytes of a policy's files of weights, those of a base that it refers to included."""
    from dysl_vla.policies.base_reference import find_base

    folder = find_checkpoint(name)
    if getattr(_class_of(folder), "takes_compute", False):
        folder, _ = find_base(name, compute.options)
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))


def _class_of(folder: Path) -> type[Any]:
    """Return the class of a checkpoint's policy."""
    policy_type = read_policy_type(folder)
    if policy_type in OURS:
        with needs_extra("policy"):
            import_module(OURS[policy_type])  # it registers itself
    if policy_type not in policies.names():
        known = ", ".join(sorted({*OURS, *policies.names()}))
        field, found = read_type_field(folder)
        raise CheckpointError(f"{folder / CONFIG}: field {field!r} must be one of {known}, got {found!r}.")
    return cast("type[Any]", policies.get(policy_type))


def _load_full(name: str, compute: ComputeConfig) -> Policy:
    """Load a policy without skipping, where `compute` wants it."""
    if name == "mock":
        from dysl_vla.policies.mock import MockPolicy

        mock = MockPolicy()
        place(name, mock, compute)
        return mock
    folder = find_checkpoint(name)
    kind = _class_of(folder)
    if getattr(kind, "takes_compute", False):
        return cast("Policy", kind.from_pretrained(name, compute))
    policy: Policy = kind.from_pretrained(str(folder))
    if compute != ComputeConfig():
        known_as = names_of(policy)  # heads were trained for the weights as the checkpoint has them
        place(name, policy, compute)
        policy.known_as = known_as  # type: ignore[attr-defined] # modules' attributes may be anything
    return policy


def _sharing_weights(policy: Policy) -> Policy | None:
    """Return a copy whose tensors are the policy's own; None where it has none, or cannot be copied."""
    if "torch" not in sys.modules or not isinstance(policy, sys.modules["torch"].nn.Module):
        return None
    module: Any = policy
    try:
        return cast("Policy", deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())}))
    except TypeError:  # something in it cannot be copied
        return None


def _as_variant(name: str, policy: Policy, skip: float | None, ablation: Ablation | None) -> Policy:
    """Give a full policy the skipping of its checkpoint, as far as it is wanted."""
    if hasattr(policy, "set_skip"):  # a bundle, which skips by itself
        if ablation not in (None, Ablation()):
            raise ConfigError(
                f"variants must be full and dysl for a bundle; for others, take what {name!r} was made from."
            )
        if skip is not None:
            policy.set_skip(skip)
        return policy
    if hasattr(policy, "set_dial") and (skip is not None or ablation is not None):
        raise ConfigError(
            f"skip and variants must be left out for {name!r}, another method that decides by itself; evaluate the "
            "policy that it was trained for beside it."
        )
    folder = None if name == "mock" else find_checkpoint(name)
    if folder is None or not has_skips(folder):
        if skip or ablation is not None:
            raise ConfigError(
                f"skip must be 0 for {name!r}, which has no adapters and controllers; train them with dysl distill."
            )
        return policy
    if skip == 0:
        return policy
    from dysl_vla.policies.dysl import load_dysl

    return load_dysl(_skippable(name, policy), folder, skip, ablation)
