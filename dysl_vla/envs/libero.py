"""LIBERO's tasks on robosuite 1.5: a Panda that follows instructions, observed as policies for LIBERO are used to.

With the first evaluation seed, episodes begin from the fixed initial states of the benchmark; with any other, and in
demonstrations, objects are placed by its own samplers, so that no policy is trained on a state that it is evaluated on.
The images are mirrored left to right, since LIBERO's come upside down and its datasets turn them by 180 degrees
(openvla-oft's and LeRobot's evaluation do the same). The protocol is that of openvla-oft, experiments/robot/libero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from dysl_vla.envs.base import VIDEO_PIXELS, check_cameras
from dysl_vla.envs.libero_controller import libero_controllers
from dysl_vla.envs.libero_package import FIX, initial_states, load_libero, task_file, task_map
from dysl_vla.envs.robosuite_libero import libero_state
from dysl_vla.envs.robosuite_world import RATE_HZ, RobosuiteWorld, embodiment, mirrored
from dysl_vla.errors import ConfigError
from dysl_vla.provenance import FIRST_EVALUATION_SEED
from dysl_vla.types import LIBERO_STATE, FloatArray, ImageArray

if TYPE_CHECKING:
    from dysl_vla.envs.robosuite_experts import Expert

HORIZONS = {
    "libero-spatial": 220,
    "libero-object": 280,
    "libero-goal": 300,
    "libero-10": 520,
    "libero-90": 400,
}
"""Suite to its horizon, without the steps of `SETTLE_STEPS`."""
PERTURBATIONS = {"language": "lan", "object": "object", "swap": "swap", "task": "task"}
"""Perturbation of LIBERO-PRO to its name in the package."""
PRO_HORIZONS = {
    f"libero-pro-{base}-{perturbation}": HORIZONS[f"libero-{base}"]
    for base in ("spatial", "object", "goal", "10")
    for perturbation in PERTURBATIONS
}
"""Suite of LIBERO-PRO to its horizon, which is that of the suite it perturbs."""
EXPERT_SUITES = ("libero-spatial", "libero-object", "libero-goal")
WITHOUT_EXPERT = ("put_the_wine_bottle_on_the_rack",)
"""Tasks of these suites that have no scripted expert."""
FIXED_STATES = 50
"""Initial states of each task from which its episodes begin with the first evaluation seed."""
SETTLE_STEPS = 10
"""Steps of an open hand that does not move, in which objects fall to rest, before a policy acts."""
MAX_PLACEMENTS = 100
"""Resets after which an episode is given up whose objects find no room."""
ARM_NOISE = 0.02
"""Standard deviation of the arm's first joint positions in radians, which is robosuite's own."""
REST = np.array([0, 0, 0, 0, 0, 0, -1.0], np.float32)
DEFAULT_CAMERAS = {"agentview": (128, 128), "robot0_eye_in_hand": (128, 128)}
CAMERAS = ("agentview", "frontview", "birdview", "sideview", "galleryview", "robot0_robotview", "robot0_eye_in_hand")


def folder_of(suite: str) -> str:
    """Return the package's name of a suite: "libero_goal_lan" for "libero-pro-goal-language"."""
    if suite not in PRO_HORIZONS:
        return suite.replace("-", "_")
    _, _, base, perturbation = suite.split("-")
    return f"libero_{base}_{PERTURBATIONS[perturbation]}"


def instruction_of(task: str) -> str:
    """Return the instruction that a task's name spells, as the published evaluations read it.

    Tasks of libero-10 and libero-90 begin with the name of their scene, "KITCHEN_SCENE3_turn_on_the_stove".
    """
    words = task.split("_")
    begin = next((i + 1 for i, word in enumerate(words) if word.startswith("SCENE")), 0)
    return " ".join(words[begin:])


def has_expert(suite: str, task: str) -> bool:
    """Tell whether a task has a scripted expert. Goals of other suites may look alike, and were not tried."""
    return suite in EXPERT_SUITES and task not in WITHOUT_EXPERT


