"""Reading and writing MP4 files with PyAV: demonstrations, and films of evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import replacing
from dysl_vla.types import ImageArray

with needs_extra("sim"):
    import av

CODEC = "h264"
PIXEL_FORMAT = "yuv444p"
"""No chroma subsampling: a goal that is three pixels wide keeps its colour."""


def write_video(path: Path, frames: Sequence[ImageArray], fps: float, *, crf: int = 14) -> None:
    """Write frames as H.264 with a constant rate and no B-frames, the file whole or not at all.

    Args:
        path: Ends in `.mp4`.
        frames: uint8 (height, width, 3), all of one size. H.264 here takes any size, odd ones included.
        fps: Frames a second.
        crf: Quality: 0 is lossless, 23 is what films use.
    """
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = PIXEL_FORMAT
        stream.options = {"crf": str(crf), "preset": "veryfast", "g": "16", "bf": "0"}
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: Path) -> Iterator[ImageArray]:
    """Decode a video frame by frame.

    Returns:
        uint8 (height, width, 3) arrays.

    Raises:
        DatasetError: The file is missing, cut off or no video.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as a video ({error}); restore it or collect it again.") from error
