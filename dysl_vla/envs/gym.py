"""The environments' names in Gymnasium's registry; Gymnasium itself calls this through its plugin entry point."""

from __future__ import annotations

import gymnasium

from dysl_vla.envs.metaworld import HORIZON as METAWORLD_HORIZON
from dysl_vla.envs.metaworld import INSTRUCTIONS
from dysl_vla.envs.mock import HORIZON as MOCK_HORIZON
from dysl_vla.envs.mock import TASKS


def register() -> None:
    """Register every task; doing it twice changes nothing."""
    for task in INSTRUCTIONS:
        gymnasium.register(
            id=f"dysl_vla/metaworld-{task}-v3",
            entry_point="dysl_vla.envs.metaworld:MetaWorldEnv",
            kwargs={"task": task},
            max_episode_steps=METAWORLD_HORIZON,
        )
    for task in TASKS:
        gymnasium.register(
            id=f"dysl_vla/mock-{task}-v0",
            entry_point="dysl_vla.envs.mock:MockEnv",
            kwargs={"task": task},
            max_episode_steps=MOCK_HORIZON,
        )
