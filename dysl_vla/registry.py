"""Named parts that others can add to: suites, policies.

A registry is a dictionary filled by a decorator, and by the entry points of installed packages, which are only imported
when a name is asked for that nobody here has.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dysl_vla.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name to part.

    Args:
        kind: What the parts are, in the singular, for messages ("suite").
        group: Entry-point group in which other packages offer theirs ("dysl_vla.suites").
    """

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a part under a name."""

        def add(part: T) -> T:
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """All names, those of other packages included, sorted."""
        return sorted({*self._parts, *(entry.name for entry in entry_points(group=self._group))})

    def get(self, name: str) -> T:
        """The part of that name.

        Raises:
            ConfigError: No part has it; the message lists those that exist.
        """
        if name not in self._parts:
            for entry in entry_points(group=self._group, name=name):
                self._parts[name] = entry.load()
        if name not in self._parts:
            raise ConfigError(f"unknown {self._kind} {name!r}; there are: {', '.join(self.names())}.")
        return self._parts[name]
