"""The state of a training after each epoch, so that one that was killed continues. Outside DVC's outputs, at the main checkout."""

import hashlib
import io
import time
from typing import Any

import torch
from filelock import FileLock, Timeout

from cifarlab import first_line
from cifarlab.files import atomic, root

KEPT_DAYS = 30
DIGEST = 32  # bytes of a SHA-256, before the content


class Checkpoint:
    """The checkpoint of one training, found by its key from the workspace, `--temp` and `--queue` alike.

    A resumed training ends in the bytes of one that never stopped only where it goes on under the same conditions
    (`training.conditions`), so these are written into the checkpoint, and one made under others is refused.
    """

    def __init__(self, key: str, conditions: dict[str, str]) -> None:
        self.path = root() / ".cache" / "checkpoints" / f"{key}.pt"
        self.conditions = {"key": key, **conditions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for old in self.path.parent.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                old.unlink(missing_ok=True)
        self.lock = FileLock(self.path.with_suffix(".lock"))  # the kernel opens it when its holder dies, however it dies

    def claim(self) -> bool:
        """Take the checkpoint for as long as this process lives; False where another one trains the same at this moment."""
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            print("the same training runs in another process: this one keeps no checkpoint")
            return False
        return True

    def load(self) -> dict[str, Any] | None:
        """Return what `save` was given last; None where there is nothing or, after a warning, nothing that can be used."""
        if not self.path.exists():
            return None
        try:
            digest, content = (data := self.path.read_bytes())[:DIGEST], data[DIGEST:]
            if digest != hashlib.sha256(content).digest():
                raise ValueError("its checksum is wrong")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            conditions, state = dict(loaded["conditions"]), dict(loaded["state"])
        except Exception as error:  # whatever a damaged zip or a hostile pickle makes torch raise
            print(f"warning: the checkpoint {self.path} is damaged ({first_line(error)[:120]}); training starts over")
            return None
        for name, value in self.conditions.items():
            if conditions.get(name) != value:
                print(f"warning: the checkpoint was made with {name} {conditions.get(name)}, now it is {value}; training starts over")
                return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all. A full disk costs a warning, not the training."""
        try:
            buffer = io.BytesIO()
            torch.save({"conditions": self.conditions, "state": state}, buffer)
            with atomic(self.path) as temporary:
                # Torch itself does not notice a flipped bit in a number.
                temporary.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({first_line(error)[:120]}); training goes on")

    @staticmethod
    def remove(key: str) -> None:
        """Forget a training: DVC has its outputs."""
        (root() / ".cache" / "checkpoints" / f"{key}.pt").unlink(missing_ok=True)
