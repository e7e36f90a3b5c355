from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan, attach
from dysl_vla.skip_controller.closed_form import fit_adapters
from dysl_vla.skip_controller.heads_trainer import relative_error

PLAN = SkipPlan(num_layers=5, static_layers=(0, 4), exits=(1, 3))
HIDDEN = 12


def fitted(units: int, mask: Tensor | None = None) -> tuple[SkipHeads, Tensor, list[Tensor]]:
    """Heads fitted to a random decoder, their inputs, and the input of each layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=HIDDEN,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    model = LlamaModel(config).eval().requires_grad_(False)
    heads = SkipHeads(PLAN, HeadsConfig(HIDDEN, adapter_size=units, controller_size=4))
    skipper = attach(model, PLAN, heads)
    inputs = torch.randn(40, 9, HIDDEN, generator=torch.Generator().manual_seed(1))

    def act(embeds: object, _: object) -> Tensor:
        assert isinstance(embeds, Tensor)
        return model(inputs_embeds=embeds).last_hidden_state

    fit_adapters(skipper, act, [(part, None if mask is None else mask) for part in inputs.split(10)])
    with skipper.record() as forwards:
        act(inputs, None)
    return heads, inputs, forwards[0]


@pytest.mark.parametrize("layer", [1, 3])
def test_an_adapter_of_twice_the_width_is_the_least_squares_map(layer: int) -> None:
    heads, _, layers = fitted(2 * HIDDEN)
    rows = layers[layer].flatten(0, 1).double().numpy()
    wanted = (layers[4] - layers[layer]).flatten(0, 1).double().numpy()
    known = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    best, *_ = np.linalg.lstsq(known, wanted, rcond=None)
    with torch.no_grad():
        found = heads.adapters[str(layer)](layers[layer]) - layers[layer]
    np.testing.assert_allclose(found.flatten(0, 1).numpy(), known @ best, atol=0.02)


def test_more_units_are_better_and_all_are_better_than_nothing() -> None:
    errors = []
    for units in (2, 6, 12, 24):
        heads, _, layers = fitted(units)
        with torch.no_grad():
            errors.append(float((heads.adapters["1"](layers[1]) - layers[4]).square().mean()))
        nothing = float((layers[1] - layers[4]).square().mean())
    assert errors == sorted(errors, reverse=True)
    assert max(errors) < nothing
    assert errors[-1] < 0.7 * nothing


def test_padding_does_not_count() -> None:
    mask = torch.ones(10, 9, dtype=torch.long)
    mask[:, :4] = 0
    heads, _, layers = fitted(2 * HIDDEN, mask)
    with torch.no_grad():
        found = heads.adapters["1"](layers[1])
    whole, seen = (relative_error(found, layers[4], part) for part in (None, mask.repeat(4, 1)))
    assert seen < whole


def test_controllers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    heads, _, _ = fitted(4)
    assert all(parameter.abs().sum() > 0 for parameter in heads.controllers.parameters())
