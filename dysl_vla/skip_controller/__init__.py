"""Dynamic-static layer skipping (DySL-VLA, arXiv 2602.22896), alone: for any decoder that holds its layers in a list.

It knows no environment, no policy and no file. `guidance` needs only NumPy, so that training, evaluation and a robot
without torch run the same one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "SkipGuidance": "guidance",
    "GuidanceState": "guidance",
    "HeadsConfig": "heads",
    "SkipHeads": "heads",
    "SkipPlan": "plan",
    "Skipper": "skipping",
    "Thresholds": "guidance",
    "attach": "skipping",
    "detach": "skipping",
}

__all__ = [*_PUBLIC]  # noqa: PLE0604 # they are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
