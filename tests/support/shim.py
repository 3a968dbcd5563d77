"""Ask the fork server to run this command; if there is none, run the real program.

The fork server copies this file into a folder on PATH as `python` and `dvc`. Above it puts lines
that start Python without site packages, and the values of SOCKET, REAL and BARE. The file
must start in milliseconds, so it imports only modules that are built into Python.
"""

import _signal
import _socket
import marshal
import os
import sys

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


def ask() -> "_socket.socket":
    """Send this command to the server and return the connection."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    if BARE & os.environ.keys():
        raise OSError("a variable needs a new interpreter")
    connection.connect(SOCKET)
    mask = os.umask(0)
    os.umask(mask)
    name = os.path.basename(sys.argv[0])
    arguments = (
        sys.argv[1:] if name.startswith("python") else [os.path.join(REAL, name), *sys.argv[1:]]
    )
    request = marshal.dumps((os.getpid(), os.getcwd(), dict(os.environ), mask, arguments))
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2))
    connection.sendmsg(
        [len(request).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)]
    )
    connection.sendall(request)
    return connection


def main() -> None:
    """Run the command, forward signals to it, and end as it ends."""
    try:
        connection = ask()
    except OSError:  # also if one of the three standard files is closed
        real = os.path.join(REAL, os.path.basename(sys.argv[0]))
        os.execv(real, [real, *sys.argv[1:]])
    for name in FORWARDED:
        _signal.signal(
            getattr(_signal, name), lambda number, _: connection.sendall(bytes([number]))
        )
    for fd in (0, 1, 2):  # the child has its own copies
        os.close(fd)
    answer = connection.recv(4)
    # No answer means that the server has died, and all its children with it.
    code = int.from_bytes(answer, "big", signed=True) if answer else -_signal.SIGKILL
    if code >= 0:
        os._exit(code)
    if -code != _signal.SIGKILL:
        _signal.signal(-code, _signal.SIG_DFL)
    os.kill(os.getpid(), -code)


main()
