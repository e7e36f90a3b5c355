"""The origin of a result or a checkpoint: versions, commit and command line, which are enough to run it again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dysl_vla.errors import ConfigError

PACKAGES = (
    "dysl-vla",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "gymnasium",
    "mujoco",
    "metaworld",
    "robosuite",
    "rpent-liberopro",
    "av",
    "pyarrow",
)
FIRST_EVALUATION_SEED = 100_000
"""First seed for evaluation; lower ones are for demonstrations."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the processor, as far as it is known, and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with "-dirty" for uncommitted changes; None without a checkout."""
    package = Path(__file__).parent
    try:
        top, commit, changes = (
            subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "."],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if Path(top) != package.parent:  # installed into an environment inside somebody else's checkout
        return None
    return commit + ("-dirty" if changes else "")


def command() -> str:
    """Return the command line, as one would type it."""
    return shlex.join(["dysl" if Path(sys.argv[0]).stem in ("dysl", "__main__") else sys.argv[0], *sys.argv[1:]])


def record() -> dict[str, Any]:
    """Return command, versions and commit, for the JSON of a result or a checkpoint."""
    return {"command": command(), "versions": versions(), "git_commit": git_commit()}


def origins(record: Any) -> Iterator[dict[str, Any]]:
    """Yield the origins of the demonstrations of a policy and of the policies that it started from."""
    if record:
        yield from record.get("data", {}).get("origins", [])
        yield from origins(record.get("init"))
        yield from origins(record.get("skipping"))
        yield from origins(record.get("baseline"))


def training_suite(record: Any, suite: str | None = None, tasks: str | None = None) -> tuple[str, str | None]:
    """The suite and tasks that a policy is run on: those asked for, else those of its last training.

    Args:
        record: The policy's provenance.
        suite: The suite asked for. Without one it is that of most episodes of the last demonstrations.
        tasks: The tasks asked for, separated by commas. Without any they are the demonstrated ones, if no suite was
            asked for, either.

    Returns:
        The suite's name, and the tasks, separated by commas; None: all of the suite.

    Raises:
        ConfigError: No suite was asked for, and the provenance names none.
    """
    if suite:
        return suite, tasks
    last = _last_origins(record)
    if not last:
        raise ConfigError(
            "suite: this policy does not say which suite it was trained in; name one, or evaluate it on held-out "
            "demonstrations with --data DIR."
        )
    episodes: Counter[str] = Counter()
    for origin in last:
        episodes[origin["suite"]] += origin["episodes"]
    [(suite, _)] = episodes.most_common(1)
    return suite, tasks or ",".join(sorted({origin["task"] for origin in last if origin["suite"] == suite}))


def known_instructions(record: Any) -> list[str]:
    """Return the instructions of a policy's last training that names any, or else those of its heads' training."""
    if not record:
        return []
    own: list[str] = record.get("data", {}).get("instructions", [])
    others = (record.get(name) for name in ("init", "skipping", "baseline"))
    return own or next(filter(None, map(known_instructions, others)), [])


def demonstrated_change(record: Any) -> list[float] | None:
    """Return the largest change from one demonstrated action to the next in a policy's last training.

    Args:
        record: The policy's provenance.

    Returns:
        A value for each dimension, in the actions' units; None when the provenance does not say, as in older policies.
    """
    if not record:
        return None
    own: list[float] | None = record.get("data", {}).get("action_change")
    return own or demonstrated_change(record.get("init"))


def _last_origins(record: Any) -> list[dict[str, Any]]:
    """Return the origins of a policy's last training that names any, or else those of its heads' training."""
    if not record:
        return []
    own: list[dict[str, Any]] = record.get("data", {}).get("origins", [])
    others = (record.get(name) for name in ("init", "skipping", "baseline"))
    return own or next(filter(None, map(_last_origins, others)), [])
