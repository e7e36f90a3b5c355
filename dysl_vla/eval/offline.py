"""`dysl eval --data`: how far a policy's actions are from those demonstrated, for those who have no simulator.

The policy observes held-out episodes at each moment at which it would infer, and the actions that it would execute are
compared with those that were demonstrated then. Several variants of it (the full model, the one that skips layers)
take turns at every moment, so that they are paired by frame and their latencies are of the same minutes. For all
variants the actions of the first count as executed: guidance compares with the last chunk, which is a model's, too.

A small distance is no success rate: errors add up when the policy acts by itself. It shows whether training learned
anything, in which dimension it did not, and what skipping changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.data.lerobot import Demonstrations, EpisodeRow
from dysl_vla.data.selection import demonstrations_for, evenly, observations, split_of
from dysl_vla.data.split import Split
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.eval.config import EvalConfig, Variant, load_all, variants_of
from dysl_vla.eval.offline_report import draw_actions, draw_horizon, render_offline
from dysl_vla.eval.offline_summary import Played, summarise
from dysl_vla.files import atomic_write, check_same_run, is_unused, locked_dir, write_json, write_text
from dysl_vla.policies import Policy, can_skip
from dysl_vla.types import ActionChunk, FloatArray, PolicySpec, check_actions
from dysl_vla.workers import use_one_inference_thread

RUN, RESULT, REPORT = "offline_run.json", "result.json", "report.md"
PARTS, HORIZON_PICTURE = "episodes", "horizon.png"
WARM_UP = 3
PICTURES = 3
"""How many episodes are drawn."""


def evaluate_offline(config: EvalConfig) -> dict[str, Any]:
    """Compare a policy's actions with demonstrated ones, and write report and pictures.

    Args:
        config: A configuration with `data`.

    Returns:
        The content of `result.json`, with the figures of each variant under "variants".

    Raises:
        ConfigError: A value cannot work, the policy does not fit the demonstrations, or `out` holds another run.
        DatasetError: The demonstrations are damaged, or no episode is held out.
        CheckpointError: The policy is damaged.
    """
    assert config.data is not None
    use_one_inference_thread()
    # Decide what is compared on which episodes. Every mistake is found here, before anything is written.
    if not is_unused(config.out) and not (config.out / RUN).exists():
        raise ConfigError(
            f"out: {config.out} is not empty and holds no evaluation on demonstrations; give a new folder."
        )
    variants = _variants(config)
    policies = load_all(config, variants)
    demonstrations = demonstrations_for(config.data, policies[0].spec)
    split = _split(config, demonstrations, policies[0])
    held_out = [row for row in demonstrations.rows if split.is_held_out(row.number)]
    if not held_out:
        raise DatasetError(f"{config.data}: {split.explain(len(demonstrations.rows))}; or evaluate on --held-out 1.")
    rows = [held_out[index] for index in evenly(len(held_out), config.episodes)]
    episodes = [row.number for row in rows]
    identity = {
        "data": str(config.data),
        "frames": demonstrations.total_frames,
        "episodes": episodes,
        "variants": [variant.name for variant in variants],
        "policies": [policy.fingerprint for policy in policies],
    }
    with locked_dir(config.out):
        # Play the episodes that an interrupted run has not played yet.
        if (config.out / RUN).exists():
            check_same_run(config.out / RUN, identity)
        write_json(config.out / RUN, identity)
        _play(config.out, policies, demonstrations, rows)
        # Write figures, pictures and the report of all episodes.
        names = [variant.name or "policy" for variant in variants]
        parts = {episode: _read(_part(config.out, episode)) for episode in episodes}
        details = {"episodes_in_all": len(demonstrations.rows), "held_out_every": split.every}
        return _write_results(config, parts, names, policies[0].spec, details)


def _write_results(
    config: EvalConfig, parts: Mapping[int, Played], names: Sequence[str], spec: PolicySpec, details: Mapping[str, int]
) -> dict[str, Any]:
    result = {
        **summarise(list(parts.values()), names, spec),
        "data": str(config.data),
        "episodes": list(parts),
        **details,
        "policy": config.policy,
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "machine": provenance.machine(),
        **provenance.record(),
    }
    for episode, part in list(parts.items())[:PICTURES]:
        draw_actions(part, names, spec, config.out / f"episode-{episode:03d}.png")
    draw_horizon(result, config.out / HORIZON_PICTURE)
    write_text(config.out / REPORT, render_offline(result) + "\n")
    write_json(config.out / RESULT, result)
    return result


def _variants(config: EvalConfig) -> list[Variant]:
    """The variants that were asked for; by default the full model and, if there is one, the model that skips layers."""
    if config.variants or config.skip == 0:
        return variants_of(config)
    if not can_skip(config.policy):
        return variants_of(config)
    return [Variant("full", 0.0, None), Variant("dysl", config.skip, None)]


def _split(config: EvalConfig, demonstrations: Demonstrations, policy: Policy) -> Split:
    """Which episodes are held out, with a warning when the policy may have been trained on some of them."""
    trained = split_of(demonstrations, policy.provenance)
    if config.held_out is None:
        return trained
    split = Split(1) if config.held_out == 1 else split_of(demonstrations, share=config.held_out)
    if split != trained:
        print(
            f"--held-out {config.held_out:g} takes other episodes than the policy's training held out (one in "
            f"{trained.every}): if it was trained on these demonstrations, it has seen some of them."
        )
    return split


def _part(out: Path, episode: int) -> Path:
    return out / PARTS / f"{episode:06d}.npz"


def _play(out: Path, policies: Sequence[Policy], demonstrations: Demonstrations, rows: Sequence[EpisodeRow]) -> None:
    """Play those episodes that have no record yet, and write each record when its episode has ended."""
    columns = demonstrations.columns()
    todo = [row for row in rows if not _part(out, row.number).exists()]
    is_warm = False
    with tqdm(total=len(rows), initial=len(rows) - len(todo), desc="evaluating", unit="episode") as progress:
        for row in todo:
            demonstrated = columns["actions"][row.start : row.start + row.length]
            played = _play_episode(policies, demonstrations, row.start, demonstrated, is_warm=is_warm)
            is_warm = True
            with atomic_write(_part(out, row.number)) as temporary, temporary.open("wb") as file:
                np.savez(file, **vars(played))
            progress.update()


def _play_episode(
    policies: Sequence[Policy], demonstrations: Demonstrations, start: int, demonstrated: FloatArray, *, is_warm: bool
) -> Played:
    """Let all policies infer at the moments of an episode; who begins changes from moment to moment."""
    spec = policies[0].spec
    frames = np.arange(0, len(demonstrated), spec.execute_steps)
    states = [policy.reset() for policy in policies]
    answers: list[list[ActionChunk]] = []
    for index, (_, observation) in enumerate(observations(demonstrations, start + frames)):
        if index == 0 and not is_warm:
            for policy in policies:
                for _ in range(WARM_UP):
                    policy.infer([observation], [policy.reset()])
        chunks: dict[int, ActionChunk] = {}
        for turn in range(len(policies)):
            variant = (index + turn) % len(policies)
            [chunks[variant]] = policies[variant].infer([observation], [states[variant]])
            check_actions(chunks[variant].actions, len(spec.action_names))
        for state in states:
            state.executed.extend(chunks[0].actions[: spec.execute_steps])
        answers.append([chunks[variant] for variant in range(len(policies))])
    skips = [[chunk.skips for chunk in chunks] for chunks in answers]
    return Played(
        frames=frames,
        demonstrated=demonstrated,
        predicted=_variants_first([[chunk.actions for chunk in chunks] for chunks in answers]),
        llm_ms=_variants_first([[1e3 * chunk.timing.llm_s for chunk in chunks] for chunks in answers]),
        total_ms=_variants_first([[1e3 * chunk.timing.total_s for chunk in chunks] for chunks in answers]),
        layers=_variants_first([[np.nan if one is None else one.layers for one in row] for row in skips]),
        verified=_variants_first([[one is not None and one.is_verified for one in row] for row in skips]).astype(
            np.bool_
        ),
    )


def _variants_first(values: Sequence[Sequence[Any]]) -> FloatArray:
    """(moments, variants, ...) to (variants, moments, ...)."""
    return np.swapaxes(np.array(values, np.float32), 0, 1)


def _read(path: Path) -> Played:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Played(**{name: file[name] for name in Played.__dataclass_fields__})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ConfigError(f"{path}: is damaged ({error}); remove it, and run the same command again.") from error
