"""Any Hugging Face decoder, tiny and random: exact when nothing is skipped, each row for itself when something is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MptConfig,
    MptModel,
    Qwen2Config,
    Qwen2Model,
    SmolVLMConfig,
)

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan, attach, detach

DEPTH, WIDTH, VOCABULARY = 6, 32, 50
POINTS = st.tuples(st.integers(0, 3), st.integers(0, 3))
PLAN = SkipPlan(num_layers=DEPTH, static_layers=(0, 3, 5))
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def smolvlm() -> nn.Module:
    text = SmolVLMConfig().text_config.__class__(**COMMON, num_key_value_heads=2)
    return AutoModel.from_config(text)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaModel(LlamaConfig(**COMMON)),
    "mpt": lambda: MptModel(
        MptConfig(d_model=WIDTH, n_heads=4, n_layers=DEPTH, vocab_size=VOCABULARY, max_seq_len=64, expansion_ratio=2)
    ),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**COMMON, num_key_value_heads=2)),
    "gemma": lambda: GemmaModel(GemmaConfig(**COMMON, num_key_value_heads=2, head_dim=8)),
    "smolvlm": smolvlm,
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ARCHITECTURES[name]().eval()


def make_heads(plan: SkipPlan = PLAN, width: int = WIDTH) -> SkipHeads:
    torch.manual_seed(1)
    heads = SkipHeads(plan, HeadsConfig(width, adapter_size=8, controller_size=4))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    return heads.eval()


def batch(rows: int, tokens: int = 7) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))


def mask(rows: int, tokens: int, side: str) -> torch.Tensor:
    ones = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        padding = row % 3
        if padding:
            ones[row, slice(0, padding) if side == "left" else slice(tokens - padding, tokens)] = 0
    return ones


@pytest.mark.parametrize(
    ("static_layers", "exits"),
    [((0, 3, 5), ()), ((0, 3), ()), ((5,), ()), ((1, 3), ()), ((0, 5), (3,)), ((0, 3, 5), (4,)), ((0, 2, 5), (1, 4))],
)
def test_a_plans_shortest_path_is_what_runs_when_all_controllers_skip(
    static_layers: tuple[int, ...], exits: tuple[int, ...]
) -> None:
    plan = SkipPlan(DEPTH, static_layers, exits)
    model = make("llama")
    skipper = attach(model, plan, make_heads(plan))
    with torch.no_grad(), skipper.step(np.zeros((1, len(plan.blocks)), np.int64), threshold=-1.0) as step:
        model(input_ids=batch(1))
    assert tuple(np.flatnonzero(step.layers_run[0])) == plan.shortest_path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attaching_changes_no_bit(name: str, side: str, cached: bool) -> None:
    model = make(name)
    inputs = {"input_ids": batch(3), "use_cache": cached}
    if side != "none":
        inputs["attention_mask"] = mask(3, 7, side)
    names = list(model.state_dict())
    before = model(**inputs).last_hidden_state
    skipper = attach(model, PLAN, make_heads())
    with torch.inference_mode():
        assert torch.equal(model(**inputs).last_hidden_state, before)
        with skipper.step(np.full((3, 2), 99)) as step:
            assert torch.equal(model(**inputs).last_hidden_state, before)
    assert step.layers_run.all()
    assert list(model.state_dict()) == names
    skipper.detach()
    assert all("forward" not in layer.__dict__ for layer in skipper.layers)
    assert torch.equal(model(**inputs).last_hidden_state, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attaching_changes_no_gradient(name: str) -> None:
    gradients = []
    for attached in (False, True):
        model = make(name).train()
        if attached:
            attach(model, PLAN, make_heads())
        torch.manual_seed(5)
        model(input_ids=batch(2)).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skip_jumps_over_the_adapter_to_the_static_layer(name: str) -> None:
    """Against the same computation written out layer by layer."""
    model, heads = make(name), make_heads()
    ids = batch(1)
    with torch.no_grad():
        inputs = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        skipper = attach(model, PLAN, heads)
        model(input_ids=ids, use_cache=False)
        with skipper.step(np.array([[1, 99]]), threshold=-1.0) as step:
            skipped = model(input_ids=ids, use_cache=False).last_hidden_state
        # Layers 0 and 1 ran, 2 was skipped: layer 3 got adapter_2 of layer 2's input.
        expected_input = heads.adapters["2"](inputs[2])
        step.first_skip, step.first_hidden = 3, expected_input
        with skipper.verify(step):
            expected = model(input_ids=ids, use_cache=False).last_hidden_state
    assert step.targets == [{2: 3}]
    assert step.layers_run.tolist() == [[True, True, False, True, True, True]]
    torch.testing.assert_close(skipped, expected)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(list(ARCHITECTURES)), data=st.data())
def test_a_rows_result_does_not_depend_on_its_neighbours(name: str, data: st.DataObject) -> None:
    model = make(name)
    skipper = attach(model, PLAN, make_heads())
    rows = data.draw(st.integers(2, 5))
    points = np.array(
        data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rows, max_size=rows))
    )
    threshold = data.draw(st.floats(0.2, 0.8))
    side = data.draw(st.sampled_from(["left", "right"]))
    ids, ones = batch(rows), mask(rows, 7, side)
    with torch.inference_mode():
        model(input_ids=ids)
        with skipper.step(points, threshold=threshold, mask=ones) as together:
            output = model(input_ids=ids, attention_mask=ones).last_hidden_state
        for row in range(rows):
            one = slice(row, row + 1)
            with skipper.step(points[one], threshold=threshold, mask=ones[one]) as alone:
                single = model(input_ids=ids[one], attention_mask=ones[one]).last_hidden_state
            nearest = min((abs(p - threshold) for p in together.outputs[row].values()), default=1.0)
            if nearest > 1e-4:  # a tie may fall either way
                assert alone.targets[0] == together.targets[row]
                real = ones[row].bool()
                torch.testing.assert_close(single[0][real], output[row][real], rtol=1e-4, atol=1e-4)
    skipper.detach()


def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    model = make("llama")
    skipper = attach(model, PLAN, make_heads())

    def asked(ones: torch.Tensor | None) -> tuple[list[dict[int, float]], list[torch.Tensor]]:
        points = np.full((2, len(PLAN.blocks)), 1)
        with torch.inference_mode(), skipper.step(points, threshold=1.0, mask=ones) as step:
            model(input_ids=batch(2))
        assert step.mask is (ones if ones is not None and not ones.all() else None)
        with skipper.force_exits([1, None], mask=ones) as forced:
            model(input_ids=batch(2))
        return step.outputs, list(forced.outputs.values())

    without, ones, hiding = asked(None), asked(torch.ones(2, 7)), asked(mask(2, 7, "left"))
    assert all(map(len, without[0]))
    assert ones[0] == without[0]
    assert torch.equal(ones[1][0], without[1][0])
    assert hiding[0] != without[0]
    assert not torch.equal(hiding[1][0], without[1][0])


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(list(ARCHITECTURES)), rows=st.integers(1, 4), data=st.data())
def test_resumed_verification_equals_the_full_model(name: str, rows: int, data: st.DataObject) -> None:
    model = make(name)
    points = np.array(
        data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rows, max_size=rows))
    )
    ids, ones = batch(rows), mask(rows, 7, "left")
    with torch.inference_mode():
        full = model(input_ids=ids, attention_mask=ones).last_hidden_state
        skipper = attach(model, PLAN, make_heads())
        model(input_ids=ids)
        with skipper.step(points, threshold=0.4, mask=ones) as step:
            model(input_ids=ids, attention_mask=ones)
        with skipper.verify(step):
            verified = model(input_ids=ids, attention_mask=ones).last_hidden_state
    assert torch.equal(verified, full)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_that_skip_cost_nothing_and_verification_runs_the_rest_alone(name: str) -> None:
    model = make(name)
    skipper = attach(model, PLAN, make_heads())
    seen: list[tuple[int, int]] = []
    for index, layer in enumerate(skipper.layers):
        for part in layer.children():
            part.register_forward_hook(
                lambda _, args, output, index=index: seen.append((index, len(args[0]))) if args else None
            )
    with torch.inference_mode():
        model(input_ids=batch(3))
        seen.clear()
        with skipper.step(np.array([[0, 99], [99, 99], [99, 99]]), threshold=-1.0) as step:
            model(input_ids=batch(3))
        rows = dict(seen)
        assert rows == {0: 3, 1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
        seen.clear()
        with skipper.verify(step):
            model(input_ids=batch(3))
        assert sorted({index for index, _ in seen}) == [1, 2, 3, 4, 5]


def test_decoding_keeps_the_decisions_of_its_prefill() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON)).eval()
    skipper = attach(model, PLAN, make_heads())
    ids = batch(3)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    points = np.array([[0, 0], [99, 0], [99, 99]])
    with torch.inference_mode():
        plain = model.generate(ids, **greedy)
        with skipper.step(points, threshold=-1.0) as step:
            output = model.generate(
                ids, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True
            )
        # A row that never skips decodes as without skipping; the others decode as they do alone.
        assert torch.equal(output.sequences[2], plain[2])
        for row in (0, 1):
            one = slice(row, row + 1)
            with skipper.step(points[one], threshold=-1.0):
                alone = model.generate(ids[one], **greedy)
            assert torch.equal(alone[0], output.sequences[row])
        with skipper.verify(step):
            assert torch.equal(model.generate(ids, **greedy), plain)
    assert step.targets == [{1: 3, 4: 5}, {4: 5}, {}]
    written = [layer.keys.shape[0] if layer.is_initialized else 0 for layer in output.past_key_values.layers]
    assert written == [3, 2, 2, 3, 1, 3]


def test_saving_does_not_notice(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, PLAN, make_heads())
    model.save_pretrained(tmp_path)
    again = LlamaModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_autocast_changes_nothing_about_exactness() -> None:
    model = make("llama")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=batch(2)).last_hidden_state
        skipper = attach(model, PLAN, make_heads())
        assert torch.equal(model(input_ids=batch(2)).last_hidden_state, before)
        with skipper.step(np.zeros((2, 2), np.int64), threshold=-1.0) as step:
            assert torch.isfinite(model(input_ids=batch(2)).last_hidden_state).all()
        with skipper.verify(step):
            assert torch.equal(model(input_ids=batch(2)).last_hidden_state, before)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match="the plan has 5"):
        attach(model, SkipPlan(num_layers=5, static_layers=(4,)))
    with pytest.raises(ConfigError, match=r"heads must have the decoder's width .* got 16"):
        attach(model, PLAN, make_heads(width=16))
    with pytest.raises(ConfigError, match="heads must be made for the plan"):
        attach(model, PLAN, make_heads(SkipPlan(num_layers=DEPTH, static_layers=(5,))))
    with pytest.raises(ConfigError, match="no list of layers"):
        attach(nn.Linear(2, 2), PLAN)
    with pytest.raises(ConfigError, match="not attached"):
        detach(model)
    with pytest.raises(ConfigError, match="heads must be of the decoder's dtype"):
        attach(model, PLAN, make_heads().half())
    skipper = attach(model, PLAN)
    with pytest.raises(ConfigError, match="already attached"):
        attach(model, PLAN)
    with pytest.raises(ConfigError, match="heads"), skipper.step(np.zeros((1, 2), np.int64)):
        pass
    detach(model)
    with pytest.raises(ConfigError, match="allow_points"), attach(model, PLAN, make_heads()).step(np.zeros((1, 3))):
        pass


def test_misuse_of_a_step_is_refused_and_not_answered_wrongly() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON)).eval()
    skipper = attach(model, PLAN, make_heads())
    points, ids = np.zeros((1, 2), np.int64), batch(1)
    with torch.inference_mode():
        with skipper.step(points, threshold=-1.0) as step:
            model(input_ids=ids, use_cache=False)
            with pytest.raises(ConfigError, match="another one is running"), skipper.verify(step):
                pass
            with pytest.raises(ConfigError, match="another one is running"), skipper.step(points):
                pass
            with pytest.raises(ConfigError, match="1 rows, the batch has 2"):
                model(input_ids=batch(2), use_cache=False)
        with pytest.raises(ConfigError, match="past_key_values"), skipper.verify(step):
            model(input_ids=ids, use_cache=True)
        with skipper.verify(step):
            model(input_ids=ids, use_cache=False)
        with pytest.raises(ConfigError, match="was verified before"), skipper.verify(step):
            pass
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="past_key_values"), skipper.step(points):
            model(input_ids=ids, past_key_values=cache)
        assert torch.isfinite(model(input_ids=ids).logits).all()  # nothing of it stays


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = make("llama")
    attach(model, PLAN, make_heads())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(input_ids=batch(1)).last_hidden_state, model(input_ids=batch(1)).last_hidden_state)


@pytest.mark.parametrize("static", [(5,), (2, 5)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_first_layer_that_is_dynamic_runs_all_the_same(name: str, static: tuple[int, ...]) -> None:
    plan = SkipPlan(num_layers=DEPTH, static_layers=static)
    model = make(name)
    skipper = attach(model, plan, make_heads(plan))
    with torch.inference_mode():
        outputs = []
        for _ in range(2):
            with skipper.step(np.zeros((2, len(plan.blocks)), np.int64), threshold=-1.0) as step:
                outputs.append(model(input_ids=batch(2), use_cache=True).last_hidden_state)
        assert torch.equal(*outputs)
    assert step.layers_run[:, 0].all()
    assert step.targets == [{target.first + (target.first == 0): target.target for target in plan.blocks}] * 2
