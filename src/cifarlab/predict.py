"""Use a trained network: the classes of new images, and files for other programs."""

import csv
import glob
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cifarlab import files, pipeline
from cifarlab.data.archives import MAX_MEMBER, Member, read_file, readable
from cifarlab.data.images import is_image
from cifarlab.data.readers import decoded
from cifarlab.errors import UserError
from cifarlab.nn import network as networks
from cifarlab.nn import weights
from cifarlab.nn.network import Network

BATCH = 100
STDIN = "-"
Predictions = Iterator[tuple[str, list[tuple[str, float]]]]
"""The path of each image, or "-" for standard input, and its most probable classes with their
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
    commit = ""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / files.WEIGHTS.name
        if model.startswith("models:/") or re.fullmatch("[0-9a-f]{32}", model):
            from cifarlab.tracking.registry import download_network

            path = download_network(model, Path(name))
        else:
            commit = pipeline.find(model).commit
            path.write_bytes(pipeline.read(files.WEIGHTS, commit))
        try:
            network = weights.load(path)
        except UserError as error:
            problem = f"{model} holds no network of this version"
            raise UserError(f"{problem}; use it in the checkout of its commit") from error
    if commit and not pipeline.has_this_network_code(commit):
        advice = "the answers may be wrong; use it in a checkout of its commit"
        print(f"warning: {model} has other code for the network, so {advice}", file=sys.stderr)
    return network


def find(names: Sequence[str], broken: list[str]) -> list[str]:
    """Return the images that paths, folders and patterns such as "photos/*.jpg" stand for.

    Parameters
    ----------
    broken : gets a sentence for each name that stands for nothing

    Raises
    ------
    UserError
        All of them stand for nothing.
    """
    found, others = list[str](), list[str]()
    for name in names:
        path = Path(name)
        if name == STDIN or path.is_file():
            found.append(str(path))
            continue
        pattern = f"{glob.escape(name)}/**" if name and path.is_dir() else name
        inside = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207, also absolute
        ranked = sorted(filter(Path.is_file, inside), key=lambda p: (len(p.parts), p))
        others += [readable(str(p)) for p in ranked if not is_image(p.name)]
        # Of paths that a link to a folder makes equal, the shortest is kept, which comes last here.
        images = {p.parent.resolve() / p.name: str(p) for p in ranked[::-1] if is_image(p.name)}
        if not images:
            shown = readable(str(path)) if name else "an empty name"
            broken.append(f"{shown}: there is no such image, and no folder of images")
        found += sorted(images.values())
    if not found:
        raise UserError("; ".join(broken[:5]))
    if others:
        shown = ", ".join(others[:3]) + ", …" * (len(others) > 3)
        print(f"skipped files that are not images ({len(others):,}): {shown}", file=sys.stderr)
    return found


def predict(network: Network, images: Sequence[str], top: int, broken: list[str]) -> Predictions:
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
    found = decoded((Member(name, partial(_read, name)) for name in images), network.image_size)
    while block := list(islice(found, BATCH)):
        broken += [f"{readable(name)}: {why}" for name, why in block if isinstance(why, str)]
        kept = [(name, pixels) for name, pixels in block if not isinstance(pixels, str)]
        if not kept:
            continue
        batch = torch.from_numpy(np.stack([pixels for _, pixels in kept])).to(device)
        logits = networks.predict(network, batch, BATCH)
        probabilities = logits.double().softmax(1).cpu().numpy()
        best = np.argsort(-probabilities, 1, kind="stable")[:, :top]
        for (name, _), row, order in zip(kept, probabilities, best, strict=True):
            yield name, [(network.classes[i], float(row[i])) for i in order]


def _read(name: str) -> io.BytesIO:
    return io.BytesIO(sys.stdin.buffer.read(MAX_MEMBER)) if name == STDIN else read_file(Path(name))


def shown(predictions: Predictions, form: str) -> Iterator[str]:
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
        csv.writer(line).writerow([image, *cells])  # only with \r\n it quotes both of them
        yield line.getvalue().removesuffix("\r\n")
