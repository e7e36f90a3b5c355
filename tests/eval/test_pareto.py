from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dysl_vla.cli import main
from dysl_vla.errors import ConfigError
from dysl_vla.eval import evaluate
from dysl_vla.eval.config import EvalConfig
from dysl_vla.eval.pareto import pareto
from tests.conftest import made_once


@pytest.fixture(scope="module")
def runs(skipping_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ways on the plain suite, two on a perturbed one."""

    def make(out: Path) -> None:
        plain = EvalConfig(
            out / "plain", str(skipping_checkpoint), suite="mock", episodes=2, variants="full,dysl,random"
        )
        evaluate(plain)
        evaluate(EvalConfig(out / "full", str(skipping_checkpoint), suite="mock", perturb="noise", episodes=2, skip=0))
        evaluate(EvalConfig(out / "fast", str(skipping_checkpoint), suite="mock", perturb="noise", episodes=2))

    return made_once(tmp_path_factory, "pareto", make)


def test_each_suite_has_a_table_and_is_paired_with_its_first_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(runs / name) for name in ("plain", "full", "fast")]
    assert main(["plot", "pareto", *folders, "--out", str(tmp_path / "p.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "episodes, against" in line] == [
        "mock, 4 episodes, against plain/full:",
        f"mock+noise:3, 4 episodes, against {runs.name}/full:",
    ]
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert rows["plain/full"][2] == "-"
    assert rows["plain/full"][4] == "all"
    assert float(rows["plain/dysl"][4]) < 6
    assert rows["plain/dysl"][6].rstrip(" |").endswith("x")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > picture.size[1] > 600


def test_what_cannot_be_drawn_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished evaluation"):
        pareto([tmp_path], tmp_path / "p.png")
    with pytest.raises(ConfigError, match=r"\.png"):
        pareto([runs / "plain"], tmp_path / "p.pdf")
    with pytest.raises(ConfigError, match="at least one"):
        pareto([], tmp_path / "p.png")
    result = json.loads((runs / "full/result.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "result.json").write_text(json.dumps(result | {"seed": 100007}))
    with pytest.raises(ConfigError, match="seed must be equal"):
        pareto([runs / "full", other], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()
