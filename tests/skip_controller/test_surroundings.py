"""What surrounds an attached decoder: threads, hooks, copies, compilers, checkpointing, quantisers, other decoders."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import SkipHeads, Skipper, attach, detach
from dysl_vla.skip_controller.decoders import MARK, find_all_layers, find_layers, padding
from dysl_vla.skip_controller.torch_backend import Forward, TorchBackend
from tests.skip_controller.test_architectures import forced
from tests.skip_controller.tiny_models import ARCHITECTURES, PLAN, WIDTH, inputs_of, layers_removed, make, make_heads

LLAMA = ARCHITECTURES[0]
BY_NAME = {one.name: one for one in ARCHITECTURES}
INPUTS = inputs_of(LLAMA, 2)
SKIPS = [[0, 0], [0, 0]]
JUMPS = {1: 3, 4: 5}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(**INPUTS, use_cache=False).logits
    return answer


def skipping(skipper: Skipper, model: nn.Module) -> Tensor:
    with forced(skipper, SKIPS):
        return logits(model)


@pytest.fixture
def model() -> nn.Module:
    return make(LLAMA)


@pytest.fixture
def expected(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The full model's answer, and that of the model without the layers that are skipped."""
    full = logits(model)
    with layers_removed(model, make_heads(LLAMA), JUMPS):
        return full, logits(model)


def assert_right(skipper: Skipper, model: nn.Module, expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(logits(model), expected[0])
    torch.testing.assert_close(skipping(skipper, model), expected[1])
    with forced(skipper, SKIPS) as step:
        logits(model)
    with skipper.verify(step):
        assert torch.equal(logits(model), expected[0])


def test_threads_get_their_own_answers(model: nn.Module, expected: tuple[Tensor, Tensor]) -> None:
    skipper = attach(model, PLAN, make_heads(LLAMA))
    wrong: list[object] = []

    def work(run: Callable[[], Tensor], answer: Tensor) -> None:
        for _ in range(25):
            try:
                if not torch.allclose(run(), answer, atol=1e-5):
                    wrong.append(run)
            except Exception as error:  # a thread's error is not the test's
                wrong.append(error)

    def verified() -> Tensor:
        with forced(skipper, SKIPS) as step:
            logits(model)
        with skipper.verify(step):
            return logits(model)

    jobs = [
        (partial(logits, model), expected[0]),
        (partial(skipping, skipper, model), expected[1]),
        (partial(skipping, skipper, model), expected[1]),
        (verified, expected[0]),
    ]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_of_another_thread_within_a_step_is_the_full_model(
    model: nn.Module, expected: tuple[Tensor, Tensor]
) -> None:
    skipper = attach(model, PLAN, make_heads(LLAMA))
    answers: list[Tensor] = []
    with forced(skipper, SKIPS) as step:
        thread = threading.Thread(target=lambda: answers.append(logits(model)))
        thread.start()
        thread.join()
        assert not step.is_decided
        torch.testing.assert_close(logits(model), expected[1])
    assert torch.equal(answers[0], expected[0])


def test_an_act_that_runs_its_layers_in_another_thread_is_refused(model: nn.Module) -> None:
    def act(_: Any, __: Forward) -> Tensor:
        thread = threading.Thread(target=logits, args=(model,))
        thread.start()
        thread.join()
        return torch.zeros(2, 1, 1)

    backend = TorchBackend(attach(model, PLAN, make_heads(LLAMA)), act, lambda *_: None, threshold=0.5)
    with pytest.raises(ConfigError, match="in the thread that calls it"):
        backend.run((INPUTS, None), np.zeros((2, 2), np.int64))


def test_the_layers_of_another_call_style_run_in_plain_and_recorded_forwards() -> None:
    class Plain(nn.Module):
        def forward(self, hidden: Tensor, past_key_values: Any = None, scale: float = 1.0) -> Tensor:
            return hidden * scale

    layers = nn.ModuleList(Plain() for _ in range(6))
    skipper = attach(layers, PLAN)
    hidden = torch.ones(1, 2, WIDTH)
    assert torch.equal(layers[0](hidden, None, scale=2.0), 2 * hidden)
    with skipper.record() as forwards:
        assert torch.equal(layers[0](hidden, None, scale=2.0), 2 * hidden)
    assert torch.equal(forwards[0][0], hidden)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 # of this test


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_is_attached_to_copies(
    model: nn.Module, expected: tuple[Tensor, Tensor], copied: Callable[[Any], Any]
) -> None:
    skipper = attach(model, PLAN, make_heads(LLAMA))
    twin = copied(model)
    other: Skipper = find_all_layers(twin).__dict__[MARK]
    assert_right(other, twin, expected)
    with torch.no_grad():
        for parameter in (*twin.parameters(), *other.heads.parameters()):  # type: ignore[union-attr]
            parameter.zero_()
    assert not torch.equal(logits(twin), expected[0])
    assert_right(skipper, model, expected)
    detach(twin)
    assert all("forward" not in layer.__dict__ for layer in find_all_layers(twin))
    both = copied((skipper, model)) if copied is not saved else (skipper, model)
    assert_right(*both, expected)


def test_a_copy_made_within_a_step_is_idle(model: nn.Module, expected: tuple[Tensor, Tensor]) -> None:
    skipper = attach(model, PLAN, make_heads(LLAMA))
    with forced(skipper, SKIPS):
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), expected[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    gradients = []
    for options in (None, {"use_reentrant": reentrant}):
        model, heads = make(LLAMA).train().requires_grad_(False), make_heads(LLAMA)
        if options is not None:
            model.gradient_checkpointing_enable(options)
        with attach(model, PLAN, heads).force_exits([1, 4]):
            loss = model(**INPUTS, use_cache=False).logits.square().sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in heads.named_parameters() if p.grad is not None})
    assert {name for name in gradients[0] if "adapters.1" in name} == {
        "adapters.1.down.weight",
        "adapters.1.down.bias",
        "adapters.1.up",
    }
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_checkpointing_around_whole_layers_is_refused_where_it_would_lose_gradients(model: nn.Module) -> None:
    embeds = torch.randn(1, 4, WIDTH, requires_grad=True)
    with attach(model, PLAN, make_heads(LLAMA)).force_exits([1, None]), pytest.raises(ConfigError, match="reentrant"):
        checkpoint(lambda hidden: model(inputs_embeds=hidden, use_cache=False).logits, embeds, use_reentrant=True)


