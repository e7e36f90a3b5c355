from __future__ import annotations

from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dysl_vla.errors import DatasetError
from dysl_vla.video import VideoReader, read_video
from tests.data.foreign import number_of, video

CODECS = [
    ("libx264", {"g": "12", "bf": "3"}),
    ("libx264", {"x264-params": "open-gop=1:keyint=15:bframes=4"}),
    ("libx264", {"x264-params": "keyint=infinite:scenecut=0"}),
    ("libsvtav1", {"g": "2", "crf": "30", "preset": "12"}),
    ("libsvtav1", {"preset": "12"}),
    ("libx264", {"container": "mpegts", "g": "20", "bf": "2"}),  # has no index: seeking in it arrives too late
]


def packets(path: Path) -> list[tuple[int, int]]:
    """Places and sizes of a video's compressed pictures in its file."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.pos is not None and p.size]


def damage(path: Path, first: int, last: int) -> None:
    """Overwrite some of a video's compressed pictures, counted in the order of the file."""
    data = bytearray(path.read_bytes())
    for place, size in packets(path)[first:last]:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize(("codec", "options"), CODECS)
def test_a_picture_is_the_same_wherever_reading_came_from(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    path = tmp_path / "v.mp4"
    video(path, np.arange(60) / 5, codec=codec, **options)
    pictures = list(read_video(path))
    assert len(pictures) == 60
    first = 0.4 if "container" in options else 0.0
    order = np.random.default_rng(0).permutation(60)
    with closing(VideoReader(path)) as opened:
        for number in (*order.tolist(), *range(59, -1, -7), *range(0, 60, 3)):
            time, image = opened.nearest(first + number / 5)
            assert time == pytest.approx(first + number / 5, abs=1e-4)
            np.testing.assert_array_equal(image, pictures[number])


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 3), min_size=1, max_size=12),
    st.floats(0, 5),
    st.lists(st.floats(-3, 30), min_size=1, max_size=8),
)
def test_the_nearest_picture_is_found_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float], start: float, asked: list[float]
) -> None:
    times = np.round((start + np.cumsum(steps)) * 90_000) / 90_000
    path = tmp_path_factory.mktemp("v") / "v.mp4"
    video(path, times)
    with closing(VideoReader(path)) as opened:
        for wanted in asked:
            time, image = opened.nearest(wanted)
            nearest = np.abs(times - wanted).min()
            assert abs(time - wanted) == pytest.approx(nearest, abs=1e-4)
            assert abs(times[number_of(image)] - wanted) == pytest.approx(nearest, abs=1e-4)


def test_what_is_not_asked_for_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    video(path, np.arange(60) / 5, g="10", bf="0", preset="ultrafast", crf="8")
    damage(path, 0, 10)
    damage(path, 22, 30)
    damage(path, 45, 60)
    with closing(VideoReader(path)) as opened:
        for number in (*range(10, 20), *range(30, 40), 15, 35):
            assert number_of(opened.nearest(number / 5)[1]) == number
        with pytest.raises(DatasetError, match=r"v\.mp4"):
            [opened.nearest(number / 5) for number in range(40, 60)]


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_a_file_that_is_no_video_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(DatasetError, match=r"v\.mp4: cannot be read"):
        VideoReader(tmp_path / "v.mp4")
