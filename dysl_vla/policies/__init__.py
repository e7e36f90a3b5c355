"""Vision-language-action policies behind one small protocol, and their training.

Importing this room imports no torch; `load_policy` does, for the policies that need it.
"""

from __future__ import annotations

from dysl_vla.checkpoint import CONFIG, find_checkpoint, read_policy_type
from dysl_vla.errors import CheckpointError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import Policy, check_fingerprint, policies

__all__ = ["Policy", "check_fingerprint", "load_policy", "policies"]


def load_policy(name: str) -> Policy:
    """Load a policy, ready to infer.

    Args:
        name: A shipped name ("metaworld-mini"), a checkpoint's folder, a Hugging Face hub id, or "mock".

    Raises:
        ConfigError: There is none of that name.
        CheckpointError: It is damaged, foreign or edited.
        MissingExtraError: torch or transformers are not installed.
    """
    if name == "mock":
        from dysl_vla.policies.mock import MockPolicy

        return MockPolicy()
    folder = find_checkpoint(name)
    policy_type = read_policy_type(folder)
    with needs_extra("policy"):
        import dysl_vla.policies.mini_vla  # noqa: F401 # it registers itself
    if policy_type not in policies.names():
        known = ", ".join(policies.names())
        raise CheckpointError(f"{folder / CONFIG}: field 'policy_type' is {policy_type!r}; this reads: {known}.")
    return policies.get(policy_type).from_pretrained(str(folder))
