from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from dysl_vla.errors import ConfigError
from dysl_vla.processes import Processes
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan, attach, detach
from dysl_vla.skip_controller.heads_trainer import DistillConfig, HeadsTrainer, mixed_precision, relative_error

T = TypeVar("T")
PLAN = SkipPlan(num_layers=6, static_layers=(0, 3, 5))


def make(
    objective: str = "tolerance",
    adapter_steps: int = 30,
    skip_steps: int = 60,
    joint_exit_prob: float = 0.75,
    plan: SkipPlan = PLAN,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[HeadsTrainer, LlamaModel]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32
    )
    model = LlamaModel(config).eval().requires_grad_(False).to(dtype)
    read_out = torch.nn.Linear(16, 8).requires_grad_(False).to(dtype)
    with mixed_precision(model):
        skipper = attach(model, plan, SkipHeads(plan, HeadsConfig(16, adapter_size=16, controller_size=8)))
    return (
        HeadsTrainer(
            skipper,
            lambda inputs, _: read_out(model(**inputs).last_hidden_state[:, -1]).view(-1, 4, 2),
            execute_steps=2,
            config=DistillConfig(
                adapter_steps,
                skip_steps,
                objective,
                batch=16,
                warmup=5,
                learning_rate=1e-2,
                hidden_weight=0.2,
                joint_exit_prob=joint_exit_prob,
            ),
        ),
        model,
    )


def run(trainer: HeadsTrainer, steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, float]]:
    data = torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    answer = trainer.answer(({"inputs_embeds": data}, None))
    figures = []
    for _ in range(steps):
        rng = trainer.rng()
        rows = torch.from_numpy(rng.integers(0, len(data), 16))
        some = type(answer)(answer.actions[rows], [target[rows] for target in answer.targets])
        figures.append(trainer.update(({"inputs_embeds": data[rows]}, None), some, rng))
    return figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["tolerance", "mixture"])
def test_both_stages_learn_in_float32_and_leave_the_backbone_alone(objective: str, dtype: torch.dtype) -> None:
    trainer, model = make(objective, dtype=dtype)
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    before = copy.deepcopy(model.state_dict())
    figures = run(trainer, 90, dtype)
    first, second = figures[:30], figures[30:]
    assert np.mean([f["loss"] for f in first[-5:]]) < 0.85 * np.mean([f["loss"] for f in first[:5]])
    assert np.mean([f["task_loss"] for f in second[-20:]]) < np.mean([f["task_loss"] for f in second[:20]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_stage_leaves_controllers_alone() -> None:
    trainer, _ = make()
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    run(trainer, 5)
    for name, value in trainer.parameters.items():
        assert torch.equal(value, before[name]) == name.startswith("controllers"), name


def test_the_second_stage_skips_one_layer_of_a_block_at_most_and_of_one_block_at_least() -> None:
    trainer, _ = make(adapter_steps=0)
    seen = set()
    for seed in range(200):
        places = trainer.draw_exits(np.random.default_rng(seed))
        for place, block in zip(places, PLAN.blocks, strict=True):
            assert place is None or block.first <= place < block.target
        assert places != [None, None]
        seen.add(tuple(places))
    assert len(seen) == 5  # left at 1, 2 or not at all, at 4 or not at all, but not both whole


def test_the_second_stage_can_leave_all_blocks_equally_deep() -> None:
    trainer, _ = make(adapter_steps=0, joint_exit_prob=1.0)
    drawn = {tuple(trainer.draw_exits(np.random.default_rng(seed))) for seed in range(50)}
    assert drawn == {(1, 4), (2, None)}  # the second block has one dynamic layer


def test_blocks_are_left_at_the_plans_exits_alone() -> None:
    trainer, _ = make(adapter_steps=0, plan=replace(PLAN, exits=(1, 4)))
    drawn = {tuple(trainer.draw_exits(np.random.default_rng(seed))) for seed in range(100)}
    assert drawn == {(1, 4), (1, None), (None, 4)}
    assert sorted(trainer._skipper.heads.adapters) == ["1", "4"]
    run(trainer, 3)
    with pytest.raises(ConfigError, match=r"exits must be among .* got 2"), trainer._skipper.force_exits([2, 4]):
        pass
    with pytest.raises(ConfigError, match="an exit after layer 0"):
        make(plan=SkipPlan(6, (1,)))


def test_a_mixture_that_never_skips_is_the_full_model() -> None:
    trainer, model = make()
    skipper = trainer._skipper
    data = torch.randn(3, 5, 16)
    full = model(inputs_embeds=data).last_hidden_state
    with torch.no_grad():
        for controller in skipper.heads.controllers.values():
            controller.out.bias.fill_(-100.0)
    with skipper.force_exits([1, 4], is_mixture=True):
        mixed = model(inputs_embeds=data).last_hidden_state
    torch.testing.assert_close(mixed, full)


def test_training_runs_what_inference_runs() -> None:
    trainer, model = make()
    run(trainer, 40)
    data = torch.randn(3, 5, 16)
    with torch.no_grad(), trainer._skipper.force_exits([2, 4]):
        trained = model(inputs_embeds=data).last_hidden_state
    with torch.no_grad(), trainer._skipper.step(np.array([[1, 0]] * 3), force_skip=True) as step:
        decreed = model(inputs_embeds=data).last_hidden_state
    assert step.targets == [{2: 3, 4: 5}] * 3
    assert step.outputs == [{}] * 3
    torch.testing.assert_close(trained, decreed)


@pytest.mark.parametrize("places", [[0, None], [3, None], [1, 5], [1]])
def test_exits_that_are_not_of_their_block_are_refused(places: list[int | None]) -> None:
    trainer, _ = make()
    with pytest.raises(ConfigError, match="exits"), trainer._skipper.force_exits(places):
        pass


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.0}, {"batch": 0}, {"quantile": 1.0}, {"objective": "x"}, {"layer_weight": -1.0}]
)
def test_values_that_cannot_work_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DistillConfig(**changes)


