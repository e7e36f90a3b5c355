"""Ctrl-C during training: the step that runs is finished and kept, and the same command goes on behind it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dysl_vla.interrupts import deferred_interrupt
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.heads_trainer import HeadsTrainer
from dysl_vla.training.behaviour_cloning import STATE_FILE, BehaviourCloning
from dysl_vla.training.distill import STATE_FILE as HEADS_STATE
from dysl_vla.training.distill import DistillRunConfig, distill
from dysl_vla.training.train import train
from tests.conftest import TRAINING
from tests.training.test_behaviour_cloning import FAST, config


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """As in a terminal: what runs in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c_at(step: int, kind: type[Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT in the middle of an update."""
    original = getattr(kind, name)

    def update(self: Any, *arguments: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(kind, name, update)


def steps_kept(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def test_training_keeps_the_step_that_was_interrupted(
    mock_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = replace(FAST, save_every=100)
    whole = train(config(mock_demos, tmp_path / "whole", optimizer=rare))
    with monkeypatch.context() as patched:
        press_ctrl_c_at(6, BehaviourCloning, "_update", patched)
        with pytest.raises(KeyboardInterrupt):
            train(config(mock_demos, tmp_path / "p", optimizer=rare))
    assert steps_kept(tmp_path / "p" / STATE_FILE) == 7
    again = train(config(mock_demos, tmp_path / "p", optimizer=rare))
    assert MiniVLA.from_pretrained(str(again)).fingerprint == MiniVLA.from_pretrained(str(whole)).fingerprint
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_distilling_keeps_the_step_that_was_interrupted(  # noqa: PLR0917 # fixtures
    teacher: Path, plan: Path, mock_demos: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "interrupted"
    run = DistillRunConfig(mock_demos, out, str(teacher), plan, frames=100, training=TRAINING)
    with monkeypatch.context() as patched:
        press_ctrl_c_at(33, HeadsTrainer, "update", patched)
        with pytest.raises(KeyboardInterrupt):
            distill(run)
    assert steps_kept(out / HEADS_STATE) == 34
    distill(run)
    ends, expected = (load_file(folder / "skip.safetensors") for folder in (out, distilled))
    assert all(torch.equal(value, expected[name]) for name, value in ends.items())


def test_a_second_ctrl_c_is_not_deferred() -> None:
    with deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_who_ignores_or_handles_ctrl_c_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.is_requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_changes() -> None:
    seen: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as interrupt:
            seen.append(interrupt.is_requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
