"""The commands that the documents tell a reader to type.

A block that starts with ```bash is executed by tests/pipeline/test_documents.py, page by page and
from top to bottom. One that starts with ```sh is not: it needs what a test does not have.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
EXECUTED = ("README.md", "docs/tutorial.md", "docs/recipes.md", "docs/questions.md")


def blocks(page: str, language: str = "bash") -> list[str]:
    """Return the blocks of a page in a language."""
    text = (REPO / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str, language: str = "bash") -> Iterator[list[str]]:
    """Yield the words of each command of a page."""
    for line in "".join(blocks(page, language)).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;()")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token.strip("&|;()"):
                words.append(token)
            elif words:
                yield words
                words = []
