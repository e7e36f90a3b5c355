"""Properties that hold in every simulator: of episodes, cameras, actions and experts."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dysl_vla.envs import ManipulationEnv, get_suite, libero, metaworld, mock, robosuite
from dysl_vla.errors import ActionError, ConfigError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY

EXPERT_STEPS = 250


@dataclass(frozen=True)
class Simulator:
    """One simulator, as the tests below need it.

    Attributes:
        env: The environment's class.
        suite: Name of the suite with all of its tasks.
        tasks: Tasks that are tested.
        shown: Cameras that an environment has when none are asked for.
        offered: Every camera that may be asked for.
        scenes: Tasks in whose scenes all offered cameras must be found: one for each arena.
        physics: An environment to arrays with everything that decides how an episode continues.
        arguments: Further arguments of the class.
    """

    env: Callable[..., Any]
    suite: str
    tasks: tuple[str, ...]
    shown: tuple[str, ...]
    offered: tuple[str, ...]
    scenes: tuple[str, ...]
    physics: Callable[[Any], Sequence[Any]]
    arguments: Mapping[str, str] = field(default_factory=dict)

    def make(self, task: str, cameras: dict[str, tuple[int, int]] | None = None, **changes: str) -> ManipulationEnv:
        """The environment of a task."""
        env: ManipulationEnv = self.env(task, cameras, **self.arguments, **changes)
        return env

    def small(self, task: str) -> ManipulationEnv:
        """The environment of a task, with small pictures."""
        return self.make(task, dict.fromkeys(self.shown, (32, 32)))


SIMULATORS = {
    "mock": Simulator(
        mock.MockEnv,
        "mock",
        tuple(mock.TASKS),
        tuple(mock.DEFAULT_CAMERAS),
        tuple(mock.DEFAULT_CAMERAS),
        ("reach",),
        lambda env: (env._dot, env._mark, np.array(env._lingered)),
    ),
    "metaworld": Simulator(
        metaworld.MetaWorldEnv,
        "metaworld-mt50",
        (*metaworld.MT10, "assembly", "hammer"),
        tuple(metaworld.DEFAULT_CAMERAS),
        metaworld.CAMERAS,
        ("reach",),
        lambda env: (env._sawyer.data.qpos, env._sawyer.data.qvel, env._sawyer.data.mocap_pos, env._full_state),
    ),
    "robosuite": Simulator(
        robosuite.RobosuiteEnv,
        "robosuite-all",
        tuple(robosuite.INSTRUCTIONS),
        tuple(robosuite.DEFAULT_CAMERAS),
        robosuite.CAMERAS,
        ("lift", "pick-place-can", "nut-assembly", "tool-hang", "wipe"),
        lambda env: (
            env._data.qpos,
            env._data.qvel,
            env._model.body_pos,
            env._model.body_quat,
            env._model.geom_rgba,
        ),
    ),
    "libero": Simulator(
        libero.LiberoEnv,
        "libero-goal",
        ("put_the_bowl_on_the_stove",),
        tuple(libero.DEFAULT_CAMERAS),
        libero.CAMERAS,
        (),
        lambda env: (env._data.qpos, env._data.qvel, env._model.body_pos, env._model.body_quat),
        {"suite": "libero-goal"},
    ),
}


def marks(name: str) -> Any:
    return () if name == "mock" else pytest.mark.slow


each_simulator = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in SIMULATORS])


def has_expert(env: ManipulationEnv, name: str) -> bool:
    return env.task not in get_suite(SIMULATORS[name].suite).without_expert


def digest(env: ManipulationEnv, name: str, seed: int, index: int) -> str:
    """A hash of everything that decides an episode: the observation, and physics and expert in its first steps."""
    observation, _ = env.reset(seed=seed, options={"episode_index": index})
    parts = [value for value in observation.values() if isinstance(value, np.ndarray)]
    still = np.full(len(env.embodiment.action_names), 0.3, np.float32)
    for _ in range(5):
        action = env.expert_action() if has_expert(env, name) else still
        parts += [np.array(values) for values in (*SIMULATORS[name].physics(env), action)]
        env.advance(action)
    parts += [np.array(values) for values in SIMULATORS[name].physics(env)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


class OtherProcess:
    """A second process, which hashes episodes of a simulator beside the tests, and closes no environment."""

    def __init__(self, name: str) -> None:
        code = f"from tests.envs.test_contract import answer_digests\nanswer_digests({name!r})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 # it is read when the process has ended
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, task: str) -> None:
        """Let it hash episode 4 of seed 9."""
        assert self._process.stdin is not None
        print(task, file=self._process.stdin, flush=True)

    def digest(self, task: str) -> str:
        """Wait for the hash that was asked for."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"digest {task} "):
                return line.split()[2]
        raise AssertionError(self.end())

    def end(self) -> str:
        """End it; returns what it wrote to standard error."""
        self._process.communicate()
        self._errors.seek(0)
        with self._errors:
            return self._errors.read()


