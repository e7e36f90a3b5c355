"""Frames that do not fit into memory are streamed, and the heads that learn from them are the same."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dysl_vla.data.augment import Copies
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.policies import compute, load_skippable_policy
from dysl_vla.policies.dysl import load_dysl
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.training import distill as distill_module
from dysl_vla.training import encoded
from dysl_vla.training.distill import DistillRunConfig, distill
from dysl_vla.training.encoded import Encoded, KeptFrames, StreamedFrames
from dysl_vla.training.encoding import encode
from dysl_vla.training.replay import Replay
from tests.conftest import TRAINING
from tests.policies.own_policies import Recurrent


@pytest.fixture(autouse=True)
def _one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "READERS", 1)


def stacked(items: list[Any]) -> torch.Tensor:
    return torch.stack([item["inputs_embeds"] for item in items])


def test_streamed_frames_train_the_same_heads_to_the_bit_also_when_the_run_was_stopped(  # noqa: PLR0917 # fixtures
    teacher: Path, plan: Path, mock_demos: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "streamed"
    config = DistillRunConfig(mock_demos, out, str(teacher), plan, frames=100, stream="always", training=TRAINING)
    forms: list[type[Encoded]] = []
    original = distill_module.Batches

    def batches(policy: Any, trainer: Any, frames: Encoded, *arguments: Any, **options: Any) -> Any:
        forms.append(type(frames))
        return original(policy, trainer, frames, *arguments, **options)

    monkeypatch.setattr(distill_module, "Batches", batches)
    monkeypatch.setattr(distill_module, "SAVE_EVERY", 30)
    with monkeypatch.context() as patch:
        save = distill_module._Run._save_state

        def save_then_stop(run: distill_module._Run, seconds: float) -> None:
            save(run, seconds)
            if run._trainer.step == 30:
                raise KeyboardInterrupt

        patch.setattr(distill_module._Run, "_save_state", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    assert not multiprocessing.active_children()
    distill(replace(config, stream="auto"))  # goes on as it began
    assert forms == [StreamedFrames] * 2
    ends, expected = (load_file(folder / "skip.safetensors") for folder in (out, distilled))
    assert ends.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ends.items())


def test_copies_are_streamed_behind_their_frame(tiny_policy: MiniVLA, mock_demos: Path) -> None:
    demonstrations, chosen = Demonstrations(mock_demos), np.arange(3, 40, 2)
    kept, streamed = (
        encode(tiny_policy, demonstrations, chosen, "frames", copies=Copies(2, is_varied=True), stream=stream)
        for stream in (False, True)
    )
    assert isinstance(kept, KeptFrames)
    assert isinstance(streamed, StreamedFrames)
    assert streamed.indices.tolist() == kept.indices.tolist()
    parts = list(streamed.batches(8))
    assert [rows.stop for rows, _ in parts] == [8, 16, 24, 32, 40, 48, 56, 57]
    expected = stacked(kept.rows(np.arange(57)))
    torch.testing.assert_close(stacked([item for _, items in parts for item in items]), expected, atol=1e-5, rtol=0)
    rows = np.array([3, 3, 20, 56])
    torch.testing.assert_close(stacked(streamed.rows(rows)), expected[rows], atol=1e-5, rtol=0)


def test_what_does_not_fit_is_streamed_unless_it_shall_be_kept(
    tiny_policy: MiniVLA, mock_demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demonstrations, chosen = Demonstrations(mock_demos), np.arange(40)
    item = stacked(encode(tiny_policy, demonstrations, chosen, "frames").rows(np.arange(1)))[0]
    for share, kind in ((0.79, KeptFrames), (0.81, StreamedFrames)):
        monkeypatch.setattr(compute, "available_memory", lambda share=share: int(40 * item.nbytes / share))
        assert isinstance(encode(tiny_policy, demonstrations, chosen, "frames"), kind)
    encode(tiny_policy, demonstrations, chosen, "frames", stream=False)
    monkeypatch.setattr(compute, "available_memory", lambda: 39 * item.nbytes)
    with pytest.raises(ConfigError, match=r"^memory: encoded frames need .*give --stream always"):
        encode(tiny_policy, demonstrations, chosen, "frames", stream=False)
    recurrent = Recurrent.make()
    monkeypatch.setattr(compute, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^memory: .*give fewer --frames"):
        encode(recurrent, demonstrations, chosen, "frames")
    with pytest.raises(ConfigError, match=r"^stream must not be always for a policy with memory"):
        encode(recurrent, demonstrations, chosen, "frames", stream=True)


def test_a_replay_that_is_streamed_is_the_same(
    distilled: Path, mock_demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.data.split.EVERY", 10)
    policy = load_skippable_policy(str(distilled))
    demonstrations = Demonstrations(mock_demos)
    with closing(load_dysl(policy, distilled, 0.5)) as dysl:
        replays = [Replay(policy, demonstrations, stream=stream) for stream in (False, True)]
        kept, streamed = (replay.play(dysl) for replay in replays)
    assert [trace.layers for trace in streamed.traces] == [trace.layers for trace in kept.traces]
    np.testing.assert_allclose(streamed.errors, kept.errors, atol=1e-5)
    for episode, moments in enumerate(replays[1]._episodes):
        expected = encode(policy, demonstrations, moments, "an episode", stream=False).rows(np.arange(len(moments)))
        torch.testing.assert_close(stacked(replays[1]._items(episode)), stacked(expected), atol=1e-5, rtol=0)


def test_a_reader_that_fails_is_one_error(tiny_policy: MiniVLA, mock_demos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(mock_demos, tmp_path / "demos"))
    frames = encode(tiny_policy, Demonstrations(copied), np.arange(40), "frames", stream=True)
    with closing(frames.ahead(np.arange(4) for _ in range(100))) as batches:
        assert len(next(batches)) == 4
        [reader] = multiprocessing.active_children()
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGKILL)
        with pytest.raises(ConfigError, match=r"^memory: a process that reads frames was killed"):
            list(batches)
    for video in (copied / "videos").rglob("*.mp4"):
        video.write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"^\S+\.mp4: cannot be read as a video"), closing(frames.batches()) as parts:
        next(parts)
    assert not multiprocessing.active_children()