def hidden_names(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapped


def test_layers_behind_functions_that_hide_their_arguments_are_right(expected: tuple[Tensor, Tensor]) -> None:
    for wrap in (hidden_names, lambda forward: wraps(forward)(hidden_names(forward))):
        model = make(LLAMA)
        for layer in find_all_layers(model):
            layer.forward = wrap(layer.forward)
        skipper = attach(model, PLAN, make_heads(LLAMA))
        assert_right(skipper, model, expected)
        skipper.detach()
        assert all("forward" in layer.__dict__ for layer in find_all_layers(model))


@pytest.mark.parametrize("when", ["before, as modules", "before, in place", "before, as functions", "after, in place"])
def test_compiled_layers_are_right(expected: tuple[Tensor, Tensor], when: str) -> None:
    model = make(LLAMA)
    layers = find_all_layers(model)
    skipper = attach(model, PLAN, make_heads(LLAMA)) if when.startswith("after") else None
    for index in (3,) if when.endswith("place") else (1, 3):  # in place, it takes seconds a layer
        layer = layers[index]
        if when.endswith("modules"):
            layers[index] = torch.compile(layer, backend="eager")
        elif when.endswith("functions"):
            layer.forward = torch.compile(layer.forward, backend="eager")
        else:
            layer.compile(backend="eager")
    skipper = skipper or attach(model, PLAN, make_heads(LLAMA))
    assert_right(skipper, model, expected)
    torch.compiler.reset()


def test_layers_that_name_no_argument_or_too_few_are_refused() -> None:
    class Nameless(nn.Module):
        def forward(self, *hidden: Tensor) -> Tensor:
            return hidden[0]

    class Tail(nn.Module):
        def forward(self, hidden: Tensor, *others: Tensor) -> Tensor:
            return hidden + sum(others)

    layers = nn.ModuleList(Nameless() for _ in range(6))
    with pytest.raises(ConfigError, match="forward of Nameless"):
        attach(layers, PLAN)
    with pytest.raises(ConfigError, match="forward of Nameless"):
        attach(nn.ModuleList(Tail() for _ in range(6)), PLAN, followers=[layers])
    tails = nn.ModuleList(Tail() for _ in range(6))
    with (
        pytest.raises(ConfigError, match="names 1, and is called with 2"),
        forced(attach(tails, PLAN, make_heads(LLAMA)), [[0, 0]]),
    ):
        tails[0](torch.ones(1, 2, WIDTH), torch.ones(1, 2, WIDTH))
    with pytest.raises(ConfigError, match="in the list once"):
        attach(nn.ModuleList([Tail()] * 6), PLAN)


def test_hooks_may_wrap_the_forward_but_not_lose_it(expected: tuple[Tensor, Tensor]) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make(LLAMA)
    layers = find_all_layers(model)
    skipper = attach(model, PLAN, make_heads(LLAMA))
    for change in (lambda layer: hooks.add_hook_to_module(layer, hooks.ModelHook()), hooks.remove_hook_from_module):
        for layer in layers:
            change(layer)
        assert_right(skipper, model, expected)
    skipper.detach()
    hooks.add_hook_to_module(layers[3], hooks.ModelHook())
    skipper = attach(model, PLAN, make_heads(LLAMA))
    assert_right(skipper, model, expected)
    hooks.remove_hook_from_module(layers[3])  # puts back what was there before attach
    for mode in (skipper.record, partial(forced, skipper, SKIPS), partial(skipper.force_exits, [1, None])):
        with pytest.raises(ConfigError, match="replaced since"), mode():
            pass
    skipper.detach()
    skipper = attach(model, PLAN, make_heads(LLAMA))
    assert_right(skipper, model, expected)
    layers[2] = copy.deepcopy(layers[2])
    with pytest.raises(ConfigError, match="replaced since"):
        skipping(skipper, model)


def test_offloaded_weights_are_fetched_and_absent_ones_refused(expected: tuple[Tensor, Tensor]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(make(LLAMA), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in find_all_layers(model).parameters()} == {"meta"}
    assert_right(attach(model, PLAN, make_heads(LLAMA)), model, expected)
    with pytest.raises(ConfigError, match="device meta"):
        attach(make(LLAMA).to("meta"), PLAN, make_heads(LLAMA))


def quantised_by_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quantised_by_bitsandbytes(bits: int, model: nn.Module) -> None:
    parts = pytest.importorskip("bitsandbytes").nn
    for layer in find_all_layers(model):
        for part in (layer.self_attn, layer.mlp):
            for name, old in list(part.named_children()):
                if isinstance(old, nn.Linear):
                    size = (old.in_features, old.out_features)
                    new = parts.Linear8bitLt(*size, bias=False, has_fp16_weights=False) if bits == 8 else None
                    new = new or parts.Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16)
                    kind = partial(parts.Int8Params, has_fp16_weights=False) if bits == 8 else parts.Params4bit
                    new.weight = kind(old.weight.detach().half(), requires_grad=False)
                    setattr(part, name, new.to("cpu"))


@pytest.mark.parametrize(
    "quantise", [quantised_by_torchao, partial(quantised_by_bitsandbytes, 8), partial(quantised_by_bitsandbytes, 4)]
)
@torch.inference_mode()
def test_weights_of_eight_and_four_bits_skip_in_the_dtype_of_their_norms(quantise: Callable[[nn.Module], None]) -> None:
    model = make(LLAMA).bfloat16()
    quantise(model)
    full, heads = logits(model), make_heads(LLAMA).bfloat16()
    with layers_removed(model, heads, JUMPS):
        removed = logits(model)
    with pytest.raises(ConfigError, match=r"dtype torch.bfloat16, got torch.float32; use heads.to\(torch.bfloat16\)"):
        attach(model, PLAN, make_heads(LLAMA))
    assert_right(attach(model, PLAN, heads), model, (full, removed))


@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_weights_that_torch_itself_packed_as_int8_skip_too() -> None:
    plain = make(LLAMA)
    quantize = torch.ao.quantization.quantize_dynamic  # type: ignore[attr-defined]
    model = quantize(plain, {nn.Linear}, dtype=torch.qint8)
    assert not any(parameter.ndim > 1 for parameter in find_all_layers(model).parameters())  # norms alone are left
    full, heads = logits(model), make_heads(LLAMA)
    assert (full - logits(plain)).abs().max() > 0
    with layers_removed(model, heads, JUMPS):
        removed = logits(model)
    assert_right(attach(model, PLAN, heads), model, (full, removed))


def test_weights_of_one_byte_do_not_tell_the_dtype(model: nn.Module, expected: tuple[Tensor, Tensor]) -> None:
    for layer in find_all_layers(model):
        codes = torch.ones(2, 2, dtype=torch.uint8)  # parameters of the layer come before those of its parts
        layer.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
        layer.register_parameter("scales", nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn)))
    assert_right(attach(model, PLAN, make_heads(LLAMA)), model, expected)
    detach(model)
    with pytest.raises(ConfigError, match=r"dtype torch\.float32, got torch\.float16"):
        attach(model, PLAN, make_heads(LLAMA).half())


