"""An environment whose episodes are perturbed."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dysl_vla.envs.base import ManipulationEnv, episode_rng
from dysl_vla.envs.perturbations.base import Perturbation, Perturbing, describe, perturbations
from dysl_vla.envs.rendering import Scene
from dysl_vla.types import IMAGE_PREFIX, TASK_KEY, FloatArray, ImageArray, check_actions


class PerturbedEnv(ManipulationEnv):
    """Another environment, in which each episode begins as it does there and is then perturbed.

    Args:
        env: The environment, which is closed with this one.
        perturbing: What is perturbed.
    """

    def __init__(self, env: ManipulationEnv, perturbing: Perturbing) -> None:
        super().__init__(env.task, env.instruction, env.embodiment, env.horizon)
        self.instructions = env.instructions
        self._env = env
        self._perturbing = perturbing
        self._active: list[Perturbation] = []
        self._cells: str | None = None
        self._cycle = 0

    @property
    def perturbation(self) -> str | None:
        """See `ManipulationEnv`."""
        return self._cells

    @property
    def perturbing(self) -> Perturbing:
        """What is perturbed."""
        return self._perturbing

    def only(self, name: str, level: int) -> PerturbedEnv:
        """The same environment with a single perturbation; it is closed with this one."""
        return PerturbedEnv(self._env, Perturbing(((name, level),)))

    @property
    def scene(self) -> Scene | None:
        """See `ManipulationEnv`."""
        return self._env.scene

    def _reset_world(self, rng: np.random.Generator) -> None:
        if self.scene is not None:
            self.scene.restore()
        self._env.begin(self._seed, self._episode_index)
        self._note_instruction()
        order = episode_rng(f"{self.task} perturbed", 0, 0)
        cells = self._perturbing.of_episode(self._env, order, self._episode_index)
        self._cells = describe(cells)
        self._active = [perturbations.get(name)(level, partial(self._draw, name)) for name, level in cells]
        self._cycle = 0
        for perturbation in self._active:
            perturbation.begin(self._env)
        self._env.world_changed()

    def _draw(self, name: str, part: str) -> np.random.Generator:
        return episode_rng(f"{self.task} {name} {part}", self._seed, self._episode_index)

    def advance(self, action: FloatArray) -> tuple[float, bool, dict[str, Any]]:
        """See `ManipulationEnv.advance`; the world may go on for more than one step."""
        check_actions(np.asarray(action), len(self.embodiment.action_names))
        executed = self.embodiment.clip(np.asarray(action, np.float32))
        for perturbation in self._active:
            executed = self.embodiment.clip(perturbation.action(executed, self._cycle))
        rewards = 0.0
        for _ in range(max((perturbation.repeats(self._cycle) for perturbation in self._active), default=1)):
            reward, truncated, info = self._env.advance(executed)
            rewards += reward
            if truncated or info["success"]:
                break
        self._cycle += 1
        self._note_instruction()
        return rewards, truncated, info

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        return self._env._step_world(action)

    def _state(self) -> FloatArray:
        return self._env._state()

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        return self._env._render_camera(camera, height, width)

    def _note_instruction(self) -> None:
        self.instruction, self.instructions = self._env.instruction, self._env.instructions

    def observe(self) -> dict[str, Any]:
        """See `ManipulationEnv.observe`."""
        self._env.full_quality = self.full_quality
        observation = self._env.observe()
        images = {camera: observation[IMAGE_PREFIX + camera] for camera in self.embodiment.cameras}
        for perturbation in self._active:
            images = perturbation.images(images, self._cycle)
            observation[TASK_KEY] = perturbation.instruction(observation[TASK_KEY])
        return {**observation, **{IMAGE_PREFIX + camera: image for camera, image in images.items()}}

    def render(self) -> ImageArray:
        """Render a frame for people: of the perturbed world, without what is perturbed about the policy's images."""
        self._env.full_quality = self.full_quality
        return self._env.render()

    def expert_action(self) -> FloatArray:
        """See `ManipulationEnv.expert_action`."""
        return self._env.expert_action()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
