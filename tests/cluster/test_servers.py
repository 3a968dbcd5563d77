"""DVC's remote in S3; MLflow with PostgreSQL, S3 and users, and many clients at once."""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from bench.growth import METRICS
from tests.conftest import REPO
from tests.support import services
from tests.support.project import Project

pytest.importorskip("dvc_s3", reason="DVC's S3 is not installed: `make cluster-test` installs it")
pytest.importorskip("moto", reason="moto is not installed: `make cluster-test` installs it")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", ["moto", "rclone"])
def test_outputs_and_experiments_travel_over_s3(
    project: Project, tmp_path: Path, kind: str
) -> None:
    project.env |= services.KEYS
    with services.s3(kind, tmp_path) as address:
        project.dvc("remote", "add", "--quiet", "--default", "storage", "s3://cifarlab/dvc")
        project.dvc("remote", "modify", "storage", "endpointurl", address)
        project.dvc("repro", "--quiet")
        project.run("git", "add", "--all")
        project.run("git", "commit", "--quiet", "--message=with a bucket")
        project.dvc("push", "--quiet")
        project.run("git", "init", "--quiet", "--bare", str(tmp_path / "remote.git"))
        project.run("git", "remote", "add", "origin", str(tmp_path / "remote.git"))
        project.dvc("exp", "run", "--quiet", "--temp", "--name", "seed-1", "-S", "train.seed=1")
        project.dvc("exp", "push", "--quiet", "origin", "seed-1")
        clone = Project(tmp_path / "clone", project.fork_server)
        clone.env |= services.KEYS
        project.run("git", "clone", "--quiet", str(project.folder), str(clone.folder))
        clone.dvc("pull", "--quiet")
        assert "up to date" in clone.dvc("status")
        clone.run("git", "remote", "set-url", "origin", str(tmp_path / "remote.git"))
        clone.dvc("exp", "pull", "--quiet", "origin", "seed-1")
        weights = (
            "import dvc.api; d = dvc.api.read('models/network.safetensors', rev='{}', mode='rb')"
        )
        read = f"{weights}; import hashlib; print(hashlib.md5(d).hexdigest())"
        for rev in ("HEAD", "seed-1"):
            digests = {p.run("python", "-c", read.format(rev)).stdout for p in (project, clone)}
            assert len(digests) == 1


CLIENTS, RUNS = 16, 50


def test_many_clients_and_two_users_of_a_server_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with services.postgres() as database, services.s3("moto", tmp_path) as bucket:
        server = services.SharedServer(tmp_path, database, bucket)
        with server.running() as process:
            for user in ("alice", "bob"):
                server.add_user(user, f"the password of {user}")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            alice, bob = (as_user(monkeypatch, server.uri, name) for name in ("alice", "bob"))
            experiment = alice(lambda client: client.create_experiment("shared"))
            clients = [start(server.uri, number) for number in range(CLIENTS)]
            wait_for_runs(alice, experiment, CLIENTS * RUNS // 4)
            os.killpg(process.pid, signal.SIGKILL)
        with server.running():
            outputs = [client.communicate(timeout=1500)[0] for client in clients]
            assert [client.returncode for client in clients] == [0] * CLIENTS, outputs
            found = bob(lambda client: client.search_runs([experiment], max_results=50_000))
            names = sorted(run.info.run_name for run in found)
            assert names == sorted(f"{c}-{r}" for c in range(CLIENTS) for r in range(RUNS))
            assert {run.info.status for run in found} == {"FINISHED"}
            assert all(len(run.data.metrics) == METRICS for run in found)
            seconds = sorted(float(line) for output in outputs for line in output.split())
            middle, slow = statistics.median(seconds), seconds[int(0.99 * len(seconds))]
            with capsys.disabled():
                print(f"\n{len(seconds)} runs: median {middle:.2f} s, 99 % {slow:.2f} s each")
            # Everybody logs, but only who made an experiment deletes from it.
            mine = bob(lambda client: client.create_run(experiment, run_name="bob's"))
            with pytest.raises(mlflow.exceptions.MlflowException, match=r"[Pp]ermission denied"):
                bob(lambda client: client.delete_run(found[0].info.run_id))
            alice(lambda client: client.delete_run(mine.info.run_id))
            (tmp_path / "table.csv").write_text("a,b\n")
            table = str(tmp_path / "table.csv")
            alice(lambda client: client.log_artifact(found[0].info.run_id, table))
            listed = bob(lambda client: client.list_artifacts(found[0].info.run_id))
            assert [file.path for file in listed] == ["table.csv"]
            stranger = as_user(monkeypatch, server.uri, "eve")
            with pytest.raises(mlflow.exceptions.MlflowException):
                stranger(lambda client: client.search_runs([experiment]))


def as_user(monkeypatch: pytest.MonkeyPatch, uri: str, name: str) -> object:
    """Return a function that calls another with a client of this user."""

    def call(action: object) -> object:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"the password of {name}")
        return action(mlflow.MlflowClient(uri))  # type: ignore[operator]

    return call


def start(uri: str, number: int) -> subprocess.Popen[str]:
    env = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
    env |= {"MLFLOW_TRACKING_USERNAME": "alice", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
    env |= {"MLFLOW_TRACKING_PASSWORD": "the password of alice"}
    command = [sys.executable, "-m", "bench.growth", "client", str(number), str(RUNS)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def wait_for_runs(user: object, experiment: object, count: int) -> None:
    deadline = time.monotonic() + 900
    while (
        len(user(lambda client: client.search_runs([experiment], max_results=5000))) < count  # type: ignore[operator]
    ):
        assert time.monotonic() < deadline
        threading.Event().wait(1)  # before it looks again
