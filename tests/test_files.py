import json
from pathlib import Path

import pytest

from cifarlab.files import atomic, write_json


def test_atomic_creates_folders_and_leaves_the_whole_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    with atomic(path) as temporary:
        assert temporary.suffix == ".png"  # matplotlib chooses the format by it
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("new, but ha")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_rounds_floats_at_every_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(
        path, {"third": 1 / 3, "count": 7, "yes": True, "none": None, "name": "Zürich", "in": {"two": {"pi": 3.14159265}}, "list": [2 / 3]}
    )
    assert json.loads(path.read_text("utf-8")) == {
        "third": 0.333333,
        "count": 7,
        "yes": True,
        "none": None,
        "name": "Zürich",
        "in": {"two": {"pi": 3.141593}},
        "list": [0.666667],
    }
    assert path.read_text("utf-8").startswith('{\n  "third": 0.333333,\n  "count": 7,\n  "yes": true')
    assert "Zürich" in path.read_text("utf-8")
    assert path.read_text("utf-8").endswith("}\n")
