"""Pictures of a run: what is drawn under the frames of a video, and a contact sheet of many videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write
from dysl_vla.types import ImageArray, SkipTrace
from dysl_vla.video import read_video

with needs_extra("train"):
    from PIL import Image, ImageDraw

COLUMNS = 6
SIDE = 144
CAPTION = 14
STRIP = 48
"""Height of the strip under a frame, in pixels."""


def write_contact_sheet(videos: Sequence[Path], path: Path) -> None:
    """Draw a row of frames for each video, evenly spaced from its first to its last, under the video's name.

    Args:
        videos: MP4 files.
        path: Path of the picture, which ends in `.png`.
    """
    read = [list(read_video(video)) for video in videos]
    height = max(round(SIDE * frames[0].shape[0] / frames[0].shape[1]) for frames in read)
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(videos) * (height + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, frames) in enumerate(zip(videos, read, strict=True)):
        top = row * (height + CAPTION)
        draw.text((2, top), video.stem, fill="black")
        for column, index in enumerate(np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)):
            frame = Image.fromarray(frames[index]).resize((SIDE, height), Image.Resampling.LANCZOS)
            sheet.paste(frame, (column * SIDE, top + CAPTION))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def draw_skipping(frame: ImageArray, trace: SkipTrace, continuities: Sequence[float | None]) -> ImageArray:
    """Draw under a frame what layer skipping did.

    The strip has a cell for each layer, green if it ran and grey if it was skipped, and the continuity of the
    trajectory so far, the latest on the right. The picture has a red border where the full model predicted again.

    Args:
        frame: uint8, (height, width, 3).
        trace: Trace of the inference that ran most layers since the last frame.
        continuities: Continuity at the episode's inferences until now.

    Returns:
        The picture, uint8, (height + STRIP, width, 3).
    """
    height, width = frame.shape[:2]
    canvas = Image.new("RGB", (width, height + STRIP), "white")
    canvas.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(canvas)
    edges = np.linspace(2, width - 2, len(trace.layers_run) + 1)
    for ran, left, right in zip(trace.layers_run, edges[:-1], edges[1:], strict=True):
        draw.rectangle((left, height + 3, right - 2, height + 12), fill="#2a9d4a" if ran else "#d0d0d0")
    known = [value for value in continuities if value is not None][-width // 4 :]
    if len(known) > 1:
        low = min(*known, -0.5)
        points = [(width - 4 * (len(known) - i), height + 16 + (STRIP - 20) * v / low) for i, v in enumerate(known)]
        draw.line(points, fill="#1f5fbf", width=2)
    if trace.is_verified:
        draw.rectangle((0, 0, width - 1, height + STRIP - 1), outline="red", width=3)
    return np.asarray(canvas)


def draw_caption(frame: ImageArray, text: str) -> ImageArray:
    """Draw a line of text above a frame.

    Args:
        frame: uint8, (height, width, 3).
        text: The text; what is too long for the width is cut.

    Returns:
        The picture, uint8, (height + CAPTION, width, 3).
    """
    height, width = frame.shape[:2]
    canvas = Image.new("RGB", (width, height + CAPTION), "white")
    canvas.paste(Image.fromarray(frame), (0, CAPTION))
    ImageDraw.Draw(canvas).text((2, 0), text, fill="black")
    return np.asarray(canvas)
