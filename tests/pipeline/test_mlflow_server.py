"""A tracking server beside the pipeline: a real one, and one that is away."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.conftest import Project, stages_run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on a free loopback port, with a store of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process:
        uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.2)  # between two questions whether it is up
        yield uri
        process.terminate()


def test_a_server_gets_the_run_and_its_artifacts(project: Project, server: str) -> None:
    project.dvc("repro", MLFLOW_TRACKING_URI=server)
    run = project.runs(server)[""]
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics
    assert {"figures/confusion.png", "tables/history.csv", "confusion_matrix.json"} <= project.artifacts(run.info.run_id, server)
    assert len(run.outputs.model_outputs) == 1
    assert not (project.folder / "mlflow.db").exists()


def test_a_server_that_is_away_costs_a_warning(project: Project) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        uri = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        output = project.dvc("repro", "--force", MLFLOW_TRACKING_URI=uri)
    assert stages_run(output) == ["download", "train", "evaluate", "plot"]
    assert output.count("warning: MLflow") == 3  # one a stage
    assert "secret" not in output
    assert "Traceback" not in output
    assert time.monotonic() - started < 120
    assert (project.folder / "plots/confusion.png").exists()
