"""Two processes that `accelerate launch` starts train the heads that one trains, and go on where they were stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dysl_vla.errors import ConfigError
from dysl_vla.processes import Processes, launched_processes
from dysl_vla.training.distill import STATE_FILE, DistillRunConfig, distill
from tests.conftest import TRAINING
from tests.training.launched import FAULT

TRAINED = replace(TRAINING, adapter_steps=10, skip_steps=20)
LAUNCH = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
QUIET = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def launch(config: DistillRunConfig, out: Path, fault: str = "") -> tuple[int, str]:
    """Run `dysl distill` in two processes, and return the launcher's exit code and what was printed."""
    options = {
        "policy": config.policy,
        "plan": config.plan,
        "data": config.data,
        "out": out,
        "frames": config.frames,
        "batch": TRAINED.batch,
        "adapter-steps": TRAINED.adapter_steps,
        "skip-steps": TRAINED.skip_steps,
        "warmup": TRAINED.warmup,
        "threads": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [*LAUNCH, *QUIET, "-m", "tests.training.launched", "distill", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {FAULT: fault}
    )
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, printed


def running(out: Path) -> list[psutil.Process]:
    """Return the processes that work on a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_two_processes_train_the_heads_of_one_and_go_on_after_ctrl_c_and_after_a_kill(
    teacher: Path, plan: Path, mock_demos: Path, tmp_path: Path
) -> None:
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    config = DistillRunConfig(mock_demos, one, str(teacher), plan, frames=100, training=TRAINED)
    alone = load_file(distill(config) / "skip.safetensors")
    code, printed = launch(config, two)
    assert code == 0, printed
    assert printed.count("Distilled: ") == 1
    together = load_file(two / "skip.safetensors")
    for name, value in alone.items():
        # Sums are rounded otherwise, and heads are saved in half precision: by one of its last places, at most.
        place = torch.from_numpy(np.spacing(np.abs(value.numpy()))).float()
        allowed = torch.maximum(place, 1e-4 * (value.float().abs() + value.float().abs().max()))
        assert ((together[name].float() - value.float()).abs() <= allowed).all(), name
    # Ctrl-C: the step that runs is finished and kept by all.
    code, printed = launch(config, stopped, f"0 10 {signal.SIGINT.value}")
    assert code != 0
    assert printed.count("dysl distill: interrupted") == 2, printed
    with safe_open(stopped / STATE_FILE, framework="pt") as file:
        assert file.metadata()["step"] == "11"
    # A process is killed: no other one is left, and the run goes on from its state.
    code, printed = launch(config, stopped, f"1 20 {signal.SIGKILL.value}")
    assert code != 0
    deadline = time.monotonic() + 10
    while running(stopped) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(stopped)
    code, printed = launch(config, stopped)
    assert code == 0, printed
    ends = load_file(stopped / "skip.safetensors")
    assert all(torch.equal(value, together[name]) for name, value in ends.items())


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_loaded(
    teacher: Path, mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Processes()
    two.count = 2
    monkeypatch.setattr("dysl_vla.training.distill.launched_processes", lambda _: nullcontext(two))
    monkeypatch.setattr("dysl_vla.training.distill.load_skippable_policy", lambda *_: pytest.fail("it was loaded"))
    training = replace(TRAINED, batch=7)
    with pytest.raises(ConfigError, match="batch must be a multiple of the 2 processes that share it, got 7"):
        distill(DistillRunConfig(mock_demos, tmp_path / "out", str(teacher), training=training))
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_started_one_process_for_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched_processes(None) as processes:
        assert (processes.count, processes.is_main, processes.is_any(True)) == (1, True, True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="give --multi_gpu in place of --cpu"), launched_processes(None):
        pass
