from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dysl_vla.errors import ConfigError
from dysl_vla.files import append_line, atomic_write, read_lines, write_json
from dysl_vla.registry import Registry


@given(cut=st.integers(0, 200))
def test_a_torn_last_line_counts_as_never_written(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "l.jsonl"
    ends = [0]
    for number in range(5):
        append_line(path, {"number": number, "text": "é" * number})
        ends.append(path.stat().st_size)
    cut = min(cut, ends[-1])
    path.write_bytes(path.read_bytes()[:cut])
    whole = sum(end <= cut for end in ends[1:])
    assert [line["number"] for line in read_lines(path)] == list(range(whole))
    append_line(path, {"number": 99})
    assert [line["number"] for line in read_lines(path)] == [*range(whole), 99]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    registry: Registry[int] = Registry("thing", "dysl_vla.no_such_group")
    registry.register("one")(1)
    assert registry.get("one") == 1
    with pytest.raises(ConfigError, match="unknown thing 'two'; there are: one"):
        registry.get("two")
