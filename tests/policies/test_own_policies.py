"""The contract of `SkippablePolicy`: four kinds of policies keep it, and what breaks it is refused at once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.deploy.export import ExportConfig, export
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import ConfigError, ObservationError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.policies import ComputeConfig, load_policy
from dysl_vla.policies.dysl import DyslPolicy, SkipSettings
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan, attach
from dysl_vla.skip_controller.heads_trainer import DistillConfig
from dysl_vla.skip_controller.operating import SkipStatistics
from dysl_vla.skip_controller.torch_backend import Forward
from dysl_vla.training.calibrate import PLAN as PLAN_FILE
from dysl_vla.training.calibrate import CalibrateConfig, calibrate, read_plan
from dysl_vla.training.check_policy import check_policy, check_saved
from dysl_vla.training.distill import DistillRunConfig, distill
from tests.conftest import MOCK_INSTRUCTIONS, made_once
from tests.policies.own_policies import ALL, DEPTH, WIDTH, Autoregressive, FlowMatching, OftLike, OwnPolicy, Recurrent
from tests.policies.test_dysl import observe

PLAN = SkipPlan(DEPTH, (0, 3, 5))
BRIEF = DistillConfig(adapter_steps=20, skip_steps=30, batch=4, warmup=5, threads=1)


@pytest.fixture(scope="session", params=ALL, ids=lambda cls: cls.policy_type)
def taught(
    request: pytest.FixtureRequest, mock_demos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[type[OwnPolicy], Path, Path]:
    """A policy's class, its plan's file, and its checkpoint with heads."""

    def make(folder: Path) -> None:
        teacher = str(folder / "teacher")
        request.param.make().save_pretrained(folder / "teacher")
        plan = calibrate(CalibrateConfig(mock_demos, folder / "plan", teacher, static_ratio=0.5, frames=20))
        distill(DistillRunConfig(mock_demos, folder / "fast", teacher, plan, 40, training=BRIEF))

    folder = made_once(tmp_path_factory, request.param.policy_type, make)
    return request.param, folder / "plan" / PLAN_FILE, folder / "fast"


def test_each_kind_is_calibrated_distilled_and_evaluated(
    taught: tuple[type[OwnPolicy], Path, Path], tmp_path: Path
) -> None:
    cls, plan, fast = taught
    assert read_plan(plan).num_layers == DEPTH
    config = EvalConfig(tmp_path / "out", str(fast), suite="mock", episodes=1, variants="full,dysl")
    evaluate(config)
    policy = load_policy(str(fast))
    assert isinstance(policy, DyslPolicy)
    assert isinstance(load_policy(str(fast), skip=0), cls)


def dysl(policy: OwnPolicy, skip: float, seed: int = 1) -> DyslPolicy:
    torch.manual_seed(seed)
    heads = SkipHeads(PLAN, HeadsConfig(WIDTH, adapter_size=4, controller_size=4))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    heads.to(next(policy.layers.parameters()).dtype)
    statistics = SkipStatistics((0.0, 0.5, 1.0), (0.1, 0.2, 0.3), (-0.1, 0.05, 0.1))
    settings = SkipSettings(PLAN, heads.config, policy.fingerprint, 3, statistics, 1, skip=0.9, mean_layers=4.5)
    return DyslPolicy(policy, heads.eval(), settings, skip=skip)


def play(policy: Any, numbers: range, instruction: str = MOCK_INSTRUCTIONS[0]) -> list[Any]:
    state, chunks = policy.reset(), []
    for number in numbers:
        [chunk] = policy.infer([{**observe(number), "task": instruction}], [state])
        chunks.append(chunk)
        state.executed.extend(chunk.actions[:2])
    return chunks


@pytest.mark.parametrize("cls", ALL)
def test_where_all_layers_run_an_episode_is_the_full_models(cls: type[OwnPolicy]) -> None:
    full = play(cls.make(), range(6))
    policy = dysl(cls.make(), 0.5)
    policy._step._guidance.observe = lambda memory, _: memory.allow_points.fill(99)  # type: ignore[method-assign]
    for one, other in zip(full, play(policy, range(6)), strict=True):
        assert other.skips.layers_run.all()
        np.testing.assert_array_equal(one.actions, other.actions)


@pytest.mark.parametrize("cls", ALL)
def test_a_verified_inference_is_the_full_models_in_what_it_remembers_too(cls: type[OwnPolicy]) -> None:
    policy = dysl(cls.make(), 1.0)
    policy._guidance.update_and_check = lambda *_: True  # type: ignore[method-assign]
    full, verified = play(cls.make(), range(6)), play(policy, range(6))
    assert all(chunk.skips.is_verified for chunk in verified)
    for one, other in zip(full, verified, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)


@pytest.mark.parametrize("cls", ALL)
def test_rows_of_a_batch_have_their_own_history_and_words(cls: type[OwnPolicy]) -> None:
    policy = dysl(cls.make(), 0.6)
    starts, texts = (0, 10, 20), (MOCK_INSTRUCTIONS[0], MOCK_INSTRUCTIONS[1], "go")
    alone = [play(policy, range(start, start + 6), text) for start, text in zip(starts, texts, strict=True)]
    states = [policy.reset() for _ in starts]
    ran = set()
    for turn in range(6):
        seen = [{**observe(start + turn), "task": text} for start, text in zip(starts, texts, strict=True)]
        for row, (chunk, state) in enumerate(zip(policy.infer(seen, states), states, strict=True)):
            np.testing.assert_allclose(chunk.actions, alone[row][turn].actions, atol=1e-4)
            assert chunk.skips.skips == alone[row][turn].skips.skips
            ran.add(int(chunk.skips.layers_run.sum()))
            state.executed.extend(chunk.actions[:2])
    assert len(ran) > 1


def test_followers_run_what_the_decoder_ran_and_are_the_model_without_those_layers() -> None:
    policy = FlowMatching.make()
    skipping = dysl(policy, 1.0)
    for adapter in skipping.heads.adapters.values():
        nn.init.zeros_(adapter.up)  # the identity
    calls: list[int] = []
    for index, layer in enumerate(policy.expert.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    [chunk] = play(skipping, range(1))
    assert np.flatnonzero(chunk.skips.layers_run).tolist() == [0, 3, 5]
    assert calls == [0, 3, 5] * FlowMatching.STEPS
    skipping.close()
    for model in (policy.backbone, policy.expert):
        model.layers = nn.ModuleList(model.layers[index] for index in (0, 3, 5))
    np.testing.assert_array_equal(play(policy, range(1))[0].actions, chunk.actions)


@pytest.mark.slow
def test_a_mask_and_a_tokenizer_of_its_own_are_exported(mock_demos: Path, tmp_path: Path) -> None:
    OftLike.make().save_pretrained(tmp_path / "teacher")
    fast = distill(
        DistillRunConfig(mock_demos, tmp_path / "fast", str(tmp_path / "teacher"), frames=20, training=BRIEF)
    )
    bundle = Bundle(export(ExportConfig(tmp_path / "bundle", str(fast))))
    policy = load_policy(str(fast))
    for instruction in (*MOCK_INSTRUCTIONS, "move the mark", "stay"):
        for one, other in zip(play(policy, range(3), instruction), play(bundle, range(3), instruction), strict=True):
            np.testing.assert_allclose(one.actions, other.actions, atol=2e-3)
            assert one.skips.skips == other.skips.skips


class Argmax(Autoregressive):
    def act(self, inputs: Any, forward: Any) -> Tensor:
        forward.needs_gradient = False
        return super().act(inputs, forward)


class Neighbours(OftLike):
    def decode(self, hidden: Tensor) -> Tensor:
        return super().decode(hidden - hidden.mean(dim=0, keepdim=True))


class OtherInfer(OftLike):
    def infer(self, observations: Any, states: Any) -> Any:
        chunks = super().infer(observations, states)
        for chunk in chunks:
            chunk.actions[:] += 1
        return chunks


class OtherLayers(Recurrent):
    layers = property(lambda self: self.into_nothing)  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.into_nothing = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))


class Forgetful(Recurrent):
    """Remembers in the module, not in the episode's state."""

    kept: Any = None

    def act(self, inputs: Any, forward: Any) -> Tensor:
        if self.kept is not None and len(self.kept[0]) == len(inputs["hidden"]):
            inputs["hidden"], inputs["cell"] = self.kept
        actions = super().act(inputs, forward)
        self.kept = inputs["next"]
        return actions


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Argmax, "act must return actions with a gradient"),
        (Neighbours, "act: the actions of a row differ"),
        (OtherInfer, "infer: its actions differ"),
        (OtherLayers, "layers must be the decoder's own list"),
        (Forgetful, "differ by"),
    ],
)
def test_what_breaks_the_contract_is_refused_in_the_first_second(
    cls: type[OwnPolicy], message: str, mock_demos: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy(cls.make(), Demonstrations(mock_demos))


class NoManifest(OftLike):
    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)
        (folder / "manifest.json").unlink()


