"""Which images belong to which class and split, from their paths or from a table of labels."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cifarlab.data.archives import readable
from cifarlab.data.images import is_image
from cifarlab.errors import UserError, in_a_sentence

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation"), "validation")
COLUMNS = {"file": "file", "filename": "file", "image": "file", "path": "file"}
COLUMNS |= {"label": "label", "class": "label", "split": "split"}
HIDDEN = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # what macOS and Windows leave behind
# Control characters, ends of lines, and characters that change the direction of a text.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
UNREADABLE, TWICE = "unreadable", "also in another split"


class Problem(NamedTuple):
    """A file that is not used, or that deserves a look."""

    file: str
    kind: str
    detail: str = ""


class Place(NamedTuple):
    """Where an image belongs."""

    split: str
    """train, validation or test; empty if the source does not say."""
    label: str
    file: str
    """Its path inside the class."""


Places = dict[str, Place]
"""The place of each image by its name."""


def by_folders(names: Iterable[str], problems: list[Problem]) -> Places:
    """Place images in train/<class>/, validation/<class>/ and test/<class>/, or in <class>/.

    Folders around all of these, and folders inside of a class, make no difference; neither does
    the case of the names of the splits. `problems` gets files that are no images or have no place.

    Raises
    ------
    UserError
        There is no train/, and the images are all in other splits, or a class is also beside them.
    """
    images = _images(names, problems)
    found = {name: _split(PurePosixPath(name).parts) for name in images}
    splits = {split for split, _ in found.values() if split}
    if any(SPLIT_NAMES[split] == "train" for split in splits):
        outside = f"outside of {_join(splits)}"
        problems += [Problem(name, outside) for name, (split, _) in found.items() if not split]
        found = {name: place for name, place in found.items() if place[0]}
    elif len(splits) > 1 and all(split for split, _ in found.values()):
        raise UserError(f"there are images in {_join(splits)} but none in train/; add or move some")
    else:
        others = _without_top({n: path for n, (split, path) in found.items() if not split})
        beside = {path[0] for path in others.values() if len(path) > 1}
        if twice := sorted(beside & {path[0] for split, path in found.values() if split}):
            where = f"the class {twice[0]} is in {_join(splits)} and beside it"
            raise UserError(f"{where}; move the classes that are beside it into train/")
        found = {name: ("", PurePosixPath(name).parts) for name in images}
    places = {}
    for name, (label, *file) in _without_top({n: path for n, (_, path) in found.items()}).items():
        if file:
            places[name] = Place(SPLIT_NAMES.get(found[name][0], ""), label, "/".join(file))
        else:
            problems.append(Problem(name, "in no class folder"))
    labels = {place.label for place in places.values()}
    if len(labels) > 1 and all(label.lower() in SPLIT_NAMES for label in labels):
        advice = "add one for each class, or name a table of labels with data.labels"
        raise UserError(f"{_join(labels)} hold images, but no folders; {advice}")
    return _same_case(places)


def by_table(
    names: Iterable[str], text: str, table: str, top: str, problems: list[Problem]
) -> Places:
    """Place images as a table says that has the columns file, label and, where it has one, split.

    A file is named by its path from the source, from the folder `top` around it, or from inside of
    the folders that hold all images; or by its name alone, with or without suffix, if only one
    image has that name. `problems` gets files and rows that cannot be used.

    Raises
    ------
    UserError
        The table has no such columns, a wrong split, two labels for a file, or over a tenth of its
        rows cannot be used.
    """
    images = _images((name for name in names if PurePosixPath(name).name != table), problems)
    found: dict[str, list[str]] = {}
    for name, parts in _without_top({n: PurePosixPath(n).parts for n in images}).items():
        path = PurePosixPath(name)
        known_as = (name, f"{top}/{name}", "/".join(parts), path.name, path.stem)
        for key in {_normal(key) for key in known_as}:
            found.setdefault(key, []).append(name)
    places: Places = {}
    unused: list[Problem] = []
    rows = _rows(text, table)
    for line, row in rows:
        file, label, split = (row.get(name, "").strip() for name in ("file", "label", "split"))
        where = f"{table}, line {line}"
        if split and split.lower() not in SPLIT_NAMES:
            known = _join(SPLIT_NAMES)
            raise UserError(f"{where}: the split {readable(split)!r} is none of {known}")
        candidates = found.get(_normal(file), [])
        if len(candidates) != 1 or not label:
            why = "ambiguous without its path" if candidates else "not among the images"
            unused.append(Problem(f"{where}: {file}", why if label else "without a label"))
            continue
        place = Place(SPLIT_NAMES.get(split.lower(), ""), label, file)
        if places.setdefault(candidates[0], place)[:2] != place[:2]:
            raise UserError(f"{where}: {readable(file)} has another label above")
    if 10 * len(unused) > len(rows):
        count = f"{len(unused)} of {len(rows)} rows of {table} cannot be used"
        raise UserError(f"{count}; {readable(unused[0].file)} is {unused[0].kind}")
    missing = f"not in {table}"
    problems += [*unused, *(Problem(name, missing) for name in images if name not in places)]
    return places


def checked_classes(places: Places, source: Path) -> Places:
    """Return the places with labels that can be shown. Equal texts in Unicode become one class.

    Raises
    ------
    UserError
        A label holds characters that cannot be seen, or two labels look equal.
    """
    shown: dict[str, str] = {}
    classes: dict[str, str] = {}
    for label in sorted({place.label for place in places.values()}):
        normal = unicodedata.normalize("NFC", label)
        if found := UNSAFE.search(label):
            hidden = f"the character U+{ord(found[0]):04X}, which cannot be seen"
            raise UserError(f"{source}: the class {label!a} holds {hidden}; rename it")
        shown[label] = readable(normal)
        seen = "".join(c for c in shown[label] if unicodedata.category(c) != "Cf").strip()
        if (twin := classes.setdefault(seen, normal)) != normal:
            raise UserError(f"{source}: the classes {twin!a} and {label!a} look equal; rename one")
    return {n: place._replace(label=shown[place.label]) for n, place in places.items()}


def summary(problems: Sequence[Problem]) -> str:
    """Describe the problems in a part of a sentence; empty if there are none.

    For example "; unused or doubtful: 9 .txt, 3 unreadable (cat/a.jpg: it is truncated, …)".
    """
    shown = []
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        first = next(problem for problem in problems if problem.kind == kind)
        example = ": ".join(readable(part) for part in (first.file, first.detail) if part)
        example = f" ({example}{', …' if count > 1 else ''})"
        shown.append(f"{count:,} {kind}{'' if kind.startswith('.') else example}")
    return f"; unused or doubtful: {', '.join(shown)}" if shown else ""


def is_hidden(name: str) -> bool:
    """Tell whether a file, or a folder around it, is hidden, or left behind by a system."""
    return any(part.startswith(".") or part in HIDDEN for part in PurePosixPath(name).parts)


def _images(names: Iterable[str], problems: list[Problem]) -> list[str]:
    """Return what should be images; `problems` gets the other files."""
    images = []
    for name in names:
        if is_hidden(name):
            problems.append(Problem(name, "hidden"))
        elif is_image(name):
            images.append(name)
        else:
            suffix = readable(PurePosixPath(name).suffix.lower()[:20])
            problems.append(Problem(name, suffix if len(suffix) > 1 else "without a suffix"))
    return images


def _split(path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the first part of a path that is a split, in lower case, and the parts below it.

    There are a class and a file below it: a class may be called train. Without such a part the
    split is empty.
    """
    at = next((i for i, part in enumerate(path[:-2]) if part.lower() in SPLIT_NAMES), None)
    return ("", path) if at is None else (path[at].lower(), path[at + 1 :])


