"""robosuite's single-arm tasks: 7-d operational-space actions at 20 Hz, two cameras, scripted experts.

A robot gets small motions of its end effector (OSC_POSE, relative to where it is) along the world's axes, and shows the
end effector's pose and the gripper's opening. Orientation is the rotation matrix's first two columns, which are
continuous and unique for each rotation (Zhou et al. 2019). Only the expert sees the objects' poses. Scenes are made
once: Lift's cube, whose side robosuite draws between 40 and 44 mm whenever it builds the scene anew, keeps one size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.base import check_cameras
from dysl_vla.envs.rendering import load_mujoco
from dysl_vla.envs.robosuite_world import RATE_HZ, RobosuiteWorld, embodiment
from dysl_vla.errors import ConfigError, DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.types import FloatArray

INSTRUCTIONS: dict[str, str] = {  # not PickPlaceSingle and NutAssemblySingle: their object differs between processes
    "lift": "lift the red cube",
    "stack": "stack the red cube on the green cube",
    "door": "open the door",
    "pick-place-can": "put the can into its bin",
    "nut-assembly-square": "put the square nut on the square peg",
    "nut-assembly-round": "put the round nut on the round peg",
    "nut-assembly": "put both nuts on their pegs",
    "pick-place-milk": "put the milk into its bin",
    "pick-place-bread": "put the bread into its bin",
    "pick-place-cereal": "put the cereal into its bin",
    "pick-place": "put every object into its bin",
    "tool-hang": "hang the tool on the frame",
    "wipe": "wipe the table",
}
EXPERT_ROBOTS: dict[str, tuple[str, ...]] = {
    "lift": ("Panda", "IIWA", "Jaco", "Kinova3", "UR5e"),
    "stack": ("Panda", "IIWA", "Kinova3", "UR5e"),
    "door": ("Panda",),
    "pick-place-can": ("Panda", "IIWA", "Kinova3", "UR5e"),
    "nut-assembly-square": ("Panda", "UR5e"),
}
"""Task to the robots whose scripted expert was seen to succeed 16 times in 20: results/env/experts.md."""
FIVE = tuple(EXPERT_ROBOTS)
ROBOTS = ("Panda", "Sawyer", "IIWA", "Jaco", "Kinova3", "UR5e")
HORIZON = 400
"""The horizon of robosuite's benchmarks, which is short for the tasks with several objects and for tool-hang."""
DEFAULT_CAMERAS = {"agentview": (128, 128), "robot0_eye_in_hand": (96, 96)}
CAMERAS = ("agentview", "frontview", "birdview", "robot0_robotview", "robot0_eye_in_hand")
"""The cameras that every task has."""
STATE_NAMES = ("x", "y", "z", "x_to_x", "x_to_y", "x_to_z", "y_to_x", "y_to_y", "y_to_z", "gripper")
"""Position in metres; directions of the end effector's x and y axes; metres between the fingers."""


