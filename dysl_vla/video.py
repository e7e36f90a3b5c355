"""Reading and writing MP4 files with PyAV: demonstrations, and videos of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from dysl_vla.errors import DatasetError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write
from dysl_vla.types import ImageArray

with needs_extra("train"):
    import av

CODEC = "h264"
PIXEL_FORMAT = "yuv444p"
"""There is no chroma subsampling, so that a goal of three pixels keeps its colour."""
FAR_S = 2.0
"""A time that lies further ahead is sought; for a nearer one, decoding on is as quick."""


def write_video(path: Path, frames: Sequence[ImageArray], fps: float, *, crf: int = 14) -> None:
    """Write frames as H.264 with a constant rate and no B-frames; the file is complete or absent.

    Args:
        path: Ends in `.mp4`.
        frames: Images, uint8 (height, width, 3), all of one size. Odd sizes work as well.
        fps: Frames a second.
        crf: Quality, from 0, lossless; 23 is common for videos.
    """
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
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

    Yields:
        Frames, uint8 (height, width, 3).

    Raises:
        DatasetError: The file is missing, cut off or no video.
    """
    with _reading(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            yield _pixels(frame)


class VideoReader:
    """A video whose pictures are found by time. Reading in the order of time decodes each picture once.

    Times are those that the file gives its pictures, in seconds (pts times time base), as in LeRobot: the first picture
    need not be at zero.

    Args:
        path: The file. It stays open until `close`.
        far_s: A time that lies further ahead than this, in seconds, is sought.

    Attributes:
        path: The file.

    Raises:
        DatasetError: The file is missing, cut off or no video; methods that read raise it as well.
    """

    def __init__(self, path: Path, *, far_s: float = FAR_S) -> None:
        self.path = path
        self._far_s = far_s
        self._before: tuple[float, av.VideoFrame] | None = None
        self._after: tuple[float, av.VideoFrame] | None = None
        self._since = math.inf
        self._open()

    @property
    def rate_hz(self) -> float:
        """Pictures a second, on average, according to the file; 0 when it does not say."""
        return float(self._stream.average_rate or 0)

    def nearest(self, time_s: float) -> tuple[float, ImageArray]:
        """Return the picture whose time is nearest, or the earlier of two that are equally near.

        Returns:
            The picture's time; the picture, uint8 (height, width, 3).
        """
        if self._is_elsewhere(time_s):
            self._seek(time_s)
        while self._after is not None and self._after[0] < time_s:
            self._before, self._after = self._after, self._read()
        known = [picture for picture in (self._before, self._after) if picture is not None]
        if not known:
            raise DatasetError(f"{self.path}: has no pictures; restore it or collect it again.")
        time, frame = min(known, key=lambda picture: abs(picture[0] - time_s))
        with _reading(self.path):
            return time, _pixels(frame)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _open(self) -> None:
        with _reading(self.path):
            self._container = av.open(str(self.path))
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1

    def _start(self) -> None:
        """Decode from the current position of the file."""
        self._frames = self._container.decode(self._stream)
        self._before, self._after = None, self._read()

    def _read(self) -> tuple[float, av.VideoFrame] | None:
        with _reading(self.path):
            for frame in self._frames:
                if frame.pts is not None and frame.time_base is not None:
                    return float(frame.pts * frame.time_base), frame
        return None

    def _is_elsewhere(self, time_s: float) -> bool:
        """Tell whether a time is before the present pictures, or so far behind them that it is sought."""
        since = self._since if self._before is None else self._before[0]
        return time_s < since or (self._after is not None and time_s > self._after[0] + self._far_s)

    def _seek(self, time_s: float) -> None:
        """Go to the last key frame before a time."""
        with _reading(self.path):
            assert self._stream.time_base is not None
            self._container.seek(max(0, math.floor(time_s / self._stream.time_base)), stream=self._stream)
        self._start()
        if self._after is not None and self._after[0] <= time_s:
            self._since = self._after[0]
        else:  # nothing is before it, or an index misleads: from the beginning
            self.close()
            self._open()
            self._start()
            self._since = -math.inf


def _pixels(frame: av.VideoFrame) -> ImageArray:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors about a bad file into one error."""
    try:
        yield
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as a video ({error}); restore it or collect it again.") from error
