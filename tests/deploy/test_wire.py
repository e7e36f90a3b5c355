from __future__ import annotations

from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy

from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ObservationError

ARRAYS = hnp.arrays(
    st.sampled_from([np.uint8, np.float32, np.float64, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)
SCALARS = st.sampled_from([np.float32(1.5), np.int64(-3), np.bool_(True), np.uint8(7)])
VALUES = st.dictionaries(
    st.text(max_size=8), ARRAYS | SCALARS | st.text(max_size=9) | st.booleans() | st.integers(-9, 9), max_size=5
)


def same(one: object, other: object) -> bool:
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")  # type: ignore[attr-defined]
    return one == other


@given(VALUES)
def test_what_is_packed_is_what_openpi_packs_and_reads(values: dict[str, object]) -> None:
    assert pack(values) == msgpack_numpy.packb(values)
    for other in (unpack(pack(values)), msgpack_numpy.unpackb(pack(values))):
        assert other.keys() == values.keys()
        assert all(same(other[key], values[key]) for key in values)


GOOD = pack({"observation.state": np.zeros(2, np.float32), "prompt": "go", "n": np.float32(1)})


@settings(max_examples=2000)
@given(st.binary(max_size=64))
def test_random_bytes_are_a_map_or_an_error(data: bytes) -> None:
    with suppress(ObservationError):
        assert isinstance(unpack(data), dict)


@settings(max_examples=2000)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_mutated_frame_is_a_map_or_an_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for index, value in changes:
        data[index] = value
    with suppress(ObservationError):
        assert isinstance(unpack(bytes(data)), dict)


def array(**changes: object) -> bytes:
    value = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    value |= {key.encode(): change for key, change in changes.items()}
    frame: bytes = msgpack.packb({"a": value})
    return frame


@pytest.mark.parametrize(
    "frame",
    [
        array(dtype="|O"),
        array(dtype="|V8"),
        array(dtype="<c8"),
        array(dtype="<M8"),
        array(dtype="f,i"),
        array(dtype=7),
        array(shape=[3]),
        array(shape=[-2]),
        array(shape=[1 << 62, 1 << 62]),
        array(shape=[2.0]),
        array(shape=[True, 2]),
        array(shape=[1] * 9),
        array(data="text"),
        msgpack.packb({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        msgpack.packb({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}),
        msgpack.packb({1: 2}, strict_types=False),
        msgpack.packb([1, 2]),
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": list(range(2000))}),
        msgpack.packb({"a": [[]] * 1024}),
        msgpack.packb({"a": [[{}] * 40] * 40}),
        pack({"a": [np.zeros(1)] * 1024}),
        b"\x81\xa1a" * 5000,
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"",
        GOOD + b"x",
    ],
)
def test_what_no_frame_may_hold_is_refused(frame: bytes) -> None:
    with pytest.raises(ObservationError):
        unpack(frame)


def test_what_has_no_place_in_a_frame_is_not_packed() -> None:
    for value in (np.array(["x"]), np.array([None]), object()):
        with pytest.raises(TypeError):
            pack({"a": value})
