"""Data sets on disk, their digest, and the split into training and validation images."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cifarlab.data.dataset import Dataset, stratified_split
from cifarlab.errors import UserError

FILES = [
    "dataset.json",
    "train_images.npy",
    "train_labels.npy",
    "test_images.npy",
    "test_labels.npy",
]


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    images = {
        split: rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        for split, n in (("train", 6), ("test", 4))
    }
    return Dataset(
        images,
        {"train": np.array([0, 1, 2, 0, 1, 2]), "test": np.array([2, 1, 0, 0])},
        ["Katze", "chien", "öl"],
        "pets",
    )


def test_a_loaded_dataset_is_equal_and_its_images_stay_on_disk(tmp_path: Path) -> None:
    data = dataset()
    data.save(tmp_path / "data")
    loaded = Dataset.load(tmp_path / "data")
    for split in ("train", "test"):
        assert isinstance(loaded.images[split], np.memmap)
        assert loaded.images[split].dtype == np.uint8
        assert loaded.labels[split].dtype == np.int64
        np.testing.assert_array_equal(loaded.images[split], data.images[split])
        np.testing.assert_array_equal(loaded.labels[split], data.labels[split])
    assert (loaded.classes, loaded.name, loaded.digest()) == (
        data.classes,
        data.name,
        data.digest(),
    )


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    dataset().save(tmp_path / "one")
    Dataset.load(tmp_path / "one").save(tmp_path / "two")
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("one", "two")
    )
    assert one == two


def rows(data: Dataset) -> list[tuple[str, int, npt.NDArray[np.uint8]]]:
    """Return the images one by one, in another order."""
    images = [
        (split, i, image) for split in data.images for i, image in enumerate(data.images[split])
    ]
    return [images[i] for i in np.random.default_rng(0).permutation(len(images))]


def test_images_written_one_by_one_give_the_files_that_numpy_writes(tmp_path: Path) -> None:
    data = dataset()
    data.save(tmp_path / "whole")
    none = {split: images[:0] for split, images in data.images.items()}
    dataclasses.replace(data, images=none).save(tmp_path / "rows", rows(data))
    for split, images in data.images.items():
        np.save(tmp_path / f"{split}_images.npy", images)
        np.save(tmp_path / f"{split}_labels.npy", data.labels[split])
    for name in FILES:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "rows" / name).read_bytes() == whole
        assert name == "dataset.json" or whole == (tmp_path / name).read_bytes()


def test_images_in_another_memory_order_are_written_in_rows(tmp_path: Path) -> None:
    data = dataset()
    planes = {split: np.asfortranarray(images) for split, images in data.images.items()}
    dataclasses.replace(data, images=planes).save(tmp_path)
    np.testing.assert_array_equal(Dataset.load(tmp_path).images["train"], data.images["train"])
    assert Dataset.load(tmp_path).digest() == data.digest()


@pytest.mark.parametrize("end", ["an error", "a kill"])
def test_failed_save_leaves_the_old_files_whole(tmp_path: Path, end: str) -> None:
    dataset().save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    data = dataclasses.replace(dataset(), classes=["a", "b", "c"])

    def some() -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
        yield from rows(data)[:5]
        if end == "a kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the end")

    if end == "a kill":
        process = multiprocessing.get_context("fork").Process(
            target=data.save, args=(tmp_path, some())
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    else:
        with pytest.raises(ValueError, match="the end"):
            data.save(tmp_path, some())
        assert {*tmp_path.iterdir()} == {*before}
    assert {path: path.read_bytes() for path in before} == before


def _pixel(data: Dataset) -> Dataset:
    data.images["test"][3, 3, 3, 2] ^= 1
    return data


def _label(data: Dataset) -> Dataset:
    data.labels["train"][5] = 1
    return data


def _class_name(data: Dataset) -> Dataset:
    return dataclasses.replace(data, classes=["Katze", "chien", "oel"])


@pytest.mark.parametrize("change", [_pixel, _label, _class_name])
def test_one_change_changes_the_digest(change: Callable[[Dataset], Dataset]) -> None:
    assert change(dataset()).digest() != dataset().digest()


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, None) for name in FILES]  # missing
    + [(name, b"") for name in FILES]
    + [(name, b"garbage\xff" * 20) for name in FILES]
    + [("train_images.npy", 150), ("test_labels.npy", 140)]  # cut short within the data
    + [("dataset.json", b"{}"), ("dataset.json", b"[]")],
)
def test_missing_or_damaged_folder_is_refused(
    tmp_path: Path, name: str, content: bytes | int | None
) -> None:
    dataset().save(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(UserError, match=r"is missing or damaged .* `dvc repro -f download`"):
        Dataset.load(tmp_path)


def labels() -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [200, 50, 10]))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1, [20, 5, 1]), (0.5, [100, 25, 5]), (0.3, [60, 15, 3])]
)
def test_split_takes_the_same_share_of_every_class(share: float, expected: list[int]) -> None:
    kept, held_out = stratified_split(labels(), share)
    assert np.bincount(labels()[held_out]).tolist() == expected
    np.testing.assert_array_equal(
        np.sort(np.concatenate([kept, held_out])), np.arange(260)
    )  # disjoint and complete
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held_out) > 0).all()


def test_split_is_deterministic_and_does_not_take_the_first_of_each_class() -> None:
    one, two = stratified_split(labels(), 0.1), stratified_split(labels(), 0.1)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[1], stratified_split(labels(), 0.1, seed=1)[1])
    first = np.concatenate([np.flatnonzero(labels() == c)[:n] for c, n in enumerate([20, 5, 1])])
    assert not np.array_equal(one[1], np.sort(first))


def test_the_last_image_of_a_class_is_not_held_out() -> None:
    labels = np.repeat([0, 1, 2], [1, 2, 10])
    kept, held_out = stratified_split(labels, 0.99)
    assert np.bincount(labels[kept]).tolist() == [1, 1, 1]
    assert len(held_out) == 10


def test_split_with_share_zero_holds_out_no_image() -> None:
    kept, held_out = stratified_split(labels(), 0)
    np.testing.assert_array_equal(kept, np.arange(260))
    assert held_out.shape == (0,)
    assert labels()[held_out].shape == (0,)  # it can be used as an index
