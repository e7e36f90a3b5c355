"""The folder of a run: its files, and how it is written, continued after a kill, and read.

run.json          settings of the run; a folder of another run is refused
episodes.jsonl    one line an episode, appended when it has ended
parts/            one Parquet file an episode, written before its line; merged when the run ends
steps.parquet     one row a step
result.json       the figures
report.md         the figures for people
videos/           videos of episodes, if asked for
contact_sheet.png frames of the first video of each task
perturbations.png what each perturbation looks like at every level, where there are any
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dysl_vla.errors import ConfigError
from dysl_vla.eval.contact_sheet import write_contact_sheet
from dysl_vla.eval.rollout import EpisodeKey
from dysl_vla.extras import needs_extra
from dysl_vla.files import (
    append_line,
    atomic_write,
    check_same_run,
    is_unused,
    locked_dir,
    read_json,
    read_lines,
    write_json,
    write_text,
)

with needs_extra("train"):
    import pyarrow as pa
    import pyarrow.parquet as pq

RUN, EPISODES, PARTS, STEPS = "run.json", "episodes.jsonl", "parts", "steps.parquet"
RESULT, REPORT, VIDEOS, CONTACT_SHEET = "result.json", "report.md", "videos", "contact_sheet.png"
PERTURBATIONS = "perturbations.png"

TIMES = ("physics_ms", "render_ms", "encode_ms", "llm_ms", "decode_ms", "guidance_ms", "total_ms")
SKIP_TIMES = ("controllers_ms", "adapters_ms", "verify_ms")
"""Times that are part of `llm_ms`."""
STEP_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("episode_index", pa.int32()),
        ("step", pa.int32()),
        ("reward", pa.float32()),
        ("success", pa.bool_()),
        *((name, pa.float32()) for name in TIMES),
        ("action", pa.list_(pa.float32())),
        ("layers", pa.int16()),
        ("layers_run", pa.list_(pa.bool_())),
        ("skipped_at", pa.list_(pa.int16())),
        ("landed_on", pa.list_(pa.int16())),
        ("controllers_asked", pa.list_(pa.int16())),
        ("controller_outputs", pa.list_(pa.float32())),
        ("allow_points", pa.list_(pa.int16())),
        ("continuity", pa.float32()),
        ("verified", pa.bool_()),
        *((name, pa.float32()) for name in SKIP_TIMES),
    ]
)


class RunFolder:
    """The folder of a run that is begun or continued.

    Args:
        root: The folder.
        identity: Settings that decide the run's result, JSON-like.

    Raises:
        ConfigError: The folder holds another run, or something else; nothing in it was changed.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.root = root
        self._identity = dict(identity)
        if (root / RUN).is_file():
            check_same_run(root / RUN, identity)
        elif not is_unused(root):
            raise ConfigError(f"out must be a new folder or one of a run; {root} is not empty and holds no run.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while the run goes on, and write the run's settings.

        Raises:
            ConfigError: Another process has locked it.
        """
        with locked_dir(self.root):
            write_json(self.root / RUN, self._identity)
            yield

    def is_finished(self) -> bool:
        """Tell whether the run's figures are written."""
        return (self.root / RESULT).exists()

    def episodes(self) -> list[dict[str, Any]]:
        """Return the records of the episodes that have ended."""
        return read_lines(self.root / EPISODES)

    def write_part(self, key: EpisodeKey, steps: list[dict[str, Any]]) -> None:
        """Write an episode's steps, in the process that ran it."""
        with atomic_write(self._part(key.task, key.index)) as temporary:
            pq.write_table(pa.Table.from_pylist(steps, STEP_SCHEMA), temporary)

    def append(self, record: dict[str, Any]) -> None:
        """Record that an episode has ended."""
        append_line(self.root / EPISODES, record)

    def steps(self, episodes: list[dict[str, Any]]) -> pa.Table:
        """Return the steps of the given episodes, in their order."""
        return pa.concat_tables([pq.read_table(self._part(e["task"], e["episode_index"])) for e in episodes])

    def finish(self, steps: pa.Table, result: Mapping[str, Any], report: str) -> None:
        """Write the files that summarise the run."""
        with atomic_write(self.root / STEPS) as temporary:
            pq.write_table(steps, temporary, compression="zstd")
        videos = sorted((self.root / VIDEOS).glob("*-000-*.mp4"))
        if videos:
            write_contact_sheet(videos, self.root / CONTACT_SHEET)
        write_text(self.root / REPORT, report)
        write_json(self.root / RESULT, result)
        shutil.rmtree(self.root / PARTS, ignore_errors=True)

    def video(self, key: EpisodeKey, success: bool) -> Path:
        """Return the path of an episode's video."""
        return self.root / VIDEOS / f"{key.task}-{key.index:03d}-{'success' if success else 'failure'}.mp4"

    def _part(self, task: str, index: int) -> Path:
        return self.root / PARTS / f"{task}-{index:05d}.parquet"


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of the finished runs in a folder: itself, or those of `--variants`.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    if (folder / RESULT).is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{RESULT}"))
    if not runs:
        read_result(folder)  # says what is missing
    return runs


def read_result(root: Path) -> dict[str, Any]:
    """Read the figures of a finished run.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    if not (root / RESULT).is_file():
        if not root.is_dir():
            raise ConfigError(f"{root}: does not exist.")
        variants = sorted(path.parent.name for path in root.glob(f"*/{RESULT}"))
        if variants:
            raise ConfigError(
                f"{root}: holds several runs; name one: {', '.join(str(root / variant) for variant in variants)}."
            )
        raise ConfigError(f"{root}: holds no finished evaluation; if it is one, the same `dysl eval` finishes it.")
    return read_json(root / RESULT)
