"""Chosen frames of demonstrations as observations, in any order: what a training reads that does not keep them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.data.augment import Copies
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.selection import check_instructions
from dysl_vla.errors import DyslError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, Observation
from dysl_vla.video import VideoReader

OPEN_VIDEOS = 64
"""Number of videos that stay open; opening one costs about as much as decoding some of its pictures."""

FAR_S = 0.5
"""Seconds to a next picture for which it is sought; about half of the distance of key frames that is common."""


class FrameSource:
    """Frames and their copies; `source[rows]` reads some. It can be sent to another process.

    Rows are the frames in rising order, each with its copies behind it.

    Args:
        demonstrations: The dataset.
        chosen: Indices of frames, rising.
        copies: Copies of each frame.
        resizes: Camera to the size, (height, width), at which the policy sees its images.

    Raises:
        DatasetError: A file is damaged, or an instruction is blank.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        chosen: NDArray[np.int64],
        copies: Copies,
        resizes: Mapping[str, tuple[int, int]],
    ) -> None:
        columns = demonstrations.columns()
        check_instructions(demonstrations, columns["task_index"][chosen])
        self.indices = np.repeat(chosen, 1 + copies.count)
        self._demonstrations, self._copies, self._resizes = demonstrations, copies, resizes
        self._states, self._tasks = columns["states"], columns["task_index"]
        self._videos: OrderedDict[Path, VideoReader] = OrderedDict()

    def __len__(self) -> int:
        return len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_videos": OrderedDict()}  # an open file stays in its process

    def __getitem__(self, row: int) -> Observation:
        return self.read([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Observation] | DyslError:
        """Read some rows, as `torch.utils.data.DataLoader` asks for a batch; an error is returned, not raised.

        The loader would raise it with the traceback of its process as its message.
        """
        try:
            return self.read(rows)
        except DyslError as error:
            return error

    def read(self, rows: Sequence[int]) -> list[Observation]:
        """Read some rows. In rising order, the fewest pictures are decoded.

        Raises:
            DatasetError: A file is damaged.
        """
        demonstrations = self._demonstrations
        indices = list(dict.fromkeys(int(self.indices[row]) for row in rows))
        read: dict[int, dict[str, Any]] = {
            index: {STATE_KEY: self._states[index], TASK_KEY: demonstrations.instructions[self._tasks[index]]}
            for index in indices
        }
        for camera in demonstrations.spec.cameras:
            images = demonstrations.pictures_at(camera, indices, self._open)
            for index, image in zip(indices, images, strict=True):
                read[index][IMAGE_PREFIX + camera] = image
        observations = []
        for row in rows:
            index, copy = int(self.indices[row]), row % (1 + self._copies.count) - 1
            observation: Observation = read[index]
            if copy >= 0:
                observation = self._copies.copy(observation, self._resizes, index, copy)
            observations.append(observation)
        return observations

    def _open(self, path: Path) -> VideoReader:
        if path in self._videos:
            self._videos.move_to_end(path)
        else:
            if len(self._videos) == OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
            self._videos[path] = VideoReader(path, far_s=FAR_S)
        return self._videos[path]
