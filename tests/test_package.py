"""The house rules: what importing loads, who may import whom, and the links at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dysl_vla

PACKAGE = Path(dysl_vla.__file__).parent
SUBPACKAGES = ("skip_controller", "envs", "policies", "data", "training", "eval", "deploy")
MAY_IMPORT = {
    "skip_controller": set(),
    "envs": {"skip_controller"},
    "policies": {"skip_controller"},
    "data": {"skip_controller", "envs", "policies"},
    "eval": {"skip_controller", "envs", "policies", "data"},
    "training": {"skip_controller", "envs", "policies", "data", "eval"},  # tuning runs evaluations
    "deploy": {"skip_controller", "envs", "policies"},
}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "mujoco", "gymnasium", "numpy", "pyarrow", "av")
    done = run_python(f"import sys, dysl_vla; print([m for m in {heavy!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_resolve() -> None:
    for name in dysl_vla.__all__:
        assert getattr(dysl_vla, name) is not None
    with pytest.raises(AttributeError):
        dysl_vla.no_such_name  # noqa: B018


def imported_subpackages(path: Path) -> set[str]:
    """Subpackages that a module imports, whatever the form of the import."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    for module in modules:
        assert module.split(".")[0] not in SUBPACKAGES, f"{path} imports through a link: {module}"
    return {m.split(".")[1] for m in modules if m.startswith("dysl_vla.") and m.split(".")[1] in SUBPACKAGES}


@pytest.mark.parametrize("subpackage", MAY_IMPORT)
def test_a_subpackage_imports_only_those_below_it(subpackage: str) -> None:
    for path in (PACKAGE / subpackage).rglob("*.py"):
        assert imported_subpackages(path) - {subpackage} <= MAY_IMPORT[subpackage], path


def test_the_foundation_imports_no_subpackage() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("cli", "doctor"):
            assert imported_subpackages(path) == set(), path


@pytest.mark.parametrize("name", ["envs", "policies", "skip_controller", "eval"])
def test_top_level_links_are_relative_and_lead_into_the_package(name: str) -> None:
    link = PACKAGE.parent / name
    assert link.readlink() == Path("dysl_vla") / name
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("gymnasium", "sim", "demos collect --suite mock --episodes 1"),
        ("av", "train", "demos collect --suite mock --episodes 1"),
        ("robosuite", "sim", "demos collect --suite robosuite-5 --episodes 1"),
        ("h5py", "hdf5", "demos import --file x"),
        ("torch", "policy", "train --data x"),
    ],
)
def test_a_missing_extra_is_named_with_its_mend(module: str, extra: str, command: str, tmp_path: Path) -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from dysl_vla.cli import main
sys.exit(main([*{command!r}.split(), "--out", {str(tmp_path / "d")!r}]))
"""
    done = run_python(code)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'dysl-vla[{extra}]'" in done.stderr
    assert not (tmp_path / "d").exists()


def test_a_robot_needs_no_simulator() -> None:
    """From LeRobot's data to a moving arm, what is imported runs without one."""
    modules = (
        "data.lerobot data.info training.train training.calibrate training.distill training.tune eval.config "
        "eval.offline deploy.export deploy.runtime deploy.run_control deploy.lerobot_robot deploy.run_server"
    )
    done = run_python(f"""
import sys
from importlib import import_module
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gymnasium", "metaworld", "mujoco", "robosuite"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
for module in {modules!r}.split():
    import_module("dysl_vla." + module)
""")
    assert done.returncode == 0, done.stderr
