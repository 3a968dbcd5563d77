"""Read images: CIFAR-10's archive, a folder or archive of images, scikit-learn's digits."""

import hashlib
import io
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cifarlab.data import archives, layout
from cifarlab.data.archives import Member, members, readable, reason
from cifarlab.data.dataset import SPLITS, Dataset, Labels, Pixels, stratified_split
from cifarlab.data.fetch import fetch, find_images
from cifarlab.data.images import EXTRA, MAX_IMAGE, count_pixels, decode, formats, is_image
from cifarlab.data.layout import UNREADABLE, Places, Problem
from cifarlab.errors import UserError, in_a_sentence
from cifarlab.files import PROBLEMS
from cifarlab.params.sections import DataParams

BATCH = 128
"""Images that are decoded at the same time."""
MAX_NAMES = 2**29
"""Bytes of memory for the names of all files."""
REFUSE_ABOVE = 0.1
"""Share of the images that cannot be read above which something else must be wrong."""
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def prepare(
    params: DataParams, root: Path, cache: Path, folder: Path, problems: list[Problem]
) -> Dataset:
    """Write the images that `params` describes into a folder.

    Parameters
    ----------
    root : where relative paths in `data.sources` start
    cache : folder that keeps verified downloads
    folder : for the files of the dataset
    problems : gets the files of a folder or archive that are not used or deserve a look, also if
        the source is refused

    Raises
    ------
    UserError
        No source could be used, a checksum differs, or the content is not what is expected.
    """
    if params.name == "digits":
        digits().save(folder)
    elif params.name == "cifar10":
        read_cifar10(fetch(params, root, cache)).save(folder)
    else:
        write_folder(find_images(params, root, cache), params, folder, problems)
    return Dataset.load(folder)


def read_cifar10(archive: Path) -> Dataset:
    """Read the official `cifar-10-python.tar.gz` (Krizhevsky 2009).

    It holds 50,000 training and 10,000 test images of 32×32 pixels. UserError: it is damaged, or
    another archive.
    """
    batches: dict[str, tuple[Pixels, Labels]] = {}
    classes: list[str] = []
    wrong = f"{archive} is not the archive of CIFAR-10 for Python: %s"
    # Damaged bytes can raise any exception, also MemoryError and SystemError.
    with in_a_sentence(f"{wrong}; set data.name: folder for folders of images", words=reason):
        for member in archives.files_in_tar(archive):
            folder, _, name = member.name.partition("/")
            if folder == "cifar-10-batches-py" and name == "batches.meta":
                names = archives.unpickle(member.read())[b"label_names"]
                classes = [readable(label.decode()) for label in names]
            elif folder == "cifar-10-batches-py" and name in chain(*CIFAR10_FILES.values()):
                content = archives.unpickle(member.read())
                pixels, numbers = content[b"data"].array, content[b"labels"]
                if pixels.shape != (len(numbers), 3072):
                    raise ValueError(f"{name} needs one label for each image of 3×32×32 bytes")
                images_of = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                batches[name] = images_of, np.fromiter(numbers, np.int64)
        images, labels = {}, {}
        for split, files in CIFAR10_FILES.items():
            parts = zip(*(batches[name] for name in files), strict=True)
            images[split], labels[split] = map(np.concatenate, parts)
        if {*labels["train"], *labels["test"]} - {*range(len(classes))}:
            raise ValueError("a label has no class")
    return Dataset(images, labels, classes, "cifar10")


def write_folder(source: Path, params: DataParams, folder: Path, problems: list[Problem]) -> None:
    """Write the images of a directory, tar or zip archive, whatever its layout is.

    The source is read several times: first the names, so that the order of the files makes no
    difference, at the end the images, of which only some are in memory. `problems` gets files that
    are not used, and images that are in two splits.

    Raises
    ------
    UserError
        The archive is damaged, too many images are, the splits have different classes, or there
        are too many images.
    """
    from tqdm import tqdm

    names = _list(source, problems)
    if params.labels:
        text, table = _table(source, params.labels)
        places = layout.by_table(names, text, table, source.name, problems)
    else:
        places = layout.by_folders(names, problems)
    places = layout.checked_classes(places, source)
    if not places:
        layouts = "train/<class>/ and test/<class>/, or in <class>/"
        found = layout.summary(problems)
        raise UserError(f"{source} holds no images in {layouts}{found}; see docs/data.md")
    places = _with_test(source, names, places, params.test)
    _check_classes(source, places, problems)
    data, rows = _arranged(places, source.resolve().name.split(".")[0], params.image_size)
    images, what = _again(source, names, places), f"reading {source.name}"
    bar = tqdm(images, what, len(places), unit=" images", disable=None)
    judged = _judged(source, places, problems, decoded(bar, params.image_size))
    data.save(folder, ((*rows[name], pixels) for name, pixels in judged))


