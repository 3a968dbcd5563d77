"""Where files lie, and how they are written: whole or not at all."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifarlab import first_line


def root() -> Path:
    """Return the main checkout, also from the throw-away copy that `dvc exp run --temp` and `--queue` work in."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: savefig and friends choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content does: power may fail
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk does not say which file, and numpy not even that it is full
            raise OSError(error.errno or errno.ENOSPC, error.strerror or first_line(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` for people and `git diff`: indented, floats of six decimals."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_rounded(content), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return round(content, 6)
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return content
