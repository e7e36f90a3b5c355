"""Options that name cameras: "corner2=144x144,gripperPOV=72x72", with a place in the image "corner2=96x96+28+44"."""

from __future__ import annotations

import re
from collections.abc import Collection

from dysl_vla.errors import ConfigError

SIZE = re.compile(r"(\d+)x(\d+)")
PLACE = re.compile(r"(\d+)x(\d+)\+(\d+)\+(\d+)")
NUMBER = re.compile(r"(\d+)")


def camera_options(
    field: str, text: str, pattern: re.Pattern[str], example: str, cameras: Collection[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Read whole numbers for cameras.

    Args:
        field: The option's name, for messages.
        text: "camera=value,camera=value"; empty for no camera.
        pattern: Pattern of a value, with a group for each number.
        example: A correct value, for messages.
        cameras: Names of the cameras that exist; None when that is checked elsewhere.

    Returns:
        Camera name to its numbers.

    Raises:
        ConfigError: The text has another form, or names a camera that does not exist.
    """
    options: dict[str, tuple[int, ...]] = {}
    for item in filter(None, text.split(",")):
        camera, _, value = item.partition("=")
        match = pattern.fullmatch(value)
        if match is None:
            raise ConfigError(f"{field} must be of the form camera={example}, got {item!r}.")
        if cameras is not None and camera not in cameras:
            raise ConfigError(f"{field}: the data has no camera {camera!r}; it has {', '.join(cameras)}.")
        options[camera] = tuple(map(int, match.groups()))
    return options
