"""The stages of dvc.yaml, one module each: `python -m stages.train`."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A stage must run the code of its own folder: a queued experiment runs its own snapshot, and an
# installed package would hide that.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

# Clones in which experiments run use the caches and the MLflow store of the main checkout.
os.environ["DVC_ROOT"] = os.environ.get("CIFARLAB_ROOT") or os.environ.get("DVC_ROOT", ".")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal

__all__ = ["Params", "interrupted_once", "processes", "run"]

try:
    from cifarlab import pipeline
    from cifarlab.errors import UserError, tolerate_settings
    from cifarlab.params.load import load_params
    from cifarlab.params.sections import Params
    from cifarlab.runtime import processes
except ModuleNotFoundError as error:
    advice = "run `make setup`, then `source .venv/bin/activate`"
    sys.exit(f"error: {error.name} is not installed for {sys.executable}; {advice}")


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage with validated parameters. Errors that a user can correct end in one sentence."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic matrix products
    gc.set_threshold(100_000)  # imports make many objects, and there is nothing to collect
    tolerate_settings()
    processes.spare_cores()
    for number in (*SIGNALS, signal.SIGALRM):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    if processes.started():
        processes.follow()
    try:
        try:
            with interrupted_once():
                pipeline.refuse_shallow_clone()
                stage(load_params())
        finally:
            # Nothing may interrupt what is said below: if one of several processes fails, torchrun
            # sends SIGTERM to the others.
            for number in (*SIGNALS, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may have been closed
            if not processes.started():  # the process that started this one says it
                print("interrupted; type the same command again and it continues", file=sys.stderr)
            sys.stdout.flush()
        os._exit(1)  # all files are closed; unloading PyTorch and MLflow would take seconds
    except Exception as error:
        if sentence := explain(error):
            if processes.started():
                processes.give_up(sentence)
            sys.exit(f"error: {sentence}")
        raise
    gc.freeze()  # Python ends sooner if it does not look for garbage in PyTorch


def explain(error: Exception) -> str:
    """Return what the user can do about an error; empty if it is an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    # On the CPU, PyTorch raises a plain RuntimeError with this name in its text.
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if full or "DefaultCPUAllocator:" in str(error):
        advice = "lower train.batch_size, evaluate.batch_size, model.widths or data.image_size"
        return f"not enough memory; {advice}"
    if isinstance(error, OSError) and (error.filename or error.errno):
        reason = f"{error.strerror or error}: {error.filename or 'disk'}"
        return f"{reason}; make room or correct the permissions, then type the same command again"
    return ""


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt at one of SIGNALS.

    It is raised again every 0.3 s until `interrupted_once` sees it, because Python drops an
    exception that is raised inside a destructor or a callback of a weak reference.
    """
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    raise KeyboardInterrupt


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Stop repeating the KeyboardInterrupt as soon as one leaves this block.

    Whatever is closed after this block, such as the MLflow run, is then not interrupted again. So
    this block must be the innermost: `with logger.run(), interrupted_once():`.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise
