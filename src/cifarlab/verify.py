"""Repeating an experiment or a commit, and comparing every file with the first one."""

import json
import math
from pathlib import Path

from cifarlab import files, pipeline
from cifarlab.errors import UserError
from cifarlab.runtime import timings

Contents = dict[Path, bytes]


def verify(name: str) -> None:
    """Train, evaluate and plot an experiment or a commit again and compare all files.

    Runs in a scratch copy and prints the result. The files must be identical. Only if the first
    training ran on another machine, or with other threads, precision or PyTorch, the test
    accuracies may differ: by as much as those of two equally good networks do on n images in 95 of
    100 cases, 1.96 √(2 p (1 - p) / n). For p, each network counts with one more image that it gets
    right and one that it does not (Agresti & Caffo 2000).

    Raises
    ------
    UserError
        There is no such experiment or commit, it could not be repeated, or the result differs.
    """
    with pipeline.scratch_copy(pipeline.find(name).commit, name) as folder:
        first = _contents(folder)
        if lost := {files.EVALUATION, files.TRAIN_METRICS} - first.keys():
            raise UserError(f"{name} lacks {min(lost)}, which belongs to Git; commit it")
        if not pipeline.repeat(folder):
            raise UserError(f"{name} could not be repeated here, see above")
        # The copy's own code knows its key; the parameters may be those of another version.
        key = next((path.stem for path in timings.path_of("", folder).parent.glob("*.json")), "")
        again, now = _contents(folder), timings.read(key, folder).conditions
    different = [path for path in first if first[path] != again.get(path)]
    if not different:
        print(f"identical: {len(first)} files of {name}, the weights included")
        return
    summary = f"{len(different)} of {len(first)} files differ, first {different[0]}"
    if files.WEIGHTS in different:
        summary += f"; {_first_tensor(first[files.WEIGHTS], again[files.WEIGHTS])}"
    before = timings.read(key).conditions or dict.fromkeys(now, "unknown")
    if before == now:
        raise UserError(f"not repeated on {now['device']}: {summary}")
    names = [name for name in now | before if before.get(name) != now.get(name)]
    changes = ", ".join(f"{k} {before.get(k, 'none')} → {now.get(k, 'none')}" for k in names)
    _compare_accuracy(first, again, f"{summary}, as they may under other conditions ({changes})")


def _contents(folder: Path) -> Contents:
    """Return the content of every output of the stages that are repeated."""
    paths = [path for stage in pipeline.STAGES for path in pipeline.outputs(stage, folder)]
    return {path: (folder / path).read_bytes() for path in paths}


def _compare_accuracy(first: Contents, again: Contents, summary: str) -> None:
    """Print whether the test accuracies agree; UserError if they do not."""
    old, new = (json.loads(content[files.EVALUATION])["accuracy"] for content in (first, again))
    images = first[files.PREDICTIONS].count(b"\n") - 1
    p = (images * (old + new) + 2) / (2 * images + 4)  # also if all images are right
    bound = 1.96 * math.sqrt(2 * p * (1 - p) / images)
    accuracies = f"{summary}. Test accuracy {old:.2%} then, {new:.2%} now"
    if abs(new - old) > bound:
        raise UserError(f"{accuracies}, NOT within ±{bound:.2%} for {images:,} images")
    print(f"{accuracies}, within ±{bound:.2%} for {images:,} images")


def _first_tensor(one: bytes, other: bytes) -> str:
    """Name the first tensor that differs, and by how much."""
    from safetensors.torch import load

    old, new = load(one), load(other)
    for name, tensor in old.items():
        if not tensor.equal(new[name]):
            difference = (tensor.double() - new[name].double()).abs().max().item()
            return f"the first tensor that differs is {name}, by up to {difference:.3g}"
    return "the tensors are equal, the headers differ"