class Unsteady(OftLike):
    @property
    def fingerprint(self) -> str:
        return f"{id(self)}"


@pytest.mark.parametrize(("cls", "message"), [(NoManifest, "no manifest.json"), (Unsteady, "^fingerprint must")])
def test_a_policy_that_is_not_itself_when_loaded_again_is_refused(
    cls: type[OwnPolicy], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_saved(cls.make(), tmp_path / "saved")


def test_half_precision_is_distilled_and_evaluated(mock_demos: Path, tmp_path: Path) -> None:
    OftLike.make().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    fast = distill(
        DistillRunConfig(mock_demos, tmp_path / "fast", str(tmp_path / "teacher"), frames=20, training=BRIEF)
    )
    with closing(load_policy(str(fast))) as policy:  # type: ignore[type-var]
        assert next(policy.heads.parameters()).dtype == torch.bfloat16
        assert all(np.isfinite(chunk.actions).all() for chunk in play(policy, range(3)))


def test_heads_that_are_trained_beside_a_cast_policy_are_the_uncast_ones(mock_demos: Path, tmp_path: Path) -> None:
    OftLike.make().save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    compute = ComputeConfig(dtype="bfloat16")
    asked = DistillRunConfig(mock_demos, tmp_path / "fast", teacher, frames=20, training=BRIEF, compute=compute)
    fast = distill(asked)
    assert load_policy(str(fast), skip=0).fingerprint == load_policy(teacher, skip=0).fingerprint
    for options in ({}, {"compute": compute}):
        with closing(load_policy(str(fast), **options)) as policy:  # type: ignore[type-var]
            assert all(np.isfinite(chunk.actions).all() for chunk in play(policy, range(2)))


def test_a_policy_with_a_template_takes_the_listed_instructions_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = Bundle.__new__(Bundle)
    bundle._token_ids, bundle._takes_others = {"go": np.array([[1, 2]])}, False
    assert bundle._tokens("go").tolist() == [[1, 2]]
    with pytest.raises(ObservationError, match=r"task must be one of this bundle's instructions .* got 'stop'"):
        bundle._tokens("stop")


def test_a_setting_that_cannot_be_leaves_the_policy_as_it_was() -> None:
    policy = OftLike.make()
    with pytest.raises(ConfigError, match="skip"):
        dysl(policy, 1.5)
    dysl(policy, 0.5).close()


def test_which_rows_ran_is_known_behind_the_decoder_and_for_every_row() -> None:
    policy = OftLike.make()
    seen: list[Any] = []

    def act(inputs: Any, forward: Forward) -> Tensor:
        with pytest.raises(ConfigError, match="has not yet"):
            forward.rows_that_ran(1)
        actions = OftLike.act(policy, inputs, forward)
        seen.append((forward.rows_that_ran(0), forward.rows_that_ran(1)))
        return actions

    inputs, mask = policy.collate(policy.encode([observe(1), observe(2)], []))
    torch.manual_seed(0)
    skipper = attach(policy.layers, PLAN, SkipHeads(PLAN, HeadsConfig(WIDTH, adapter_size=4, controller_size=4)))
    with torch.no_grad(), skipper.step(np.array([[0, 9], [9, 9]]), mask=mask, force_skip=True) as step:
        act(inputs, Forward(step))
    with torch.no_grad(), skipper.force_exits([1, None], mask=mask) as forced:
        act(inputs, Forward(forced))
    assert [first for first, _ in seen] == [None, None]
    assert [second.tolist() for _, second in seen] == [[False, True], [False, False]]


def test_states_of_another_policy_are_refused_before_any_is_moved() -> None:
    policy = dysl(OftLike.make(), 0.5)
    mine, foreign = policy.reset(), policy.reset()
    foreign.guidance.allow_points = np.zeros(7, np.int64)
    mine.executed.extend(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    with pytest.raises(TypeError, match="reset"):
        policy.infer([observe(1), observe(2)], [mine, foreign])
    assert len(mine.guidance.recent) == 0
