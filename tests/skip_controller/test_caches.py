"""Caches of any kind: a step's own is right within it, and refused where skips would make it wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, Skipper, SkipPlan, attach
from tests.skip_controller.test_architectures import NEW_TOKENS, forced, points_of
from tests.skip_controller.tiny_models import (
    ARCHITECTURES,
    DEPTH,
    SPECIAL,
    WIDTH,
    Architecture,
    decode_without_cache,
    inputs_of,
    jumps_of,
    layers_removed,
    make,
    make_heads,
    row_of,
)

BY_NAME = {one.name: one for one in ARCHITECTURES}
LLAMA = BY_NAME["Llama"]
CACHES: dict[str, Callable[[nn.Module], Any]] = {
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
    "dynamic, of layers that come as they run": lambda _: DynamicCache(),
}


def attached(architecture: Architecture = LLAMA) -> tuple[nn.Module, Skipper, dict[str, Tensor]]:
    model = make(architecture)
    return model, attach(model, architecture.plan, make_heads(architecture)), inputs_of(architecture, 2)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    tokens: Tensor = model.generate(
        **inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": SPECIAL} | options
    )
    return tokens


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["Llama", "Mistral, window of 4", "Gemma 3"])
@torch.inference_mode()
def test_caches_of_other_kinds_generate_and_verify_rightly(name: str, cache: str) -> None:
    architecture, new_cache = BY_NAME[name], CACHES[cache]
    model, skipper, inputs = attached(architecture)
    full = generate(model, inputs, past_key_values=new_cache(model))
    points, reference = points_of(architecture, 2), make(architecture)
    with forced(skipper, points) as step:
        actual = generate(model, inputs, past_key_values=new_cache(model))
    for row, one in enumerate(points):
        with layers_removed(reference, make_heads(architecture), jumps_of(architecture.plan, one)):
            expected = decode_without_cache(reference, row_of(architecture, inputs, row), NEW_TOKENS)
        assert actual[row].tolist() == expected[0].tolist()
    with skipper.verify(step):
        assert torch.equal(generate(model, inputs, past_key_values=new_cache(model)), full)


@torch.inference_mode()
def test_a_quantised_cache_is_verified_to_the_bit() -> None:
    model, skipper, inputs = attached()
    full = generate(model, inputs, past_key_values=QuantizedCache("fp8", model.config))
    with forced(skipper, points_of(LLAMA, 2)) as step:
        generate(model, inputs, past_key_values=QuantizedCache("fp8", model.config))
    with skipper.verify(step):
        assert torch.equal(generate(model, inputs, past_key_values=QuantizedCache("fp8", model.config)), full)


@torch.inference_mode()
def test_a_cache_with_skips_is_refused_outside_of_its_step() -> None:
    model, skipper, inputs = attached()
    more = {"input_ids": torch.tensor([[5], [6]])}
    with forced(skipper, points_of(LLAMA, 2)):
        cache = model(**inputs, use_cache=True).past_key_values
        model(**more, past_key_values=cache)
    with pytest.raises(ConfigError, match="another step"):
        model(**more, past_key_values=cache)
    with pytest.raises(ConfigError, match="another step"), skipper.record():
        model(**more, past_key_values=cache)
    with forced(skipper, points_of(LLAMA, 2)):
        model(**inputs, use_cache=True)
        with pytest.raises(ConfigError, match="another step"):
            model(**more, past_key_values=cache)
    with forced(skipper, [[99, 99]] * 2):  # nothing is left out
        cache = model(**inputs, use_cache=True).past_key_values
    model(**more, past_key_values=cache)


@pytest.mark.parametrize("cache", CACHES)
@torch.inference_mode()
def test_a_cache_that_was_reset_after_skips_is_as_new(cache: str) -> None:
    model, skipper, inputs = attached()
    full, one = generate(model, inputs), CACHES[cache](model)
    skips = [[1, 0]] * 2  # in all rows alike: a static cache that is reset keeps the number of rows of each layer
    for points in (skips, [[99, 99]] * 2, skips):  # one step skips nothing
        one.reset()
        with forced(skipper, points) as step:
            generate(model, inputs, past_key_values=one)
    one.reset()
    with skipper.verify(step):
        assert torch.equal(generate(model, inputs, past_key_values=one), full)
    for use in (nullcontext, skipper.record):
        one.reset()
        with forced(skipper, skips):
            generate(model, inputs, past_key_values=one)
        one.reset()
        with use():
            assert torch.equal(generate(model, inputs, past_key_values=one), full)
    one.reorder_cache(torch.tensor([1, 0]))


@torch.inference_mode()
def test_a_cache_is_not_new_where_only_layers_that_do_not_measure_it_hold_a_state() -> None:
    model = make(BY_NAME["LFM2"])
    plan = SkipPlan(DEPTH, (0, 5))  # layers 1 and 4, at which the cache is measured, can be skipped
    torch.manual_seed(1)
    skipper = attach(model, plan, SkipHeads(plan, HeadsConfig(WIDTH, adapter_size=8, controller_size=4)))
    cache, inputs = DynamicCache(config=model.config), inputs_of(BY_NAME["LFM2"], 1)
    with forced(skipper, [[0]]):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ConfigError, match="another step"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ConfigError, match="another step"), forced(skipper, [[0]]):
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.inference_mode()
def test_a_verification_that_failed_is_not_repeated(use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, skipper, inputs = attached()
    with forced(skipper, points_of(LLAMA, 2)) as step:
        model(**inputs, use_cache=use_cache)
    with monkeypatch.context() as patch, skipper.verify(step):
        patch.setattr(skipper.layers[3].mlp, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, use_cache=use_cache)
        with pytest.raises(ConfigError, match="run the step again"):
            model(**inputs, use_cache=use_cache)
    with pytest.raises(ConfigError, match="run the step again"), skipper.verify(step):
        model(**inputs, use_cache=use_cache)


@torch.inference_mode()
def test_beams_cannot_exchange_rows_that_skip() -> None:
    model, skipper, inputs = attached()
    one = row_of(LLAMA, inputs, 0)
    with forced(skipper, points_of(LLAMA, 2)), pytest.raises(ConfigError, match="num_beams=1"):
        generate(model, one, num_beams=2)
    plain = generate(model, one, num_beams=2)
    with forced(skipper, [[99, 99]] * 2):
        assert torch.equal(generate(model, one, num_beams=2), plain)


@torch.inference_mode()
def test_caches_that_a_step_cannot_keep_are_refused() -> None:
    model, skipper, inputs = attached()
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # made so, it needs a GPU
    for cache, reason in ((offloaded, "offload"), (object(), "must be a cache of transformers")):
        with pytest.raises(ConfigError, match=reason), forced(skipper, points_of(LLAMA, 2)):
            skipper.layers[0](torch.zeros(2, 3, 32), past_key_values=cache)
    with forced(skipper, points_of(LLAMA, 2)) as step:
        model(**inputs, use_cache=True)
    with pytest.raises(ConfigError, match="step's kind"), skipper.verify(step):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=20))


@torch.inference_mode()
def test_a_step_that_skipped_nothing_can_be_verified_while_tokens_are_generated() -> None:
    model, skipper, inputs = attached()
    with forced(skipper, [[99, 99]] * 2) as step:
        tokens = generate(model, inputs)
    with skipper.verify(step):
        assert torch.equal(generate(model, inputs), tokens)


def test_a_layer_whose_keys_others_read_must_be_static() -> None:
    gemma4 = BY_NAME["Gemma 4"]
    model = make(gemma4)
    plan = SkipPlan(DEPTH, (0, 1, 3, 5))
    with pytest.raises(ConfigError, match=r"static_layers must include \[2\], .* layers \[4, 5\] read"):
        attach(model, plan)
    for layer in model.model.layers:
        layer.self_attn.store_full_length_kv = False
    with pytest.raises(ConfigError, match="store_full_length_kv"):
        attach(model, plan)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


@torch.inference_mode()
def test_layers_that_hand_states_to_others_in_an_unknown_way_are_refused() -> None:
    _, skipper, _ = attached()
    with pytest.raises(ConfigError, match="by the argument notes"), forced(skipper, points_of(LLAMA, 2)):
        skipper.layers[0](torch.zeros(2, 3, 32), notes={})


@torch.inference_mode()
def test_masks_sized_at_a_layer_that_may_be_skipped_are_refused_with_a_cache_alone() -> None:
    architecture = BY_NAME["Gemma 3, first full layer dynamic"]
    model, skipper, inputs = attached(architecture)
    reason = r"static_layers must include layer 1 .* first layer of full attention"
    with pytest.raises(ConfigError, match=reason), forced(skipper, [[99, 99]] * 2):  # by its plan, whatever is skipped
        generate(model, inputs)
    with forced(skipper, points_of(architecture, 2)):
        assert generate(model, inputs, use_cache=False).shape == (2, 9 + NEW_TOKENS)
