"""An environment around a robosuite world: its arm, cameras and expert, for robosuite's own tasks and for LIBERO's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dysl_vla.envs.base import ManipulationEnv
from dysl_vla.envs.rendering import Scene, SceneRenderer
from dysl_vla.envs.robosuite_arm import Arm
from dysl_vla.errors import ConfigError
from dysl_vla.types import EmbodimentSpec, FloatArray, ImageArray

if TYPE_CHECKING:
    from dysl_vla.envs.robosuite_experts import Expert

RATE_HZ = 20
ARM_ACTIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw")
"""A value of 1 is 5 cm, or half a radian about that axis; the three angles are one rotation vector."""
ACTION_NAMES = (*ARM_ACTIONS, "gripper")
"""Names that all tasks share: the tool that wipes has no gripper, and its last action moves nothing."""
COLLISION_GEOMS = 0
"""The group of the geometries that only collide."""


class RobosuiteWorld(ManipulationEnv):
    """What environments on robosuite share; they call `_bind` with each world that they make."""

    _expert: Expert | None = None
    """The scripted expert of the running episode; None before the first one, and where the task has none."""
    _has_expert: bool
    """Whether the task has a scripted expert."""

    def _bind(self, world: Any) -> None:
        """Find the arm and the cameras in a world's present model."""
        self._world = world
        self._model, self._data = world.sim.model._model, world.sim.data._data
        self._arm = Arm(world)
        self._renderer = SceneRenderer(self._model, hidden_groups=(COLLISION_GEOMS,))
        self._scene = Scene(self._model, self._data, self._renderer)

    @property
    def scene(self) -> Scene:
        """See `ManipulationEnv`."""
        return self._scene

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        return self._renderer.render(self._data, camera, height, width, full_quality=self.full_quality)

    def expert_action(self) -> FloatArray:
        """The action of a scripted policy on the full state; see `ManipulationEnv.expert_action`."""
        if not self._has_expert:
            return super().expert_action()
        if self._expert is None:
            raise ConfigError("expert_action: reset the environment first.")
        return np.clip(np.asarray(self._expert.act(), np.float32), -1, 1)

    def close(self) -> None:
        """Free the renderers."""
        self._renderer.close()
        self._world.close()


def embodiment(cameras: Mapping[str, tuple[int, int]], state_names: tuple[str, ...]) -> EmbodimentSpec:
    """Return the specification of an arm that gets small motions of its end effector and a gripper's action."""
    return EmbodimentSpec(
        cameras=cameras,
        state_names=state_names,
        action_names=ACTION_NAMES,
        action_low=(-1.0,) * len(ACTION_NAMES),
        action_high=(1.0,) * len(ACTION_NAMES),
        rate_hz=float(RATE_HZ),
    )


def mirrored(image: ImageArray) -> ImageArray:
    """Return an image, (height, width, 3), left to right: LIBERO's come upside down, and are turned by 180 degrees."""
    return image[:, ::-1].copy()