def test_the_language_model_of_a_whole_vlm_is_found_and_ambiguity_is_refused_by_name() -> None:
    model: Any = make(BY_NAME["Qwen2.5-VL"])
    blocks = model.model.visual.blocks
    for _ in range(8):
        blocks.append(copy.deepcopy(blocks[0]))
    layers = model.model.language_model.layers
    assert find_all_layers(model) is layers
    with pytest.raises(ConfigError, match=r"num_layers must be a depth .* \[6\]; the plan has 10"):
        find_layers(model, 10)
    both = nn.ModuleDict({"vision": nn.Sequential(blocks), "text": nn.Sequential(layers)})
    with pytest.raises(ConfigError, match=r"got 2, vision.0 \(10 layers\), text.0 \(6 layers\)"):
        find_all_layers(both)
    both.config = model.config
    assert find_all_layers(both) is layers


@torch.inference_mode()
def test_what_a_model_adds_between_layers_does_not_reach_rows_on_their_way() -> None:
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
    heads = make_heads(LLAMA)
    skipper = attach(layers, PLAN, heads)

    def run(hidden: Tensor, added: list[float], grow: int = 0) -> Tensor:
        for layer, more in zip(layers, added, strict=True):
            hidden = layer(hidden)[:, grow:] + more
        return hidden

    hidden = torch.randn(2, 4, WIDTH)
    with forced(skipper, [[0, 99], [99, 99]]):
        actual = run(hidden, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    first = layers[0](hidden) + 1
    landed = heads.adapters["1"](first[:1])
    whole = layers[2](layers[1](first[1:]) + 2) + 3
    expected = torch.cat([landed, whole])
    for index in (3, 4, 5):
        expected = layers[index](expected) + index + 1
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ConfigError, match="changes the shape"), forced(skipper, [[0, 99], [99, 99]]):
        run(hidden, [0.0] * 6, grow=1)
    with pytest.raises(ConfigError, match="in order and once"), forced(skipper, [[0, 99], [99, 99]]):
        layers[2](layers[0](hidden))


