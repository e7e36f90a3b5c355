"""What a distillation needs, before weights are loaded: its memory at the peak, and its floating-point operations.

The trainer itself rehearses a step of each stage on tensors that have a shape and no content (PyTorch's fake tensors),
with the policy's own `encode`, `collate` and `act`; a ledger adds up the bytes of all tensors that are alive. So
whatever the trainer, the policy and autograd keep is counted, and no formula has to know them. What happens outside of
PyTorch's operators is not counted: workspaces inside of a kernel, and the fragmentation of an allocator.

Operators are chosen as on a CPU. On a GPU attention may be computed by another kernel, which keeps about as much.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dysl_vla.policies import SkippablePolicy
from dysl_vla.skip_controller.heads import HeadsConfig, SkipHeads, forget_shares
from dysl_vla.skip_controller.heads_trainer import DistillConfig, FullModelAnswer, HeadsTrainer, mixed_precision
from dysl_vla.skip_controller.plan import SkipPlan
from dysl_vla.skip_controller.skipping import attach
from dysl_vla.training.encoded import BATCH
from dysl_vla.types import Observation

Exits = Sequence[int | None]
aten = torch.ops.aten
ENCODING, STAGE_1, ANSWER, STAGE_2 = "encoding", "stage 1", "the full model's answer", "stage 2"
DRAWS = 256
"""Number of draws of exits over which operations are averaged."""


@dataclass(frozen=True)
class Phase:
    """A part of the training with a peak of its own, in bytes.

    Attributes:
        name: Its name.
        inputs: The batch, and the full model's answer to it.
        activations: What the forward keeps for backward, at its end.
        peak: The most that is alive at once beside weights, heads and inputs, activations included.
        forward: Floating-point operations before backward.
        backward: Floating-point operations of backward, what is computed again included.
    """

    name: str
    inputs: int
    activations: int
    peak: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Estimate:
    """What a distillation needs, in bytes and floating-point operations.

    Attributes:
        backbone: Bytes of the decoder's layers.
        rest: Bytes of all other weights of the policy.
        backbone_weights: Number of weights of the decoder's layers.
        trained: Number of weights of adapters and controllers, in float32.
        shape: (batch, tokens, hidden) of the decoder's first forward.
        frame: Bytes of an encoded frame.
        answer: Bytes of the full model's answer to a frame.
        encoding: Floating-point operations of encoding a frame.
        phases: The parts of the training.
        is_checkpointed: Whether activations of the backbone are computed again in backward.
        is_measured: Whether real weights were loaded, as the policy does not run on tensors without content.
    """

    backbone: int
    rest: int
    backbone_weights: int
    trained: int
    shape: tuple[int, ...]
    frame: int
    answer: int
    encoding: float
    phases: tuple[Phase, ...]
    is_checkpointed: bool
    is_measured: bool

    @cached_property
    def largest(self) -> Phase:
        """Return the phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak + phase.inputs)

    @property
    def parts(self) -> dict[str, int]:
        """Return where the memory of the policy's device goes at the peak; frames that are kept are not included."""
        largest, heads = self.largest, 4 * self.trained
        return {
            "backbone": self.backbone,
            "other weights": self.rest,
            "adapters and controllers": heads,
            "their gradients": heads,
            "their optimizer": 2 * heads,
            "batch, and the full model's answer": largest.inputs,
            "activations kept for backward": largest.activations,
            "workspace": largest.peak - largest.activations,
        }

    @property
    def total(self) -> int:
        """Return the bytes of the policy's device at the peak."""
        return sum(self.parts.values())

    def phase(self, name: str) -> Phase | None:
        """Return a part of the training; None where it is left out."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclass(frozen=True)
class Rehearsal:
    """A distillation to estimate.

    Attributes:
        policy: The policy, on any device, PyTorch's `meta` included. It is of no use afterwards.
        plan: What may be skipped.
        heads: Sizes of adapters and controllers.
        training: How they are trained.
        observation: What is encoded, with the longest instruction.
    """

    policy: SkippablePolicy
    plan: SkipPlan
    heads: HeadsConfig
    training: DistillConfig
    observation: Observation

    def estimate(self, *, is_checkpointed: bool, is_measured: bool = False) -> Estimate:
        """Rehearse a step of each stage.

        Args:
            is_checkpointed: Whether activations of the backbone are computed again in backward.
            is_measured: Whether the policy is loaded, and its real tensors are used where it is.
        """
        fakes = contextlib.nullcontext() if is_measured else FakeTensorMode(allow_non_fake_inputs=True)
        forget_shares()  # what is kept between calls must not be mixed with tensors without content
        try:
            with fakes, torch.inference_mode(False):
                return self._estimate(is_checkpointed, is_measured)
        finally:
            forget_shares()

    def _estimate(self, is_checkpointed: bool, is_measured: bool) -> Estimate:
        policy, training = self.policy, self.training
        modules: nn.Module = policy if isinstance(policy, nn.Module) else policy.layers
        if not is_measured:
            _drop_content(modules)
        modules.requires_grad_(False)
        with next(policy.layers.parameters()).device:
            heads = SkipHeads(self.plan, self.heads)
        with mixed_precision(policy.layers):
            skipper = attach(policy.layers, self.plan, heads, followers=policy.followers)
        trainer = _Rehearsed(skipper, policy.act, policy.spec.execute_steps, training, is_checkpointed=is_checkpointed)
        trainer.worst = worst_exits(self.plan, training)
        _begin_optimizer(trainer)
        weights = [*modules.parameters(), *modules.buffers()]
        ledger = _Ledger([*weights, *heads.parameters(), *tree_leaves(list(trainer.optimizer.state.values()))])
        try:
            # Encode a batch.
            with ledger.counting(), torch.no_grad():
                states = [policy.reset() for _ in range(BATCH)]
                items = policy.encode([self.observation] * BATCH, states)
            batch = policy.collate([items[row % BATCH] for row in range(training.batch)])
            encoding = ledger.phase(ENCODING, 0)
            # Ask the full model, then train a step of each stage.
            answer, phases = self._steps(trainer, ledger, batch)
        finally:
            skipper.detach()
        backbone = list(policy.layers.parameters())
        return Estimate(
            backbone=_nbytes(backbone),
            rest=_nbytes(weights) - _nbytes(backbone),
            backbone_weights=sum(p.numel() for p in backbone),
            trained=sum(p.numel() for p in heads.parameters()),
            shape=tuple(answer.targets[0].shape),
            frame=_nbytes(items[0], is_shared=False),
            answer=_nbytes([answer.actions, answer.targets]) // training.batch,
            encoding=encoding.forward / BATCH,
            phases=(encoding, *phases),
            is_checkpointed=is_checkpointed,
            is_measured=is_measured,
        )

    def _steps(
        self, trainer: _Rehearsed, ledger: _Ledger, batch: tuple[Any, Tensor | None]
    ) -> tuple[FullModelAnswer, tuple[Phase, ...]]:
        """Rehearse all parts of the training on one batch."""
        training = self.training
        ledger.ignore(batch)
        with ledger.counting():
            answer = trainer.answer(batch)
        targets = [answer.actions, answer.targets]
        phases = [ledger.phase(ANSWER, _nbytes(batch))]
        ledger.ignore(targets)
        if training.adapter_steps:
            with ledger.counting():
                trainer.update(batch, None, trainer.rng())
            phases.append(ledger.phase(STAGE_1, _nbytes(batch)))
        trainer.step = training.adapter_steps
        with ledger.counting():
            trainer.update(batch, answer, trainer.rng())
        measured = ledger.phase(STAGE_2, _nbytes([batch, targets]))
        return answer, (*phases, self._averaged(trainer, measured, phases[0].forward))

    def _averaged(self, trainer: HeadsTrainer, worst: Phase, full: float) -> Phase:
        """Replace the operations of the worst exits by those of the exits that are drawn, on average."""
        is_mixture, depth = self.training.objective == "mixture", self.plan.num_layers
        rngs = [np.random.default_rng([self.training.seed, step]) for step in range(DRAWS)]
        draws = [HeadsTrainer.draw_exits(trainer, rng) for rng in rngs]
        run, learnt = np.mean([_layers(self.plan, exits, is_mixture) for exits in draws], axis=0)
        run_at_worst, learnt_at_worst = _layers(self.plan, worst_exits(self.plan, self.training), is_mixture)
        return Phase(
            name=worst.name,
            inputs=worst.inputs,
            activations=worst.activations,
            peak=worst.peak,
            forward=worst.forward - (run_at_worst - run) * full / depth,
            backward=worst.backward * learnt / learnt_at_worst,
        )


class _Rehearsed(HeadsTrainer):
    """A trainer that leaves blocks where that needs the most memory."""

    worst: Exits = ()

    def draw_exits(self, rng: np.random.Generator) -> list[int | None]:
        return list(self.worst) if self.worst else super().draw_exits(rng)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Counts the bytes of all tensors that are alive, and floating-point operations.

    Args:
        known: Tensors that do not count: weights, and what lies ready before a step.

    Attributes:
        live: Bytes that are alive.
        peak: The most that were alive at once.
        kept: Bytes that were alive when backward began.
        forward: Floating-point operations before backward.
        backward: Floating-point operations in backward.
    """

    def __init__(self, known: Sequence[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.kept: int | None = None
        self.forward = self.backward = 0.0
        self.ignore(known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _number(args[0])
        is_backward = torch._C._current_graph_task_id() >= 0
        if is_backward and self.kept is None:
            self.kept = self.live
        output = func(*args, **(kwargs or {}))
        operations = OPERATIONS.get(func._overloadpacket)
        if operations is not None:
            count = operations(*args, **(kwargs or {}), out_val=output)
            self.forward += 0 if is_backward else count
            self.backward += count if is_backward else 0
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._add(value)
        return output

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count anew, from what is alive, in the body."""
        before = self.live
        self.peak, self.kept, self.forward, self.backward = before, None, 0.0, 0.0
        with self:
            yield
        self.peak -= before
        self.kept = None if self.kept is None else self.kept - before

    def phase(self, name: str, inputs: int) -> Phase:
        """Return what was counted last."""
        return Phase(name, inputs, self.kept or 0, self.peak, self.forward, self.backward)

    def ignore(self, tensors: object) -> None:
        """Count tensors no longer."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._add(tensor)
                self.live -= self._sizes[tensor.untyped_storage()._cdata]
                self._sizes[tensor.untyped_storage()._cdata] = 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # views share it
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def worst_exits(plan: SkipPlan, training: DistillConfig) -> Exits:
    """Return the exits, of those that may be drawn, with which the most layers are kept for backward."""
    choices = [plan.exits_of(block) for block in plan.blocks]
    first = next(number for number, layers in enumerate(choices) if layers)
    drawn: list[Exits] = []
    if training.joint_exit_prob < 1:
        rest = [layers[-1] if layers and not training.keep_block_prob else None for layers in choices]
        drawn.append([layers[0] if number == first else rest[number] for number, layers in enumerate(choices)])
    if training.joint_exit_prob > 0:
        ranks = range(max(map(len, choices)))
        drawn += [[layers[rank] if rank < len(layers) else None for layers in choices] for rank in ranks]
    return max(drawn, key=lambda exits: _layers(plan, exits, training.objective == "mixture")[1])


def _layers(plan: SkipPlan, exits: Exits, is_mixture: bool) -> tuple[int, int]:
    """Return how many layers run, and how many of them lie behind an adapter, so that backward passes them."""
    pairs = [(place, block.target) for place, block in zip(exits, plan.blocks, strict=True) if place is not None]
    skipped = set() if is_mixture else {layer for place, target in pairs for layer in range(place, target)}
    landing = min(target for _, target in pairs)
    run = set(range(plan.num_layers)) - skipped
    return len(run), len([layer for layer in run if layer >= landing])


def _drop_content(module: nn.Module) -> None:
    """Replace a module's parameters and buffers by tensors of the same shape without content."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    made[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment] # of its kind


def _begin_optimizer(trainer: HeadsTrainer) -> None:
    """Give the optimizer the state that it has when all heads have been trained."""
    for parameter in trainer.parameters.values():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        trainer.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def _number(tensor: Tensor) -> float | int | bool:
    """Return a number for a tensor without content: what a mask without padding, or a loss, may be."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _nbytes(tensors: object, *, is_shared: bool = True) -> int:
    """Count the bytes of tensors, those that share memory once; without `is_shared`, of the parts that they are."""
    found = [tensor for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]
    if not is_shared:
        return sum(tensor.nbytes for tensor in found)
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in found)}.values())


def _attention_forward(query: Tensor, key: Tensor, *_: object, products: int = 2, **__: object) -> int:
    """Return the operations of products of all queries with all keys, (batch, heads, tokens, width)."""
    return products * 2 * query.numel() * key.shape[-2]


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, *__: object, **___: object) -> int:
    return _attention_forward(query, key, products=5)  # the scores are computed again


OPERATIONS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operator to what counts its operations; PyTorch does not know attention on a CPU."""