def test_padding_does_not_count() -> None:
    wanted = torch.ones(2, 3, 4)
    predicted = wanted.clone()
    predicted[0, 0] += 5  # padding
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert relative_error(predicted, wanted, mask) == 0
    assert relative_error(predicted, wanted) == pytest.approx(5 / 6)


class Half(Processes):
    """One of two processes, which are threads here, and each of which keeps its share of the rows."""

    count = 2
    slots: ClassVar[list[Any]] = [None, None]
    barrier = threading.Barrier(2, timeout=60)

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def exchange(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        for tensor, *both in zip(tensors, *self.exchange([tensor.clone() for tensor in tensors]), strict=True):
            tensor.copy_(sum(both) / 2)

    def gathered(self, values: Tensor) -> Tensor:
        return torch.cat(self.exchange(values))


def in_two(work: Callable[[HeadsTrainer, Processes], T], objective: str = "tolerance") -> list[T]:
    halves = [Half(0), Half(1)]
    trainers = [make(objective, adapter_steps=4, skip_steps=8)[0] for _ in halves]
    for trainer, half in zip(trainers, halves, strict=True):
        trainer._processes = half
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, trainers, halves))


def train_padded(trainer: HeadsTrainer, processes: Processes) -> dict[str, Tensor]:
    data = torch.randn(64, 7, 16, generator=torch.Generator().manual_seed(2))
    lengths = np.where(np.arange(64) < 32, 7, 2)  # rows are sorted, so that the second process has the padding
    mask = (torch.arange(data.shape[1]) >= data.shape[1] - torch.from_numpy(lengths)[:, None]).long()
    for _ in range(12):
        rng = trainer.rng()
        rows = processes.share(np.sort(rng.integers(0, len(data), 16)))
        batch = {"inputs_embeds": data[rows], "attention_mask": mask[rows]}, mask[rows]
        trainer.update(batch, trainer.answer(batch), rng)
    return {name: value.detach().clone() for name, value in trainer.parameters.items()} | {
        "tolerance": torch.tensor(trainer.tolerance)
    }


