"""The documents name tests and files that exist."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = ("architecture", "data", "performance", "reliability", "use")
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


@pytest.mark.parametrize(
    "page", ["README.md", "images/README.md", *(f"docs/{page}.md" for page in PAGES)]
)
def test_links_lead_to_existing_files(page: str) -> None:
    path = REPO / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
