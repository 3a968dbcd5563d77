"""A real MLflow server, and a proxy that disturbs the connection to it."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow


class Server:
    """A real MLflow server on a free loopback port, with a store of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server; `wait` waits until it is ready."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            # Its six processes for background jobs would take seconds to start.
            env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.2)  # before it asks again

    def forget(self) -> None:
        """Delete all runs."""
        client = mlflow.MlflowClient(self.uri)
        if experiment := client.get_experiment_by_name("cifarlab"):
            for run in client.search_runs([experiment.experiment_id]):
                client.delete_run(run.info.run_id)

    def kill(self) -> None:
        """Kill the server and its workers, whatever they are doing."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Proxy:
    """A proxy in front of a server. `rule` chooses an action for each request.

    pass: forward the request and the answer
    refuse: close the connection
    stall: never answer
    drip: send a byte every 2 s, without an end
    lose: forward the request, then close the connection without an answer
    cut: forward the request, then send only half of the answer
    garbage: answer with random bytes instead of HTTP
    a number, such as 503: answer with this status and an HTML page
    """

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.rule: Callable[[str], str] = lambda _: "pass"
        self.seen: list[tuple[str, str]] = []
        """Each request, such as `POST /api/2.0/mlflow/runs/create`, with the action."""
        self.closed = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                proxy._handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        """Stop the proxy and release stalled requests."""
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def _handle(self, client: BaseHTTPRequestHandler) -> None:
        try:
            client.raw_requestline = client.rfile.readline(65537)
            if not client.raw_requestline or not client.parse_request():
                client.close_connection = True
                return
            body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
            request = f"{client.command} {client.path.partition('?')[0]}"
            action = self.rule(request)
            self.seen.append((request, action))
            client.close_connection = action != "pass"
            if action == "stall":
                self.closed.wait()
            elif action == "drip":
                client.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not self.closed.wait(2):
                    client.wfile.write(b"x")
            elif action == "garbage":
                client.wfile.write(random.Random(0).randbytes(4096))
            elif action.isdigit():
                page = b"<html>\n<body>an HTML page</body>\n</html>"
                head = (
                    f"HTTP/1.1 {action} No\r\nContent-Type: text/html\r\nRetry-After: 600\r\n"
                    f"Content-Length: {len(page)}\r\n\r\n"
                )
                client.wfile.write(head.encode() + page)
            elif action != "refuse":
                self._forward(client, body, action)
        except OSError:
            client.close_connection = True

    def _forward(self, client: BaseHTTPRequestHandler, body: bytes, action: str) -> None:
        server = http.client.HTTPConnection(self.target, timeout=60)
        try:
            headers = {
                k: v for k, v in client.headers.items() if k.lower() not in ("connection", "host")
            }
            server.request(client.command, client.path, body or None, headers)
            answer = server.getresponse()
            content = answer.read()
        finally:
            server.close()
        head = [
            f"{k}: {v}"
            for k, v in answer.getheaders()
            if k.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        whole = (
            "\r\n".join(
                [
                    f"HTTP/1.1 {answer.status} {answer.reason}",
                    *head,
                    f"Content-Length: {len(content)}",
                    "",
                    "",
                ]
            ).encode()
            + content
        )
        client.wfile.write(
            {"pass": whole, "cut": whole[: -len(content) // 2 or None], "lose": b""}[action]
        )