class RobosuiteEnv(RobosuiteWorld):
    """One robosuite task.

    Args:
        task: The task's name in lower case, words joined by hyphens, "pick-place-can".
        cameras: Camera name to (height, width).
        robot: One of `ROBOTS`.
        full_quality: See `ManipulationEnv`.
        render_mode: See `ManipulationEnv`.

    Raises:
        ConfigError: The task, the robot or a camera is unknown.
        RenderingError: This machine has no OpenGL.
    """

    state_names: ClassVar[tuple[str, ...]] = STATE_NAMES
    default_cameras: ClassVar[Mapping[str, tuple[int, int]]] = DEFAULT_CAMERAS

    def __init__(
        self,
        task: str,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        *,
        robot: str = ROBOTS[0],
        full_quality: bool = False,
        render_mode: str = "rgb_array",
    ) -> None:
        if task not in INSTRUCTIONS:
            raise ConfigError(f"task: robosuite's {task!r} is not offered; there are: {', '.join(INSTRUCTIONS)}.")
        if robot not in ROBOTS:
            raise ConfigError(f"robot: robosuite's {robot!r} is not offered; there are: {', '.join(ROBOTS)}.")
        sizes = dict(cameras or self.default_cameras)
        check_cameras(sizes, CAMERAS)
        robosuite = load_robosuite()
        from dysl_vla.envs.robosuite_experts import experts

        self._has_expert = robot in EXPERT_ROBOTS.get(task, ())
        self._make_expert = experts[task] if self._has_expert else None
        world = robosuite.make(
            re.sub(r"(?:^|-)(.)", lambda first: first[1].upper(), task),
            robots=robot,
            controller_configs=controllers(robot),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=False,
            hard_reset=False,
            ignore_done=True,
            control_freq=RATE_HZ,
            seed=0,
        )
        self.full_quality = full_quality
        self._bind(world)
        self._is_recorded = False
        super().__init__(task, INSTRUCTIONS[task], embodiment(sizes, self.state_names), HORIZON, render_mode)

    def load_recorded(self, model: str) -> None:
        """Build the scene of a recording, whose objects may differ in size and place; it has no episodes to reset to.

        Args:
            model: The scene in MJCF, as robosuite records it.

        Raises:
            DatasetError: The scene is of another robot or another version of robosuite.
        """
        self._renderer.close()
        self._is_recorded = True
        try:
            self._world.reset_from_xml_string(model)
        except Exception as error:  # whatever MuJoCo, robosuite and the XML parser raise
            raise DatasetError(
                f"the recorded scene is not robosuite 1.5's {self.task} ({error}); take a recording of that "
                "version (robomimic's are named demo_v15.hdf5)."
            ) from error
        self._bind(self._world)

    @property
    def recorded_width(self) -> int:
        """How many numbers a recorded state of the present scene has."""
        return int(1 + self._model.nq + self._model.nv)

    def show_recorded(self, state: NDArray[np.float64]) -> bool:
        """Put the world into a recorded state, to observe it but not to continue from it.

        Args:
            state: Time, positions and velocities, as robosuite flattens them.

        Returns:
            Whether the task is done in that state.

        Raises:
            DatasetError: The state does not fit the scene.
        """
        if state.shape != (self.recorded_width,) or not np.isfinite(state).all():
            raise DatasetError(
                f"a recorded state must have {self.recorded_width} finite values, got an array of shape {state.shape}."
            )
        self._world.sim.set_state_from_flattened(state)
        self._world.sim.forward()
        return bool(self._world._check_success())

    def _reset_world(self, rng: np.random.Generator) -> None:
        if self._is_recorded:
            raise ConfigError("reset: this environment shows a recording; make another one for episodes.")
        # Robot and placement samplers hold one generator, that of the world.
        self._world.rng.bit_generator.state = rng.bit_generator.state
        self._world.reset()
        self._expert = self._make_expert(self._world) if self._make_expert else None

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        _, reward, _, _ = self._world.step(action[: self._world.action_dim])
        return float(reward), bool(self._world._check_success())

    def _state(self) -> FloatArray:
        arm = self._arm
        return np.array([*arm.position, *arm.rotation[:, 0], *arm.rotation[:, 1], arm.opening], np.float32)

    def expert_action(self) -> FloatArray:
        """The action of a scripted policy on the full state; see `ManipulationEnv.expert_action`."""
        if not self._has_expert:
            having = ", ".join(EXPERT_ROBOTS.get(self.task, ())) or "none"
            raise ConfigError(f"task: {self.task!r} has no scripted expert for this robot; robots with one: {having}.")
        return super().expert_action()


def controllers(robot: str) -> dict[str, Any]:
    """Robosuite's own settings of a robot's controllers, except for the frame of actions.

    That frame is the world's: the base's is parallel to it, but for the IIWA, whose "base" turns with its first joint.
    """
    settings: dict[str, Any] = load_robosuite().load_composite_controller_config(robot=robot)
    settings["body_parts"]["right"]["input_ref_frame"] = "world"
    return settings


def load_robosuite() -> Any:
    """Import robosuite after MuJoCo with its GL backend, and silence what it logs on every import and robot."""
    load_mujoco()
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    with needs_extra("sim"):
        import robosuite
    return robosuite


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