def _list(source: Path, problems: list[Problem]) -> Collection[str]:
    """Return the names of all files; `problems` gets those that cannot be read.

    UserError: there are too many, or two images have the same name.
    """
    names: dict[str, None] = {}
    size = 0
    for member in members(source):
        name = member.name
        size += sys.getsizeof(name) + 600  # the tables made of it need more
        if size > MAX_NAMES:
            raise UserError(f"{source} holds over {MAX_NAMES >> 20} MiB of names; use fewer images")
        if not member.problem:
            if name in names and is_image(name):
                raise UserError(f"{source} holds two files called {readable(name)}; remove one")
            names[name] = None
        elif is_image(name):
            problems.append(Problem(name, UNREADABLE, member.problem))
        else:
            problems.append(Problem(name, member.problem))
    return names


def _table(source: Path, name: str) -> tuple[str, str]:
    """Return the text of the table of labels inside or beside the source, and its file name."""
    beside = [path / name for path in (source, source.parent) if (path / name).is_file()]
    inside = (member.read for member in members(source) if f"/{member.name}".endswith(f"/{name}"))
    read = partial(archives.read_file, beside[0]) if beside else next(inside, None)
    if not read:
        raise UserError(f"there is no data.labels = {name} in {source} or beside it")
    # Damaged bytes can raise any exception.
    with in_a_sentence(f"{name} cannot be read: %s; save it as CSV in UTF-8", words=reason):
        return read().getvalue().decode("utf-8-sig"), PurePosixPath(name).name


def _with_test(source: Path, names: Collection[str], places: Places, share: float) -> Places:
    """Return the places with a part for testing, and print where it comes from."""
    splits = {place.split for place in places.values()}
    if "test" in splits:
        return {n: p if p.split else p._replace(split="train") for n, p in places.items()}
    if "validation" in splits:
        print("there is no test/: its validation images are the test images")
        return {n: p._replace(split=SPLITS[p.split == "validation"]) for n, p in places.items()}
    if not share:
        raise UserError(f"{source} has no test images, and data.test = 0 holds out none; raise it")
    print(f"there is no test/: of each class, the share data.test = {share:g} is for testing")
    # By content, so that neither order nor names matter, and equal images stay together.
    digests = {member.name: _sha256(member) for member in _again(source, names, places)}
    classes: dict[str, list[str]] = {}
    for name in sorted(places, key=digests.__getitem__):
        classes.setdefault(places[name].label, []).append(name)
    test = set[str]()
    for of_class in classes.values():
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        last = digests[of_class[count - 1]]
        test.update(name for name in of_class if count and digests[name] <= last)
    return {n: p._replace(split="test" if n in test else "train") for n, p in places.items()}


def _check_classes(source: Path, places: Places, problems: list[Problem]) -> None:
    """Refuse fewer than two classes, and one without images in a split."""
    found = {(place.split, place.label) for place in places.values()}
    labels = sorted({label for _, label in found})
    unused = layout.summary(problems)
    if len(labels) < 2:
        only = f"one class only, {labels[0]}"
        raise UserError(f"{source} holds {only}; at least two are needed{unused}")
    for split, label in product(SPLITS, labels):
        if (split, label) not in found:
            needed = "each class needs images to train on and to test, so at least two"
            raise UserError(f"{source} holds no images in {split}/{label}/; {needed}{unused}")


def _arranged(places: Places, name: str, size: int) -> tuple[Dataset, dict[str, tuple[str, int]]]:
    """Return a dataset without pixels, and of each image, by its name, split and number there.

    Validation images are the last ones of the training images.
    """
    classes = sorted({place.label for place in places.values()})
    number = {label: i for i, label in enumerate(classes)}
    rows: dict[str, tuple[str, int]] = {}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    # A place sorts as split, label and file, so validation comes behind train.
    for image, place in sorted(places.items(), key=lambda item: (item[1], item[0])):
        split = "test" if place.split == "test" else "train"
        rows[image] = split, len(labels[split])
        labels[split].append(number[place.label])
    validation = sum(place.split == "validation" for place in places.values())
    pixels = dict.fromkeys(SPLITS, np.empty((0, size, size, 3), np.uint8))
    arrays = {split: np.array(numbers, np.int64) for split, numbers in labels.items()}
    return Dataset(pixels, arrays, classes, name, validation), rows


