"""Read images: CIFAR-10's archive, a folder or archive of images, scikit-learn's digits."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cifarlab.data.archives import ArrayUnpickler, image_files, open_tar, read_bounded
from cifarlab.data.dataset import SPLITS, Dataset, stratified_split
from cifarlab.data.fetch import fetch
from cifarlab.errors import UserError, first_line
from cifarlab.params.sections import DataParams

MAX_PIXELS = 2**32
"""Bytes of the pixels of all images together."""
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def prepare(params: DataParams, root: Path, cache: Path) -> Dataset:
    """Return the images that `params` describes.

    Parameters
    ----------
    root : where relative paths in `data.sources` start
    cache : folder that keeps verified downloads

    Raises
    ------
    UserError
        No source could be used, a checksum differs, or the content is not what is expected.
    """
    if params.name == "digits":
        return digits()
    source = fetch(params, root, cache)
    folder = params.name == "folder"
    return read_folder(source, params.image_size) if folder else read_cifar10(source)


def read_cifar10(archive: Path) -> Dataset:
    """Read the official `cifar-10-python.tar.gz` (Krizhevsky 2009).

    It holds 50,000 training and 10,000 test images of 32×32 pixels. UserError: it is damaged, or
    another archive.
    """
    images, labels = {}, {}
    try:
        with open_tar(archive) as tar:
            for split, files in CIFAR10_FILES.items():
                pixels, numbers = zip(*(_cifar10_batch(tar, name) for name in files), strict=True)
                images[split], labels[split] = np.concatenate(pixels), np.concatenate(numbers)
            classes = [name.decode() for name in _unpickle(tar, "batches.meta")[b"label_names"]]
        if {*labels["train"], *labels["test"]} - {*range(len(classes))}:
            raise ValueError("a label has no class")
    # Damaged bytes can raise any exception, also MemoryError and SystemError.
    except Exception as error:
        wrong = f"{archive} is not the archive of CIFAR-10 for Python: {first_line(error)}"
        raise UserError(f"{wrong}; set data.name: folder for folders of images") from error
    return Dataset(images, labels, classes, "cifar10")


def _cifar10_batch(tar: tarfile.TarFile, name: str) -> tuple[Pixels, Labels]:
    """Return images (N, 32, 32, 3) and labels (N,) of one file of the archive."""
    content = _unpickle(tar, name)
    pixels, labels = content[b"data"].array, content[b"labels"]
    if pixels.shape != (len(labels), 3072):
        raise ValueError(f"{name} must have one label for each image of 3×32×32 bytes")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.fromiter(labels, np.int64)


def _unpickle(tar: tarfile.TarFile, name: str) -> dict[bytes, Any]:
    try:
        entry = tar.getmember(f"cifar-10-batches-py/{name}")
        file = read_bounded(tar.extractfile(entry), entry.size)
        return ArrayUnpickler(file, encoding="bytes").load()  # type: ignore[no-any-return]
    except Exception as error:  # damaged bytes can raise any exception
        raise ValueError(f"{name}: {first_line(error)}") from error


def read_folder(source: Path, image_size: int) -> Dataset:
    """Read `train/<class>/*` and `test/<class>/*` from a directory, a tar or a zip archive.

    The images are PNG or JPEG of any size. UserError: an image or the archive is damaged, the
    splits have different classes, or there are too many images.
    """
    try:
        found = _read_images(source, image_size)
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise any exception
        raise UserError(f"{source} cannot be read as an archive: {first_line(error)}") from error
    classes, other = (sorted({name for s, name, _ in found if s == split}) for split in SPLITS)
    if not classes or classes != other:
        wanted = "PNG or JPEG images of the same classes in train/<class>/ and test/<class>/"
        raise UserError(f"{source} must hold {wanted}, not {classes} and {other}")
    if len(classes) < 2:
        raise UserError(f"{source} holds one class only, {classes[0]}; at least two are needed")
    # Sorted, so that the order of the files in the archive makes no difference.
    keys = {split: sorted(key for key in found if key[0] == split) for split in SPLITS}
    images = {split: np.stack([found[key] for key in keys[split]]) for split in SPLITS}
    numbers = {split: [classes.index(name) for _, name, _ in keys[split]] for split in SPLITS}
    labels = {split: np.asarray(numbers[split], np.int64) for split in SPLITS}
    return Dataset(images, labels, classes, source.name.split(".")[0])


def _read_images(source: Path, image_size: int) -> dict[tuple[str, str, str], Pixels]:
    """Return the images by split, class and file name."""
    from tqdm import tqdm

    found: dict[tuple[str, str, str], Pixels] = {}
    bar = tqdm(image_files(source), f"reading {source.name}", unit=" images", disable=None)
    for name, open_file in bar:
        split, label, file = key = PurePosixPath(name).parts[-3:]
        if key in found:
            raise UserError(f"{source} holds two images called {'/'.join(key)}; remove one")
        if (len(found) + 1) * 3 * image_size**2 > MAX_PIXELS:
            raise UserError(f"{source} holds over {MAX_PIXELS >> 30} GiB; lower data.image_size")
        try:
            with open_file() as stream:
                found[split, label, file] = _read_image(stream, image_size)
        except Exception as error:
            reason = f"is not a readable image ({first_line(error)})"
            raise UserError(f"{source}: {name} {reason}; repair or remove it") from error
    return found


def _read_image(stream: IO[bytes], size: int) -> Pixels:
    """Return a PNG or JPEG image as RGB, its middle square resized to (size, size, 3)."""
    from PIL import Image, ImageOps

    with Image.open(stream, formats=("PNG", "JPEG")) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # For 16 bits, convert() would turn everything but the darkest grey into white.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(ImageOps.fit(upright.convert("RGB"), (size, size)))


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