def answer_digests(name: str) -> None:
    for line in sys.stdin:
        env = SIMULATORS[name].small(line.strip())
        print("digest", env.task, digest(env, name, 9, 4), flush=True)


@pytest.fixture(scope="module")
def others() -> Iterator[dict[str, OtherProcess]]:
    """Second processes by simulator: starting one takes seconds."""
    running: dict[str, OtherProcess] = {}
    yield running
    for process in running.values():
        process.end()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, task), id=f"{name}-{task}", marks=marks(name))
        for name, simulator in SIMULATORS.items()
        for task in simulator.tasks
    ],
)
def env(request: pytest.FixtureRequest, others: dict[str, OtherProcess]) -> Iterator[ManipulationEnv]:
    """Making one takes seconds, so that all tests of a task share it."""
    name, task = request.param
    if name not in others:
        others[name] = OtherProcess(name)
    others[name].ask(task)
    with closing(SIMULATORS[name].small(task)) as made:
        yield made


@pytest.fixture
def name(env: ManipulationEnv) -> str:
    """The simulator of the environment."""
    [found] = [name for name, simulator in SIMULATORS.items() if type(env) is simulator.env]
    return found


def test_an_initial_state_is_the_same_in_any_order_and_after_any_episode(env: ManipulationEnv, name: str) -> None:
    forwards = [digest(env, name, 5, index) for index in range(3)]
    for _ in range(30):
        env.advance(env.expert_action() if has_expert(env, name) else env.action_space.high)
    backwards = [digest(env, name, 5, index) for index in (2, 1, 0)]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 3


def test_an_initial_state_is_the_same_in_another_process(
    env: ManipulationEnv, name: str, others: dict[str, OtherProcess]
) -> None:
    assert others[name].digest(env.task) == digest(env, name, 9, 4)


def test_a_reset_without_a_seed_starts_the_next_episode(env: ManipulationEnv) -> None:
    env.reset(seed=3)
    following, info = env.reset()
    assert info["episode_index"] == 1
    expected, _ = env.reset(seed=3, options={"episode_index": 1})
    for key, value in expected.items():
        np.testing.assert_array_equal(following[key], value)


def test_the_task_is_said_in_words_and_all_tasks_share_an_embodiment(env: ManipulationEnv, name: str) -> None:
    suite, embodiment = get_suite(SIMULATORS[name].suite), env.embodiment
    observation, _ = env.reset(seed=0)
    assert " " in observation[TASK_KEY]
    assert observation[STATE_KEY].shape == (len(embodiment.state_names),)
    assert len(embodiment.action_names) == len(embodiment.action_low) == len(embodiment.action_high)
    assert env.horizon == suite.horizon
    assert embodiment == EMBODIMENTS.setdefault(name, embodiment)


EMBODIMENTS: dict[str, Any] = {}
"""The embodiment of each simulator's first task."""


def test_a_bad_action_moves_nothing(env: ManipulationEnv, name: str) -> None:
    zeros = np.zeros(len(env.embodiment.action_names), np.float32)
    others = np.zeros(len(zeros) - 1, np.float32)
    env.reset(seed=1)
    before = [np.array(values) for values in SIMULATORS[name].physics(env)]
    for action in ([np.nan, *others], [np.inf, *others], others, [*zeros, 0]):
        with pytest.raises(ActionError):
            env.step(np.array(action, np.float32))
        for value, after in zip(before, SIMULATORS[name].physics(env), strict=True):
            np.testing.assert_array_equal(value, after)


