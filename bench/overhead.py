"""`make bench-overhead`: what checkpoints and tracking cost beside an epoch of the default network.

The train stage itself, in a scratch copy, for two epochs, with the calls that keep a user's work timed.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

from bench.measure import variant
from cifarlab import files, tracking
from cifarlab.checkpoints import Checkpoint
from stages.train import train

EPOCHS = 2


@contextlib.contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every call of a method to `spent` under its name."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[f"{owner.__name__}.{name}"] = spent.get(f"{owner.__name__}.{name}", 0.0) + time.perf_counter() - start

    setattr(owner, name, wrapper)
    yield
    setattr(owner, name, method)


def main() -> None:
    """Print seconds an epoch and the share that each call takes of it."""
    params = variant("default", {"train.epochs": EPOCHS})
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for part in ("src", "stages"):
            copytree(part, folder / part)
        (folder / "dvc.yaml").write_text(Path("dvc.yaml").read_text("utf-8"), "utf-8")
        (folder / "data").symlink_to(Path("data").resolve())
        (folder / ".dvc/tmp").mkdir(parents=True)
        os.environ["DVC_ROOT"] = name
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(timed(Checkpoint, "save", spent))
        stack.enter_context(timed(tracking.Mirror, "epoch", spent))
        train(params)
        seconds = [took for _, took in tracking.read_diary(tracking.training_key(params), files.root())["epochs"].values()]
    shares = {name: f"{took / EPOCHS:.3f} s, {took / sum(seconds):.2%} of an epoch" for name, took in spent.items()}
    print(json.dumps({"epoch seconds": seconds, **shares, "together": f"{sum(spent.values()) / sum(seconds):.2%}"}, indent=2))


if __name__ == "__main__":
    main()
