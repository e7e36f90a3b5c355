"""dysl-vla: vision-language-action policies that skip layers when the action allows it.

The names below are imported when they are first used: `import dysl_vla` itself loads neither torch nor a simulator.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ActionChunk": "dysl_vla.types",
    "BackbonePolicy": "dysl_vla.policies.backbone",
    "Bundle": "dysl_vla.deploy.runtime",
    "Client": "dysl_vla.deploy.client",
    "ControlLoop": "dysl_vla.deploy.control",
    "DyslError": "dysl_vla.errors",
    "EmbodimentSpec": "dysl_vla.types",
    "EpisodeState": "dysl_vla.types",
    "EvalConfig": "dysl_vla.eval.config",
    "Observation": "dysl_vla.types",
    "Policy": "dysl_vla.policies",
    "PolicySpec": "dysl_vla.types",
    "SkipHeads": "dysl_vla.skip_controller.heads",
    "SkipPlan": "dysl_vla.skip_controller.plan",
    "SkippablePolicy": "dysl_vla.policies",
    "attach": "dysl_vla.skip_controller.skipping",
    "detach": "dysl_vla.skip_controller.skipping",
    "evaluate": "dysl_vla.eval",
    "get_suite": "dysl_vla.envs",
    "load_policy": "dysl_vla.policies",
    "select_action": "dysl_vla.policies",
}
"""Public names, and the modules that define them."""

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 # they are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dysl_vla' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
