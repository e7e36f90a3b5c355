"""`dysl demos import`: human demonstrations from HDF5 files become a LeRobotDataset v3.

The kind of a file is recognised by its content: those of robomimic and robosuite hold states of the simulator, which
are rendered here; those of LIBERO hold images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dysl_vla.data.hdf5 import recorded_file
from dysl_vla.data.lerobot import Demonstrations
from dysl_vla.data.libero_hdf5 import import_libero, is_libero
from dysl_vla.data.options import SIZE, camera_options
from dysl_vla.data.robomimic import import_robomimic
from dysl_vla.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class ImportConfig:
    """Write HDF5 files of LIBERO's, robomimic's or robosuite's as a LeRobotDataset v3. Resumes where it stopped."""

    file: Path
    """HDF5 file, or a folder whose *.hdf5 files are all imported. LIBERO's files keep their names, TASK_demo.hdf5.
    Those of robomimic and robosuite were recorded with robosuite 1.5, as robomimic's demo_v15.hdf5 was; their states
    are rendered."""
    out: Path
    """Folder of the dataset; an existing one of the same world is continued."""
    episodes: int | None = None
    """Demonstrations of each file that are imported at most. All when not given."""
    cameras: str | None = None
    """Camera sizes, "agentview=128x128,robot0_eye_in_hand=96x96"; the suite's own when not given. LIBERO's images are
    taken as they are stored."""

    def __post_init__(self) -> None:
        if self.episodes is not None and self.episodes < 1:
            raise ConfigError(f"episodes must be at least 1, got {self.episodes}; leave it out to import all.")


def import_demonstrations(config: ImportConfig) -> Demonstrations:
    """Write those demonstrations of the files that the dataset lacks.

    Of LIBERO's files all are checked before anything is written; of others, each before any of its demonstrations is.

    Returns:
        The dataset, opened.

    Raises:
        ConfigError: A value of the configuration is wrong.
        DatasetError: A file is damaged, has another format, or does not fit the dataset or the other files.
        MissingExtraError: A package is not installed.
    """
    sizes = camera_options("cameras", config.cameras or "", SIZE, "128x128")
    files = _files(config.file)
    kinds: dict[bool, Path] = {}
    for path in files:
        with recorded_file(path) as data:
            kinds.setdefault(is_libero(data), path)
    if len(kinds) > 1:
        raise DatasetError(
            f"{config.file}: must hold files of one kind; {kinds[True].name} is LIBERO's, {kinds[False].name} is not; "
            "import each kind from a folder of its own into a dataset of its own."
        )
    if True in kinds:
        if sizes:
            raise ConfigError("cameras must be left out for LIBERO's files, whose images are taken as they are stored.")
        import_libero(files, config.out, config.episodes)
    else:
        cameras = {name: (height, width) for name, (height, width) in sizes.items()} or None
        for path in files:
            import_robomimic(path, config.out, cameras, config.episodes)
    return Demonstrations(config.out)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(found for found in path.glob("*.hdf5") if not found.name.startswith("."))
    if not files:
        raise ConfigError(f"file: the folder {path} holds no *.hdf5 file; give the one that holds them.")
    return files
