"""What OpenVLA-OFT does with a camera's image before the vision transformers, as in its training and evaluation.

An image goes through JPEG, as the training data did, is resized by a Lanczos kernel, and loses a border, because the
random crops of the training kept 90 % of the area. The reference uses TensorFlow for it. Each step here repeats
TensorFlow's arithmetic in single precision, in the same order, so that the same pixels result.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dysl_vla.types import FloatArray, ImageArray

Integers = NDArray[np.int32]
RADIUS = 3
"""Lobes of the Lanczos kernel on each side."""
CROP_AREA = np.float32(0.9)
"""Share of an image's area that the centre crop keeps."""


def prepared(image: ImageArray, size: int) -> ImageArray:
    """Prepare a camera's image for the vision transformers.

    Args:
        image: (height, width, 3) uint8, upright as in the training data.
        size: Pixels on each side of the result.

    Returns:
        (size, size, 3) uint8. An image that has this size already is cropped only.
    """
    if image.shape[:2] != (size, size):
        image = _resized(_through_jpeg(image), size)
    return _centre_cropped(image)


def _through_jpeg(image: ImageArray) -> ImageArray:
    """Encode an image as JPEG of quality 95 and decode it, as TensorFlow does.

    TensorFlow decodes by libjpeg's fast inverse transform, which Pillow does not offer and which changes two pixels of
    three. The lossless part of JPEG, its entropy coding, is left out; the rest is libjpeg's integer arithmetic.
    """
    height, width = image.shape[:2]
    luma, *colours = _ycc(image.astype(np.int32))
    luma = _coded(luma, 0)
    halves = (_coded(_halved(colour), 1)[:, : (width + 1) // 2] for colour in colours)
    cb, cr = (_doubled(half)[:height, :width] - 128 for half in halves)
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    return np.stack([red, green, blue], axis=2).clip(0, 255).astype(np.uint8)


def _ycc(image: Integers) -> list[Integers]:
    """Return an image's luminance, and its blue and red differences, each (height, width)."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    cb = (-11059 * red - 21709 * green + 32768 * blue + (128 << 16) + 32767) >> 16
    cr = (32768 * red - 27439 * green - 5329 * blue + (128 << 16) + 32767) >> 16
    return [luma, cb, cr]


def _halved(plane: Integers) -> Integers:
    """Average squares of two by two pixels; halves are rounded down and up in turn."""
    height, width = plane.shape
    even = np.pad(plane, ((0, height % 2), (0, -width % 16)), mode="edge")
    sums = even[::2, ::2] + even[::2, 1::2] + even[1::2, ::2] + even[1::2, 1::2]
    means: Integers = (sums + 1 + np.arange(sums.shape[1], dtype=np.int32) % 2) >> 2
    return means


def _doubled(plane: Integers) -> Integers:
    """Double a plane's size; a pixel is 9/16 of the nearest value and 3/16, 3/16 and 1/16 of the next ones."""
    padded = np.pad(plane, 1, mode="edge")
    middle = 3 * padded[1:-1]
    rows = np.stack([middle + padded[:-2], middle + padded[2:]], axis=1).reshape(-1, padded.shape[1])
    centre = 3 * rows[:, 1:-1]
    pairs = [(centre + rows[:, :-2] + 8) >> 4, (centre + rows[:, 2:] + 7) >> 4]
    doubled: Integers = np.stack(pairs, axis=2).reshape(len(rows), -1)
    return doubled


def _coded(plane: Integers, table: int) -> Integers:
    """Transform a plane, (height, width), quantise it, and transform it back: values from 0 to 255."""
    height, width = plane.shape
    padded = np.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge") - 128
    blocks = padded.reshape(padded.shape[0] // 8, 8, -1, 8).transpose(1, 3, 0, 2)  # (row, column, blocks...)
    quantum = _quanta()[table]
    divisor = (quantum << 3)[..., None, None]
    found = _forward(_forward(blocks.swapaxes(0, 1), 2).swapaxes(0, 1), -2)
    levels = np.sign(found) * ((np.abs(found) + (divisor >> 1)) // divisor)
    scale = np.array([1.0] + [math.sqrt(2) * math.cos(k * math.pi / 16) for k in range(1, 8)])
    factors = (quantum * np.round(2**14 * np.outer(scale, scale)).astype(np.int32) + 2**11) >> 12
    values = _inverse(_inverse(levels * factors[..., None, None]).swapaxes(0, 1)).swapaxes(0, 1) >> 5
    decoded = (values + 128).clip(0, 255).transpose(2, 0, 3, 1).reshape(padded.shape)
    return decoded[:height, :width]


@lru_cache(maxsize=1)
def _quanta() -> list[Integers]:
    """Return the quantisation tables of luminance and colour, (8, 8): Pillow's and TensorFlow's are the same."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=95)
    tables = Image.open(file).quantization  # type: ignore[attr-defined] # a JPEG has it
    return [np.array(tables[index], np.int32).reshape(8, 8) for index in (0, 1)]


def _forward(x: Integers, bits: int) -> Integers:
    """Transform the first axis, eight values, by libjpeg's accurate cosine transform.

    Args:
        x: (8, ...).
        bits: Bits of fraction that the result has more than `x`.
    """
    s0, s1, s2, s3 = x[0] + x[7], x[1] + x[6], x[2] + x[5], x[3] + x[4]
    d0, d1, d2, d3 = x[0] - x[7], x[1] - x[6], x[2] - x[5], x[3] - x[4]
    e0, e1, e2, e3 = s0 + s3, s1 + s2, s1 - s2, s0 - s3
    even = (e2 + e3) * 4433
    z1, z2, z3, z4 = (d3 + d0) * -7373, (d2 + d1) * -20995, (d3 + d1) * -16069, (d2 + d0) * -3196
    z5 = (d3 + d1 + d2 + d0) * 9633
    z3, z4 = z3 + z5, z4 + z5
    products = [
        (e0 + e1) << 13,
        d0 * 12299 + z1 + z4,
        even + e3 * 6270,
        d1 * 25172 + z2 + z3,
        (e0 - e1) << 13,
        d2 * 16819 + z2 + z4,
        even - e2 * 15137,
        d3 * 2446 + z1 + z3,
    ]
    shift = 13 - bits
    result: Integers = (np.stack(products) + (1 << shift >> 1)) >> shift
    return result


def _inverse(x: Integers) -> Integers:
    """Transform the first axis, eight values, back by libjpeg's fast cosine transform, which rounds down."""
    e0, e1, e3 = x[0] + x[4], x[0] - x[4], x[2] + x[6]
    e2 = ((x[2] - x[6]) * 362 >> 8) - e3
    s0, s3, s1, s2 = e0 + e3, e0 - e3, e1 + e2, e1 - e2
    z13, z10, z11, z12 = x[5] + x[3], x[5] - x[3], x[1] + x[7], x[1] - x[7]
    z5 = (z10 + z12) * 473 >> 8
    d7 = z11 + z13
    d6 = (z10 * -669 >> 8) + z5 - d7
    d5 = ((z11 - z13) * 362 >> 8) - d6
    d4 = (z12 * 277 >> 8) - z5 + d5
    return np.stack([s0 + d7, s1 + d6, s2 + d5, s3 - d4, s3 + d4, s2 - d5, s1 - d6, s0 - d7])


def _resized(image: ImageArray, size: int) -> ImageArray:
    """Resize an image by a Lanczos kernel that is as wide as the sampling needs (antialiasing)."""
    rows = _along_first_axis(image.astype(np.float32), size)
    values = _along_first_axis(rows.swapaxes(0, 1), size).swapaxes(0, 1)
    pixels: ImageArray = np.clip(np.round(values), 0, 255).astype(np.uint8)
    return pixels


def _along_first_axis(values: FloatArray, size: int) -> FloatArray:
    """Resample the first of three axes; products are added in the order of the source's rows."""
    starts, weights = _lanczos(len(values), size)
    result = np.zeros((size, *values.shape[1:]), np.float32)
    for tap in range(weights.shape[1]):
        result += weights[:, tap, None, None] * values[np.minimum(starts + tap, len(values) - 1)]
    return result


@lru_cache(maxsize=16)
def _lanczos(old: int, new: int) -> tuple[NDArray[np.intp], FloatArray]:
    """Return the first source row of each resampled one, (new,), and the weights from there on, (new, taps)."""
    one, half = np.float32(1), np.float32(0.5)
    inverse = one / (np.float32(new) / np.float32(old))
    width = max(inverse, one)
    reach = np.float32(RADIUS) * width
    centres = (np.arange(new, dtype=np.float32) + half) * inverse
    starts = np.clip(np.ceil(centres - reach - half), 0, old - 1).astype(np.intp)
    ends = np.clip(np.floor(centres + reach - half), 0, old - 1).astype(np.intp) + 1
    rows = starts[:, None] + np.arange((ends - starts).max())
    weights = _kernel(np.abs((rows.astype(np.float32) + half - centres[:, None]) * (one / width)))
    weights[rows >= ends[:, None]] = 0
    total = np.zeros(new, np.float32)
    for column in weights.T:
        total += column
    return starts, weights * (one / total)[:, None]


def _kernel(x: FloatArray) -> FloatArray:
    """Return the Lanczos kernel at distances from its centre."""
    pi, radius = np.float32(math.pi), np.float32(RADIUS)
    safe = np.maximum(x, np.float32(1e-3))  # the kernel is 1 nearer to its centre
    values = radius * _sine(pi * safe) * _sine(pi * safe / radius) / (pi * pi * safe * safe)
    values[x <= np.float32(1e-3)] = 1
    values[x > radius] = 0
    return values  # type: ignore[no-any-return]


def _sine(x: FloatArray) -> FloatArray:
    """Return the sine of values from 0 on, rounded as the GNU C library's `sinf` does, which TensorFlow calls.

    It is a polynomial in double precision between two multiples of half of pi. NumPy's own differs by a last bit, and
    a pixel in 100,000 with it.
    """
    wide = x.astype(np.float64)
    quarter = np.floor(wide * (2 / math.pi) + 0.5).astype(np.int64)
    rest = wide - quarter * (math.pi / 2)
    square = rest * rest
    cube = rest * square
    odd = rest + cube * float.fromhex("-0x1.555545995a603p-3")
    odd = odd + cube * square * (
        float.fromhex("0x1.1107605230bc4p-7") + square * float.fromhex("-0x1.994eb3774cf24p-13")
    )
    fourth = square * square
    even = 1 + square * float.fromhex("-0x1.ffffffd0c621cp-2") + fourth * float.fromhex("0x1.55553e1068f19p-5")
    even = even + fourth * square * (
        float.fromhex("-0x1.6c087e89a359dp-10") + square * float.fromhex("0x1.99343027bf8c3p-16")
    )
    values = np.where(quarter % 2 == 0, odd, even)
    return np.where(quarter % 4 < 2, values, -values).astype(np.float32)


def _centre_cropped(image: ImageArray) -> ImageArray:
    """Cut the border off, and enlarge the rest to the image's size by linear interpolation."""
    values = image.astype(np.float32) * np.float32(1 / 255)
    first, last, share = _sampled(image.shape[0])
    rows = values[first], values[last]
    first, last, across = _sampled(image.shape[1])
    top, bottom = (row[:, first] + (row[:, last] - row[:, first]) * across[:, None] for row in rows)
    cropped = top + (bottom - top) * share[:, None, None]
    pixels: ImageArray = (np.clip(cropped, 0, 1) * np.float32(255.5)).astype(np.uint8)
    return pixels


@lru_cache(maxsize=16)
def _sampled(size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], FloatArray]:
    """Return the two source rows of each row of the centre crop, and the second one's share."""
    one = np.float32(1)
    side = np.sqrt(CROP_AREA)
    begin = (one - side) / np.float32(2)
    scale = ((begin + side) - begin) * np.float32(size - 1) / np.float32(size - 1)
    positions = begin * np.float32(size - 1) + np.arange(size, dtype=np.float32) * scale
    first = np.floor(positions)
    return first.astype(np.intp), np.ceil(positions).astype(np.intp), positions - first
