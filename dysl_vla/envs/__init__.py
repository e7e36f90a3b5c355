"""Simulated manipulation: Gymnasium environments with LeRobot's observation keys, and the suites made of them.

Importing this room imports no simulator. The environments are registered with Gymnasium under
`dysl_vla/metaworld-<task>-v3` and `dysl_vla/mock-<task>-v0`.
"""

from dysl_vla.extras import needs_extra

with needs_extra("sim"):
    import gymnasium  # noqa: F401

from dysl_vla.envs.base import ManipulationEnv, episode_rng
from dysl_vla.envs.suites import FIRST_EVALUATION_SEED, Suite, get_suite, suites

__all__ = ["FIRST_EVALUATION_SEED", "ManipulationEnv", "Suite", "episode_rng", "get_suite", "suites"]
