"""`dysl doctor`: what this machine has, and the one command that mends each thing that it lacks."""

from __future__ import annotations

import os
import platform
import re
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from dysl_vla import provenance
from dysl_vla.errors import DyslError

EXTRAS = ("policy", "sim")
SLOW_FRAME_MS = 100.0


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        found: Lines about what is there.
        wanting: What is missing, each with its mend.
    """

    found: list[str]
    wanting: list[str]

    @property
    def healthy(self) -> bool:
        """Nothing is missing."""
        return not self.wanting

    def text(self) -> str:
        """For the terminal."""
        mends = [f"missing: {line}" for line in self.wanting] or ["Everything is there."]
        return "\n".join([*self.found, "", *mends])


def needed_by(extra: str) -> list[str]:
    """The packages that an extra brings, from this package's own metadata."""
    marked = (line.partition(";") for line in requires("dysl-vla") or [])
    names = [re.split(r"[^\w.-]", line)[0] for line, _, marker in marked if re.search(f"extra == .{extra}.", marker)]
    return [name for name in names if name != "dysl-vla"]


def is_installed(name: str) -> bool:
    """A distribution of that name is there."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def diagnose() -> Diagnosis:
    """Look at packages, OpenGL and rendering speed; changes nothing."""
    found = [f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    wanting = []
    versions = provenance.versions()
    found += [f"{name} {versions[name]}" for name in versions if name != "python"]
    for extra in EXTRAS:
        lacking = [name for name in needed_by(extra) if not is_installed(name)]
        if lacking:
            wanting.append(f"{', '.join(lacking)}; mend it with: pip install 'dysl-vla[{extra}]'")
    if not any("[sim]" in line for line in wanting):
        try:
            found += _rendering()
        except DyslError as error:
            wanting.append(str(error))
    return Diagnosis(found, wanting)


def _rendering() -> list[str]:
    from dysl_vla.envs.metaworld import MetaWorldEnv
    from dysl_vla.envs.rendering import choose_gl_backend

    backend = choose_gl_backend()
    with closing(MetaWorldEnv("reach", {"corner2": (128, 128), "gripperPOV": (128, 128)})) as env:
        env.reset(seed=0)
        env.observe()
        started = time.perf_counter()
        for _ in range(10):
            env.observe()
        frame_ms = 1e3 * (time.perf_counter() - started) / 10
    note = "" if frame_ms < SLOW_FRAME_MS else " (slow: is another program using the cores?)"
    return [f"OpenGL backend {backend}; both Meta-World cameras at 128 pixels: {frame_ms:.1f} ms{note}"]
