"""dysl-vla: vision-language-action policies that skip layers when the action allows it.

The names below are imported when they are first used: `import dysl_vla` itself loads neither torch nor a simulator.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ActionChunk": "dysl_vla.types",
    "DyslError": "dysl_vla.errors",
    "EpisodeState": "dysl_vla.types",
    "Observation": "dysl_vla.types",
    "Policy": "dysl_vla.policies",
    "PolicySpec": "dysl_vla.types",
    "EmbodimentSpec": "dysl_vla.types",
    "evaluate": "dysl_vla.eval.runner",
    "get_suite": "dysl_vla.envs",
    "load_policy": "dysl_vla.policies",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 # they are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dysl_vla' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
