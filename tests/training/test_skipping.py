"""The three commands that make a policy skip, on the mock world with a tiny random policy: calibrate, distill, eval."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dysl_vla.cli import main
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.envs.mock import MockEnv
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.plot import plot
from dysl_vla.eval.rollout import EpisodeKey, run_episode
from dysl_vla.eval.statistics import PairedSuccess
from dysl_vla.files import read_lines, write_json
from dysl_vla.policies import load_policy, load_skippable_policy
from dysl_vla.policies.dysl import load_dysl
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.policies.mock import MockPolicy
from dysl_vla.training import distill as distill_module
from dysl_vla.training import tune as tune_module
from dysl_vla.training.calibrate import read_plan
from dysl_vla.training.distill import DistillRunConfig, distill
from dysl_vla.training.replay import Replay, Replayed
from dysl_vla.training.tune import TuneConfig, tune
from dysl_vla.types import ActionChunk, SkipTrace
from dysl_vla.video import read_video
from tests.conftest import TRAINING, made_once


def test_replayed_episodes_know_nothing_of_each_other(
    distilled: Path, mock_demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.data.split.EVERY", 5)
    policy = load_skippable_policy(str(distilled))
    replay = Replay(policy, Demonstrations(mock_demos))
    assert len(replay) == 4
    with closing(load_dysl(policy, distilled, 0.5)) as dysl:
        in_order = replay.play(dysl)
    parts = {}
    with closing(load_dysl(policy, distilled, 1.0)) as dysl:
        for episode in (2, 0, 3, 1):
            dysl.set_skip(1.0)
            replay.play_episode(dysl, episode)
            dysl.set_skip(0.5)
            parts[episode] = replay.play_episode(dysl, episode)
    in_turns = Replayed.joined([parts[episode] for episode in range(4)])
    np.testing.assert_array_equal(in_turns.errors, in_order.errors)
    assert [trace.layers for trace in in_turns.traces] == [trace.layers for trace in in_order.traces]
    assert len(in_turns.llm_s) == len(in_turns.traces)


def test_calibration_leaves_a_plan_and_a_picture(plan: Path) -> None:
    document = json.loads(plan.read_text())
    assert len(document["similarity"]) == 6
    assert read_plan(plan) == read_plan(plan.parent)
    assert {0, 5} <= set(read_plan(plan).static_layers)
    assert Image.open(plan.parent / "similarity.png").size[0] > 300


@pytest.mark.parametrize("edit", [{"static_layers": [0, 9]}, {"static_layers": "x"}, {"num_layers": 6}])
def test_an_edited_plan_is_checked(plan: Path, tmp_path: Path, edit: dict[str, object]) -> None:
    path = tmp_path / "plan.json"
    document = json.loads(plan.read_text())
    document["plan"] = edit if "num_layers" in edit else document["plan"] | edit
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"plan|static_layers"):
        read_plan(path)


def test_distilling_leaves_the_policys_weights_as_they_were(teacher: Path, distilled: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, distilled))
    assert before.keys() == after.keys()
    assert all(value.numpy().tobytes() == after[name].numpy().tobytes() for name, value in before.items())
    full = load_policy(str(distilled), skip=0)
    assert isinstance(full, MiniVLA)
    assert full.fingerprint == MiniVLA.from_pretrained(str(teacher)).fingerprint
    curve = [json.loads(line) for line in (distilled / "distill.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == 60
    assert any(name.startswith("adapter_error/") for name in curve[0])
    assert {"skip_rate", "task_loss"} <= set(curve[-1])
    assert list((distilled / "tensorboard").iterdir())


def test_heads_are_trained_further_from_what_they_were(
    teacher: Path, distilled: Path, mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.data.split.EVERY", 5)
    training = replace(TRAINING, skip_steps=2, learning_rate=1e-4)
    begun = tmp_path / "begun"
    shutil.copytree(distilled, begun)
    settings = json.loads((begun / "skip.json").read_text())
    write_json(begun / "skip.json", settings | {"importance": "gripper"})
    monkeypatch.setattr("dysl_vla.training.distill.choose_importance", lambda asked, *_: asked)
    config = DistillRunConfig(mock_demos, tmp_path / "more", str(begun), frames=50, augment_copies=1, training=training)
    distill(replace(config, init_heads=True))
    before, after = (load_file(folder / "skip.safetensors") for folder in (distilled, tmp_path / "more"))
    moved = {name: float((after[name].float() - value.float()).abs().max()) for name, value in before.items()}
    assert 0 < max(moved.values()) < 1e-3
    [point] = [json.loads(line) for line in (tmp_path / "more/distill.jsonl").read_text().splitlines()]
    assert point["step"] == 2  # no stage 1
    first, second = (json.loads((folder / "skip.json").read_text()) for folder in (distilled, tmp_path / "more"))
    assert (settings["importance"], second["importance"]) == ("continuity", "gripper")
    assert second["plan"] == first["plan"]
    assert second["provenance"]["init"] == first["provenance"]
    distill(replace(config, init_heads=True))  # finished: nothing to do
    shutil.copytree(tmp_path / "more", begun, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="initial"):  # other heads than those that it went on from
        distill(replace(config, init_heads=True))
    for change, named in (({"adapter_size": 8}, "adapter_size"), ({"policy": str(teacher)}, "init_heads")):
        with pytest.raises(ConfigError, match=named):
            distill(replace(config, init_heads=True, out=tmp_path / "refused", **change))
    assert not (tmp_path / "refused").exists()


def test_a_distillation_that_was_stopped_ends_like_one_that_was_not(  # noqa: PLR0917 # fixtures
    teacher: Path, plan: Path, mock_demos: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    config = DistillRunConfig(mock_demos, out, str(teacher), plan, frames=100, training=TRAINING)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_module, "SAVE_EVERY", 30)
    with monkeypatch.context() as patch:
        patch.setattr(distill_module._Run, "_finish", stop)
        original = distill_module._Run._save_state

        def save_then_stop(run: distill_module._Run, seconds: float) -> None:
            original(run, seconds)
            if run._trainer.step == 30:
                raise KeyboardInterrupt

        patch.setattr(distill_module._Run, "_save_state", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    distill(config)
    ends, expected = (load_file(folder / "skip.safetensors") for folder in (out, distilled))
    assert ends.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ends.items())
    with pytest.raises(ConfigError, match="batch"):
        distill(replace(config, training=replace(TRAINING, batch=9)))


def test_fitted_adapters_begin_where_others_have_to_be_trained_to(
    teacher: Path, plan: Path, mock_demos: Path, tmp_path: Path
) -> None:
    errors = {}
    for frames in (None, 100):
        config = DistillRunConfig(mock_demos, tmp_path / f"{frames}", str(teacher), plan, frames=100, training=TRAINING)
        out = distill(replace(config, fit_frames=frames))
        [first, *_] = read_lines(out / "distill.jsonl")
        errors[frames] = [value for name, value in first.items() if name.startswith("adapter_error/")]
    assert len(errors[None]) > 0
    assert all(fitted < trained for trained, fitted in zip(*errors.values(), strict=True))


def test_fitting_that_needs_more_memory_than_there_is_is_refused(
    teacher: Path, plan: Path, mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.training.fit.free_memory", lambda *_: 1000)
    config = DistillRunConfig(mock_demos, tmp_path / "o", str(teacher), plan, 100, fit_frames=50, training=TRAINING)
    with pytest.raises(ConfigError, match="fit_frames must be left out: its sums need"):
        distill(config)


@pytest.fixture(scope="module")
def evaluated(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = EvalConfig(Path(), str(distilled), suite="mock", episodes=2, video=1, variants="full,dysl,random")
    return made_once(tmp_path_factory, "evaluated", lambda out: evaluate(replace(config, out=out)))


def test_ways_run_the_same_episodes_in_turn(evaluated: Path, distilled: Path, tmp_path: Path) -> None:
    columns = ["task", "episode_index", "step", "action"]
    alone = evaluate(EvalConfig(out=tmp_path / "r", policy=str(distilled), suite="mock", episodes=2))["variants"]
    for name in ("full", "dysl", "random"):
        result = json.loads((evaluated / name / "result.json").read_text())
        assert result["episodes"] == 4
        assert (result["layers"] is None) == (name == "full")
    together = pq.read_table(evaluated / "dysl/steps.parquet", columns=columns)
    assert together.equals(pq.read_table(tmp_path / "r/steps.parquet", columns=columns))
    assert alone["policy"]["layers"]["mean"] < 6
    assert "Layers run an inference" in (evaluated / "dysl/report.md").read_text()


def test_steps_say_what_was_skipped(evaluated: Path) -> None:
    rows = pq.read_table(evaluated / "dysl/steps.parquet").to_pylist()
    inferred = [row for row in rows if row["layers"] is not None]
    assert inferred
    assert all((row["layers"] is None) == (row["llm_ms"] is None) for row in rows)
    for row in inferred:
        assert row["layers"] >= sum(row["layers_run"])
        assert len(row["layers_run"]) == 6
        assert len(row["skipped_at"]) == len(row["landed_on"])
        assert row["llm_ms"] >= row["controllers_ms"] + row["adapters_ms"] + row["verify_ms"]


def test_films_and_plots_show_it(evaluated: Path) -> None:
    [video, *_] = sorted((evaluated / "dysl/videos").iterdir())
    frame = next(read_video(video))
    assert frame.shape == (304, 256, 3)
    strip = frame[258:270].reshape(-1, 3).astype(int)
    assert (strip[:, 1] - strip[:, 0] > 60).any()  # green: a layer that ran
    for path in plot(evaluated):
        assert np.asarray(Image.open(path)).std() > 5
    with pytest.raises(ConfigError, match="skips layers"):
        plot(evaluated / "full")


def test_tuning_stores_what_meets_the_target(distilled: Path, mock_demos: Path, tmp_path: Path) -> None:
    distilled = Path(shutil.copytree(distilled, tmp_path / "tuned"))  # others read it meanwhile
    tuned = tune(TuneConfig(distilled, mock_demos, target_ms=1e3))
    assert tuned.chosen == tuned.curve[-1]  # all are fast enough: the most careful
    assert "was not measured" in tuned.advice
    assert load_policy(str(distilled)).skip == tuned.chosen.skip  # type: ignore[attr-defined]
    before = (distilled / "skip.json").read_bytes()
    with pytest.raises(ConfigError, match=r"nearest possible[\s\S]*\| 0.1 \|"):
        tune(TuneConfig(distilled, mock_demos, target_ms=1e-3))
    assert (distilled / "skip.json").read_bytes() == before
    tuned = tune(TuneConfig(distilled, mock_demos, target_success_drop=1.0, tasks="reach", episodes=1))
    assert tuned.chosen.skip == 1.0
    assert "dysl export --prune" in tuned.advice
    assert json.loads((distilled / "skip.json").read_text())["provenance"]["operating_point"]["advice"] == tuned.advice


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": "fly"}, "'fly'"), ({"robot": "R2D2"}, "R2D2"), ({"episodes": 0}, "episodes must be")],
)
def test_tuning_looks_where_it_will_play_before_it_measures(
    distilled: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(tune_module, "measure_curve", lambda *_: pytest.fail("minutes were spent"))
    with pytest.raises(ConfigError, match=message):
        tune(replace(TuneConfig(distilled, Path("demonstrations"), target_success_drop=0.1), **change))


def test_a_policy_plays_where_it_was_trained(distilled: Path, tmp_path: Path) -> None:
    for variants in (None, "full,dysl"):
        evaluate(EvalConfig(out=tmp_path / f"out-{variants}", policy=str(distilled), episodes=1, variants=variants))
    for folder in ("out-None", "out-full,dysl/full", "out-full,dysl/dysl"):
        result = json.loads((tmp_path / folder / "result.json").read_text())
        assert result["suite"] == "mock"
        assert set(result["per_task"]) == {"reach", "linger"}


def test_tuning_by_success_takes_the_fastest_that_loses_no_more_in_any_world(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"full": 20, "1.0": 70, "0.9": 35, "0.5": 10, "full+": 50, "1.0+": 300, "0.9+": 55, "0.5+": 52}
    asked: list[float] = []

    def measured(config: TuneConfig, out: Path, skip: float) -> list[Path]:
        asked.append(skip)
        return [out, out.with_name(f"{out.name}+")] if config.perturb else [out]

    def paired(first: list[Path], second: list[Path]) -> list[PairedSuccess]:
        """Of 1000 episodes, each setting fails in others."""
        counts = [(failures[other.name], failures[one.name]) for one, other in zip(first, second, strict=True)]
        return [PairedSuccess(1000 - sum(pair), *pair, 0) for pair in counts]

    monkeypatch.setattr(tune_module, "_evaluate", measured)
    monkeypatch.setattr(tune_module, "_paired", paired)
    curve = [tune_module.Point(skip, 4, 1, 2, 0.1, 0) for skip in (1.0, 0.9, 0.5)]

    def choose(drop: float, perturb: str | None = None) -> tuple[float, PairedSuccess | None]:
        config = TuneConfig(Path("p"), Path("d"), target_success_drop=drop, perturb=perturb)
        tuned = tune_module._choose_by_success(config, curve)
        return tuned.chosen.skip, tuned.against_shortest

    assert choose(0.1) == (1.0, None)
    assert choose(0.02) == (0.9, PairedSuccess(895, 35, 70, 0))
    assert choose(0.01) == (0.5, PairedSuccess(920, 10, 70, 0))
    assert asked == [0, 1.0, 0, 1.0, 0.9, 0, 1.0, 0.9, 0.5]  # the full model once
    assert choose(0.1, "plus") == (0.9, PairedSuccess(895 + 645, 35 + 55, 70 + 300, 0))
    failures["0.5"] = 50
    with pytest.raises(ConfigError, match=r"nearest possible is 0\.015, at skip 0\.9"):
        choose(0.001)
    with pytest.raises(ConfigError, match="perturb must come with target_success_drop"):
        TuneConfig(Path("p"), Path("d"), target_ms=5, perturb="light")


@pytest.mark.parametrize(
    ("won", "lost", "says"),
    [(9, 1, "is worth it"), (1, 9, "are simpler"), (3, 1, "are simpler"), (0, 0, "are simpler")],
)
def test_tuning_names_the_simpler_way_unless_episodes_show_a_difference(won: int, lost: int, says: str) -> None:
    shortest, chosen = (tune_module.Point(skip, layers, 1, 2, 0.1, 0) for skip, layers in ((1.0, 3), (0.9, 8)))
    advice = tune_module.Tuned([shortest, chosen], chosen, PairedSuccess(50, lost, won, 2)).advice
    assert says in advice
    assert f"won {won} and lost {lost} of {52 + won + lost}" in advice


def test_ways_that_mean_nothing_are_refused(distilled: Path, evaluated: Path, tmp_path: Path) -> None:
    def run(out: Path, skip: float | None, variants: str) -> None:
        evaluate(EvalConfig(out=out, policy=str(distilled), suite="mock", skip=skip, variants=variants, episodes=1))

    with pytest.raises(ConfigError, match="0, which is the full model"):
        run(tmp_path / "r", 0, "full,dysl")
    with pytest.raises(ConfigError, match="as many layers as the stored setting"):
        run(tmp_path / "r", 0.37, "full,random")
    with pytest.raises(ConfigError, match="holds another run"):
        run(evaluated / "dysl", None, "full,dysl")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("text", ["full,full", "fast"])
def test_unknown_ways_are_refused(distilled: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="variants"):
        evaluate(EvalConfig(out=tmp_path / "r", policy=str(distilled), suite="mock", variants=text))
    assert not (tmp_path / "r").exists()


def test_the_backbone_bench_measures_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "backbone", "--config", "6x128", "--tokens", "4", "--rounds", "2", "--threads", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    layers = [int(row.split("|")[1]) for row in rows[1:]]
    assert layers == [6, 5, 4, 3], "the full decoder, then every number of layers that the shares leave, once"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub's answer is not waited for
    assert main(["bench", "backbone", "--config", "nothing-here"]) == 2
    assert "LAYERSxWIDTH" in capsys.readouterr().err


def test_a_film_shows_the_busiest_inference_since_its_last_frame() -> None:
    layers_run = iter([1, 6, 2, 3, 5, 4, 1, 1] + [1] * 100)

    class Skipping(MockPolicy):
        def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
            [chunk] = super().infer(observations, states)
            still = np.zeros_like(chunk.actions)
            trace = SkipTrace(np.arange(6) < next(layers_run), {}, {}, (), None)
            return [ActionChunk(still, chunk.timing, trace)]

    env = MockEnv("linger")
    env.embodiment = replace(env.embodiment, rate_hz=80.0)  # four steps, two inferences a frame
    video = run_episode(env, Skipping(), EpisodeKey("linger", 100_000, 0), video=True).video
    middles = np.linspace(2, 254, 7)[:-1] + 20
    green = [(frame[262, middles.astype(int), 1] > 1.2 * frame[262, middles.astype(int), 0]).sum() for frame in video]
    assert green[:4] == [1, 6, 5, 4]
