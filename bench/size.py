"""`make lint`: count the lines of code of src/ and stages/, and find functions that are too long.

Blank lines, comments and docstrings do not count as code. A function counts with all its lines.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

CODE = ("src", "stages")
LIMIT = 5_541
LONGEST = 50  # lines of a function
SHOWN = 5
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Count the lines that hold code."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docstrings)


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the length in lines of each function of a file, and where it is."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield length, f"{path}:{node.lineno} {node.name}"


def main() -> None:
    """Print the counts; exit code 1 if a limit is exceeded."""
    files = [path for folder in CODE for path in sorted(Path(folder).rglob("*.py"))]
    total = sum(code_lines(path.read_text("utf-8")) for path in files)
    longest = sorted((entry for path in files for entry in functions(path)), reverse=True)
    above = sum(length > 40 for length, _ in longest)
    print(f"{' + '.join(CODE)}: {total:,} lines of code (limit {LIMIT:,}) in {len(files)} files;")
    print(f"{above} of {len(longest)} functions have more than 40 lines, the longest:")
    for length, place in longest[:SHOWN]:
        print(f"  {length}  {place}")
    if total > LIMIT or longest[0][0] > LONGEST:
        way_out = f"shorten, or raise the limit in {Path(__file__).name} and say why"
        sys.exit(f"error: at most {LIMIT:,} lines, and {LONGEST} for a function; {way_out}")


if __name__ == "__main__":
    main()