def _judged(
    source: Path, places: Places, problems: list[Problem], images: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Pixels]]:
    """Yield the images that can be read; `problems` gets those that cannot or are in two splits.

    UserError: too many cannot be read.
    """
    # The digests of the pixels of each split, and the name of an image that has them.
    digests: dict[str, dict[bytes, str]] = {"train": {}, "validation": {}, "test": {}}
    for name, pixels in images:
        if isinstance(pixels, str):
            problems.append(Problem(name, UNREADABLE, pixels))
            continue
        digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
        known = digests[places[name].split]
        known[digest] = min(name, known.get(digest, name))
        yield name, pixels
    problems.sort()
    unreadable = [problem for problem in problems if problem.kind == UNREADABLE]
    bad = {problem.file for problem in unreadable}
    every = len(bad | places.keys())
    if len(bad) > REFUSE_ABOVE * every:
        first = unreadable[0]
        example = f"{readable(first.file)} is not a readable image ({first.detail})"
        count = f"{len(bad):,} of {every:,} images cannot be read"
        way_out = f"repair, shrink or remove them; {PROBLEMS} names all"
        raise UserError(f"{source}: {count}; {example}; {way_out}")
    left = {name: place for name, place in places.items() if name not in bad}
    _check_classes(source, left, problems)
    seen: dict[bytes, str] = {}
    for found in digests.values():
        twice = sorted(seen.keys() & found.keys(), key=found.__getitem__)
        problems += [Problem(found[d], layout.TWICE, seen[d]) for d in twice]
        seen = found | seen


def decoded(images: Iterable[Member], size: int) -> Iterator[tuple[str, Pixels | str]]:
    """Yield names of images, each with its pixels (size, size, 3) or why it cannot be read.

    Threads decode a group of images at a time, which takes little memory.
    """
    group: list[tuple[str, io.BytesIO]] = []
    used = 0.0  # of the memory and threads that a group may take
    # Pillow warns of metadata and large images, in whichever thread.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for image in images:
            try:
                file = image.read()
                pixels, length = count_pixels(file), file.getbuffer().nbytes
            except Exception as error:  # damaged bytes can raise any exception
                yield image.name, _why(image.name, error)
                continue
            share = pixels / MAX_IMAGE + length / archives.MAX_MEMBER + 1 / BATCH
            if used + share > 1:
                yield from pool.map(_decode, group, repeat(size))
                group, used = [], 0
            used += share
            group.append((image.name, file))
        yield from pool.map(_decode, group, repeat(size))


def _decode(image: tuple[str, io.BytesIO], size: int) -> tuple[str, Pixels | str]:
    name, file = image
    try:
        return name, decode(file, size)
    except Exception as error:  # damaged bytes can raise any exception
        return name, _why(name, error)


def _why(name: str, error: Exception) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    opener = EXTRA.get(suffix) if suffix not in formats() else None
    return reason(error) + (f"; {opener} opens {suffix}" if opener else "")


def _sha256(member: Member) -> bytes:
    try:
        return hashlib.sha256(member.read().getbuffer()).digest()
    except Exception:  # it cannot be read, which is noticed later
        return b""


def _again(source: Path, names: Collection[str], images: Collection[str]) -> Iterator[Member]:
    """Yield the images of a source that was read before. `names` are those of all its files.

    UserError: other files are there now.
    """
    found = set[str]()
    for member in members(source):
        if member.problem:
            continue
        found.add(member.name)
        if member.name in images:
            yield member
    if found != {*names}:
        raise UserError(f"{source} has changed while it was read; type the same command again")


def digits() -> Dataset:
    """Return scikit-learn's handwritten digits (UCI), a fifth of them for testing.

    The 1,797 images of 8×8 grey pixels become RGB images of 32×32.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = (bundle.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    parts = dict(zip(SPLITS, stratified_split(bundle.target, 0.2), strict=True))
    split_images = {split: images[rows] for split, rows in parts.items()}
    labels = {split: bundle.target[rows].astype(np.int64) for split, rows in parts.items()}
    return Dataset(split_images, labels, list("0123456789"), "digits")
