"""The way from where a robot stands to where the policy begins: checked before the first command, then gone slowly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dysl_vla.deploy.limits import ActionLimiter
from dysl_vla.errors import SafetyStop
from dysl_vla.types import EmbodimentSpec, FloatArray


class Approach:
    """The way of one run.

    Args:
        embodiment: The robot's specification.
        limiter: Knows how much an action may change in one step.
        may_approach: A robot that stands far away goes there; otherwise it is refused.
        notify: Called with a line for the user where the robot has to go there.

    Attributes:
        has_arrived: The robot has come to where the policy wanted it once; from then on it follows the policy.
    """

    def __init__(
        self, embodiment: EmbodimentSpec, limiter: ActionLimiter, may_approach: bool, notify: Callable[[str], None]
    ) -> None:
        self._embodiment, self._limiter = embodiment, limiter
        self._may_approach, self._notify = may_approach, notify
        self.has_arrived = False

    def check(self, held: FloatArray | None, first: FloatArray | None) -> None:
        """Check, before the first command, that the robot may go from where it stands to what the policy wants.

        Args:
            held: The action that keeps the robot where it stands, (action,); None: the robot does not tell.
            first: The policy's first action, (action,); None: there is none, because the robot is being stopped.

        Raises:
            SafetyStop: The robot does not tell where it stands, stands outside of its range, or stands too far away.
        """
        if held is None:
            if self._limiter.positions:
                raise SafetyStop(
                    "robot: does not tell where it holds, so that its first command could be a jump; its hold(None) "
                    "must return the present position."
                )
            self.has_arrived = True
            return
        if (held != self._embodiment.clip(held)).any():
            raise SafetyStop(f"robot: stands at {held.tolist()}, outside of what it accepts; move it by hand.")
        if first is None:
            return
        wanted = self._embodiment.clip(first)
        distance = np.abs(wanted - held) * (self._limiter.towards(wanted, held) != wanted)
        self.has_arrived = not distance.any()
        if self.has_arrived:
            return
        worst = int(distance.argmax())
        where = (
            f"{self._embodiment.action_names[worst]} stands at {held[worst]:.4g}, the policy's first action is "
            f"{wanted[worst]:.4g}, and {self._limiter.limits.max_change[worst]:.4g} a step are allowed"
        )
        if not self._may_approach:
            raise SafetyStop(f"far_start: {where}; move the robot nearer, or let it --far-start approach.")
        self._notify(f"The robot first goes to where the policy begins: {where}.")

    def next_action(self, action: FloatArray, last: FloatArray) -> FloatArray:
        """Go on; sets `has_arrived` once the robot is near enough to be sent the action itself.

        Args:
            action: The policy's, (action,).
            last: The action that was sent last, (action,).

        Returns:
            The action to send, (action,).
        """
        wanted = self._embodiment.clip(action)
        near = self._limiter.towards(wanted, last)
        self.has_arrived = bool((near == wanted).all())
        return near
