"""What people have: folders and archives of many layouts, and tables of labels."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarlab.data import layout
from cifarlab.data.dataset import Dataset
from cifarlab.data.images import formats
from cifarlab.data.layout import Problem
from tests.support.archives import tar, zipped
from tests.support.pictures import CATS, picture, pictures, under, write

Read = Callable[..., tuple[Dataset, list[Problem]]]
Get = Callable[..., Dataset]


MORE = {name.replace(".png", "-2.png"): picture(100 + i) for i, name in enumerate(CATS)}
THIRD = {name.replace(".png", "-3.png"): picture(200 + i) for i, name in enumerate(CATS)}


@pytest.mark.parametrize(
    ("files", "train", "test", "validation"),
    [
        pytest.param(under("train", CATS) | under("test", MORE), 20, 20, 0, id="train and test"),
        pytest.param(under("Train", CATS) | under("TEST", MORE), 20, 20, 0, id="capital letters"),
        pytest.param(under("train", CATS) | under("val", MORE), 20, 20, 0, id="train and val"),
        pytest.param(under("train", CATS) | under("valid", MORE), 20, 20, 0, id="train and valid"),
        pytest.param(
            under("training", CATS) | under("Validation", MORE), 20, 20, 0, id="other words"
        ),
        pytest.param(
            under("train", CATS) | under("test", MORE) | under("val", THIRD), 40, 20, 20, id="three"
        ),
        pytest.param(under("train", CATS), 16, 4, 0, id="train only"),
        pytest.param(CATS, 16, 4, 0, id="classes at the top"),
        pytest.param(under("photos", CATS), 16, 4, 0, id="a folder around the classes"),
        pytest.param(under("a/b", CATS), 16, 4, 0, id="two folders around the classes"),
        pytest.param(
            under("a", under("train", CATS) | under("test", MORE)), 20, 20, 0, id="around splits"
        ),
        pytest.param(
            under("a/train", CATS) | under("b/test", MORE), 20, 20, 0, id="splits in two folders"
        ),
        pytest.param(under("train/animals", CATS), 16, 4, 0, id="a folder inside of the split"),
        pytest.param(
            {name.replace("/", "/2024/may/"): data for name, data in CATS.items()},
            *(16, 4, 0),
            id="folders inside of the classes",
        ),
        pytest.param(CATS | pictures(10, "train"), 24, 6, 0, id="a class that is called train"),
        pytest.param(
            under("train", CATS)
            | {name.replace("cat", "Cat"): data for name, data in under("test", MORE).items()},
            *(20, 20, 0),
            id="a class in another case",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip", "backslashes", "tar.gz"])
def test_every_layout_is_read(
    tmp_path: Path,
    get: Get,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    files: dict[str, bytes],
    train: int,
    test: int,
    validation: int,
) -> None:
    if kind == "folder":
        source = write(tmp_path / "mine", files)
    elif kind == "tar.gz":
        source = tar(tmp_path / "mine.tar.gz", files)
    else:
        names = {n.replace("/", "\\") if kind == "backslashes" else n: d for n, d in files.items()}
        source = zipped(tmp_path / "mine.zip", names)
    data = get("folder", source, test=0.2)
    assert data.classes[:2] == ["cat", "dog"]
    assert (len(data.labels["train"]), len(data.labels["test"])) == (train, test)
    assert data.validation == validation
    divided = np.bincount(data.labels["test"])
    assert len({*divided.tolist()}) == 1  # every class has the same number
    output = capsys.readouterr().out
    assert ("data.test = 0.2" in output) == (test in (4, 6))
    if validation:
        kept, held_out = data.split(0.1, 0)
        greens = {tuple(image[0, 0]) for image in data.images["train"][held_out]}
        assert greens == {tuple(colour(200 + i)) for i in range(20)}
        assert len(kept) == 20


def colour(number: int) -> tuple[int, int, int]:
    return number * 37 % 256, number * 11 % 256, number % 256


def test_the_test_images_depend_on_names_and_contents_only(tmp_path: Path, get: Get) -> None:
    folder = write(tmp_path / "mine", CATS)
    data = get("folder", folder)
    backwards = dict(reversed(CATS.items()))
    assert get("folder", tar(tmp_path / "mine.tar", backwards)).digest() == data.digest()
    renamed = {f"{name[:-4]}-new.png": content for name, content in CATS.items()}
    again = get("folder", write(tmp_path / "renamed", renamed))
    for split in ("train", "test"):
        sets = [{image.tobytes() for image in d.images[split]} for d in (data, again)]
        assert sets[0] == sets[1]
    # One image more leaves nearly all of them where they were.
    (folder / "cat/new.png").write_bytes(picture(99))
    more = get("folder", folder)
    before, after = ({image.tobytes() for image in d.images["test"]} for d in (data, more))
    assert len(before & after) >= 3


def test_without_a_share_a_test_part_is_needed(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = write(tmp_path / "mine", CATS)
    assert "data.test = 0 holds out none" in refused("folder", folder, test=0)
    few = write(tmp_path / "few", CATS | pictures(1, "rare"))
    sentence = "holds no images in test/rare/; each class needs images to train on and to test"
    assert sentence in refused("folder", few, test=0.2)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_of_two_images_of_a_class_one_is_for_testing(
    tmp_path: Path, get: Get, share: float
) -> None:
    data = get("folder", write(tmp_path / "mine", CATS | pictures(2, "rare")), test=share)
    for split in ("train", "test"):
        assert np.bincount(data.labels[split])[2] == 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_equal_images_stay_together(tmp_path: Path, read: Read, share: float) -> None:
    copies = {name.replace(".png", "-copy.png"): content for name, content in CATS.items()}
    _, problems = read("folder", write(tmp_path / "mine", CATS | copies), test=share)
    assert problems == []  # otherwise a test image is also a training image


# Formats


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("TIFF", mode) for mode in ("RGB", "CMYK", "LAB", "I;16", "I", "F", "YCbCr")),
        *(("GIF", mode) for mode in ("P", "L")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *((kind, "RGB") for kind in ("WEBP", "BMP", "AVIF", "TGA", "PPM", "JPEG2000", "PCX")),
    ],
)
def test_every_format_and_mode_is_read(tmp_path: Path, get: Get, kind: str, mode: str) -> None:
    grey = Image.new("RGB", (40, 24), (200, 200, 200))
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((24, 40), 200 * 257, np.uint16)).convert(mode)
    elif mode == "F":
        image = Image.fromarray(np.full((24, 40), 200 / 255, np.float32))
    elif mode == "LAB":
        image = Image.new("LAB", (40, 24), (205, 128, 128))  # L* = 80.6, as grey of 200
    else:
        no_dots = {"dither": Image.Dither.NONE, "palette": Image.Palette.ADAPTIVE}
        image = grey.convert(mode, **no_dots)
    file = io.BytesIO()
    image.save(file, kind)
    suffix = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(kind, kind.lower())
    files = under("train", CATS) | under("test", MORE)
    files[f"train/cat/a.{suffix}"] = file.getvalue()
    data = get("folder", write(tmp_path / "mine", files))
    last_cat = data.images["train"][10].reshape(-1, 3).astype(int)
    expected = 255 if mode == "1" else 200
    assert np.abs(last_cat - expected).max() <= 3


def test_of_an_animation_the_first_picture_is_read(tmp_path: Path, get: Get) -> None:
    first, second = (Image.new("RGB", (32, 32), (level,) * 3) for level in (40, 200))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second])
    files = under("train", CATS) | under("test", MORE) | {"train/cat/a.gif": file.getvalue()}
    data = get("folder", write(tmp_path / "mine", files))
    assert any((image == 40).all() for image in data.images["train"])
    assert not any((image == 200).all() for image in data.images["train"])


# What is not read


def test_nothing_is_dropped_in_silence(tmp_path: Path, read: Read) -> None:
    files = under("photos/train", CATS) | under("photos/test", MORE) | {
        "photos/readme.txt": b"",
        "photos/train/cat/notes.TXT": b"",
        "photos/train/cat/LICENSE": b"",
        "photos/train/cat/.DS_Store": b"",
        "__MACOSX/photos/train/cat/._0.png": b"\0\5\26\7",
        "photos/preview.jpg": picture(0, "JPEG"),
        "photos/train/title.png": picture(0),
        "photos/train/cat/broken.png": picture(1)[:-30],
        "photos/train/dog/empty.png": b"",
    }  # fmt: skip
    data, problems = read("folder", zipped(tmp_path / "mine.zip", files))
    assert len(data.labels["train"]) == len(data.images["train"]) == 20
    summary = layout.summary(problems)
    assert summary.startswith("; unused or doubtful: ")
    for part in (
        "2 .txt",
        "1 without a suffix (photos/train/cat/LICENSE)",
        "2 hidden (__MACOSX/photos/train/cat/._0.png, …)",
        "2 outside of test/, train/ (photos/preview.jpg, …)",
        "2 unreadable (photos/train/cat/broken.png: image file is truncated, …)",
    ):
        assert part in summary
    without = {name: content for name, content in files.items() if "broken" not in name}
    del without["photos/train/dog/empty.png"]
    clean, _ = read("folder", zipped(tmp_path / "mine.zip", without))
    assert clean.digest() == data.digest()


def test_more_than_a_tenth_of_damaged_images_is_refused(
    tmp_path: Path, read: Read, refused: Callable[..., str]
) -> None:
    folder = write(tmp_path / "mine", under("train", CATS) | under("test", MORE))
    for i in range(4):
        (folder / f"train/cat/{i}.png").write_bytes(b"")
    _, problems = read("folder", folder)
    why = "it is no image that Pillow can open"
    text = f"; unused or doubtful: 4 unreadable (train/cat/0.png: {why}, …)"
    assert layout.summary(problems) == text
    (folder / "train/cat/4.png").write_bytes(b"")
    sentence = refused("folder", folder)
    assert "5 of 40 images cannot be read; train/cat/0.png is not a readable image" in sentence
    assert sentence.endswith("plots/image_problems.csv names all")


def test_a_class_without_readable_images_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    files = under("train", CATS) | under("test", MORE) | {"test/fish/0.png": b""}
    files["train/fish/0.png"] = picture(1)
    folder = write(tmp_path / "mine", files)
    assert "holds no images in test/fish/" in refused("folder", folder)


def test_splits_without_one_to_train_on_are_refused(
    tmp_path: Path, refused: Callable[..., str], read: Read
) -> None:
    folder = write(tmp_path / "mine", under("val", CATS) | under("test", MORE))
    assert "there are images in test/, val/ but none in train/" in refused("folder", folder)
    folder = write(tmp_path / "kaggle", {f"train/{i}.png": picture(i) for i in range(8)})
    write(folder, {f"test/{i}.png": picture(10 + i) for i in range(8)})
    assert "test/, train/ hold images, but no folders; add one" in refused("folder", folder)
    folder = tmp_path / "mine"
    # A third class makes clear that these are classes.
    write(folder, pictures(10, "other"))
    assert read("folder", folder)[0].classes == ["other", "test", "val"]


@pytest.mark.parametrize("top", ["", "photos"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_classes_beside_a_split_do_not_make_it_a_class(
    tmp_path: Path, refused: Callable[..., str], split: str, top: str
) -> None:
    files = CATS | under(split, MORE)
    folder = write(tmp_path / "mine", under(top, files) if top else files)
    assert f"the class cat is in {split}/ and beside it; move" in refused("folder", folder)


def test_an_image_in_two_splits_is_reported(tmp_path: Path, read: Read) -> None:
    files = under("train", CATS) | under("test", MORE)
    files["test/cat/same.png"] = files["train/cat/3.png"]
    with Image.open(io.BytesIO(files["train/dog/4.png"])) as image:
        file = io.BytesIO()
        image.save(file, "BMP")  # the same pixels in other bytes
    files["test/dog/same.bmp"] = file.getvalue()
    data, problems = read("folder", write(tmp_path / "mine", files))
    assert len(data.labels["test"]) == 22
    assert problems == [
        Problem("test/cat/same.png", layout.TWICE, "train/cat/3.png"),
        Problem("test/dog/same.bmp", layout.TWICE, "train/dog/4.png"),
    ]
    assert layout.summary(problems) == (
        "; unused or doubtful: 2 also in another split (test/cat/same.png: train/cat/3.png, …)"
    )


def test_an_image_for_validation_that_is_in_another_split_is_reported(
    tmp_path: Path, read: Read
) -> None:
    files = under("train", CATS) | under("test", MORE) | under("val", THIRD)
    files["val/cat/same.png"] = files["train/cat/3.png"]
    files["test/dog/same.png"] = files["val/dog/1-3.png"]
    _, problems = read("folder", write(tmp_path / "mine", files))
    assert problems == [
        Problem("val/cat/same.png", layout.TWICE, "train/cat/3.png"),
        Problem("test/dog/same.png", layout.TWICE, "val/dog/1-3.png"),
    ]


# Tables of labels

FLAT = {f"img/{name.replace('/', '-')}": content for name, content in CATS.items()}
ROWS = [(name, name.split("/")[1][:3]) for name in FLAT]


def table(rows: list[tuple[str, ...]], separator: str = ",", head: str = "file,label") -> bytes:
    lines = [head.replace(",", separator), *(separator.join(row) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        pytest.param(table(ROWS), "labels.csv", id="csv"),
        pytest.param(table(ROWS, "\t"), "labels.tsv", id="tsv"),
        pytest.param(table(ROWS, ";"), "labels.csv", id="semicolons"),
        pytest.param(b"\xef\xbb\xbf" + table(ROWS), "labels.csv", id="byte order mark"),
        pytest.param(table(ROWS, head="Filename,Class"), "labels.csv", id="other heads"),
        pytest.param(table([(n[4:], c) for n, c in ROWS]), "labels.csv", id="names from inside"),
        pytest.param(table([(n[4:-4], c) for n, c in ROWS]), "labels.csv", id="without suffix"),
        pytest.param(
            table([(n.replace("/", "\\"), c) for n, c in ROWS]), "labels.csv", id="backslashes"
        ),
    ],
)
@pytest.mark.parametrize("place", ["in the folder", "beside the folder", "in a zip", "beside it"])
def test_a_table_says_the_labels(
    tmp_path: Path, read: Read, content: bytes, name: str, place: str
) -> None:
    files = FLAT | ({name: content} if place.startswith("in ") else {})
    beside = tmp_path / name
    if not place.startswith("in "):
        beside.write_bytes(content)
    if "folder" in place:
        source = write(tmp_path / "mine", files)
    else:
        source = zipped(tmp_path / "mine.zip", files)
    data, problems = read("folder", source, labels=name)
    assert data.classes == ["cat", "dog"]
    assert (len(data.labels["train"]), len(data.labels["test"])) == (16, 4)
    assert problems == []


def test_a_table_may_write_accents_otherwise_than_the_folder(tmp_path: Path, read: Read) -> None:
    files = {f"e\u0301{i}.png": picture(i) for i in range(20)}  # as macOS does
    rows = [(f"\u00e9{i}.png", "cat" if i % 2 else "dog") for i in range(20)]
    folder = write(tmp_path / "mine", files | {"t.csv": table(rows)})
    data, problems = read("folder", folder, labels="t.csv")
    assert (len(data.labels["train"]), len(data.labels["test"]), problems) == (16, 4, [])


def test_a_table_beside_the_images_may_name_files_from_there(tmp_path: Path, read: Read) -> None:
    rows = [(f"mine/{name}", label) for name, label in ROWS]
    rows.append(("mine/img/nowhere.png", "cat"))
    write(tmp_path, {"t.csv": table(rows)})
    _, problems = read("folder", write(tmp_path / "mine", FLAT), labels="t.csv")
    assert [problem.kind for problem in problems] == ["not among the images"]


def test_a_table_may_name_the_splits(tmp_path: Path, read: Read) -> None:
    rows = [(name, label, "Test" if "9" in name else "train") for name, label in ROWS[1:]]
    rows.append(("img/nowhere.png", "cat", "train"))
    folder = write(tmp_path / "mine", FLAT | {"t.csv": table(rows, head="file,label,split")})
    data, problems = read("folder", folder, labels="t.csv")
    assert (len(data.labels["train"]), len(data.labels["test"])) == (17, 2)
    assert [problem.kind for problem in problems] == ["not in t.csv", "not among the images"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (table(ROWS, head="a,b"), "t.csv needs the columns file and label, and may have split"),
        (table([(n, "x", "holdout") for n, _ in ROWS], head="file,label,split"), "'holdout'"),
        (
            table([(f"x{n}", c) for n, c in ROWS]),
            "20 of 20 rows of t.csv cannot be used; "
            "t.csv, line 2: ximg/cat-0.png is not among the images",
        ),
        (
            table([*ROWS[:16], *((n, "") for n, _ in ROWS[16:])]),
            "line 18: img/dog-6.png is without a label",
        ),
        (table([*ROWS, (ROWS[0][0], "dog")]), "line 22: img/cat-0.png has another label above"),
        (b"\xff\xfe", "t.csv cannot be read: 'utf-8' codec"),
        (b"", "t.csv needs the columns"),
        (b'file,label\n"' + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_a_wrong_table_is_refused(
    tmp_path: Path, refused: Callable[..., str], content: bytes, sentence: str
) -> None:
    folder = write(tmp_path / "mine", FLAT | {"t.csv": content})
    assert sentence in refused("folder", folder, labels="t.csv")
    assert "there is no data.labels = u.csv" in refused("folder", folder, labels="u.csv")


def test_a_table_may_name_an_image_again(tmp_path: Path, read: Read) -> None:
    folder = write(tmp_path / "mine", FLAT | {"t.csv": table([*ROWS, *ROWS])})
    data, problems = read("folder", folder, labels="t.csv")
    assert len(data.labels["train"]) + len(data.labels["test"]) == len(ROWS)
    assert problems == []


def test_a_table_that_cannot_be_read_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    content = table(ROWS)
    archive = zipped(tmp_path / "mine.zip", FLAT | {"t.csv": content})
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:  # the checksum no longer fits
        packed = opened.getinfo("t.csv")
        start = packed.header_offset + 30 + len("t.csv")
    archive.write_bytes(data[: start + 9] + bytes([data[start + 9] ^ 1]) + data[start + 10 :])
    assert "t.csv cannot be read: " in refused("folder", archive, labels="t.csv")


@pytest.mark.parametrize("label", ["NA", "null", "nan", "7", "C+", "C#"])
def test_names_of_classes_stay_as_they_are(tmp_path: Path, get: Get, label: str) -> None:
    files = {name.replace("dog", label): content for name, content in CATS.items()}
    assert get("folder", write(tmp_path / "mine", files)).classes == sorted(["cat", label])


@pytest.mark.parametrize("what", ["zip", "link", "raw"])
def test_a_folder_of_the_project_without_images_is_not_ignored(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", {"README.md": b"", ".DS_Store": b"", "desktop.ini": b""})
    if what == "zip":
        zipped(tmp_path / "images/mine.zip", CATS)
    elif what == "link":
        (tmp_path / "images/cat").symlink_to(write(tmp_path / "photos", CATS) / "cat")
    else:
        write(tmp_path / "images", {"cat/1.cr2": b"raw"})
    kind = {
        "zip": "1 .zip",
        "link": "1 link that leads out of the folder (cat)",
        "raw": "1 .cr2",
    }[what]
    sentence = refused("folder", zipped(tmp_path / "other.zip", CATS))
    assert sentence.startswith("images holds no images in train/<class>/")
    assert kind in sentence


def test_the_folder_of_the_project_is_read_if_it_holds_images(
    tmp_path: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = zipped(tmp_path / "mine.zip", CATS)
    write(tmp_path / "images", {"README.md": b""})
    assert get("folder", archive).name == "mine"
    write(tmp_path / "images", CATS)
    assert get("folder", archive).name == "images"
    shutil.move(tmp_path / "images", tmp_path / "photos")
    assert get("folder", archive, folder=str(tmp_path / "photos")).name == "photos"


def test_a_format_that_pillow_cannot_open_is_named_with_what_opens_it(
    tmp_path: Path, read: Read
) -> None:
    files = under("train", CATS) | under("test", MORE) | {"train/cat/phone.heic": b"\0" * 40}
    _, [problem] = read("folder", write(tmp_path / "mine", files))
    assert problem[:2] == ("train/cat/phone.heic", "unreadable")
    if ".heic" not in formats():
        assert problem.detail.endswith("; pillow-heif opens .heic")
