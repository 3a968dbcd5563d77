"""The stages of dvc.yaml, one module each: `python -m stages.train`."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# The code that runs is that of the folder the stage runs in: a queued experiment runs its own snapshot's code,
# which an installed package would hide.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
# Must be set before CUDA starts, for deterministic matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _not_set_up(error: ModuleNotFoundError) -> NoReturn:
    sys.exit(f"error: {error.name} is not installed for {sys.executable}; `make setup`, then `source .venv/bin/activate`")


try:
    from cifarlab import UserError
    from cifarlab.params import Params, load_params
except ModuleNotFoundError as error:
    _not_set_up(error)


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, and again until it is heard: Python drops what is raised in a destructor or a weakref's callback."""
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    raise KeyboardInterrupt


def run(stage: Callable[[Params], None]) -> None:
    """Run a stage with validated parameters; an error of the user's ends in a sentence, not in a traceback."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
    try:
        stage(load_params())
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        _not_set_up(error)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():  # PyTorch has no error of its own for it on the CPU
            raise
        sys.exit("error: the memory is not enough; lower train.batch_size, evaluate.batch_size, model.widths or data.image_size")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
        print("interrupted; type the same command again and it continues", file=sys.stderr, flush=True)
        os._exit(1)  # all is written and closed; taking PyTorch and MLflow down would cost seconds
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        told = f"{error.strerror or error}: {error.filename or 'disk'}"
        sys.exit(f"error: {told}; make room or mend the permissions, then type the same command again")
