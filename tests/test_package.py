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


def imported_names(path: Path) -> set[str]:
    """What a module imports, with the module that it comes from: "dysl_vla.envs.get_suite"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_subpackages(path: Path) -> set[str]:
    names = imported_names(path)
    for name in names:
        assert name.split(".")[0] not in SUBPACKAGES, f"{path} imports through a link: {name}"
    return {n.split(".")[1] for n in names if n.startswith("dysl_vla.") and n.split(".")[1] in SUBPACKAGES}


@pytest.mark.parametrize("subpackage", MAY_IMPORT)
def test_a_subpackage_imports_only_those_below_it(subpackage: str) -> None:
    for path in (PACKAGE / subpackage).rglob("*.py"):
        assert imported_subpackages(path) - {subpackage} <= MAY_IMPORT[subpackage], path


def test_the_foundation_imports_no_subpackage() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("cli", "doctor"):
            assert imported_subpackages(path) == set(), path


def test_no_two_modules_import_each_other() -> None:
    """Neither directly nor through others; what is imported for type checkers alone counts, too."""
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {module.removesuffix(".__init__"): path for module, path in modules.items()}
    imports = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imported_names(path)}
        for module, path in modules.items()
    }
    while imports:  # those that import nothing that is left, or that nothing left imports, are on no circle
        imported = set().union(*imports.values())
        circle = {module: names for module, names in imports.items() if module in imported and names & imports.keys()}
        assert circle.keys() != imports.keys(), f"these import each other: {circle}"
        imports = circle


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
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    module: str, extra: str, command: str, tmp_path: Path
) -> None:
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
