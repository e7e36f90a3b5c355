"""The command `dysl VERB`: it parses its options, calls one function and prints what that returns.

Each verb imports its modules when it is called, so that `dysl --help` is instant and a robot's controller needs only
those that it runs. A user's mistake ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from dysl_vla.errors import ConfigError, DyslError

T = TypeVar("T")


def _doctor(arguments: Sequence[str]) -> int:
    from dysl_vla.doctor import diagnose

    def doctor() -> int:
        """Print versions, the OpenGL backend and a rendered frame's time, and how to install what is missing."""
        report = diagnose()
        print(report.text())
        return 0 if report.healthy else 1

    return tyro.cli(doctor, args=arguments, prog="dysl doctor")


def _demos_collect(arguments: Sequence[str]) -> int:
    from dysl_vla.data.collect import CollectConfig, collect
    from dysl_vla.data.info import render_info

    print(render_info(collect(_parse(CollectConfig, arguments, "dysl demos collect"))))
    return 0


def _demos_info(arguments: Sequence[str]) -> int:
    from dysl_vla.data.info import render_info
    from dysl_vla.data.lerobot import Demonstrations

    def info(folder: tyro.conf.Positional[Path]) -> int:
        """Print the content of a LeRobotDataset v3 on disk.

        Args:
            folder: The dataset's folder.
        """
        print(render_info(Demonstrations(folder)))
        return 0

    return tyro.cli(info, args=arguments, prog="dysl demos info")


def _demos_import(arguments: Sequence[str]) -> int:
    from dysl_vla.data.imports import ImportConfig, import_demonstrations
    from dysl_vla.data.info import render_info

    print(render_info(import_demonstrations(_parse(ImportConfig, arguments, "dysl demos import"))))
    return 0


def _train(arguments: Sequence[str]) -> int:
    from dysl_vla.training.train import TrainConfig, evaluation, train

    config = _parse(TrainConfig, arguments, "dysl train")
    out = train(config)
    print(f"Trained: {out}. Evaluate it: {evaluation(out, config.data)}")
    return 0


def _calibrate(arguments: Sequence[str]) -> int:
    from dysl_vla.training.calibrate import CalibrateConfig, calibrate, read_plan
    from dysl_vla.training.presets import paper_calibration

    parsed = _parse_preset(CalibrateConfig, arguments, "dysl calibrate", paper_calibration)
    config = parsed.config
    path = calibrate(config)
    plan = read_plan(path)
    print(f"{path}: static layers {', '.join(map(str, plan.static_layers))} of {plan.num_layers}.")
    out = f"{Path(config.policy).name}-fast" if not Path(config.policy).exists() else f"{config.policy}-fast"
    words = ["--policy", config.policy, "--data", config.data, "--plan", path, "--out", out]
    command = f"dysl distill {shlex.join(map(str, words))}"
    command += f" --preset {parsed.preset}" if parsed.preset else ""
    command += config.compute.words
    print(f"Train adapters and controllers: {command}")
    return 0


def _distill(arguments: Sequence[str]) -> int:
    from dysl_vla.training.distill import distill, dry_run
    from dysl_vla.training.distill_config import DistillRunConfig
    from dysl_vla.training.presets import paper_distillation
    from dysl_vla.training.train import evaluation

    config = _parse_preset(DistillRunConfig, arguments, "dysl distill", paper_distillation).config
    if config.dry_run:
        print(dry_run(config))
        return 0
    out = distill(config)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one finishes the checkpoint
        return 0
    print(f"Distilled: {out}. Full and skipping, side by side: {evaluation(out, config.data)} --variants full,dysl")
    return 0


def _baseline(arguments: Sequence[str]) -> int:
    from dysl_vla.training.baselines import BaselineRunConfig, train_baseline
    from dysl_vla.training.train import evaluation

    config = _parse(BaselineRunConfig, arguments, "dysl baseline")
    out = train_baseline(config)
    print(f"Trained: {out}. Evaluate it: {evaluation(out, config.data)}")
    return 0


def _tune(arguments: Sequence[str]) -> int:
    from dysl_vla.policies import can_export
    from dysl_vla.training.tune import TuneConfig, render_curve, tune

    config = _parse(TuneConfig, arguments, "dysl tune")
    tuned = tune(config)
    chosen = tuned.chosen
    print(render_curve(tuned.curve, chosen))
    print(f"Stored in {config.policy}: skip {chosen.skip}, {chosen.layers:.1f} layers an inference.")
    print(tuned.advice)
    command = f"dysl control --policy {config.policy} --robot lerobot:FILE.json"
    if can_export(str(config.policy)):
        command = f"dysl export --policy {config.policy} --out {config.policy}-bundle"
    print(f"Take it to a robot: {command}")
    return 0


