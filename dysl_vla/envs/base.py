"""What every simulated manipulation environment shares: observation keys, seeding, checks.

A simulator's module subclasses `ManipulationEnv` and fills in four methods, five with an expert. Not for
robots: those speak the robot protocol of `deploy`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from dysl_vla.errors import ConfigError
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    EmbodimentSpec,
    FloatArray,
    ImageArray,
    check_actions,
)

if TYPE_CHECKING:
    from dysl_vla.envs.rendering import Scene

PRINTABLE = "".join(map(chr, range(32, 127)))
VIDEO_PIXELS = 256


def episode_rng(task: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one episode, a function of (task, seed, episode index) alone.

    They are the same in any order, in any process and after any earlier episode.
    """
    digest = hashlib.sha256(task.encode()).digest()
    return np.random.default_rng([int.from_bytes(digest[:8], "big"), seed, index])


class ManipulationEnv(gymnasium.Env[dict[str, Any], FloatArray]):
    """One task of one simulator.

    Args:
        task: The task's name in its suite.
        instruction: The instruction in plain English: the observation's `task`.
        spec: Cameras, state and actions.
        horizon: Steps after which an episode is truncated.
        render_mode: Gymnasium's parameter; only "rgb_array" is supported.

    An episode may have several `instructions`, one after the other: `instruction` is the present one, and `info` then
    has `completed`, the number of those that were carried out.

    `reset(seed=s, options={"episode_index": i})` starts the episode (task, s, i). Without a seed the next episode index
    of the last seed starts.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 # Gymnasium declares it so
    full_quality: bool = False
    """Whether shadows, reflections and multi-sampling are rendered, where the simulator has them, which is slower."""

    def __init__(
        self, task: str, instruction: str, spec: EmbodimentSpec, horizon: int, render_mode: str = "rgb_array"
    ) -> None:
        if render_mode != "rgb_array":
            raise ConfigError(f"render_mode must be 'rgb_array', got {render_mode!r}.")
        self.render_mode = render_mode
        self.task = task
        self.instruction = instruction
        self.instructions: tuple[str, ...] = (instruction,)
        self.embodiment = spec
        self.horizon = horizon
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._episode_index = -1
        self._step = 0
        images = {
            IMAGE_PREFIX + camera: spaces.Box(0, 255, (height, width, 3), np.uint8)
            for camera, (height, width) in spec.cameras.items()
        }
        self.observation_space = spaces.Dict(
            {
                **images,
                STATE_KEY: spaces.Box(-np.inf, np.inf, (len(spec.state_names),), np.float32),
                TASK_KEY: spaces.Text(max_length=256, charset=PRINTABLE),
            }
        )
        low, high = (np.asarray(bound, np.float32) for bound in (spec.action_low, spec.action_high))
        self.action_space = spaces.Box(low, high, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; see the class for how its initial state is chosen."""
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode_index = seed, -1
        index = (options or {}).get("episode_index", self._episode_index + 1)
        if not isinstance(index, int | np.integer) or index < 0:
            raise ConfigError(f"episode_index must be a number from 0 on, got {index!r}.")
        self.begin(self._seed, int(index))
        return self.observe(), {"episode_index": self._episode_index}

    def begin(self, seed: int, index: int) -> None:
        """Start the episode of a seed and an index without rendering."""
        self._seed, self._episode_index = seed, index
        self.np_random = episode_rng(self.task, seed, index)
        self._step = 0
        self._reset_world(self.np_random)

    def step(self, action: FloatArray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Gymnasium's step: `advance`, then `observe`. Success is `info["success"]`; it does not end the episode."""
        reward, truncated, info = self.advance(action)
        return self.observe(), reward, False, truncated, info

    def advance(self, action: FloatArray) -> tuple[float, bool, dict[str, Any]]:
        """Simulate one step without rendering, for the steps of a chunk at which nothing is observed.

        Args:
            action: (action,), in the embodiment's units; it is clipped to the action space.

        Returns:
            Reward, truncated, info with `success`.

        Raises:
            ActionError: The action has another dimension, NaN or infinity. Nothing has moved.
        """
        check_actions(np.asarray(action), len(self.embodiment.action_names))
        reward, success = self._step_world(self.embodiment.clip(np.asarray(action, np.float32)))
        self._step += 1
        return reward, self._step >= self.horizon, {"success": success}

    def observe(self) -> dict[str, Any]:
        """Render every camera and return the present observation."""
        return {
            **{
                IMAGE_PREFIX + camera: self._render_camera(camera, height, width)
                for camera, (height, width) in self.embodiment.cameras.items()
            },
            STATE_KEY: self._state(),
            TASK_KEY: self.instruction,
        }

    def render(self) -> ImageArray:
        """Render a frame for people: the first camera at 256 pixels, (256, 256, 3) uint8."""
        return self._render_camera(next(iter(self.embodiment.cameras)), VIDEO_PIXELS, VIDEO_PIXELS)

    @abstractmethod
    def _reset_world(self, rng: np.random.Generator) -> None:
        """Put the world into the initial state that `rng` draws, whatever happened before."""

    @abstractmethod
    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        """Simulate one control period and return reward and success."""

    @abstractmethod
    def _state(self) -> FloatArray:
        """Return the proprioception, (state,) float32."""

    @abstractmethod
    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        """Render one frame, uint8 (height, width, 3)."""

    @property
    def scene(self) -> Scene | None:
        """The MuJoCo scene, for what changes it; None where there is none."""
        return None

    @property
    def perturbation(self) -> str | None:
        """What perturbs the present episode, "light:3"; None in an environment that is not perturbed."""
        return None

    def proprioception(self) -> FloatArray:
        """The robot's present state as it is observed, (state,), without rendering."""
        return self._state()

    def world_changed(self) -> None:
        """Take note of what was changed about the world from outside: where things, cameras and lights are."""
        if self.scene is not None:
            self.scene.update()

    def rehearse(self, action: FloatArray) -> None:
        """Simulate one step before the episode's first one, (action,)."""
        self._step_world(self.embodiment.clip(action))

    def expert_action(self) -> FloatArray:
        """The action of a scripted expert, from privileged state; (action,) inside the action space.

        Raises:
            ConfigError: This task has no scripted expert.
        """
        raise ConfigError(
            f"task: {self.task!r} has no scripted expert; choose a task with one, or import demonstrations."
        )


def check_cameras(asked: dict[str, tuple[int, int]], offered: tuple[str, ...]) -> None:
    """Refuse a camera that a simulator does not have.

    Raises:
        ConfigError: Naming the camera and those that exist.
    """
    for camera, (height, width) in asked.items():
        if camera not in offered:
            raise ConfigError(f"cameras: there is no camera {camera!r}; there are: {', '.join(offered)}.")
        if height < 1 or width < 1:
            raise ConfigError(f"cameras: {camera!r} must be at least 1x1 pixels, got {height}x{width}.")
