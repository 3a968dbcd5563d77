"""Where files lie, and how they are written: whole or not at all."""

import csv
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifarlab.errors import first_line

# Relative to the checkout, or to the copy of it in which `dvc exp run --temp` and `--queue` work.
PARAMS = Path("params.yaml")
VARIANTS = Path("variants.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")
DATA = Path("data")
WEIGHTS = Path("models/network.safetensors")
TRAIN_METRICS = Path("metrics/train.json")
EVALUATION = Path("metrics/evaluate.json")
PLOTS = Path("plots")
PROBLEMS = PLOTS / "image_problems.csv"
HISTORY = PLOTS / "history.csv"
PREDICTIONS = PLOTS / "predictions.csv"
PER_CLASS = PLOTS / "per_class.csv"
CONFUSION = PLOTS / "confusion.csv"
QUESTIONS = Path("studies")
ANSWERS = Path("docs/studies")
EQUAL_CODE = ANSWERS / "same-bytes.json"


def root() -> Path:
    """Return the main checkout, also from a copy that `dvc exp run --temp` or `--queue` made."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def cache(checkout: Path | None = None) -> Path:
    """Return the folder for downloads, checkpoints and epoch times, which no DVC stage owns."""
    return (checkout or root()) / ".cache"


def mlflow_database() -> Path:
    """Return the SQLite file of MLflow that is used where MLFLOW_TRACKING_URI names no other."""
    return root() / "mlflow.db"


def scratch() -> Path:
    """Return the folder for temporary files and locks, which Git ignores."""
    return root() / ".dvc" / "tmp"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block succeeds."""
    if path.exists() and not path.is_file():  # root could replace /dev/null by a file
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because savefig chooses the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # after a power cut the name must not exist without the content
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            # The error of a full disk names no file, and numpy's does not even have a number.
            reason = error.strerror or first_line(error)
            raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file as a whole."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` for people and `git diff`: indented, floats with six decimals."""
    rounded = json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 6))
    write(path, json.dumps(rounded, indent=2, ensure_ascii=False) + "\n")


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows of equal keys: floats with six decimals, None and NaN as empty cells.

    Without rows, `columns` are the keys.
    """
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns or rows[0])
        writer.writerows(map(_cell, row.values()) for row in rows)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text("utf-8"))


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value
