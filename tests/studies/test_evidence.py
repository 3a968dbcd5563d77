"""Which rows of a study count: equal digests, links between codes, new parameters."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cifarlab.errors import UserError
from cifarlab.params.load import data_set
from cifarlab.studies.points import (
    Link,
    choose_rows,
    key_of,
    read_links,
    valid_origins,
)

POINT = {"train.lr": 0.1, "train.cutmix": 0.0, "plot.dpi": 50}
OLDER = {"train.lr": 0.1}


def link(base: str, new: str, **parameters: Any) -> Link:
    values = {f"train.{name}": value for name, value in parameters.items()}
    return Link(base_code=base, code=new, new_parameters=values)


def counts(
    row: tuple[str, dict[str, Any]], links: list[Link], point: dict[str, Any] = POINT
) -> bool:
    """Tell whether a row, made by a code with parameters, counts for the code "present"."""
    code, parameters = row
    return (code, key_of(parameters)) in valid_origins(point, "present", links)


def test_a_row_of_the_same_code_counts_if_its_parameters_are_the_same() -> None:
    assert counts(("present", POINT), [])
    assert not counts(("present", POINT | {"train.lr": 0.2}), [])
    assert not counts(("present", OLDER), [])


def test_a_row_of_another_code_counts_only_if_both_are_linked() -> None:
    assert not counts(("older", POINT), [])
    assert not counts(("older", POINT), [link("elsewhere", "present"), link("older", "other")])
    assert counts(("older", POINT), [link("older", "present")])
    assert not counts(("older", POINT | {"train.lr": 0.2}), [link("older", "present")])


def test_links_hold_in_both_directions_and_over_several_steps() -> None:
    assert counts(("newer", POINT), [link("present", "newer")])
    chain = [link("b", "present"), link("a", "b"), link("first", "a")]
    assert counts(("first", POINT), chain)
    assert counts(("first", POINT), chain[::-1])
    # Both the present code and the other one were compared with a third.
    assert counts(("sister", POINT), [link("base", "present"), link("base", "sister")])
    assert counts(("sister", POINT), [link("present", "newest"), link("sister", "newest")])
    assert not counts(("first", POINT), [chain[0], chain[2]])


def test_links_in_a_circle_end() -> None:
    circle = [link("present", "a", x=1), link("a", "b"), link("b", "present")]
    assert counts(("b", POINT | {"train.x": 1}), circle)
    assert not counts(("c", POINT), circle)


def test_a_row_from_before_a_parameter_counts_if_it_has_the_compared_value() -> None:
    links = [link("older", "present", cutmix=0)]
    assert counts(("older", OLDER), links)
    assert not counts(("older", OLDER), links, POINT | {"train.cutmix": 0.5})
    # The older code has no such parameter, so no row of it can have been made with one.
    assert not counts(("older", POINT), links)
    # The new code's own rows do not need the compared value.
    mixed = POINT | {"train.cutmix": 0.5}
    assert counts(("present", mixed), links, mixed)


def test_new_parameters_add_up_along_a_chain() -> None:
    links = [link("middle", "present", cutmix=0), link("oldest", "middle", lr=0.1)]
    assert counts(("middle", OLDER), links)
    assert counts(("oldest", {}), links)
    assert not counts(("oldest", {}), links, POINT | {"train.lr": 0.2})
    assert counts(("middle", {"train.lr": 0.2}), links, POINT | {"train.lr": 0.2})


def test_a_row_of_newer_code_counts_if_its_new_parameters_have_the_compared_values() -> None:
    links = [link("present", "newer", mixup=0)]
    assert counts(("newer", POINT | {"train.mixup": 0.0}), links)
    assert not counts(("newer", POINT | {"train.mixup": 0.5}), links)
    assert not counts(("newer", POINT), links)


def test_parameters_that_were_removed_count_with_the_values_that_were_compared() -> None:
    removed = {"evaluate.mirror": False}
    changed = {"new_parameters": {"evaluate.views": 1}, "old_parameters": removed}
    point = OLDER | {"evaluate.views": 1}
    links = [Link(base_code="older", code="present", **changed)]
    assert counts(("older", OLDER | removed), links, point)
    assert not counts(("older", OLDER), links, point)
    assert not counts(("older", OLDER | removed), links, point | {"evaluate.views": 6})
    links = [Link(base_code="present", code="newer", **changed)]
    assert counts(("newer", point), links, OLDER | removed)
    assert not counts(("newer", point), links, OLDER | {"evaluate.mirror": True})


def test_the_key_depends_on_deciding_parameters_only() -> None:
    assert key_of(POINT) == key_of(dict(reversed(POINT.items())))
    same = {"plot.dpi": 120, "tracking.log_model": True, "evaluate.batch_size": 7}
    same |= {"data.name": "folder", "data.sources": ["elsewhere"], "data.sha256": "a"}
    assert key_of(POINT) == key_of(POINT | same)
    assert key_of({"train.lr": 1}) == key_of({"train.lr": 1.0})
    others = ({"data.folder_depth": 2}, {"evaluate.batch_size_limit": 1})  # new ones, some day
    for change in ({"train.lr": 0.2}, {"data.image_size": 8}, {"train.flip": "none"}, *others):
        assert key_of(POINT) != key_of(POINT | change)
    assert key_of({"train.mirror": True}) != key_of({"train.mirror": 1})


def test_of_each_point_the_newest_row_is_chosen() -> None:
    key, other = key_of(POINT), key_of(OLDER)
    rows = pd.DataFrame(
        [
            ("a", "present", key, 1),
            ("a", "present", key, 2),
            ("a", "older", key, 3),
            ("b", "older", key, 4),
            ("b", "present", other, 5),
            ("unknown", "present", key, 6),
            ("c", "linked", key, 7),
        ],
        columns=["experiment", "code", "key", "number"],
    )
    points = dict.fromkeys(["c", "b", "a", "new"], POINT)
    chosen = choose_rows(rows, points, "present", [link("linked", "present")])
    assert list(chosen.number) == [7, 5, 2]
    assert list(chosen.counts) == [True, False, True]
    none = choose_rows(rows[:0], points, "present", [])
    assert none[none.counts].empty


def test_the_file_of_links(tmp_path: Path) -> None:
    path = tmp_path / "same-bytes.json"
    assert read_links(path) == []
    entry = {"base": "c" * 40, "base_code": "a", "code": "b", "new_parameters": {"train.x": [1]}}
    path.write_text(json.dumps([entry | {"variants": 9, "machine": "a CPU"}]))
    assert read_links(path) == [link("a", "b", x=[1])]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[{", "[1]", '{"base_code": "a"}', '[{"code": "b"}]'),
        '[{"base_code": 1, "code": "b"}]',
        '[\n<<<<<<< HEAD\n{"base_code": "a", "code": "b"}]',
    ],
)
def test_a_damaged_file_of_links_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "same-bytes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"same-bytes.json is damaged \(.+\); `git checkout") as e:
        read_links(path)
    assert "\n" not in str(e.value)


def test_a_link_says_nothing_about_the_points_that_were_left_out() -> None:
    link = Link(base_code="older", code="present", without={"train.optimizer": "muon"})
    muon, adam = ({"train.optimizer": name} for name in ("muon", "adam"))
    assert ("older", key_of(adam)) in valid_origins(adam, "present", [link])
    assert valid_origins(muon, "present", [link]) == {("present", key_of(muon))}


@pytest.mark.parametrize(
    ("name", "folder", "sources", "expected"),
    [
        ("cifar10", "images", ["https://example.org/a.tar.gz"], "cifar10"),
        ("folder", "images", ["/images/cifar10-jpeg.tar.xz"], "cifar10-jpeg"),
        ("folder", "/home/me/pets.zip", ["https://example.org/a.tar.gz"], "pets"),
        ("digits", "images", [], "digits"),
        ("a new format", "images", ["/data/pets.npz"], "pets.npz"),
    ],
)
def test_the_name_of_the_data_set(
    name: str, folder: str, sources: list[str], expected: str
) -> None:
    values = {"data.name": name, "data.folder": folder, "data.sources": sources}
    assert data_set(values) == expected
