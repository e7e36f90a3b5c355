"""What a perturbation of a simulated world is, how one is named, and how several make a sweep.

A perturbation is a function of (task, seed, episode index) like the initial state, and what changes during an episode
one of the step, too: every method meets the same, whatever cameras it has and however often it looks. The level, from 1
to 5, is its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dysl_vla.errors import ConfigError
from dysl_vla.registry import Registry
from dysl_vla.types import FloatArray, ImageArray

LEVELS = (1, 2, 3, 4, 5)
DEFAULT_LEVEL = 3
SWEEP = "plus"
"""The name of all perturbations, of which an episode has one."""


Draw = Callable[[str], np.random.Generator]
"""Random numbers of (task, seed, episode index), a perturbation and a part of it, which the argument names."""


class Perturbation:
    """One perturbation of one episode. A subclass overrides what it perturbs; nothing else is changed.

    Args:
        level: From 1 to 5.
        draw: Its random numbers.
    """

    name: ClassVar[str]
    magnitudes: ClassVar[tuple[float, ...]]
    """The size at each level."""
    shows: ClassVar[bool] = False
    """Whether a single picture shows it."""

    varies_by_task: ClassVar[bool] = False
    """Whether it applies to some tasks of a suite alone."""

    def __init__(self, level: int, draw: Draw) -> None:
        self.level = level
        self.size = self.magnitudes[level - 1]
        self.draw = draw
        self.rng = draw("")

    @classmethod
    def applies_to(cls, env: Any) -> bool:
        """Tell whether there is anything to perturb in an environment, a `ManipulationEnv`."""
        return True

    def begin(self, env: Any) -> None:
        """Change the world of an episode that has just begun.

        Args:
            env: A `ManipulationEnv`. What is changed about its model is given back by its `Scene`.
        """

    def images(self, images: dict[str, ImageArray], step: int) -> dict[str, ImageArray]:
        """Change what the cameras saw at a step; camera name to uint8 (height, width, 3)."""
        return images

    def instruction(self, text: str) -> str:
        """Change what is asked for in words."""
        return text

    def action(self, action: FloatArray, step: int) -> FloatArray:
        """Change the action that is executed at a step, (action,); it is clipped afterwards."""
        return action

    def repeats(self, step: int) -> int:
        """The number of times that the world goes on with the action of a step."""
        return 1


perturbations: Registry[type[Perturbation]] = Registry("perturbation", "dysl_vla.perturbations")


def register(cls: type[Perturbation]) -> type[Perturbation]:
    """Register a perturbation under its name."""
    return perturbations.register(cls.name)(cls)


@dataclass(frozen=True)
class Perturbing:
    """What is asked for: perturbations that every episode has at once, or a sweep.

    Attributes:
        cells: Name and level of each perturbation.
        is_sweep: Whether an episode has one of them, not all.
    """

    cells: tuple[tuple[str, int], ...]
    is_sweep: bool = False

    @classmethod
    def parse(cls, text: str) -> Perturbing:
        """Read "light:4", "light+latency:2" or "plus:3".

        Args:
            text: A name, with a level or at level 3; several, joined by "+", change an episode at once. "plus" is a
                sweep over all names and levels, "plus:3" over all names at that level.

        Raises:
            ConfigError: A name or a level is unknown.
        """
        cells = [_cell(part) for part in text.split("+")]
        if not all(name for name, _ in cells):
            raise ConfigError(f"perturb must name a perturbation, {SWEEP} or {', '.join(perturbations.names())}.")
        names = [name for name, _ in cells]
        if SWEEP in names:
            if len(cells) > 1:
                raise ConfigError(f"perturb: {SWEEP!r} has one perturbation an episode; leave out what is beside it.")
            levels = LEVELS if cells[0][1] is None else (cells[0][1],)
            return cls(tuple((name, level) for name in perturbations.names() for level in levels), is_sweep=True)
        if len(set(names)) < len(names):
            raise ConfigError(f"perturb: each perturbation must be named once, got {text!r}.")
        for name in names:
            perturbations.get(name)
        return cls(tuple(sorted((name, DEFAULT_LEVEL if level is None else level) for name, level in cells)))

    @property
    def name(self) -> str:
        """The one name of it: "latency:2+light:4", "plus" or "plus:3"."""
        if not self.is_sweep:
            return describe(self.cells)
        levels = {level for _, level in self.cells}
        return SWEEP if levels == set(LEVELS) else f"{SWEEP}:{levels.pop()}"

    def misses(self, env: Any) -> list[str]:
        """Names of perturbations that were asked for and do not apply to an environment; a sweep leaves them out."""
        return [name for name, _ in self.cells if not self.is_sweep and not perturbations.get(name).applies_to(env)]

    def of_episode(self, env: Any, order: np.random.Generator, index: int) -> Sequence[tuple[str, int]]:
        """Names and levels of an episode's perturbations.

        In a sweep, they take turns in an order of the task's own; what does not apply to the task is left out.

        Args:
            env: The environment.
            order: The random numbers of the order, the same for each episode of a task.
            index: The episode's index.

        Raises:
            ConfigError: A perturbation that was asked for does not apply to the task.
        """
        possible = [cell for cell in self.cells if perturbations.get(cell[0]).applies_to(env)]
        if self.is_sweep:
            return [possible[order.permutation(len(possible))[index % len(possible)]]]
        for name in self.misses(env):
            raise ConfigError(f"perturb: {name} does not apply to {env.task}, which has nothing that it could change.")
        return possible


def describe(cells: Sequence[tuple[str, int]]) -> str:
    """The name of perturbations: "light:4+latency:2"."""
    return "+".join(f"{name}:{level}" for name, level in cells)


def _cell(text: str) -> tuple[str, int | None]:
    name, has_level, level = text.strip().partition(":")
    if not has_level:
        return name, None
    if level not in map(str, LEVELS):
        raise ConfigError(f"perturb: the level of {name} must be from {LEVELS[0]} to {LEVELS[-1]}, got {level!r}.")
    return name, int(level)