def _without_top(paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Remove the folders that hold all images, as long as there are folders below."""
    while any(len(path) > 2 for path in paths.values()):
        if len({path[0] for path in paths.values() if len(path) > 1}) > 1:
            break
        paths = {name: path[len(path) > 1 :] for name, path in paths.items()}
    return paths


def _same_case(places: Places) -> Places:
    """Give a class in validation/ and test/ the case that its name has in train/."""
    train = {place.label for place in places.values() if place.split == "train"}
    known = {label.casefold(): label for label in train}
    if len(known) < len(train):  # the case distinguishes classes, such as a and A
        return places
    return {n: p._replace(label=known.get(p.label.casefold(), p.label)) for n, p in places.items()}


def _rows(text: str, table: str) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a table with commas, semicolons or tabs, and their numbers of line."""
    separator = max("\t;,", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restval="")
    with in_a_sentence(f"{table}: %s", csv.Error):
        head = reader.fieldnames or []
        reader.fieldnames = [COLUMNS.get(name.strip().lower(), "") for name in head]
        if not {"file", "label"} <= {*reader.fieldnames}:
            columns = readable(", ".join(head)) or "none"
            needed = "needs the columns file and label, and may have split"
            raise UserError(f"{table} {needed}; it has {columns}")
        return [(reader.line_num, row) for row in reader]


def _normal(path: str) -> str:
    """Return a path with slashes and in NFC: Windows writes backslashes, macOS é in two parts."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path.replace("\\", "/"))))


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(f"{name}/" for name in names))