@torch.inference_mode()
def test_a_decision_copies_from_the_device_once_an_exit_and_never_where_guidance_decided(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipper = attach(model, PLAN, make_heads(LLAMA))
    copies: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            copies.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    def count(points: list[list[int]], **options: Any) -> list[str]:
        embeds = torch.zeros(2, 4, WIDTH)
        copies.clear()
        with skipper.step(np.array(points), threshold=2.0, **options):
            for layer in skipper.layers:
                embeds = layer(embeds, position_embeddings=rotary)
        return list(copies)

    rotary = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    assert count([[0, 0], [99, 0]]) == ["tolist"] * 3  # exits 1, 2 and 4
    assert count([[99, 99]] * 2) == []
    hidden_by = torch.ones(2, 4, device="meta")  # as on an accelerator, its values cannot be asked for
    assert padding(hidden_by) is hidden_by
    assert count([[0, 0], [99, 0]], force_skip=True) == []


def test_heads_of_another_device_or_dtype_than_their_layer_are_refused(model: nn.Module) -> None:
    for part in ("adapters", "controllers"):
        heads: SkipHeads = make_heads(LLAMA)
        getattr(heads, part)["2"].half()
        with pytest.raises(ConfigError, match=r"dtype torch\.float32, got torch\.float16"):
            attach(model, PLAN, heads)
        getattr(heads, part)["2"].float()
        getattr(heads, part)["4"].to("meta")
        with pytest.raises(ConfigError, match="device cpu at layer 4, got meta"):
            attach(model, PLAN, heads)
