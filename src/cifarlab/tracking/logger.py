"""Logging a stage to MLflow in a process of its own, beside the stage.

MLflow takes seconds to import, and a server may be slow to answer. Meanwhile the stage imports
PyTorch, and trains, evaluates or draws.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cifarlab import files
from cifarlab.errors import first_line
from cifarlab.params.sections import Params
from cifarlab.runtime import processes
from cifarlab.tracking.client import connect, database, warn

if TYPE_CHECKING:
    from cifarlab.nn.network import Network

EPOCHS = "epochs"  # the command to log them; any other says how the stage has ended
SECONDS = 40  # that a stage waits at its end
SECONDS_IF_KILLED = 5


class Logger:
    """Starts the process. It ends with the stage, and has logged nothing if `run` was not entered.

    Make it first of all in a stage: a process with several threads should not fork.

    Raises
    ------
    UserError
        MLFLOW_TRACKING_URI names no store.
    """

    def __init__(self, stage: str, params: Params) -> None:
        database()
        self.stage, self.graph = stage, files.scratch() / f"model-{os.getpid()}.pt2"
        self.graph.unlink(missing_ok=True)
        commands, self.pipe = Pipe(duplex=False)
        os.set_blocking(self.pipe.fileno(), False)  # the stage does not wait if the pipe is full
        self.process = os.fork()
        if not self.process:
            self.pipe.close()
            _log(stage, params, self.graph, commands)
        commands.close()

    @contextmanager
    def run(self, conditions: dict[str, str] | None = None) -> Iterator[None]:
        """Log what the block writes, as `tracking.run.track` does. Wait for it at the end only."""
        self._tell((conditions, time.time()))
        try:
            yield
        except BaseException as error:
            self._end(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RuntimeError)
            raise
        self._end(None)

    def log_epochs(self) -> None:
        """Log the epochs of history.csv that the run lacks."""
        self._tell(EPOCHS)

    def log_model(self, network: "Network") -> None:
        """Export the network for the end of the run: the process that logs lacks PyTorch."""
        from cifarlab.nn.weights import export_torch

        with suppress(Exception):  # then that process tries it, and warns
            export_torch(network, self.graph)

    def _tell(self, command: object) -> bool:
        """Tell whether the process can get a command: it may have died, or the pipe is full."""
        with suppress(OSError):
            self.pipe.send(command)
            return True
        return False

    def _end(self, error: type[BaseException] | None) -> None:
        process, killed = psutil.Process(self.process), error is KeyboardInterrupt
        limit = (SECONDS_IF_KILLED if killed else SECONDS) if self._tell(error) else 1
        try:
            reason = "the process that logs was killed" if process.wait(limit) else ""
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
            reason = f"it did not answer within {limit} s"
        self.graph.unlink(missing_ok=True)
        if reason and not killed:
            warn(self.stage, reason)


def _log(stage: str, params: Params, graph: Path, commands: Connection) -> None:
    """Follow the commands, and end this process."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the stage as well
        processes.follow()
        from cifarlab.tracking.run import track

        with suppress(Exception):  # the run tries it again, and warns
            connect()  # takes the longest
        conditions, started = commands.recv()
        run = track(stage, params, conditions)
        run.graph, run.started = graph, started
        run.__enter__()
        command: Any = EPOCHS
        while command == EPOCHS:
            news = [commands.recv()]
            while commands.poll():  # several epochs may have ended meanwhile
                news.append(commands.recv())
            if EPOCHS in news:
                run.log_epochs()
            command = news[-1]
        run.__exit__(command)
    except (EOFError, KeyboardInterrupt):  # the stage has ended otherwise
        pass
    except BaseException as error:
        warn(stage, first_line(error))
    finally:
        os._exit(0)  # without the cleaning up that belongs to the stage
