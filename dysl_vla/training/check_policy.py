"""Checks of a policy that take a second, made before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla.checkpoint import MANIFEST
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import evenly, observations
from dysl_vla.errors import ConfigError, DyslError
from dysl_vla.extras import needs_extra
from dysl_vla.policies import SkippablePolicy, load_policy
from dysl_vla.types import FloatArray, Observation

with needs_extra("policy"):
    import torch

    from dysl_vla.skip_controller.compatibility import compute_dtype, run_device
    from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads
    from dysl_vla.skip_controller.heads_trainer import mixed_precision
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import Skipper, attach
    from dysl_vla.skip_controller.torch_backend import Forward, to_numpy

TOLERANCES = {"torch.float32": 2e-3, "torch.float16": 5e-2}
"""How far a row's actions may be from those of the same row elsewhere, in deviations, by type of the weights."""
COARSE = 0.25
"""The same tolerance for types with fewer bits."""
MAX_RELOADED = 2e9
"""Bytes of weights above which a saved policy is not loaded again to be compared."""


def check_policy(policy: SkippablePolicy, demonstrations: Demonstrations) -> None:
    """Refuse a policy whose inference in four steps is not what it declares.

    On three demonstrated moments it checks that a row's actions are the same alone and in a batch, without skips and
    with different ones; that `infer` returns what the steps return; that every layer is run; and that actions have a
    gradient where heads are trained.

    Raises:
        ConfigError: Something differs; the message names it.
    """
    frames = evenly(demonstrations.total_frames, 3)
    seen: list[Observation] = [observation for _, observation in observations(demonstrations, frames)]
    with torch.no_grad():
        items = policy.encode(seen, [policy.reset() for _ in seen])
        together = _act(policy, items)
        _check_shape(policy, together, len(seen))
        _compare(policy, "act: the actions of a row", together, [_act(policy, [item])[0] for item in items])
        answered = [policy.infer([one], [policy.reset()])[0].actions for one in seen]
        normalisation = policy.spec.action_normalisation
        exact = [column for column in range(together.shape[-1]) if column not in normalisation.signs]
        normalised = [normalisation.apply(actions)[..., exact] for actions in answered]
        _compare(policy, "infer: its actions", together[..., exact], normalised)
    depth = len(policy.layers)
    if depth < 3:
        raise ConfigError(f"layers must be three or more, got {depth}, which leave none to skip.")
    plan = SkipPlan(depth, (0, depth - 1))
    torch.manual_seed(0)
    heads = SkipHeads(plan, HeadsConfig(policy.width, 4, 4, getattr(policy, "follower_sizes", ())))
    heads.to(run_device(policy.layers, "0"))
    with mixed_precision(policy.layers):
        skipper = attach(policy.layers, plan, heads, followers=policy.followers)
        try:
            _check_skips(policy, skipper, items)
            _check_gradient(policy, skipper, items, heads)
        finally:
            skipper.detach()


def check_saved(policy: SkippablePolicy, folder: Path) -> None:
    """Save a policy, and refuse one that is not the same when it is loaded again.

    Args:
        policy: The policy.
        folder: Folder for its checkpoint, to which heads will be added.

    Raises:
        ConfigError: The policy cannot be saved or loaded, or differs when it is loaded.
    """
    try:
        policy.save_pretrained(folder)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"save_pretrained must work, and failed ({type(error).__name__}: {error}).") from error
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"save_pretrained must write a manifest, and wrote no {MANIFEST}; use dysl_vla.checkpoint.save_checkpoint."
        )
    if sum(p.nbytes for p in policy.layers.parameters()) > MAX_RELOADED:
        return
    try:
        again = load_policy(str(folder), skip=0)
    except DyslError as error:
        raise ConfigError(f"save_pretrained must write what can be loaded ({error})") from error
    if again.fingerprint != policy.fingerprint:
        raise ConfigError(
            "fingerprint must depend only on what the checkpoint holds, and that of a policy that was saved and loaded "
            "again differs."
        )


def _act(policy: SkippablePolicy, items: Sequence[Any]) -> FloatArray:
    return to_numpy(policy.act(policy.collate(items)[0], Forward()))


def _check_shape(policy: SkippablePolicy, actions: FloatArray, rows: int) -> None:
    spec = policy.spec
    expected = (rows, spec.chunk_length, len(spec.action_names))
    if actions.shape != expected:
        raise ConfigError(f"act must return actions of the spec's shape {expected}, got {actions.shape}.")
    if not np.isfinite(actions).all():
        raise ConfigError("act must return finite actions, got NaN or infinity.")


def _compare(policy: SkippablePolicy, what: str, wanted: FloatArray, got: Sequence[FloatArray]) -> None:
    tolerance = TOLERANCES.get(str(compute_dtype(policy.layers)), COARSE)
    distance = float(np.abs(np.stack(got) - wanted).max())
    if not distance <= tolerance:
        raise ConfigError(
            f"{what} differ by {distance:.2g} deviations from those that `encode`, `collate` and `act` give in a batch "
            f"of {len(got)}; at most {tolerance:g} may. Padding, or something that a row takes from its neighbours or "
            "from the inference before, is the usual cause."
        )


def _check_skips(policy: SkippablePolicy, skipper: Skipper, items: Sequence[Any]) -> None:
    """Refuse a policy whose rows, where each skips other layers, differ from the same rows alone."""
    length = skipper.plan.blocks[0].length
    points = np.array([[0], [length // 2], [length]][: len(items)])

    def skipping(some: Sequence[Any], allow_points: Any) -> FloatArray:
        inputs, mask = policy.collate(some)
        with torch.no_grad(), skipper.step(allow_points, mask=mask, force_skip=True) as step:
            actions = to_numpy(policy.act(inputs, Forward(step)))
        if not step.is_decided:
            raise ConfigError(
                "layers must be the decoder's own list of layers, which `act` runs; it does not run the policy's."
            )
        return actions

    together = skipping(items, points)
    alone = [skipping([item], points[row : row + 1])[0] for row, item in enumerate(items)]
    _compare(policy, "act: the actions of a row, where rows skip different layers,", together, alone)


def _check_gradient(policy: SkippablePolicy, skipper: Skipper, items: Sequence[Any], heads: SkipHeads) -> None:
    inputs, mask = policy.collate(items)
    exits = [skipper.plan.exits_of(block)[0] for block in skipper.plan.blocks]
    with torch.inference_mode(False), torch.enable_grad(), skipper.force_exits(exits, mask=mask) as forced:
        actions = policy.act(inputs, Forward(forced, needs_gradient=True))
    adapter = heads.adapters[str(exits[0])]
    found = actions.requires_grad and torch.autograd.grad(
        actions.float().abs().sum(), list(adapter.parameters()), allow_unused=True
    )
    if not found or all(gradient is None for gradient in found):
        raise ConfigError(
            "act must return actions with a gradient, which heads learn from; where `forward.needs_gradient` is set, "
            "return what is differentiable (an expectation over bins for an argmax), and detach nothing."
        )
