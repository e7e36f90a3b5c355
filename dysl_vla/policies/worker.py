"""The policies that a worker process keeps between its tasks."""

from __future__ import annotations

from functools import lru_cache

from dysl_vla.policies import ComputeConfig, Policy, check_fingerprint, load_policy
from dysl_vla.skip_controller.operating import Ablation
from dysl_vla.workers import use_one_inference_thread


@lru_cache(maxsize=16)
def worker_policy(
    name: str,
    fingerprint: str,
    *,
    skip: float | None = None,
    ablation: Ablation | None = None,
    compute: ComputeConfig | None = None,
) -> Policy:
    """A worker's own copy of a policy, loaded once, with one inference thread.

    Args:
        name: See `load_policy`.
        fingerprint: The fingerprint, or its first characters, of the policy that the run began with.
        skip: See `load_policy`.
        ablation: See `load_policy`.
        compute: See `load_policy`.

    Raises:
        CheckpointError: The checkpoint was changed since the run began.
    """
    policy = load_policy(name, skip=skip, ablation=ablation, compute=compute)
    check_fingerprint(policy, name, fingerprint)
    use_one_inference_thread()
    return policy
