"""`dysl doctor`: what this machine has, and the one command that mends each thing that it lacks."""

from __future__ import annotations

import os
import platform
import time
from contextlib import closing
from dataclasses import dataclass

from dysl_vla import provenance
from dysl_vla.errors import DyslError

NEEDED = {
    "torch": "policy",
    "transformers": "policy",
    "tokenizers": "policy",
    "safetensors": "policy",
    "gymnasium": "sim",
    "mujoco": "sim",
    "metaworld": "sim",
    "robosuite": "sim",
    "av": "sim",
    "pyarrow": "sim",
}
"""Package to the extra that brings it."""
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


def diagnose() -> Diagnosis:
    """Look at packages, OpenGL and rendering speed; changes nothing."""
    found = [f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    wanting = []
    versions = provenance.versions()
    found += [f"{name} {versions[name]}" for name in versions if name != "python"]
    for extra in dict.fromkeys(NEEDED.values()):
        lacking = [name for name, of in NEEDED.items() if of == extra and name not in versions]
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
