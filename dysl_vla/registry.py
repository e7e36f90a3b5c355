"""Registries of named parts to which other packages can add: suites, policies, importance measures, robots.

A registry is filled by a decorator and by the entry points of installed packages. An entry point is only imported when
a name is asked for that is not registered yet.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dysl_vla.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to parts.

    Args:
        kind: Kind of the parts, in the singular, for messages ("suite").
        group: Entry-point group of other packages' parts ("dysl_vla.suites").
    """

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a part under a name."""

        def add(part: T) -> T:
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """Return all names, those of other packages included, sorted."""
        return sorted({*self._parts, *(entry.name for entry in entry_points(group=self._group))})

    def get(self, name: str) -> T:
        """Return the part of a name.

        Raises:
            ConfigError: The name is unknown; the message lists those that exist.
        """
        if name not in self._parts:
            for entry in entry_points(group=self._group, name=name):
                self._parts[name] = entry.load()
        if name not in self._parts:
            raise ConfigError(f"unknown {self._kind} {name!r}; there are: {', '.join(self.names())}.")
        return self._parts[name]
