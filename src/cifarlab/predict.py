"""Use a trained network: the classes of new images, and files for other programs."""

import csv
import glob
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cifarlab import files, pipeline
from cifarlab.data.archives import MAX_MEMBER, read_file, readable, reason
from cifarlab.data.dataset import Pixels
from cifarlab.data.images import EXTRA, MAX_IMAGE, count_pixels, decode, formats, is_image
from cifarlab.errors import UserError
from cifarlab.nn import network as networks
from cifarlab.nn import weights
from cifarlab.nn.network import Network

BATCH = 100
STDIN = "-"
NamedFile = tuple[str, io.BytesIO]
Prediction = tuple[str, list[tuple[str, float]]]
"""The path of an image, or "-" for standard input, and its most probable classes with their
probabilities, the best first."""


def load(model: str) -> Network:
    """Return a trained network.

    Parameters
    ----------
    model : a .safetensors file, a DVC experiment or commit, the id of an MLflow run, or
        models:/NAME@ALIAS; empty for the network in the workspace

    Raises
    ------
    UserError
        There is no such network.
    """
    if not model or Path(model).is_file():
        return weights.load(Path(model or files.WEIGHTS))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / files.WEIGHTS.name
        if model.startswith("models:/") or re.fullmatch("[0-9a-f]{32}", model):
            from cifarlab.tracking.registry import download_network

            path = download_network(model, Path(name))
        else:
            path.write_bytes(pipeline.read(files.WEIGHTS, pipeline.find(model).commit))
        try:
            return weights.load(path)
        except UserError as error:
            problem = f"{model} holds no network of this version"
            raise UserError(f"{problem}; use it in the checkout of its commit") from error


def find(names: Sequence[str], here: Path, broken: list[str]) -> list[str]:
    """Return the images that paths, folders and patterns such as "photos/*.jpg" stand for.

    Parameters
    ----------
    here : where relative names start
    broken : gets a sentence for each name that stands for nothing

    Raises
    ------
    UserError
        All of them stand for nothing.
    """
    found: list[str] = []
    for name in names:
        path = here / name
        if name == STDIN or path.is_file():
            found.append(name if name == STDIN else str(path))
            continue
        pattern = f"{glob.escape(name)}/**" if name and path.is_dir() else name
        inside = glob.glob(pattern, root_dir=here, recursive=True)  # noqa: PTH207, also absolute
        images: dict[Path, str] = {}
        # Of paths that a link to a folder makes equal, the shortest is kept.
        for image in sorted((here / match for match in inside), key=lambda p: (len(p.parts), p)):
            if is_image(image.name) and image.is_file():
                images.setdefault(image.parent.resolve() / image.name, str(image))
        if not images:
            shown = readable(str(path)) if name else "an empty name"
            broken.append(f"{shown}: there is no such image, and no folder of images")
        found += sorted(images.values())
    if not found:
        raise UserError("; ".join(broken[:5]))
    return found


def predict(
    network: Network, images: Sequence[str], top: int, broken: list[str]
) -> Iterator[Prediction]:
    """Classify images of any size, format and mode, resized as in training.

    Parameters
    ----------
    images : paths, or "-" for an image on standard input
    top : how many classes to name
    broken : gets a sentence for each image that cannot be read
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant, as in evaluation
    network = network.to(device)
    # Pillow warns of metadata and large images, in whichever thread.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for group in _groups(images, broken):
            decoded = list(pool.map(partial(_decode, size=network.image_size), group))
            broken += [sentence for sentence in decoded if isinstance(sentence, str)]
            pairs = zip(group, decoded, strict=True)
            kept = [(name, p) for (name, _), p in pairs if not isinstance(p, str)]
            if not kept:
                continue
            batch = torch.from_numpy(np.stack([image for _, image in kept])).to(device)
            logits = networks.predict(network, batch, BATCH)
            probabilities = logits.double().softmax(1).cpu().numpy()
            best = np.argsort(-probabilities, 1, kind="stable")[:, :top]
            for (name, _), row, order in zip(kept, probabilities, best, strict=True):
                yield name, [(network.classes[i], float(row[i])) for i in order]


def shown(predictions: Iterator[Prediction], form: str) -> Iterator[str]:
    """Yield predictions as lines of a table, of "csv", or as a list in "json"."""
    if form == "json":
        records = []
        for image, pairs in predictions:
            top = [{"class": label, "probability": round(p, 6)} for label, p in pairs]
            whole = "".join(map(readable, image))  # readable() would cut it
            records.append({"image": whole, **top[0], "top": top})
        yield json.dumps(records, ensure_ascii=False, indent=2)
        return
    for number, (image, pairs) in enumerate(predictions):
        if form != "csv":
            yield "  ".join([readable(image), *(f"{label} {p:.1%}" for label, p in pairs)])
            continue
        if number == 0:
            more = (f"class_{i},probability_{i}" for i in range(2, len(pairs) + 1))
            yield ",".join(["image,class,probability", *more])
        line = io.StringIO()
        cells = (cell for label, p in pairs for cell in (label, f"{p:.6f}"))
        csv.writer(line, lineterminator="").writerow([image, *cells])
        yield line.getvalue()


def _groups(images: Sequence[str], broken: list[str]) -> Iterator[list[NamedFile]]:
    """Yield names and files of images, grouped so that decoding a group takes little memory."""
    group: list[NamedFile] = []
    used = 0.0  # of the memory that a group may take
    for name in images:
        try:
            stdin = name == STDIN
            file = io.BytesIO(sys.stdin.buffer.read(MAX_MEMBER)) if stdin else read_file(Path(name))
            pixels, length = count_pixels(file), file.getbuffer().nbytes
        except Exception as error:  # damaged bytes can raise any exception
            broken.append(_sentence(name, error))
            continue
        share = pixels / MAX_IMAGE + length / MAX_MEMBER + 1 / BATCH
        if used + share > 1:
            yield group
            group, used = [], 0
        used += share
        group.append((name, file))
    yield group


def _decode(image: NamedFile, size: int) -> Pixels | str:
    """Return the pixels of an image, or why there are none."""
    name, file = image
    try:
        return decode(file, size)
    except Exception as error:  # damaged bytes can raise any exception
        return _sentence(name, error)


def _sentence(name: str, error: Exception) -> str:
    suffix = Path(name).suffix.lower()
    opener = EXTRA.get(suffix) if suffix not in formats() else None
    needed = f"; {opener} opens {suffix}" if opener else ""
    return f"{readable(name)}: {reason(error)}{needed}"
