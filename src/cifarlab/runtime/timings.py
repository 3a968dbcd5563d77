"""When each epoch of a training ended, how long it took, and on what it ran: printed and kept.

These are kept outside DVC's outputs, in .cache/trainings/KEY.json: the outputs of a training must
not depend on the clock.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from tqdm import tqdm

from cifarlab import files

Results = Callable[[], tuple[float, float]]
MACHINE = "{device}, {threads} threads, {precision}, PyTorch {torch}"
"""What a training ran on, in words: to be filled with `device.conditions`."""


class Timings(NamedTuple):
    """What is known about the times of a training."""

    conditions: dict[str, str]
    """What it ran on: `device.conditions`."""
    epochs: dict[str, tuple[int, float]]
    """For each epoch ("1", "2", …), when it ended (ms since 1970) and how long it took (s)."""


def read(key: str, checkout: Path | None = None) -> Timings:
    """Return the timings of the training with this key; empty if there are none."""
    try:
        return TypeAdapter(Timings).validate_json(path_of(key, checkout).read_bytes())
    except (OSError, ValueError):
        return Timings({}, {})


class Progress:
    """Prints the progress of a training, and keeps its timings. The clock starts at once.

    A terminal shows a bar with the epoch's loss and accuracy so far; a log file only gets a line
    for each epoch. A resumed training keeps the timings of its earlier epochs.
    """

    def __init__(self, key: str, conditions: dict[str, str], epochs: int) -> None:
        self.path, self.conditions, self.ended = path_of(key), conditions, read(key).epochs
        self.epochs, self.start = epochs, time.perf_counter()
        self.bar: tqdm[Any] | None = None

    def batch(self, epoch: int, seen: int, images: int, results: Results) -> None:
        """Move the bar to the number of images seen, of all `images` of an epoch."""
        title, self.images = f"epoch {epoch}/{self.epochs}", images
        self.bar = self.bar or tqdm(None, title, images, leave=False, unit=" images", disable=None)
        if self.bar.update(seen - self.bar.n):  # it is shown, ten times a second at most
            loss, accuracy = results()
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
        if seen == images:
            self.bar.close()
            self.bar = None

    def epoch(self, row: dict[str, Any]) -> None:
        """Print a row of history.csv, the speed and the time that is left. Keep the timing."""
        epoch, now = row["epoch"], time.perf_counter()
        took, self.start = now - self.start, now
        parts = [f"epoch {epoch}/{self.epochs}"]
        for name, split in (("loss", "train"), ("validation loss", "val")):
            if (loss := row[f"{split}_loss"]) is not None:
                parts.append(f"{name} {loss:.3f}, accuracy {row[f'{split}_accuracy']:.1%}")
        left = (self.epochs - epoch) * took
        parts.append(f"{self.images / took:,.0f} images/s, {left:.0f} s left")
        print("   ".join(parts), flush=True)
        earlier = {number: times for number, times in self.ended.items() if int(number) < epoch}
        self.ended = earlier | {str(epoch): (int(time.time() * 1000), round(took, 3))}
        with contextlib.suppress(OSError):  # a full disk costs only the timings
            files.write_json(self.path, Timings(self.conditions, self.ended)._asdict())


def path_of(key: str, checkout: Path | None = None) -> Path:
    """Return the file of a training's timings."""
    return kept(checkout) / "trainings" / f"{key}.json"


def kept(checkout: Path | None = None) -> Path:
    """Return the folder that holds timings and checkpoints.

    CIFARLAB_CHECKPOINTS may name one that several machines share, relative to the main checkout.
    """
    named = os.environ.get("CIFARLAB_CHECKPOINTS")
    return files.cache(checkout) if checkout or not named else files.root() / named
