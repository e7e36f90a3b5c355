"""Chains of five instructions in one scene of LIBERO, drawn by CALVIN's rules.

The ten tasks of libero-goal share a scene; the nine without the wine rack make the chains. Five different tasks follow
one another without a reset: each has 360 steps, the next one begins when its goal holds, and the episode ends when a
task's steps are over. The rules are CALVIN's (calvin_agent/evaluation/multistep_sequences.py): no two tasks of a chain
are of one category, and each is possible in the state that those before it leave; among the chains that are, every one
is equally likely. The states are symbols, and the conditions careful: what a gripper might not reach is impossible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from dysl_vla.envs.libero import LiberoEnv, instruction_of
from dysl_vla.envs.libero_package import load_libero, task_file
from dysl_vla.errors import ConfigError
from dysl_vla.types import FloatArray

TASK = "chain"
LENGTH = 5
TASK_STEPS = 360
"""Steps that each task of a chain has."""
HORIZON = LENGTH * TASK_STEPS
SCENE = "put_the_bowl_on_the_plate"
"""The task whose scene and fixed initial states the chains have: those of the others only differ by their draw."""


Things = dict[str, tuple[str, ...]]
"""Name of a thing to the states in which it may be."""


@dataclass(frozen=True)
class ChainTask:
    """What decides whether a task can be part of a chain.

    Attributes:
        category: What it is about; a chain has no two tasks about one thing.
        conditions: Alternatives; the task is possible when one of them holds.
        effect: Name of a thing to its state after the task.
    """

    category: str
    conditions: tuple[Things, ...]
    effect: Mapping[str, str]


INITIAL = {
    "bowl": "table",
    "bottle": "table",
    "cheese": "table",
    "plate": "table",
    "stove": "off",
    "top drawer": "closed",
    "middle drawer": "closed",
}
DRAWERS_CLOSED: Things = {"top drawer": ("closed",), "middle drawer": ("closed",)}
"""An open drawer hangs over the plate and half of the bowl, where these are at first, and over the lower drawers."""
BOWL_FREE: Things = DRAWERS_CLOSED | {"bowl": ("table",), "cheese": ("table",)}
"""With cheese in it, the bowl can hardly be grasped, and may lose the cheese."""
CHAIN_TASKS = {
    "open_the_middle_drawer_of_the_cabinet": ChainTask(
        "middle drawer",
        (
            DRAWERS_CLOSED | {"bowl": ("table",), "cheese": ("table",)},
            DRAWERS_CLOSED | {"bowl": ("stove", "cabinet")},
            DRAWERS_CLOSED | {"bowl": ("plate",), "plate": ("stove front",)},
        ),
        {"middle drawer": "open"},
    ),
    "open_the_top_drawer_and_put_the_bowl_inside": ChainTask(
        "bowl", (BOWL_FREE,), {"top drawer": "open", "bowl": "drawer"}
    ),
    "put_the_bowl_on_the_plate": ChainTask("bowl", (BOWL_FREE,), {"bowl": "plate"}),
    "put_the_bowl_on_the_stove": ChainTask("bowl", (BOWL_FREE,), {"bowl": "stove"}),
    # Bowl and bottle do not fit onto the cabinet side by side where a policy puts either.
    "put_the_bowl_on_top_of_the_cabinet": ChainTask("bowl", (BOWL_FREE | {"bottle": ("table",)},), {"bowl": "cabinet"}),
    "put_the_wine_bottle_on_top_of_the_cabinet": ChainTask(
        "bottle", ({"bottle": ("table",), "bowl": ("table", "plate", "stove", "drawer")},), {"bottle": "cabinet"}
    ),
    "put_the_cream_cheese_in_the_bowl": ChainTask(
        "cheese",
        (
            DRAWERS_CLOSED | {"cheese": ("table",), "bowl": ("table", "plate")},
            {"cheese": ("table",), "bowl": ("stove", "cabinet", "drawer")},
            {"cheese": ("table",), "bowl": ("plate",), "plate": ("stove front",)},
        ),
        {"cheese": "bowl"},
    ),
    "push_the_plate_to_the_front_of_the_stove": ChainTask(
        "plate",
        (DRAWERS_CLOSED | {"plate": ("table",), "bowl": ("table", "stove", "cabinet")},),
        {"plate": "stove front"},
    ),
    "turn_on_the_stove": ChainTask("stove", ({"stove": ("off",)},), {"stove": "on"}),
}
"""Tasks of libero-goal that make chains."""


def is_possible(chain: tuple[str, ...]) -> bool:
    """Tell whether tasks can follow one another from the initial state, and are about different things."""
    state = dict(INITIAL)
    for task in map(CHAIN_TASKS.__getitem__, chain):
        if not any(all(state[thing] in states for thing, states in case.items()) for case in task.conditions):
            return False
        state.update(task.effect)
    return len({CHAIN_TASKS[task].category for task in chain}) == len(chain)


@lru_cache(maxsize=1)
def possible_chains() -> tuple[tuple[str, ...], ...]:
    """Return every chain of five tasks, in one order."""
    return tuple(filter(is_possible, permutations(CHAIN_TASKS, LENGTH)))


class LiberoChainEnv(LiberoEnv):
    """Episodes of five instructions; see the module.

    The chain of an episode is a function of (seed, episode index) alone, and so is its initial state: with the first
    evaluation seed one of the fifty fixed ones, by the index modulo 50. `info` has `completed`, the number of tasks
    that were completed; success is all five. An expert acts by the present instruction, where its task has one.

    Args:
        task: "chain".
        cameras: Camera name to (height, width).
        render_mode: See `ManipulationEnv`.

    Raises:
        ConfigError: The task or a camera is unknown.
        MissingExtraError: LIBERO is not installed.
        RenderingError: This machine has no OpenGL.
    """

    def __init__(
        self,
        task: str = TASK,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        *,
        render_mode: str = "rgb_array",
    ) -> None:
        if task != TASK:
            raise ConfigError(f"task: libero-chain has no {task!r}; there is: {TASK}.")
        super().__init__(SCENE, cameras, suite="libero-goal", render_mode=render_mode)
        self.task, self.horizon = TASK, HORIZON
        self._goals: dict[str, list[Any]] = {}
        for name in CHAIN_TASKS:
            with task_file("libero_goal", name) as path:
                self._goals[name] = load_libero().parse(str(path))["goal_state"]
        self._chain: tuple[str, ...] = ()
        self._completed = 0
        self._steps_left = TASK_STEPS

    def _reset_world(self, rng: np.random.Generator) -> None:
        chains = possible_chains()
        self._chain = chains[rng.integers(len(chains))]
        self.instructions = tuple(map(instruction_of, self._chain))
        self._completed = 0
        self._begin_task()
        super()._reset_world(rng)

    def _begin_task(self) -> None:
        self.instruction = self.instructions[self._completed]
        self._steps_left = TASK_STEPS
        self._world.parsed_problem["goal_state"] = self._goals[self._chain[self._completed]]

    def _step_world(self, action: FloatArray) -> tuple[float, bool]:
        reward, is_done = super()._step_world(action)
        self._steps_left -= 1
        if self._completed < LENGTH and is_done:
            self._completed += 1
            if self._completed < LENGTH:
                self._begin_task()
                self._expert = self._make_expert()
        return reward, self._completed == LENGTH

    def rehearse(self, action: FloatArray) -> None:
        """See `ManipulationEnv.rehearse`."""
        super()._step_world(self.embodiment.clip(action))

    def advance(self, action: FloatArray) -> tuple[float, bool, dict[str, Any]]:
        """Simulate one step, after which the instruction may be another one; see `ManipulationEnv.advance`."""
        reward, truncated, info = super().advance(action)
        return reward, truncated or self._steps_left <= 0, {**info, "completed": self._completed}