def _bench_backbone(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.bench_backbone import BackboneBenchConfig, bench_backbone, render_backbone

    config = _parse(BackboneBenchConfig, arguments, "dysl bench backbone")
    print(render_backbone(config, bench_backbone(config)))
    return 0


def _bench_policy(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.bench_policy import PolicyBenchConfig, bench_policy, render_policy

    config = _parse(PolicyBenchConfig, arguments, "dysl bench policy")
    print(render_policy(config, bench_policy(config)))
    return 0


def _bench_env(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.bench_env import EnvBenchConfig, bench_env, render_env_times

    config = _parse(EnvBenchConfig, arguments, "dysl bench env")
    print(render_env_times(config, list(bench_env(config))))
    return 0


def _bench_bundle(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.bench_bundle import BundleBenchConfig, bench_bundle, render_bundle

    print(render_bundle(bench_bundle(_parse(BundleBenchConfig, arguments, "dysl bench bundle"))))
    return 0


def _bench_serve(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.bench_serve import ServeBenchConfig, bench_serve, render_served

    print(render_served(bench_serve(_parse(ServeBenchConfig, arguments, "dysl bench serve"))))
    return 0


def _plot(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.plot import plot

    def draw(folder: tyro.conf.Positional[Path]) -> int:
        """Draw an evaluation: layers over the progress of an episode, and success over latency.

        Args:
            folder: A folder of `dysl eval`, of one run or of several (`--variants`).
        """
        for path in plot(folder):
            print(path)
        return 0

    return tyro.cli(draw, args=arguments, prog="dysl plot")


def _plot_pareto(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.pareto import pareto

    def draw(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("pareto.png")) -> int:
        """Draw success against the LLM's latency, and print the table; runs are paired with the first of their suite.

        Args:
            folders: Folders of `dysl eval`, each of one run or of several (`--variants`, the full model first).
            out: Path of the picture, which ends in .png.
        """
        print(pareto(folders, out))
        print(out)
        return 0

    return tyro.cli(draw, args=arguments, prog="dysl plot pareto")


def _eval(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.config import EvalConfig

    config = _parse(EvalConfig, arguments, "dysl eval")
    if config.data is not None:
        from dysl_vla.eval.offline import evaluate_offline
        from dysl_vla.eval.offline_report import render_offline

        print(render_offline(evaluate_offline(config)))
        print(f"Records and pictures: {config.out}")
        return 0
    from dysl_vla.eval import evaluate
    from dysl_vla.eval.compare import compare, render_comparison
    from dysl_vla.eval.report import render_report

    variants = evaluate(config)["variants"]
    for figures in variants.values():
        print(render_report(figures))
    if len(variants) > 1:
        runs = [config.out / name for name in variants]
        print(render_comparison(runs, compare(runs)))
    print(f"Records: {config.out}")
    return 0


def _eval_compare(arguments: Sequence[str]) -> int:
    from dysl_vla.eval.compare import compare, render_comparison

    def compare_runs(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> int:
        """Compare evaluations of different policies on the same episodes, paired with the first one's.

        Args:
            runs: Two or more folders of `dysl eval`.
        """
        print(render_comparison(runs, compare(runs)))
        return 0

    return tyro.cli(compare_runs, args=arguments, prog="dysl eval compare")


def _export(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.export import ExportConfig, export, robot_to_try

    out = export(_parse(ExportConfig, arguments, "dysl export"))
    print(f"Exported: {out}. Try it: dysl control --bundle {out} --robot {robot_to_try(out)} --seconds 10")
    return 0


def _control(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.loop_stats import render_stats
    from dysl_vla.deploy.run_control import ControlConfig, control

    print(render_stats(control(_parse(ControlConfig, arguments, "dysl control"))))
    return 0


def _control_replay(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.replay_log import replay

    def play(folder: tyro.conf.Positional[Path], robot: str | None = None) -> int:
        """Send the actions of a control log to a robot again, at their times, within the log's limits.

        Args:
            folder: A folder of `dysl control --log`.
            robot: KIND:NAME. When not given, it is the robot of the log.
        """
        for name, value in replay(folder, robot).items():
            print(f"{name}: {value}")
        return 0

    return tyro.cli(play, args=arguments, prog="dysl control replay")


def _control_view(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.view_log import view

    def show(folder: tyro.conf.Positional[Path], out: Path | None = None) -> int:
        """Write a log of the control loop as a recording for Rerun's viewer.

        Args:
            folder: A folder of `dysl control --log`.
            out: File of the recording. When not given, it is cycles.rrd beside the log.
        """
        path = view(folder, out)
        print(f"{path}: open it with: rerun {path}")
        return 0

    return tyro.cli(show, args=arguments, prog="dysl control view")


def _serve(arguments: Sequence[str]) -> int:
    from dysl_vla.deploy.run_server import ServeConfig, serve_policy

    serve_policy(_parse(ServeConfig, arguments, "dysl serve"))
    return 0


def _parse(config: type[T], arguments: Sequence[str], program: str) -> T:
    parsed = tyro.cli(config, args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,))
    _check_device(parsed)
    return parsed


def _check_device(config: object) -> None:
    """Refuse PyTorch's device without contents, which is for `dysl distill --dry-run` to choose."""
    if getattr(getattr(config, "compute", None), "device", None) == "meta":
        raise ConfigError("device must be one of this machine's, got 'meta', on which nothing is computed.")


@dataclass(frozen=True)
class _Presettable(Generic[T]):
    """A configuration whose defaults can be those of a preset."""

    config: T
    preset: Literal["paper"] | None = None
    """Published settings in place of the defaults, which other options override: paper, the regime of DySL-VLA, with a
    fifth of the layers static, exits at all others, 6.7 k steps, the mixture objective and the continuity measure."""


def _parse_preset(config: type[T], arguments: Sequence[str], program: str, paper: Callable[[T], T]) -> _Presettable[T]:
    """Parse options, of which --preset replaces the defaults.

    Args:
        config: The configuration's class.
        arguments: The options.
        program: The command.
        paper: Returns a configuration with the settings of the preset "paper".
    """
    options: dict[str, Any] = {
        "args": arguments,
        "prog": program,
        "description": (config.__doc__ or "").split("\n\n")[0],
        "config": (tyro.conf.OmitArgPrefixes,),
    }
    parsed: _Presettable[T] = tyro.cli(_Presettable[config], **options)  # type: ignore[valid-type]
    if parsed.preset is not None:  # what is given on the command line beats the new defaults, too
        parsed = tyro.cli(_Presettable[config], default=replace(parsed, config=paper(parsed.config)), **options)  # type: ignore[valid-type]
    _check_device(parsed.config)
    return parsed


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "doctor": (_doctor, "check this machine, and say how to install what is missing"),
    "demos collect": (_demos_collect, "collect demonstrations in simulation, from experts or corrected policies"),
    "demos import": (_demos_import, "read human demonstrations for robosuite or LIBERO from HDF5 files"),
    "demos info": (_demos_info, "show the content of a dataset"),
    "train": (_train, "train a policy on demonstrations"),
    "calibrate": (_calibrate, "measure which layers a policy cannot do without, and plan what may be skipped"),
    "distill": (_distill, "train adapters and controllers, so that a policy skips layers"),
    "baseline": (_baseline, "train another method that runs fewer layers, to compare with"),
    "tune": (_tune, "choose how much a policy skips, by time, by success or by the actions' error"),
    "bench backbone": (_bench_backbone, "measure what skipping costs beside what it saves, on a decoder of any size"),
    "bench policy": (_bench_policy, "measure the parts of SmolVLA's or pi0's inference, full and skipping"),
    "bench env": (_bench_env, "measure how fast a suite simulates, and where the time goes"),
    "bench bundle": (_bench_bundle, "measure an exported policy beside its checkpoint"),
    "bench serve": (_bench_serve, "measure a policy server with many clients, some of which misbehave"),
    "plot": (_plot, "draw which layers ran in an evaluation"),
    "plot pareto": (_plot_pareto, "draw success against latency of many evaluations"),
    "eval": (_eval, "evaluate a policy in simulation (success, latency, videos) or on demonstrations"),
    "export": (_export, "turn a policy that skips layers into a folder that needs no torch"),
    "control": (_control, "run a policy on a robot, real or simulated, at a fixed rate"),
    "control replay": (_control_replay, "send the actions of a control log to a robot again"),
    "control view": (_control_view, "write a control log as a recording for Rerun"),
    "serve": (_serve, "serve a policy to openpi clients over websockets"),
    "eval compare": (_eval_compare, "compare evaluations, paired by episode"),
}

CONTINUES = ("demos collect", "demos import", "train", "distill", "baseline", "eval")
"""Verbs that continue a run that was interrupted."""


def usage() -> str:
    """Return what `dysl` prints without a verb."""
    width = max(map(len, VERBS))
    lines = [f"  dysl {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: dysl VERB [options]    (dysl VERB --help explains the options)", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0; 1 when `doctor` found something missing; 2 for a user's mistake or a failure of the system (a
        full disk, a worker killed for lack of memory); 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for length in (2, 1):
        verb = " ".join(words[:length])
        if verb in VERBS:
            try:
                return VERBS[verb][0](words[length:])
            except (DyslError, OSError, BrokenProcessPool) as error:
                print(f"dysl {verb}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                continues = "; the same command continues where it stopped" if verb in CONTINUES else ""
                print(f"dysl {verb}: interrupted{continues}.", file=sys.stderr)
                return 130
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    print(f"dysl: verb {words[0]!r} is unknown.\n\n{usage()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
