"""openpi's wire format: msgpack maps in which arrays are maps with byte keys. It needs NumPy and msgpack alone.

A frame from outside is checked before memory of its size is allocated: kinds of numbers, shapes, lengths, depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dysl_vla.errors import ObservationError
from dysl_vla.extras import needs_extra

with needs_extra("serve"):
    import msgpack

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
KINDS = "biuf"
MAX_DIMENSIONS = 8
MAX_ITEMS = 1024
"""Largest number of items of a map or a list."""
MAX_CONTAINERS = 1024
"""Largest number of maps (arrays are such) and lists of a frame: an empty one is a byte in it, seventy in memory."""


def pack(value: Mapping[str, Any]) -> bytes:
    """Turn a map into a frame.

    Raises:
        TypeError: A value in it cannot be part of a frame.
    """
    frame: bytes = msgpack.packb(value, default=_pack)
    return frame


def unpack(frame: bytes) -> dict[str, Any]:
    """Turn a frame into a map, whose arrays are views of the frame, which cannot be written to.

    Raises:
        ObservationError: The frame is not a whole map, or holds what no frame may.
    """
    size = len(frame)
    left = MAX_CONTAINERS

    def counted(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ObservationError(f"A frame must hold at most {MAX_CONTAINERS} maps, arrays and lists.")
        return container

    try:
        value = msgpack.unpackb(
            frame,
            object_hook=lambda value: _unpack(counted(value)),
            list_hook=counted,
            max_bin_len=size,
            max_str_len=size,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except ObservationError:
        raise
    except Exception as error:  # msgpack's errors share no base: ValueError, its own, of UTF-8, of recursion
        raise ObservationError(f"A frame must be one msgpack map ({type(error).__name__}: {error}).") from error
    if not isinstance(value, dict):
        raise ObservationError(f"A frame must be one msgpack map, got {type(value).__name__}.")
    for key in value:
        if not isinstance(key, str):
            raise ObservationError(f"A frame's keys must be text, got {key!r:.50}.")
    return value


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in KINDS:
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be part of a frame.")


def _unpack(value: dict[Any, Any]) -> Any:
    if ARRAY in value:
        dtype = _dtype(value.get(b"dtype"))
        shape, data = value.get(b"shape"), value.get(b"data")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise ObservationError(f"An array's shape must list at most {MAX_DIMENSIONS} sizes, got {shape!r:.80}.")
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
            kind = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            raise ObservationError(f"An array's data must be the bytes of {dtype} {tuple(shape)!r:.80}, got {kind}.")
        return np.frombuffer(data, dtype).reshape(shape)
    if SCALAR in value:
        item = value.get(b"data")
        if not isinstance(item, (bool, int, float)):
            raise ObservationError(f"A scalar's data must be a number, got {type(item).__name__}.")
        dtype = _dtype(value.get(b"dtype"))
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= item <= np.iinfo(dtype).max:
            raise ObservationError(f"A scalar must fit its dtype, {dtype}, got {item!r:.50}.")
        with np.errstate(over="ignore"):
            try:
                return dtype.type(item)
            except OverflowError as error:
                raise ObservationError(f"A scalar must fit its dtype, {dtype}, got {item!r:.50}.") from error
    return value


def _dtype(name: Any) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name) if isinstance(name, str) and len(name) <= 4 else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in KINDS or dtype.itemsize == 0:
        raise ObservationError(f"A dtype must be one of numbers, such as '<f4' or '|u1', got {name!r:.50}.")
    return dtype
