"""Logging a stage to MLflow in a process of its own, beside the stage.

MLflow takes seconds to import, and a server may be slow to answer. Meanwhile the stage imports
PyTorch, and trains, evaluates or draws.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import psutil

from cifarlab.errors import first_line
from cifarlab.params.sections import Params
from cifarlab.runtime import processes
from cifarlab.tracking.client import database, warn
from cifarlab.tracking.model import exported

if TYPE_CHECKING:
    from cifarlab.nn.network import Network

EPOCHS = "epochs"  # the command to log them
SECONDS = 30  # that a stage waits at its end
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
        self.stage = stage
        commands, self.pipe = Pipe(duplex=False)
        self.process = os.fork()
        if not self.process:
            self.pipe.close()
            _log(stage, params, commands)
        commands.close()

    @contextmanager
    def run(self, conditions: dict[str, str] | None = None) -> Iterator[None]:
        """Log what the block writes, as `tracking.run.track` does. Wait for it at the end only."""
        self._tell(conditions)
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
        with suppress(Exception):  # then that process tries it, and warns
            self._tell(exported(network))

    def _tell(self, command: object) -> None:
        with suppress(OSError):  # `_end` warns if the process has died
            self.pipe.send(command)

    def _end(self, error: type[BaseException] | None) -> None:
        self._tell(error)
        process, killed = psutil.Process(self.process), error is KeyboardInterrupt
        try:
            code = process.wait(SECONDS_IF_KILLED if killed else SECONDS)
            reason = f"the process that logs has ended with code {code}" if code else ""
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
            reason = f"it did not answer within {SECONDS} s"
        if reason and not killed:
            warn(self.stage, reason)


def _log(stage: str, params: Params, commands: Connection) -> None:
    """Follow the commands, and end this process."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the stage as well
        processes.follow()
        import mlflow  # noqa: F401, takes the longest

        from cifarlab.tracking.run import track

        run = track(stage, params, commands.recv()).__enter__()
        given = list[Any]()
        while not given or given[-1] == EPOCHS or isinstance(given[-1], bytes):
            given = [commands.recv()]
            while commands.poll():  # several epochs may have ended meanwhile
                given.append(commands.recv())
            if EPOCHS in given:
                run.log_epochs()
            run.graph = next((part for part in given if isinstance(part, bytes)), run.graph)
        run.__exit__(given[-1])
    except EOFError:  # the stage has ended otherwise
        pass
    except Exception as error:
        warn(stage, first_line(error))
    finally:
        os._exit(0)  # without the cleaning up that belongs to the stage
