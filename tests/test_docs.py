"""The documents name tests, files, commands and parameters that exist."""

import json
import re
from itertools import pairwise
from pathlib import Path

import click
import pytest
from dvc.cli import parse_args

from bench import reference
from cifarlab.cli import main
from cifarlab.params.load import KEYS
from tests.support.documents import EXECUTED, blocks, commands

REPO = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "images/README.md", "docs/studies/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))
TARGETS = re.findall(r"^([a-z -]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)


def promises() -> list[str]:
    """Return the rows of docs/reliability.md that name a test."""
    text = (REPO / "docs/reliability.md").read_text("utf-8")
    return [row for row in ROW.findall(text) if "tests/" in row]


@pytest.mark.parametrize("row", promises(), ids=lambda row: row[2:40])
def test_every_promise_has_its_test(row: str) -> None:
    files = [REPO / name for name in re.findall(r"`(tests/[\w/]+\.py)`", row)]
    code = "\n".join(file.read_text("utf-8") for file in files)
    for fragment in re.findall(r"`([a-z_]+)`", row.split("|")[3]):
        assert re.search(rf"def test_\w*{fragment}", code), fragment


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_existing_files(page: str) -> None:
    path = REPO / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("page", [*EXECUTED, "CONTRIBUTING.md"])
def test_every_command_exists_with_its_options(page: str) -> None:
    """A slow test executes them (tests/pipeline/test_documents.py); this one only reads them."""
    typed = [*commands(page), *commands(page, "sh")]
    assert typed
    for program, *rest in typed:
        changed = [value.split("=")[0] for option, value in pairwise(rest) if option == "-S"]
        assert set(changed) <= set(KEYS)
        match program:
            case "make":
                targets = " ".join(TARGETS).split()
                assert {word for word in rest if "=" not in word and word[0] != "-"} <= {*targets}
            case "cifarlab":
                command = main.commands[rest[0]]
                command.make_context(rest[0], rest[1:], click.Context(main))
            case "dvc":
                parse_args(rest)


def test_blocks_that_no_test_types_are_few() -> None:
    typed = sum(len(list(commands(page))) for page in EXECUTED)
    untyped = [words[0] for page in EXECUTED for words in commands(page, "sh")]
    assert typed > 60
    assert set(untyped) <= {"cifarlab", "dvc", "docker", "make"}
    assert len(untyped) < typed / 8
    languages = re.findall(r"^```(\w+)$", "".join((REPO / p).read_text() for p in EXECUTED), re.M)
    assert set(languages) == {"bash", "sh"}


def test_the_readme_is_short_and_starts_with_what_one_types() -> None:
    text = (REPO / "README.md").read_text("utf-8")
    assert len(text.splitlines()) < 150
    assert [line.split("  ")[0] for line in blocks("README.md")[0].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_the_figures_in_the_readme_come_from_one_machine() -> None:
    recorded: dict[str, list[dict[str, float]]] = {}
    for line in (REPO / "bench/results/full.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        recorded.setdefault(" ".join(run["measurement"][:2]), []).append(run["result"])

    def shown(runs: list[dict[str, float]], key: str, factor: int = 1, digits: int = 0) -> str:
        low, middle, high = (
            f"{value * factor:.{digits}f}" for value in sorted(r[key] for r in runs)
        )
        return f"{middle} ({low}–{high})"

    text = (REPO / "README.md").read_text("utf-8")
    reference_runs = [r for k, runs in recorded.items() if k.startswith("reference") for r in runs]
    for runs in (reference_runs, recorded["ours default"]):
        cells = [shown(runs, "accuracy", 100, 2), shown(runs, "seconds")]
        cells.append(shown(runs, "images_per_second"))
        assert f"| {' | '.join(cells)} |" in text
    assert f"| {shown(recorded['ours notebook'], 'images_per_second')} |" in text


def test_the_reference_of_parameters_is_current() -> None:
    assert (REPO / reference.PAGE).read_text("utf-8") == reference.page(), "run `make reference`"


def test_the_reference_explains_every_parameter() -> None:
    rows = [row.split(" | ") for row in reference.page().splitlines() if row.startswith("| `")]
    assert sorted(row[0].strip("| `") for row in rows) == sorted(KEYS)
    unexplained = {
        row[0].strip("| `") for row in rows if not row[3].strip() and "`, `" not in row[2]
    }
    assert not unexplained
    cells = {row[0].strip("| `"): row[1:] for row in rows}
    assert cells["train.epochs"][1] == "whole number ≥ 1 and ≤ 1,000,000"
    assert cells["train.flip"][1] == "`none`, `random`, `alternating`"
    assert cells["evaluate.views"][-1] == "evaluate |"
    assert cells["tracking.log_model"][-1] == "none |"
