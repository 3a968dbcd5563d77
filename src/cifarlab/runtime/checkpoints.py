"""The state of a training after each epoch, so that a killed training can resume.

Checkpoints are not outputs of DVC. They lie at the main checkout, where temporary copies find them.
"""

import hashlib
import io
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from cifarlab import files
from cifarlab.errors import first_line
from cifarlab.runtime import timings

KEPT_DAYS = 30
DIGEST = 32  # bytes of the SHA-256 at the start of the file


class Checkpoint:
    """The checkpoint of one training, found by the training's key.

    A resumed training gives the same bytes as an uninterrupted one only under the same conditions
    (`device.conditions`). So the file holds the conditions, and `load` refuses other ones.
    """

    def __init__(self, key: str, conditions: dict[str, str]) -> None:
        self.path = path_of(key)
        self.conditions = {"key": key, **conditions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ours = re.compile(r"\.?[0-9a-f]{64}\.(\d+\.)?(pt|lock)")  # the folder may be shared
        for old in filter(lambda path: ours.fullmatch(path.name), self.path.parent.iterdir()):
            with suppress(FileNotFoundError):  # another process may remove or rename it
                if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                    old.unlink()
        # The kernel releases the lock when its process ends in any way.
        self.lock = FileLock(self.path.with_suffix(".lock"))

    def claim(self) -> bool:
        """Reserve the checkpoint for this process; False if another one runs the same training."""
        with suppress(Timeout):
            self.lock.acquire(blocking=False)
            return True
        print("the same training runs in another process: this one keeps no checkpoint")
        return False

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last.

        None if there is none, or, after a warning, if it is damaged or from other conditions.
        """
        if not self.path.exists():
            return None
        try:
            data = self.path.read_bytes()
            if data[:DIGEST] != hashlib.sha256(data[DIGEST:]).digest():
                raise ValueError("its checksum is wrong")
            loaded = torch.load(io.BytesIO(data[DIGEST:]), map_location="cpu", weights_only=True)
            before, now = loaded["conditions"], self.conditions
            for name in now | before:
                then, current = before.get(name, "none"), now.get(name, "none")
                if then != current:
                    raise ValueError(f"it was made with {name} {then}, now it is {current}")
            return dict(loaded["state"])
        except Exception as error:  # a damaged zip or a hostile pickle can raise anything
            reason = f"cannot be used ({first_line(error)[:200]})"
            print(f"warning: the checkpoint {self.path} {reason}; training starts over")
            return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint as a whole. A full disk costs a warning, not the training."""
        try:
            buffer = io.BytesIO()
            torch.save({"conditions": self.conditions, "state": state}, buffer)
            data = buffer.getvalue()
            # With a checksum, because torch does not notice a flipped bit in a tensor.
            files.write(self.path, hashlib.sha256(data).digest() + data)
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({first_line(error)}); training goes on")


def path_of(key: str) -> Path:
    """Return the file of a training's checkpoint."""
    return timings.kept() / "checkpoints" / f"{key}.pt"
