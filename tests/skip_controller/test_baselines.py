from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.baselines import (
    METHODS,
    BaselineConfig,
    BaselineRunner,
    BaselineTrainer,
    BaselineTrainingConfig,
    Pass,
    make_baseline,
)
from dysl_vla.skip_controller.baselines.running import dial_for

SIZES = BaselineConfig("deer", 6, 16, 4, 2, 2, layers=4, adapter_size=16)
BRIEF = BaselineTrainingConfig(steps=150, batch=16, learning_rate=1e-2, warmup=5)


class World:
    """A random decoder, a read-out and inputs."""

    def __init__(self, method: str, layers: float = 4) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=10,
            hidden_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
        )
        self.model = LlamaModel(config).eval().requires_grad_(False)
        self.read_out = torch.nn.Linear(16, 8).requires_grad_(False)
        self.baseline = make_baseline(replace(SIZES, method=method, layers=layers))
        self.runner = BaselineRunner(self.model.layers, self.baseline)
        self.inputs = torch.randn(16, 5, 16, generator=torch.Generator().manual_seed(1))

    def act(self, inputs: Any, _: object = None) -> Tensor:
        return self.read_out(self.model(inputs_embeds=inputs).last_hidden_state[:, -1]).view(-1, 4, 2)

    def infer(self, row: int, dial: float) -> tuple[Tensor, list[int]]:
        with torch.no_grad(), self.runner.running(Pass(dial)) as one:
            actions = self.act(self.inputs[row : row + 1])
        return actions if one.actions is None else one.actions, one.layers_run

    def trainer(self) -> BaselineTrainer:
        return BaselineTrainer(self.runner, self.act, 2, 3, BRIEF)


@pytest.mark.parametrize("method", METHODS)
def test_outside_of_a_pass_the_decoder_is_the_full_one_and_detaching_restores_it(method: str) -> None:
    world = World(method)
    wrapped = world.act(world.inputs)
    world.infer(0, 0.5)
    torch.testing.assert_close(world.act(world.inputs), wrapped, rtol=0, atol=0)
    world.runner.detach()
    torch.testing.assert_close(world.act(world.inputs), wrapped, rtol=0, atol=0)
    assert "forward" not in world.model.layers[0].__dict__


@pytest.mark.parametrize("method", METHODS)
def test_the_first_layer_always_runs_and_layers_run_in_order(method: str) -> None:
    world = World(method)
    for dial in (0.0, 0.4, 1.0, 3.0, 6.0):
        for row in range(4):
            _, ran = world.infer(row, dial)
            assert ran[0] == 0
            assert ran == sorted(set(ran))


@pytest.mark.parametrize(("method", "dial"), [("flexidepth", 0.0), ("mole", 6.0)])
def test_with_every_layer_it_is_the_full_model(method: str, dial: float) -> None:
    world = World(method)
    actions, ran = world.infer(3, dial)
    assert ran == list(range(6))
    torch.testing.assert_close(actions, world.act(world.inputs[3:4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_layers_run_with_the_dial_that_means_fewer(method: str) -> None:
    world = World(method)
    dials = [0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 4.0]
    dials = list(range(1, 7))[::-1] if METHODS[method] is METHODS["mole"] else dials
    counts = [sum(len(world.infer(row, dial)[1]) for row in range(8)) for dial in dials]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("method", METHODS)
def test_training_brings_actions_to_the_full_models_and_leaves_the_decoder_alone(method: str) -> None:
    world = World(method)
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    trainer = world.trainer()
    batch = (world.inputs, None)
    answer = trainer.answer(batch)
    losses = [trainer.update(batch, answer)["loss"] for _ in range(BRIEF.steps)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(torch.equal(value, before[name]) for name, value in world.model.state_dict().items())
    assert all(parameter.grad is not None for parameter in trainer.parameters.values())


def test_flexidepth_learns_to_run_as_many_layers_as_it_shall() -> None:
    for layers in (2.0, 5.0):
        world = World("flexidepth", layers)
        trainer = world.trainer()
        batch = (world.inputs, None)
        answer = trainer.answer(batch)
        for _ in range(300):
            trainer.update(batch, answer)
        with torch.no_grad(), world.runner.running(Pass(0.5, is_training=True)) as one:
            world.act(world.inputs)
        assert 1 + float(torch.stack(one.terms).sum(dim=0).mean()) == pytest.approx(layers, abs=0.5)


def test_mole_runs_as_many_layers_as_its_dial_says() -> None:
    world = World("mole")
    for count in range(1, 7):
        assert len(world.infer(2, count)[1]) == count


def test_deer_leaves_where_two_exits_agree() -> None:
    world = World("deer")
    _, ran = world.infer(0, 1e9)
    assert ran == [0, 1, 2, 3]  # the exits are behind 1, 3 and 5, and two are needed
    _, ran = world.infer(0, 0.0)
    assert ran == list(range(6))


@pytest.mark.parametrize("wanted", [1.0, 2.5, 7.0, 9.9])
def test_the_dial_is_the_smallest_that_runs_few_enough(wanted: float) -> None:
    def measure(dial: float) -> float:
        return 10 - 9 * dial

    dial = dial_for(wanted, 0.0, 1.0, measure)
    assert measure(dial) <= wanted
    assert measure(dial) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "method must be one of deer, flexidepth, mole"),
        ({"layers": 7}, "layers must be from 1 to"),
        ({"layers": 3}, "layers must be at least 4 for deer"),
        ({"method": "mole", "layers": 2.5}, "layers must be a whole number for mole"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SIZES, **changes)
    refused: list[Callable[[], object]] = [
        lambda: BaselineTrainingConfig(steps=0),
        lambda: BaselineTrainingConfig(learning_rate=0),
        lambda: BaselineTrainingConfig(executed_weight=2),
    ]
    for make in refused:
        with pytest.raises(ConfigError):
            make()
