from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller.layer_similarity import choose_static_layers, similarities


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=9), st.integers(2, 4), st.none() | st.integers(1, 5))
def test_no_other_choice_is_less_similar(values: list[float], count: int, longest: int | None) -> None:
    depth = len(values)
    similarity = np.array(values)
    limit = math.ceil((depth - count) / (count - 1)) if longest is None else longest

    def fits(chosen: tuple[int, ...]) -> bool:
        return all(b - a - 1 <= limit for a, b in itertools.pairwise(chosen))

    possible = [
        (0, *middle, depth - 1)
        for middle in itertools.combinations(range(1, depth - 1), count - 2)
        if fits((0, *middle, depth - 1))
    ]
    ratio = count / depth
    if not possible:
        with pytest.raises(ConfigError, match="longest_block"):
            choose_static_layers(similarity, ratio, longest)
        return
    chosen = choose_static_layers(similarity, ratio, longest)
    assert chosen in possible
    assert similarity[list(chosen)].sum() == pytest.approx(min(similarity[list(p)].sum() for p in possible))


def test_similarity_compares_what_a_layer_gets_with_what_it_gives() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=10, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.down_proj.weight.mul_(1000)
        # the second layer's output is its input
        model.layers[1].self_attn.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
    embeds = torch.randn(2, 4, 16)
    measured = similarities(model.layers, lambda: model(inputs_embeds=embeds))
    assert measured.shape == (3,)
    assert measured[1] == pytest.approx(1)
    assert max(measured[0], measured[2]) < 0.9


def test_similarity_finds_the_hidden_states_among_keywords() -> None:
    class Half(nn.Module):
        def forward(self, hidden: Tensor, other: Tensor) -> Tensor:
            return hidden + other

    layers = nn.ModuleList([Half()])
    hidden = torch.tensor([[[1.0, 0.0]]])
    measured = similarities(layers, lambda: layers[0](other=torch.tensor([[[0.0, 1.0]]]), hidden=hidden))
    assert measured[0] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_ratios_that_leave_nothing_to_skip_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="static_ratio"):
        choose_static_layers(np.ones(6), ratio)
