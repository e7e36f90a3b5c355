"""Films of episodes on one picture, so that a run can be looked at in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dysl_vla.extras import needs_extra
from dysl_vla.files import replacing
from dysl_vla.video import read_video

with needs_extra("sim"):
    from PIL import Image, ImageDraw

COLUMNS = 6
SIDE = 144
CAPTION = 14


def write_contact_sheet(films: Sequence[Path], path: Path) -> None:
    """Draw frames of each film, evenly spaced from its first to its last, a row a film under its name.

    Args:
        films: MP4 files.
        path: Ends in `.png`.
    """
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(films) * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, film in enumerate(films):
        frames = list(read_video(film))
        top = row * (SIDE + CAPTION)
        draw.text((2, top), film.stem, fill="black")
        for column, index in enumerate(np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)):
            frame = Image.fromarray(frames[index]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(frame, (column * SIDE, top + CAPTION))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
