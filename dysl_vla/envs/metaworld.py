"""Meta-World's Sawyer tasks: 4-d end-effector actions at 80 Hz, two cameras, scripted experts.

Observations follow LeRobot's set-up: `corner2` moved closer and turned upright, the wrist camera `gripperPOV`, and the
first four numbers of Meta-World's state. Only the expert sees the object positions that Meta-World also offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dysl_vla.envs.base import ManipulationEnv, check_cameras
from dysl_vla.envs.metaworld_experts import make_metaworld_expert
from dysl_vla.envs.rendering import Scene, SceneRenderer, load_mujoco
from dysl_vla.errors import ConfigError
from dysl_vla.types import EmbodimentSpec, FloatArray, ImageArray

INSTRUCTIONS: dict[str, str] = {
    "assembly": "put the ring on the peg",
    "basketball": "dunk the ball into the basket",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press": "press the button from the front",
    "button-press-wall": "press the button behind the wall from the front",
    "coffee-button": "push the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-open": "open the door",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-unlock": "unlock the door",
    "drawer-open": "open the drawer",
    "drawer-close": "close the drawer",
    "faucet-open": "turn the faucet on",
    "faucet-close": "turn the faucet off",
    "hammer": "hammer the nail into the wall",
    "hand-insert": "put the hand into the hole",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the box",
    "peg-unplug-side": "pull the peg out of the box",
    "pick-out-of-hole": "lift the puck out of the hole",
    "pick-place": "lift the puck to the goal",
    "pick-place-wall": "lift the puck over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "move the hand to the goal",
    "reach-wall": "move the hand around the wall to the goal",
    "shelf-place": "put the cube on the shelf",
    "soccer": "kick the ball into the goal",
    "stick-push": "push the box with the stick",
    "stick-pull": "pull the box with the stick",
    "sweep-into": "sweep the puck into the hole",
    "sweep": "sweep the puck off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}

MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)

HORIZON = 500
DEFAULT_CAMERAS = {"corner2": (144, 144), "gripperPOV": (72, 72)}
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
UPSIDE_DOWN = frozenset({"corner", "corner2", "corner3", "corner4"})
CORNER2_POSITION = (0.75, 0.075, 0.7)
MODEL_FIELDS_CHANGED_BY_RESET = ("body_pos", "body_quat", "site_pos", "site_quat", "geom_pos", "geom_quat")


class MetaWorldEnv(ManipulationEnv):
    """One Meta-World task.

    Args:
        task: The task's name without the version, "drawer-open".
        cameras: Camera name to (height, width).
        full_quality: See `ManipulationEnv`; it is ten times slower.
        render_mode: See `ManipulationEnv`.

    Raises:
        ConfigError: The task or a camera is unknown.
        RenderingError: This machine has no OpenGL.
    """

    def __init__(
        self,
        task: str,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        *,
        full_quality: bool = False,
        render_mode: str = "rgb_array",
    ) -> None:
        if task not in INSTRUCTIONS:
            raise ConfigError(f"unknown Meta-World task {task!r}; there are: {', '.join(sorted(INSTRUCTIONS))}.")
        sizes = dict(cameras or DEFAULT_CAMERAS)
        check_cameras(sizes, CAMERAS)
        mujoco = load_mujoco()  # before Meta-World imports it
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        sawyer: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        # The expert knows where the goal is; the policy's observation never holds it.
        sawyer._partially_observable = False
        del sawyer.sawyer_observation_space  # cached, with the goal clipped to zero
        sawyer.seeded_rand_vec = True
        sawyer._set_task_called = True
        sawyer.model.cam_pos[sawyer.model.camera("corner2").id] = CORNER2_POSITION
        self._mujoco = mujoco
        self._sawyer = sawyer
        self._expert = make_metaworld_expert(task)
        self._full_state = np.zeros(39)
        self._unchanged_model = {name: getattr(sawyer.model, name).copy() for name in MODEL_FIELDS_CHANGED_BY_RESET}
        self._renderer = SceneRenderer(sawyer.model)
        self._scene = Scene(sawyer.model, sawyer.data, self._renderer)
        self.full_quality = full_quality
        spec = EmbodimentSpec(
            cameras=sizes,
            state_names=("x", "y", "z", "gripper"),
            action_names=("dx", "dy", "dz", "gripper"),
            action_low=(-1.0,) * 4,
            action_high=(1.0,) * 4,
            rate_hz=round(1 / sawyer.dt, 6),
        )
        super().__init__(task, INSTRUCTIONS[task], spec, HORIZON, render_mode)

    def _reset_world(self, rng: np.random.Generator) -> None:
        # Tasks move bodies of the *model* when they are reset, and read what an earlier episode left there.
        for name, value in self._unchanged_model.items():
            getattr(self._sawyer.model, name)[:] = value
        self._mujoco.mj_resetData(self._sawyer.model, self._sawyer.data)
        # As Meta-World itself does: one reset draws the initial state (some tasks draw until it is a fair one), and the
        # next starts from it, so that the hand is moved into place among bodies that are where they will be.
        self._sawyer.np_random = rng
        self._sawyer._freeze_rand_vec = False
        self._sawyer.reset_model()
        self._sawyer._freeze_rand_vec = True
        self._full_state, _ = self._sawyer.reset()
        self._mujoco.mj_forward(self._sawyer.model, self._sawyer.data)
        self._expert = make_metaworld_expert(self.task)

    def world_changed(self) -> None:
        """See `ManipulationEnv.world_changed`."""
        super().world_changed()
        self._full_state = self._sawyer._get_obs()

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        self._sawyer.curr_path_length = 0  # the horizon is ours
        self._full_state, reward, _, _, info = self._sawyer.step(action)
        return float(reward), bool(info["success"])

    @property
    def scene(self) -> Scene:
        """See `ManipulationEnv`."""
        return self._scene

    def _state(self) -> FloatArray:
        return self._full_state[:4].astype(np.float32)

    def _render_camera(self, camera: str, height: int, width: int) -> ImageArray:
        turned = camera in UPSIDE_DOWN
        return self._renderer.render(
            self._sawyer.data, camera, height, width, turned=turned, full_quality=self.full_quality
        )

    def expert_action(self) -> FloatArray:
        """The action of a scripted policy, which gets a copy of the full state: some of Meta-World's write to it."""
        action = self._expert.get_action(self._full_state.copy())
        return np.clip(np.asarray(action, np.float32), -1, 1)

    def close(self) -> None:
        """Free the renderers."""
        self._renderer.close()
        self._sawyer.close()
