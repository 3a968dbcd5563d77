"""Read images: CIFAR-10's archive, a folder or archive of images, scikit-learn's digits."""

import io
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from cifarlab.data import archives
from cifarlab.data.archives import image_files, readable, reason
from cifarlab.data.dataset import SPLITS, Dataset, Labels, Pixels, stratified_split
from cifarlab.data.fetch import fetch
from cifarlab.errors import UserError
from cifarlab.params.sections import DataParams

MAX_PIXELS = 2**32
"""Bytes of the pixels of all images together."""
MAX_IMAGE = 50_000_000
"""Pixels of one image, and of the images that are decoded at the same time."""
LARGE_JPEG = 16_000_000
"""Pixels of a JPEG image that is decoded at a smaller size."""
BATCH = 128
"""Images that are decoded at the same time."""
MAX_TEXT = 2**22
"""Characters of the texts in one PNG image, unpacked."""
MAX_NAMES = 2**29
"""Bytes of memory for the names of all images."""
FORMATS = ("PNG", "JPEG")
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def prepare(params: DataParams, root: Path, cache: Path, folder: Path) -> Dataset:
    """Write the images that `params` describes into a folder, and return them.

    Parameters
    ----------
    root : where relative paths in `data.sources` start
    cache : folder that keeps verified downloads
    folder : for the files of the dataset

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
        write_folder(fetch(params, root, cache), params.image_size, folder)
    return Dataset.load(folder)


def read_cifar10(archive: Path) -> Dataset:
    """Read the official `cifar-10-python.tar.gz` (Krizhevsky 2009).

    It holds 50,000 training and 10,000 test images of 32×32 pixels. UserError: it is damaged, or
    another archive.
    """
    batches: dict[str, tuple[Pixels, Labels]] = {}
    classes: list[str] = []
    try:
        for entry, read in archives.tar_members(archive):
            folder, _, name = entry.name.partition("/")
            if folder == "cifar-10-batches-py" and name == "batches.meta":
                names = archives.unpickle(read())[b"label_names"]
                classes = [readable(label.decode()) for label in names]
            elif folder == "cifar-10-batches-py" and name in chain(*CIFAR10_FILES.values()):
                batches[name] = _cifar10_batch(name, read)
        images, labels = {}, {}
        for split, files in CIFAR10_FILES.items():
            pixels, numbers = zip(*(batches[name] for name in files), strict=True)
            images[split], labels[split] = np.concatenate(pixels), np.concatenate(numbers)
        if {*labels["train"], *labels["test"]} - {*range(len(classes))}:
            raise ValueError("a label has no class")
    # Damaged bytes can raise any exception, also MemoryError and SystemError.
    except Exception as error:
        wrong = f"{archive} is not the archive of CIFAR-10 for Python: {reason(error)}"
        raise UserError(f"{wrong}; set data.name: folder for folders of images") from error
    return Dataset(images, labels, classes, "cifar10")


def _cifar10_batch(name: str, read: Callable[[], io.BytesIO]) -> tuple[Pixels, Labels]:
    """Return images (N, 32, 32, 3) and labels (N,) of one file of the archive."""
    try:
        content = archives.unpickle(read())
        pixels, labels = content[b"data"].array, content[b"labels"]
    except Exception as error:  # damaged bytes can raise any exception
        raise ValueError(f"{name}: {reason(error)}") from error
    if pixels.shape != (len(labels), 3072):
        raise ValueError(f"{name} must have one label for each image of 3×32×32 bytes")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.fromiter(labels, np.int64)


def write_folder(source: Path, image_size: int, folder: Path) -> None:
    """Write the images in train/<class>/ and test/<class>/ of a directory, tar or zip archive.

    The images are PNG or JPEG of any size. The source is read twice: first the names, so that the
    order of the files makes no difference, then the images, of which only some are in memory.

    Raises
    ------
    UserError
        An image or the archive is damaged, the splits have different classes, or there are too
        many images.
    """
    keys = _list(source, image_size)
    found = {split: [key for key in keys if key[0] == split] for split in SPLITS}
    names = {split: {label: None for _, label, *_ in found[split]} for split in SPLITS}
    if not keys:
        raise UserError(f"{source} holds no PNG or JPEG images in train/<class>/ and test/<class>/")
    for label in sorted(names["train"].keys() ^ names["test"].keys()):
        split = SPLITS[label in names["train"]]
        needed = "train/<class>/ and test/<class>/ need the same classes"
        raise UserError(f"{source} holds no PNG or JPEG images in {split}/{label}/; {needed}")
    if len(classes := list(names["train"])) < 2:
        raise UserError(f"{source} holds one class only, {classes[0]}; at least two are needed")
    number = {label: i for i, label in enumerate(classes)}
    labels = {
        split: np.array([number[key[1]] for key in found[split]], np.int64) for split in SPLITS
    }
    rows = {key[3]: (split, row) for split in SPLITS for row, key in enumerate(found[split])}
    images = dict.fromkeys(SPLITS, np.empty((0, image_size, image_size, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata and large images
        blocks = _decode_all(source, image_size, rows)
        Dataset(images, labels, classes, source.name.split(".")[0]).save(folder, blocks)


def _list(source: Path, image_size: int) -> list[tuple[str, str, str, str]]:
    """Return split, class, file name and whole name of all images, sorted.

    UserError: two of them cannot be told apart, or there are too many.
    """
    keys: list[tuple[str, str, str, str]] = []
    classes: dict[str, str] = {}
    size = 0
    for name, _ in image_files(source):
        split, label, file = PurePosixPath(name).parts[-3:]
        shown = readable(label)
        twin = classes.setdefault(unicodedata.normalize("NFC", shown), label)
        if twin != label:
            raise UserError(f"{source}: the classes {twin!a} and {label!a} look equal; rename one")
        keys.append((split, shown, file, name))
        size += sys.getsizeof(name) + 300  # the tables made of it need more
        if size > MAX_NAMES or len(keys) * 3 * image_size**2 > MAX_PIXELS:
            most = f"{MAX_PIXELS >> 30} GiB or {MAX_NAMES >> 20} MiB of names"
            raise UserError(f"{source} holds over {most}; lower data.image_size or use fewer")
    keys.sort()
    for one, other in pairwise(keys):
        if one[:3] == other[:3]:
            twice = readable("/".join(one[:3]))
            raise UserError(f"{source} holds two images called {twice}; remove one")
    return keys


def _decode_all(
    source: Path, size: int, rows: dict[str, tuple[str, int]]
) -> Iterator[tuple[str, int, Pixels]]:
    """Yield split, number and pixels (size, size, 3) of all images, in the order of the source.

    `rows` has split and number for the name of each image. UserError: an image cannot be read, or
    there are others than in `rows`.
    """
    from tqdm import tqdm

    changed = f"{source} has changed while it was read; type the same command again"
    bar = tqdm(None, f"reading {source.name}", len(rows), unit=" images", disable=None)
    with ThreadPoolExecutor() as pool, bar:
        for batch in _batches(source):
            pixels = pool.map(partial(_decode, source, size), batch)
            for (name, _), decoded in zip(batch, pixels, strict=True):
                if name not in rows:
                    raise UserError(changed)
                yield *rows.pop(name), decoded
                bar.update()
    if rows:
        raise UserError(changed)


def _batches(source: Path) -> Iterator[list[tuple[str, io.BytesIO]]]:
    """Yield names and files of images, grouped so that decoding a group takes little memory.

    UserError: the header of an image is damaged, or it is too large.
    """
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT  # by default 64 MiB
    batch: list[tuple[str, io.BytesIO]] = []
    pixels = size = 0
    for name, read in image_files(source):
        with _named(source, name), Image.open(file := read(), formats=FORMATS) as image:
            if (more := image.width * image.height) > MAX_IMAGE:
                limit = f"more than {MAX_IMAGE // 10**6} million pixels"
                raise ValueError(f"{image.width:,}×{image.height:,} are {limit}")
        pixels, size = pixels + more, size + file.getbuffer().nbytes
        if len(batch) == BATCH or pixels > MAX_IMAGE or size > archives.MAX_MEMBER:
            yield batch
            batch, pixels, size = [], more, file.getbuffer().nbytes
        batch.append((name, file))
    yield batch


@contextmanager
def _named(source: Path, name: str) -> Iterator[None]:
    """Turn the exceptions of a damaged image, which can be any, into one sentence."""
    try:
        yield
    except Exception as error:
        why = f"is not a readable image ({reason(error)})"
        raise UserError(f"{source}: {readable(name)} {why}; repair, shrink or remove it") from error


def _decode(source: Path, size: int, item: tuple[str, io.BytesIO]) -> Pixels:
    """Return an image as RGB, its middle square resized to (size, size, 3)."""
    from PIL import Image, ImageOps

    name, file = item
    # It is opened again, because unpacked texts and profiles in its header can take much memory.
    with _named(source, name), Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > LARGE_JPEG:
            # JPEG can be decoded at a half, a quarter or an eighth of its size. The pixels then
            # differ a little, so smaller images are decoded in full.
            image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        rgb: Image.Image = image
        if image.mode.startswith("I;16"):
            # For 16 bits, convert() would turn everything but the darkest grey into white.
            rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
        square = ImageOps.fit(rgb, (size, size))
    return np.asarray(square)


def digits() -> Dataset:
    """Return scikit-learn's handwritten digits (UCI), a fifth of them for testing.

    The 1,797 images of 8×8 grey pixels become RGB images of 32×32.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = (bundle.images * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(pixels.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    train, test = stratified_split(bundle.target, 0.2)
    labels, classes = bundle.target.astype(np.int64), list("0123456789")
    split_images = {"train": images[train], "test": images[test]}
    split_labels = {"train": labels[train], "test": labels[test]}
    return Dataset(split_images, split_labels, classes, "digits")
