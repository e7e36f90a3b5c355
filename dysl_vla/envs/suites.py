"""Suites: sets of tasks under one name, with their horizon and how their environments are made.

In every suite an episode succeeds when the success flag is raised at any step before the horizon, and its initial state
is a function of (task, seed, episode index) alone. Seeds below `provenance.FIRST_EVALUATION_SEED` are for
demonstrations, those from it on for evaluation, so that nothing is ever evaluated on a state that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.libero import FIXED_STATES, PRO_HORIZONS, LiberoEnv, folder_of, has_expert
from dysl_vla.envs.libero import HORIZONS as LIBERO_HORIZONS
from dysl_vla.envs.libero_chain import HORIZON as CHAIN_HORIZON
from dysl_vla.envs.libero_chain import TASK as CHAIN
from dysl_vla.envs.libero_chain import LiberoChainEnv
from dysl_vla.envs.libero_package import load_libero, task_map
from dysl_vla.envs.metaworld import HORIZON, INSTRUCTIONS, MT10, MetaWorldEnv
from dysl_vla.envs.mock import HORIZON as MOCK_HORIZON
from dysl_vla.envs.mock import TASKS as MOCK_TASKS
from dysl_vla.envs.mock import MockEnv
from dysl_vla.envs.perturbations import SWEEP, PerturbedEnv, Perturbing
from dysl_vla.envs.rendering import load_mujoco
from dysl_vla.envs.robosuite import EXPERT_ROBOTS, FIVE, ROBOTS, RobosuiteEnv, load_robosuite
from dysl_vla.envs.robosuite import HORIZON as ROBOSUITE_HORIZON
from dysl_vla.envs.robosuite import INSTRUCTIONS as ROBOSUITE_INSTRUCTIONS
from dysl_vla.envs.robosuite_libero import RobosuiteAsLibero
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.provenance import FIRST_EVALUATION_SEED
from dysl_vla.registry import Registry
from dysl_vla.types import FULL_QUALITY, PolicySpec

Cameras = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Suite:
    """A named set of tasks of one robot, with the same cameras, state and actions.

    Attributes:
        name: The suite's name on the command line.
        tasks: The tasks in the order of reports.
        horizon: Steps after which an episode ends.
        make: (task, cameras or None for the suite's own) to an environment.
        robot: The robot whose arm moves.
        without_expert: The tasks that have no scripted expert for this robot.
        noise: Strength of the noise on an expert's actions in demonstrations; with more, too many of them fail.
        fixed_states: Number of initial states from which a benchmark's protocol evaluates a task: those of the first
            evaluation seed. Without any, and for the other seeds, there are as many states as episodes.
        robots: Name of each other robot to this suite with that robot.
        perturbing: What perturbs its episodes; None: nothing.
    """

    name: str
    tasks: tuple[str, ...]
    horizon: int
    make: Callable[[str, Cameras | None], ManipulationEnv]
    robot: str
    without_expert: frozenset[str] = frozenset()
    noise: float = 1.0
    fixed_states: int | None = None
    robots: Mapping[str, Callable[[], Suite]] = field(default_factory=dict)
    perturbing: Perturbing | None = None

    def choose(self, names: str | None) -> tuple[str, ...]:
        """The tasks asked for, all of them when none is named, in the suite's order.

        Args:
            names: Names separated by commas, see `find`; None: all of them.

        Raises:
            ConfigError: A task is not in this suite.
        """
        asked = {name.strip(): self.find(name) for name in (names or "").split(",") if name.strip()}
        for name, task in asked.items():
            if task is None:
                raise ConfigError(f"unknown task {name!r}; suite {self.name} has: {', '.join(self.tasks)}.")
        return tuple(task for task in self.tasks if task in asked.values()) if asked else self.tasks

    def check_episodes(self, episodes: int, seed: int) -> None:
        """Refuse more episodes of a task than there are initial states, as some would be run twice.

        Raises:
            ConfigError: There are fewer states.
        """
        if self.fixed_states is not None and seed == FIRST_EVALUATION_SEED and episodes > self.fixed_states:
            raise ConfigError(
                f"episodes must be at most {self.fixed_states} in {self.name}, whose benchmark fixes so many initial "
                f"states a task, got {episodes}; with --seed {seed + 1} and above, states are drawn anew."
            )

    def make_for(self, task: str, spec: PolicySpec) -> ManipulationEnv:
        """Make the environment of a task with the images that a policy was trained on."""
        env = self.make(task, spec.cameras)
        env.full_quality = spec.rendering == FULL_QUALITY
        return env

    def find(self, name: str) -> str | None:
        """The task that a name means: "PickPlaceCan" means "pick-place-can"; None for an unknown name."""
        return {_plain(task): task for task in self.tasks}.get(_plain(name))


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "")


class TaskEnvs:
    """A suite's environments for one process. Only that of the last task is kept, since making one takes seconds.

    Args:
        make: A task's name to its environment.
    """

    def __init__(self, make: Callable[[str], ManipulationEnv]) -> None:
        self._make = make
        self._env: ManipulationEnv | None = None

    def env(self, task: str) -> ManipulationEnv:
        """The environment of a task; that of another task is closed."""
        if self._env is None or self._env.task != task:
            self.close()
            self._env = self._make(task)
        return self._env

    def close(self) -> None:
        """Free the renderers."""
        if self._env is not None:
            self._env.close()
            self._env = None


suites: Registry[Callable[[], Suite]] = Registry("suite", "dysl_vla.suites")


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Args:
        name: "robosuite-5", or "robosuite-5@UR5e" with another robot than its own; "robosuite-5+light:4" with what
            perturbs it, see `Perturbing.parse`.

    Raises:
        ConfigError: The suite, the robot or a perturbation is unknown; the message lists those that exist.
        MissingExtraError: The suite's simulator is not installed.
    """
    name, is_perturbed, perturbing = name.partition("+")
    if is_perturbed:
        return _perturbed(get_suite(name), Perturbing.parse(perturbing))
    name, _, robot = name.partition("@")
    suite = suites.get(name)()
    if not robot or _plain(robot) == _plain(suite.robot):
        return suite
    known = {_plain(other): make for other, make in suite.robots.items()}
    if _plain(robot) not in known:
        offered = f"there are: {', '.join(suite.robots)}" if suite.robots else f"it has only its own, {suite.robot}"
        raise ConfigError(f"robot: suite {name} has no robot {robot!r}; {offered}.")
    return known[_plain(robot)]()


def with_robot(suite: str, robot: str | None) -> str:
    """The name of a suite with a given robot; the name itself when no robot is named."""
    name, plus, perturbing = suite.partition("+")
    return f"{name.partition('@')[0]}@{robot}{plus}{perturbing}" if robot else suite


def with_perturbation(suite: str, perturbing: str | None) -> str:
    """The name of a suite that is perturbed; the name itself when nothing is named."""
    return f"{suite}+{perturbing}" if perturbing else suite


def _perturbed(suite: Suite, perturbing: Perturbing, name: str | None = None) -> Suite:
    """The suite with perturbed episodes; its name says so, unless it has another one."""
    if suite.perturbing is not None:
        raise ConfigError(f"perturb: {suite.name} is perturbed already; take the suite without.")

    def make(task: str, cameras: Cameras | None) -> ManipulationEnv:
        return PerturbedEnv(suite.make(task, cameras), perturbing)

    robots = {
        robot: partial(_perturbed_by, make_suite, perturbing, name and with_robot(name, robot))
        for robot, make_suite in suite.robots.items()
    }
    own_name = name or with_perturbation(suite.name, perturbing.name)
    return replace(suite, name=own_name, make=make, robots=robots, perturbing=perturbing)


def _perturbed_by(make: Callable[[], Suite], perturbing: Perturbing, name: str | None) -> Suite:
    return _perturbed(make(), perturbing, name)


def _metaworld(name: str, tasks: tuple[str, ...]) -> Suite:
    load_mujoco()
    with needs_extra("sim"):
        import metaworld  # noqa: F401
    return Suite(name, tasks, HORIZON, MetaWorldEnv, robot="Sawyer")


@suites.register("metaworld-mt10")
def metaworld_mt10() -> Suite:
    """The ten tasks of Meta-World's MT10."""
    return _metaworld("metaworld-mt10", MT10)


@suites.register("metaworld-mt10-plus")
def metaworld_mt10_plus() -> Suite:
    """MT10 with every perturbation at every level, one an episode."""
    return _perturbed(get_suite("metaworld-mt10"), Perturbing.parse(SWEEP), "metaworld-mt10-plus")


@suites.register("metaworld-mt50")
def metaworld_mt50() -> Suite:
    """The fifty tasks of Meta-World's MT50."""
    return _metaworld("metaworld-mt50", tuple(INSTRUCTIONS))


def _robosuite(name: str, tasks: tuple[str, ...], make: type[RobosuiteEnv] = RobosuiteEnv) -> Suite:
    load_robosuite()

    def with_arm(robot: str) -> Suite:
        return Suite(
            with_robot(name, robot if robot != ROBOTS[0] else ""),
            tasks,
            ROBOSUITE_HORIZON,
            partial(make, robot=robot),
            robot,
            without_expert=frozenset(task for task in tasks if robot not in EXPERT_ROBOTS.get(task, ())),
            noise=0.4,
            robots={other: partial(with_arm, other) for other in ROBOTS},
        )

    return with_arm(ROBOTS[0])


@suites.register("robosuite-5")
def robosuite_5() -> Suite:
    """Five tasks, each with a scripted expert for the Panda."""
    return _robosuite("robosuite-5", FIVE)


@suites.register("robosuite-5-plus")
def robosuite_5_plus() -> Suite:
    """robosuite-5 with every perturbation at every level, one an episode."""
    return _perturbed(get_suite("robosuite-5"), Perturbing.parse(SWEEP), "robosuite-5-plus")


@suites.register("robosuite-all")
def robosuite_all() -> Suite:
    """All tasks of robosuite's for one arm."""
    return _robosuite("robosuite-all", tuple(ROBOSUITE_INSTRUCTIONS))


@suites.register("robosuite-5-libero")
def robosuite_5_libero() -> Suite:
    """robosuite-5's tasks, observed as LIBERO's are."""
    return _robosuite("robosuite-5-libero", FIVE, RobosuiteAsLibero)


def _libero(name: str) -> Suite:
    load_libero()
    tasks = task_map()[folder_of(name)]
    return Suite(
        name,
        tasks,
        (LIBERO_HORIZONS | PRO_HORIZONS)[name],
        partial(LiberoEnv, suite=name),
        robot="Panda",
        without_expert=frozenset(task for task in tasks if not has_expert(name, task)),
        noise=0.4,
        fixed_states=FIXED_STATES,
    )


for _name in (*LIBERO_HORIZONS, *PRO_HORIZONS):
    suites.register(_name)(partial(_libero, _name))


@suites.register("libero-chain")
def libero_chain() -> Suite:
    """Chains of five of libero-goal's tasks in one scene."""
    load_libero()
    return Suite(
        "libero-chain",
        (CHAIN,),
        CHAIN_HORIZON,
        LiberoChainEnv,
        robot="Panda",
        without_expert=frozenset({CHAIN}),
        fixed_states=FIXED_STATES,
    )


@suites.register("mock")
def mock() -> Suite:
    """A point on a plane, which needs no simulator: for tests of everything around one."""
    return Suite("mock", tuple(MOCK_TASKS), MOCK_HORIZON, MockEnv, robot="point")
