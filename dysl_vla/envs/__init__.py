"""Simulated manipulation: Gymnasium environments with LeRobot's observation keys, and the suites made of them.

Importing this room imports no simulator. It registers the environments with Gymnasium, as
`dysl_vla/metaworld-<task>-v3` and `dysl_vla/mock-<task>-v0`.
"""

from dysl_vla.extras import needs_extra

with needs_extra("sim"):
    import gymnasium

from dysl_vla.envs.base import ManipulationEnv, episode_rng
from dysl_vla.envs.metaworld import HORIZON as METAWORLD_HORIZON
from dysl_vla.envs.metaworld import INSTRUCTIONS
from dysl_vla.envs.mock import HORIZON as MOCK_HORIZON
from dysl_vla.envs.mock import TASKS as MOCK_TASKS
from dysl_vla.envs.suites import FIRST_EVALUATION_SEED, Suite, TaskEnvs, get_suite, suites

__all__ = ["FIRST_EVALUATION_SEED", "ManipulationEnv", "Suite", "TaskEnvs", "episode_rng", "get_suite", "suites"]

for task in INSTRUCTIONS:
    gymnasium.register(
        id=f"dysl_vla/metaworld-{task}-v3",
        entry_point="dysl_vla.envs.metaworld:MetaWorldEnv",
        kwargs={"task": task},
        max_episode_steps=METAWORLD_HORIZON,
    )
for task in MOCK_TASKS:
    gymnasium.register(
        id=f"dysl_vla/mock-{task}-v0",
        entry_point="dysl_vla.envs.mock:MockEnv",
        kwargs={"task": task},
        max_episode_steps=MOCK_HORIZON,
    )
