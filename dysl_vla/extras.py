"""Optional dependencies: imported when they are needed, and the command that installs a missing one is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dysl_vla.errors import MissingExtraError


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failing import in the body into an error that names the command that installs the package.

    Raises:
        MissingExtraError: A module of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "dysl_vla":
            raise
        raise MissingExtraError(
            f"the Python package {error.name!r} is not installed; install it with: pip install 'dysl-vla[{extra}]'"
        ) from error
