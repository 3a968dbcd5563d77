"""PostgreSQL, two kinds of S3, and an MLflow server with users, on loopback ports."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

Process = subprocess.Popen[bytes]
KEYS = {
    "AWS_ACCESS_KEY_ID": "cifarlab",
    "AWS_SECRET_ACCESS_KEY": "a-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}
PROGRAMS = Path(sys.executable).parent
ADMIN = "a password of the admin"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int, process: Process | None = None, seconds: float = 180) -> None:
    """Wait until a port accepts connections."""
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as test:
            if test.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process is None or process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.1)  # before it asks again


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, **env: str) -> Iterator[Process]:
    """Run a server until the block ends."""
    with log.open("a") as output:
        process = subprocess.Popen(
            command, env=os.environ | env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(port, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def s3(kind: str, folder: Path) -> Iterator[str]:
    """Yield the address of an S3 with the bucket `cifarlab`: kind is moto or rclone."""
    port, store = free_port(), folder / "s3"
    (store / "cifarlab").mkdir(parents=True)
    if kind == "moto":
        command = [str(PROGRAMS / "moto_server"), "--host", "127.0.0.1", "--port", str(port)]
    else:
        keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
        command = [str(PROGRAMS / "rclone"), "serve", "s3", str(store), "--auth-key", keys]
        command += ["--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    with running(command, port, folder / "s3.log"):
        import boto3

        address = f"http://127.0.0.1:{port}"
        access = {k.lower().removesuffix("_default_region"): v for k, v in KEYS.items()}
        access.pop("aws", None)
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **access)
        if kind == "moto":
            client.create_bucket(Bucket="cifarlab")
        yield address


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Yield the address of a new PostgreSQL database, with a second one for MLflow's users."""
    programs = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    initdb = next(Path(found) for found in programs if found)
    # It does not run as root, and its user cannot enter pytest's folders.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    user = user if os.getuid() == 0 else []
    folder, port = Path(tempfile.mkdtemp(prefix="postgres-")), free_port()
    if user:
        shutil.chown(folder, "postgres", "postgres")
    try:
        subprocess.run(
            [*user, str(initdb), "--auth=trust", "--username=mlflow", "-D", str(folder / "data")],
            check=True,
            capture_output=True,
            cwd="/",
        )
        command = [*user, str(initdb.with_name("postgres")), "-D", str(folder / "data")]
        command += ["-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
        with running(command, port, folder.with_suffix(".log")) as process:
            import psycopg2

            address = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while True:
                try:
                    connection = psycopg2.connect(f"{address.replace('+psycopg2', '')}/postgres")
                    break
                except psycopg2.OperationalError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.2)  # it is starting up
            connection.autocommit = True
            for name in ("runs", "users"):
                connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()
            yield address
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


class SharedServer:
    """An MLflow server with PostgreSQL, artifacts in S3, and users, as in compose.yaml."""

    def __init__(self, folder: Path, database: str, bucket: str) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        settings = folder / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = EDIT\nadmin_username = admin\n"
            "auth_cache_ttl_seconds = 60\n"
            f"database_uri = {database}/users\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        self.env = KEYS | {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret that all workers share",
            "MLFLOW_S3_ENDPOINT_URL": bucket,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self.command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "2"]
        self.command += ["--backend-store-uri", f"{database}/runs"]
        self.command += ["--artifacts-destination", "s3://cifarlab/mlflow"]

    def running(self) -> contextlib.AbstractContextManager[Process]:
        """Start it, and stop it when the block ends."""
        return running(self.command, self.port, self.folder / "server.log", **self.env)

    def add_user(self, name: str, password: str) -> None:
        import requests

        answer = requests.post(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json={"username": name, "password": password},
            auth=("admin", ADMIN),
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