@pytest.mark.parametrize("objective", ["tolerance", "mixture"])
def test_two_processes_learn_what_one_does_also_where_one_has_more_padding(objective: str) -> None:
    whole = train_padded(make(objective, adapter_steps=4, skip_steps=8)[0], Processes())
    halves = in_two(train_padded, objective)
    for name, value in whole.items():
        assert torch.equal(halves[0][name], halves[1][name]), name
        torch.testing.assert_close(halves[0][name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name)


def test_a_loss_that_is_not_finite_in_one_process_ends_both_in_the_same_step() -> None:
    data = torch.randn(16, 5, 16)
    data[12] = torch.nan

    def work(trainer: HeadsTrainer, processes: Processes) -> int:
        rows = processes.share(np.arange(16))
        with pytest.raises(ConfigError, match="learning_rate must be lower: the loss is nan at step 0"):
            trainer.update(({"inputs_embeds": data[rows]}, None), None, trainer.rng())
        return trainer.step

    assert in_two(work) == [0, 0]


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("objective", ["tolerance", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(
    dtype: torch.dtype, objective: str, side: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, model = make(objective, adapter_steps=0, dtype=dtype)
    run(trainer, 2, dtype)  # an untrained adapter hides what is behind it
    batch: dict[str, Any] = {"inputs_embeds": torch.randn(3, 5, 16).to(dtype), "use_cache": False}
    mask = None
    if side is not None:
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[1, slice(0, 2) if side == "left" else slice(3, 5)] = 0
        batch["attention_mask"] = mask
    answer, ran = trainer.answer((batch, mask)), []
    original = model.layers[5].mlp.forward
    monkeypatch.setattr(model.layers[5].mlp, "forward", lambda hidden: (ran.append(0), original(hidden))[1])
    gradients = []
    for is_checkpointed in (False, True):
        ran.clear()
        trainer.is_checkpointed = is_checkpointed
        with mixed_precision(model):
            loss, _ = trainer._skip_loss((batch, mask), answer, np.random.default_rng(0))
        before = len(ran)
        gradients.append(torch.autograd.grad(loss, list(trainer.parameters.values()), allow_unused=True))
        assert len(ran) == before + is_checkpointed  # computed again, after the body of the mode
    assert any(g is not None and g.abs().sum() > 0 for g in gradients[0])
    for kept, computed_again in zip(*gradients, strict=True):
        assert kept is computed_again is None or torch.equal(kept, computed_again)


def test_a_decoder_that_would_write_its_cache_twice_is_not_checkpointed() -> None:
    trainer, model = make()
    with (
        trainer._skipper.force_exits([1, 4], is_checkpointed=True),
        pytest.raises(ConfigError, match=r"checkpointing must be off .* use_cache=False"),
    ):
        model(inputs_embeds=torch.randn(3, 5, 16))


def test_a_policy_without_gradients_in_the_second_stage_is_refused_by_its_cause() -> None:
    trainer, _ = make(adapter_steps=0)
    batch = {"inputs_embeds": torch.randn(3, 5, 16)}, None
    answer = trainer.answer(batch)
    trainer._act = torch.no_grad()(trainer._act)
    with pytest.raises(ConfigError, match=r"act must return actions with a gradient.*no_grad.*use_reentrant=False"):
        trainer.update(batch, answer, trainer.rng())


def test_heads_of_an_offloaded_decoder_learn_in_mixed_precision_where_it_runs() -> None:
    accelerate = pytest.importorskip("accelerate")
    _, model = make(dtype=torch.bfloat16)
    detach(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with mixed_precision(model) as context:
        attach(model, PLAN, SkipHeads(PLAN, HeadsConfig(16)))
    assert context.device == "cpu"
    with pytest.raises(ConfigError, match="device meta"):
        mixed_precision(torch.nn.Linear(2, 2, device="meta"))
