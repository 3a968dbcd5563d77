"""Files are written as a whole or not at all; JSON and CSV are rounded."""

import json
import math
import os
from pathlib import Path

import pandas as pd
import pytest

from cifarlab.files import atomic, write_csv, write_json


def test_atomic_creates_folders_and_leaves_only_the_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    with atomic(path) as temporary:
        assert temporary.suffix == ".png"  # matplotlib chooses the format by the suffix
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
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


def test_atomic_does_not_replace_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # like /dev/null, which root could replace
    with pytest.raises(OSError, match="it is no regular file"), atomic(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_write_json_rounds_floats_at_every_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(
        path,
        {
            "third": 1 / 3,
            "count": 7,
            "yes": True,
            "none": None,
            "name": "Zürich",
            "in": {"two": {"pi": 3.14159265}},
            "list": [2 / 3],
        },
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
    assert path.read_text("utf-8").startswith(
        '{\n  "third": 0.333333,\n  "count": 7,\n  "yes": true'
    )
    assert "Zürich" in path.read_text("utf-8")
    assert path.read_text("utf-8").endswith("}\n")


def test_write_csv_gives_the_same_bytes_as_pandas(tmp_path: Path) -> None:
    names = [
        "plain",
        "a,b",
        'say "cheese"',
        "two\nlines",
        " space",
        "猫",
        "",
        "7",
        "#",
        "\r",
        "None",
    ]
    numbers = [0.0, 1.0, -0.0, 1 / 3, 1e-9, 123456.7890125, -2e22, 5e-7, math.nan, math.inf, 2.5]
    rows = [
        {"epoch": i, "na,me": name, "number": number, "held out": None, "loss": number or None}
        for i, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    write_csv(tmp_path / "ours.csv", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "pandas.csv", index=False, float_format="%.6f")
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "pandas.csv").read_bytes()
