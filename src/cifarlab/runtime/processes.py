"""The threads and processes of a training: how they wait, start and end."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from cifarlab.errors import UserError

ERRORS = "TORCHELASTIC_ERROR_FILE"
"""torchrun sets it: where each of its processes writes why it failed."""


def launch(count: int) -> None:
    """Run the train stage in several processes, as `torchrun --standalone` does.

    Raises
    ------
    UserError
        One of them failed or was killed. The others are then ended.
    KeyboardInterrupt
        This process was told to end, and has passed it on.
    """
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # For train.threads: auto. The processes share the cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
    logging.disable()  # torchrun reports at length what becomes one sentence here
    with tempfile.TemporaryDirectory() as logs:
        options = [f"--nproc-per-node={count}", "--local-addr=127.0.0.1", f"--log-dir={logs}"]
        command = ["--standalone", *options, "--module", "stages.train"]
        try:
            run.run(run.parse_args(command))  # type: ignore[no-untyped-call]
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            raise UserError(explain(list(error.failures.values()), count)) from error


def explain(failures: list[Any], count: int) -> str:
    """Return the reason why torchrun failed: that of the process that began it."""
    from cifarlab.training.ranks import LOST

    silent = [f for f in failures if not Path(f.error_file).is_file()]
    if said := [f.message for f in failures if f not in silent and f.message != LOST]:
        return str(said[0])
    first = [*silent, *failures][0]  # those that torchrun ended afterwards come last
    how = signal.Signals(-first.exitcode).name if first.exitcode < 0 else f"code {first.exitcode}"
    died = f"process {first.local_rank + 1} of {count} ended with {how}, and with it the training"
    return f"{died}; type the same command again and it continues"


def started() -> bool:
    """Tell whether this is one of the processes that `launch` started."""
    return ERRORS in os.environ


def is_first() -> bool:
    """Tell whether this is the only process of a training, or the one that writes for all."""
    return not started() or os.environ["RANK"] == "0"


def spare_cores() -> None:
    """Let threads that wait for each other sleep soon. It counts before PyTorch is imported only.

    By default they spin for milliseconds (GCC's OpenMP), on cores that other programs may need.
    Beside two busy programs, a step then takes several times as long (docs/performance.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # enough for threads that arrive together


def follow() -> None:
    """End this process when the one that started it is killed."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def give_up(sentence: str) -> NoReturn:
    """End this process, one of several, and leave a sentence for the one that started it."""
    Path(os.environ[ERRORS]).write_text(json.dumps({"message": sentence}), "utf-8")
    os._exit(1)  # an orderly end might wait for the other processes
