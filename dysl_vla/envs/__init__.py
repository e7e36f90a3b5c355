"""Simulated manipulation: Gymnasium environments with LeRobot's observation keys, and the suites made of them.

Importing this subpackage imports no simulator. It registers the environments with Gymnasium, as
`dysl_vla/metaworld-<task>-v3`, `dysl_vla/robosuite-<task>-v1` and `dysl_vla/mock-<task>-v0`; LIBERO's take the task as
an argument, `gymnasium.make("dysl_vla/libero-goal-v1", task="turn_on_the_stove")`.
"""

from dysl_vla.extras import needs_extra

with needs_extra("sim"):
    import gymnasium

from dysl_vla.envs.base import ManipulationEnv, episode_rng
from dysl_vla.envs.libero import HORIZONS as LIBERO_HORIZONS
from dysl_vla.envs.libero import PRO_HORIZONS as LIBERO_PRO_HORIZONS
from dysl_vla.envs.libero_chain import HORIZON as CHAIN_HORIZON
from dysl_vla.envs.metaworld import HORIZON as METAWORLD_HORIZON
from dysl_vla.envs.metaworld import INSTRUCTIONS
from dysl_vla.envs.mock import HORIZON as MOCK_HORIZON
from dysl_vla.envs.mock import TASKS as MOCK_TASKS
from dysl_vla.envs.robosuite import HORIZON as ROBOSUITE_HORIZON
from dysl_vla.envs.robosuite import INSTRUCTIONS as ROBOSUITE_INSTRUCTIONS
from dysl_vla.envs.suites import Suite, TaskEnvs, get_suite, suites, with_perturbation, with_robot
from dysl_vla.provenance import FIRST_EVALUATION_SEED

__all__ = [
    "FIRST_EVALUATION_SEED",
    "ManipulationEnv",
    "Suite",
    "TaskEnvs",
    "episode_rng",
    "get_suite",
    "suites",
    "with_perturbation",
    "with_robot",
]

for simulator, environment, tasks, horizon, version in (
    ("metaworld", "metaworld:MetaWorldEnv", INSTRUCTIONS, METAWORLD_HORIZON, 3),
    ("robosuite", "robosuite:RobosuiteEnv", ROBOSUITE_INSTRUCTIONS, ROBOSUITE_HORIZON, 1),
    ("mock", "mock:MockEnv", MOCK_TASKS, MOCK_HORIZON, 0),
):
    for task in tasks:
        gymnasium.register(
            id=f"dysl_vla/{simulator}-{task}-v{version}",
            entry_point=f"dysl_vla.envs.{environment}",
            kwargs={"task": task},
            max_episode_steps=horizon,
        )
for suite, horizon in (LIBERO_HORIZONS | LIBERO_PRO_HORIZONS).items():
    gymnasium.register(
        id=f"dysl_vla/{suite}-v1",
        entry_point="dysl_vla.envs.libero:LiberoEnv",
        kwargs={"suite": suite},
        max_episode_steps=horizon,
    )
gymnasium.register(
    id="dysl_vla/libero-chain-v1",
    entry_point="dysl_vla.envs.libero_chain:LiberoChainEnv",
    max_episode_steps=CHAIN_HORIZON,
)
