"""Suites: what is evaluated. Tasks, horizon and how an environment is made, under one name.

In every suite an episode succeeds when the success flag is raised at any step before the horizon, and its initial state
is a function of (task, seed, episode index) alone. Seeds below `FIRST_EVALUATION_SEED` are for demonstrations, those
from it on for evaluation, so that nothing is ever evaluated on a state that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.metaworld import HORIZON, INSTRUCTIONS, MT10, MetaWorldEnv
from dysl_vla.envs.mock import HORIZON as MOCK_HORIZON
from dysl_vla.envs.mock import TASKS as MOCK_TASKS
from dysl_vla.envs.mock import MockEnv
from dysl_vla.envs.rendering import load_mujoco
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.registry import Registry

FIRST_EVALUATION_SEED = 100_000

Cameras = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Suite:
    """A named set of tasks.

    Attributes:
        name: What the command line calls it.
        tasks: In the order of reports.
        horizon: Steps at most.
        make: (task, cameras or None for the suite's own) to an environment.
    """

    name: str
    tasks: tuple[str, ...]
    horizon: int
    make: Callable[[str, Cameras | None], ManipulationEnv]

    def choose(self, names: str) -> tuple[str, ...]:
        """The tasks asked for, all of them when none is named, in the suite's order.

        Args:
            names: Separated by commas.

        Raises:
            ConfigError: A task is not in this suite.
        """
        tasks = [name.strip() for name in names.split(",") if name.strip()]
        for task in tasks:
            if task not in self.tasks:
                raise ConfigError(f"unknown task {task!r}; suite {self.name} has: {', '.join(self.tasks)}.")
        return tuple(task for task in self.tasks if task in tasks) if tasks else self.tasks


class TaskEnvs:
    """A suite's environments for one process, which keeps that of the last task: making one takes a while.

    Args:
        suite: Whose tasks.
        cameras: See `Suite.make`.
    """

    def __init__(self, suite: Suite, cameras: Cameras | None) -> None:
        self._suite = suite
        self._cameras = cameras
        self._env: ManipulationEnv | None = None

    def env(self, task: str) -> ManipulationEnv:
        """The task's environment; the last one is closed."""
        if self._env is None or self._env.task != task:
            self.close()
            self._env = self._suite.make(task, self._cameras)
        return self._env

    def close(self) -> None:
        """Free the renderers."""
        if self._env is not None:
            self._env.close()
            self._env = None


suites: Registry[Callable[[], Suite]] = Registry("suite", "dysl_vla.suites")


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: Unknown; the message lists those that exist.
        MissingExtraError: Its simulator is not installed.
    """
    return suites.get(name)()


def _metaworld(name: str, tasks: tuple[str, ...]) -> Suite:
    load_mujoco()
    with needs_extra("sim"):
        import metaworld  # noqa: F401
    return Suite(name, tasks, HORIZON, MetaWorldEnv)


@suites.register("metaworld-mt10")
def metaworld_mt10() -> Suite:
    """The official ten tasks."""
    return _metaworld("metaworld-mt10", MT10)


@suites.register("metaworld-mt50")
def metaworld_mt50() -> Suite:
    """All fifty tasks."""
    return _metaworld("metaworld-mt50", tuple(INSTRUCTIONS))


@suites.register("mock")
def mock() -> Suite:
    """A point on a plane: no simulator, for tests of everything around one."""
    return Suite("mock", tuple(MOCK_TASKS), MOCK_HORIZON, MockEnv)