def test_an_action_is_clipped_to_what_the_world_accepts(env: ManipulationEnv) -> None:
    ends = []
    for scale in (1, 3):
        env.reset(seed=1)
        for _ in range(3):
            env.advance(scale * env.action_space.high)
        ends.append(env._state())
    np.testing.assert_array_equal(*ends)


def test_the_expert_solves_the_task_with_actions_that_the_world_accepts(env: ManipulationEnv, name: str) -> None:
    if not has_expert(env, name):
        env.reset(seed=1)
        with pytest.raises(ConfigError, match="no scripted expert"):
            env.expert_action()
        return
    for index in range(2):
        env.reset(seed=13, options={"episode_index": index})
        for _ in range(min(env.horizon, EXPERT_STEPS)):
            action = env.expert_action()
            assert action in env.action_space
            if env.advance(action)[2]["success"]:
                break
        else:
            pytest.fail(f"episode {index}")


@pytest.mark.parametrize(
    ("name", "task"),
    [
        pytest.param(name, task, marks=marks(name))
        for name, simulator in SIMULATORS.items()
        for task in simulator.scenes
    ],
)
def test_every_offered_camera_is_in_the_scene_and_gives_pictures_of_the_asked_size(name: str, task: str) -> None:
    simulator = SIMULATORS[name]
    with closing(simulator.make(task, dict.fromkeys(simulator.offered, (12, 16)))) as env:
        observation, _ = env.reset(seed=5)
        for camera in simulator.offered:
            assert observation[IMAGE_PREFIX + camera].shape == (12, 16, 3)
        assert env.render().shape == (256, 256, 3)


@each_simulator
def test_what_does_not_exist_is_named(name: str) -> None:
    simulator = SIMULATORS[name]
    with pytest.raises(ConfigError, match=rf"'juggle'.*{simulator.tasks[0]}"):
        simulator.make("juggle")
    with pytest.raises(ConfigError, match=rf"cameras.*'nowhere'.*{simulator.offered[0]}"):
        simulator.make(simulator.tasks[0], {"nowhere": (32, 32)})
    with pytest.raises(ConfigError, match=r"got 0x32"):
        simulator.make(simulator.tasks[0], {simulator.offered[0]: (0, 32)})
    with pytest.raises(ConfigError, match="render_mode"):
        simulator.make(simulator.tasks[0], render_mode="human")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if name == "libero" else marks(name)) for name in SIMULATORS],
)
def test_gymnasium_makes_every_task_and_accepts_the_environment(name: str) -> None:
    prefix, suite = f"dysl_vla/{name}-", get_suite(SIMULATORS[name].suite)
    registered = {spec.kwargs.get("task"): spec for key, spec in gymnasium.registry.items() if key.startswith(prefix)}
    if name == "libero":  # a suite has one name, and its tasks are an argument
        registered = {task: gymnasium.spec(f"dysl_vla/{suite.name}-v1") for task in suite.tasks}
    assert {task: spec.max_episode_steps for task, spec in registered.items()} == dict.fromkeys(
        suite.tasks, suite.horizon
    )
    cameras, task = dict.fromkeys(SIMULATORS[name].shown, (32, 32)), SIMULATORS[name].tasks[0]
    with closing(gymnasium.make(registered[task], cameras=cameras, task=task).unwrapped) as env:
        check_env(env, skip_close_check=True)


@each_simulator
def test_a_process_that_forgets_to_close_ends_quietly(name: str, others: dict[str, OtherProcess]) -> None:
    """There is no traceback of a renderer, and none of a simulator's remarks on its own set-up."""
    process = others.pop(name, None) or OtherProcess(name)
    process.ask(SIMULATORS[name].tasks[0])
    process.digest(SIMULATORS[name].tasks[0])
    assert process.end() == ""