class LiberoEnv(RobosuiteWorld):
    """One task of LIBERO or LIBERO-PRO.

    LIBERO-PRO keeps the names of the tasks that it perturbs, and writes the instruction into the BDDL file: its authors
    read it from there (LIBERO-PRO's issue 14), in lower case as the parser gives it. Four of its tasks have no fixed
    initial states in the package, where their BDDL could not be read when the others' were drawn: with every seed,
    objects are placed by their samplers.

    Args:
        task: The task's name, which is that of its BDDL file.
        cameras: Camera name to (height, width).
        suite: The suite's name, "libero-goal" or "libero-pro-goal-swap".
        render_mode: See `ManipulationEnv`.

    Raises:
        ConfigError: The suite, the task or a camera is unknown.
        MissingExtraError: LIBERO is not installed.
        RenderingError: This machine has no OpenGL.
    """

    def __init__(
        self,
        task: str,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        *,
        suite: str,
        render_mode: str = "rgb_array",
    ) -> None:
        horizons = HORIZONS | PRO_HORIZONS
        if suite not in horizons:
            raise ConfigError(f"suite: LIBERO's {suite!r} is not offered; there are: {', '.join(horizons)}.")
        if task not in (tasks := task_map()[folder_of(suite)]):
            raise ConfigError(f"task: {suite} has no {task!r}; there are: {', '.join(tasks)}.")
        sizes = dict(cameras or DEFAULT_CAMERAS)
        check_cameras(sizes, CAMERAS)
        self._has_expert = has_expert(suite, task)
        self._states = initial_states(folder_of(suite), task)
        with task_file(folder_of(suite), task) as path:
            problem = load_libero().parse(str(path))
            self._bind(_build_world(path, problem["problem_name"]))
        words = problem["language_instruction"]
        instruction = instruction_of(task) if suite in HORIZONS else " ".join(words).replace("\u2019", "'")
        super().__init__(task, instruction, embodiment(sizes, LIBERO_STATE), horizons[suite], render_mode)

    def _reset_world(self, rng: np.random.Generator) -> None:
        is_fixed = self._seed == FIRST_EVALUATION_SEED and len(self._states) > 0
        # A fixed state has the arm's first pose; until then the arm is where the published evaluations have it.
        self._world.robots[0].initialization_noise["magnitude"] = 0.0 if is_fixed else ARM_NOISE
        # LIBERO places objects, and fixtures also in evaluation, by NumPy's global random numbers.
        with _global_random_numbers(int(rng.integers(2**32))):
            self._world.rng.bit_generator.state = rng.bit_generator.state  # for the arm's first pose
            self._place_objects()
        if is_fixed:
            self._world.sim.set_state_from_flattened(self._states[self._episode_index % len(self._states)])
            self._world.sim.forward()
            self._world._post_process()
        for _ in range(SETTLE_STEPS):
            self._world.step(REST)
        self._expert = self._make_expert()

    def _make_expert(self) -> Expert | None:
        """Return the scripted expert of the present task; None where it has none."""
        from dysl_vla.envs.libero_experts import make_expert

        return make_expert(self._world) if self._has_expert else None

    def _place_objects(self) -> None:
        """Reset the world; its samplers may find no room for an object, and are asked again."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(MAX_PLACEMENTS):
            self._return_fixtures()
            try:
                self._world.reset()
            except RandomizationError:
                continue
            return
        raise ConfigError(f"{self.task}: LIBERO found no room for all objects; take another episode index or seed.")

    def _return_fixtures(self) -> None:
        """Put the fixtures to the origin, where the model has them.

        LIBERO adds the place of a fixture's region to that of the fixture, to place the objects on it.
        """
        for name in self._world.fixtures_dict:
            index = self._model.body(self._world.get_object(name).root_body).id
            self._model.body_pos[index], self._model.body_quat[index] = 0, (1, 0, 0, 0)

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        _, reward, success, _ = self._world.step(action)
        return float(reward), bool(success)

    def _state(self) -> FloatArray:
        return libero_state(self._world, self._arm)

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        return mirrored(super()._render_camera(camera, height, width))

    def render(self) -> ImageArray:
        """Render a frame for people, which is not mirrored; see `ManipulationEnv.render`."""
        return super()._render_camera(next(iter(self.embodiment.cameras)), VIDEO_PIXELS, VIDEO_PIXELS)


def _build_world(path: Path, problem: str) -> Any:
    """Build the scene of a BDDL file, of the given kind.

    Raises:
        ConfigError: A file of its meshes is missing or damaged.
    """
    try:
        return load_libero().problems[problem](
            str(path),
            robots=["Panda"],
            controller_configs=libero_controllers(),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=RATE_HZ,
            ignore_done=True,
            hard_reset=False,
        )
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:  # of files: theirs and MuJoCo's
        reason = " ".join(str(error).split())
        raise ConfigError(f"LIBERO's scene of {path.stem} cannot be built ({reason}); {FIX}") from error


@contextmanager
def _global_random_numbers(seed: int) -> Iterator[None]:
    """Seed NumPy's global random numbers in the body, and give everybody else's back afterwards."""
    before = np.random.get_state()  # LIBERO draws from them
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
