"""The controller that LIBERO's demonstrations, checkpoints and published results are about: robosuite 1.4's.

LIBERO was made with robosuite 1.4; its tasks are run on 1.5.2 here. 1.5 has the same operational-space law and the same
gains, but two things in it move the arm elsewhere, by centimetres and millimetres over an episode:

- Orientation goal. A rotation command is relative to the hand's present orientation. When the command is exactly zero,
  1.4 keeps its last goal; 1.5 takes the present orientation as the new goal, so that the hand drifts.
- Gripper. 1.4 moves the fingers' target by 0.01 in each of the 25 physics steps of an action, so that it needs 8
  actions from open to closed and starts within the action. 1.5 moves it once for each action, by 0.2: 10 actions.

The controller here restores both by robosuite's own registry of controllers; nothing of robosuite is overwritten.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.robosuite import load_robosuite

NAME = "LIBERO"
"""The name under which the controller is registered with robosuite."""
FINGER_SPEED = 0.01
"""What 1.4 adds to the target of the Panda's fingers, from -1 to 1, in each physics step."""
FINGER_DIRECTIONS = np.array([-1.0, 1.0])
"""The two fingers move against each other."""


def libero_controllers() -> dict[str, Any]:
    """Return the settings of a Panda's controllers that act as robosuite 1.4's do, for `controller_configs`.

    They are 1.5's own, which are 1.4's: gains of 150, damping ratio 1, actions of at most 5 cm and half a radian. The
    frame is the world's as in 1.4; 1.5 would take the base's, which is parallel to it.

    Raises:
        MissingExtraError: robosuite is not installed.
    """
    settings: dict[str, Any] = load_robosuite().load_composite_controller_config(robot="Panda")
    settings["type"] = _register()
    settings["body_parts"]["right"]["input_ref_frame"] = "world"
    return settings


def next_fingers(target: NDArray[np.float64], command: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the fingers' target after one physics step.

    Args:
        target: The target before, each from -1 to 1; (2,), or one 0 after a reset.
        command: The gripper's action, of which the sign counts: 1 closes, -1 opens, 0 holds; (1,).
    """
    moved: NDArray[np.float64] = np.clip(target + FINGER_DIRECTIONS * FINGER_SPEED * np.sign(command), -1.0, 1.0)
    return moved


@lru_cache(maxsize=1)
def _register() -> str:
    """Register the controller with robosuite, which is imported only now, and return its name."""
    from robosuite.controllers.composite.composite_controller import CompositeController, register_composite_controller

    class LiberoController(CompositeController):  # type: ignore[misc]  # robosuite has no types
        """robosuite 1.4's arm and gripper; robosuite makes a new one at every reset."""

        name = NAME

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._commands: dict[str, NDArray[np.float64]] = {}

        def set_goal(self, all_action: NDArray[np.float64]) -> None:
            """Take an action: once for each action, before its first physics step."""
            for part, controller in self.part_controllers.items():
                start, end = self._action_split_indexes[part]
                command = all_action[start:end]
                if part in self.grippers:
                    self._commands[part] = command  # the fingers' target moves in every physics step
                    continue
                kept = None if np.any(command[3:]) else controller.goal_ori
                controller.set_goal(command)
                if kept is not None:
                    controller.goal_ori = kept

        def run_controller(self, enabled_parts: dict[str, bool]) -> dict[str, NDArray[np.float64]]:
            """Return what each part's actuators get in one physics step."""
            for part, command in self._commands.items():
                gripper = self.grippers[part]
                gripper.current_action = next_fingers(gripper.current_action, command)
                self.part_controllers[part].set_goal(gripper.current_action)
            applied: dict[str, NDArray[np.float64]] = super().run_controller(enabled_parts)
            return applied

    register_composite_controller(LiberoController)
    return NAME
