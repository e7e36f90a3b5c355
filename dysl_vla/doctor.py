"""`dysl doctor`: what this machine has, and for each thing that it lacks the command that installs it."""

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

EXTRAS, OPTIONAL = ("policy", "sim"), ("libero",)
"""Extras that are looked for, and those that are if a part of them is there."""
SLOW_FRAME_MS = 100.0


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        found: Lines about what is there.
        missing: Lines about what is missing, each with its fix.
    """

    found: list[str]
    missing: list[str]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    def text(self) -> str:
        """Render the diagnosis for the terminal."""
        fixes = [f"missing: {line}" for line in self.missing] or ["Everything is there."]
        return "\n".join([*self.found, "", *fixes])


def needed_by(extra: str) -> list[str]:
    """Return the packages that an extra installs, from this package's own metadata."""
    marked = (line.partition(";") for line in requires("dysl-vla") or [])
    names = [re.split(r"[^\w.-]", line)[0] for line, _, marker in marked if re.search(f"extra == .{extra}.", marker)]
    return [name for name in names if name != "dysl-vla"]


def is_installed(name: str) -> bool:
    """Tell whether a distribution of that name is installed."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def diagnose() -> Diagnosis:
    """Check packages, OpenGL and the speed of rendering. Nothing is changed."""
    found = [f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    missing = []
    versions = provenance.versions()
    found += [f"{name} {versions[name]}" for name in versions if name != "python"]
    for extra in (*EXTRAS, *OPTIONAL):
        needed = needed_by(extra)
        lacking = [name for name in needed if not is_installed(name)]
        if lacking and (extra in EXTRAS or len(lacking) < len(needed)):
            missing.append(f"{', '.join(lacking)}; install with: pip install 'dysl-vla[{extra}]'")
    if not any("[sim]" in line for line in missing):
        try:
            found += _rendering()
        except DyslError as error:
            missing.append(str(error))
    return Diagnosis(found, missing)


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
