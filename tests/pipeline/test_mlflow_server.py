"""The pipeline with a tracking server: one that works, and one that cannot be reached."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.project import Project, stages_run
from tests.support.servers import Server


def test_a_server_gets_the_run_and_its_artifacts(project: Project, mlflow_server: Server) -> None:
    mlflow_server.forget()
    project.edit("tracking", log_model=False)
    project.dvc("repro", MLFLOW_TRACKING_URI=mlflow_server.uri)
    run = project.runs(mlflow_server.uri)[""]
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics
    assert {
        "figures/confusion.png",
        "tables/history.csv",
        "confusion_matrix.json",
    } <= project.artifacts(run.info.run_id, mlflow_server.uri)
    assert not (project.folder / "mlflow.db").exists()


def test_a_server_that_cannot_be_reached_costs_only_a_warning(finished: Project) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        uri = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        output = finished.dvc("repro", "--force", MLFLOW_TRACKING_URI=uri)
    assert stages_run(output) == ["download", "train", "evaluate", "plot"]
    assert output.count("warning: MLflow") == 3  # one for each stage
    assert "secret" not in output
    assert "Traceback" not in output
    assert time.monotonic() - started < 120
    assert (finished.folder / "plots/confusion.png").exists()


def test_the_ui_listens_on_this_machine_only(project: Project, tmp_path: Path) -> None:
    ui = Server(tmp_path)
    command = [sys.executable, "-m", "cifarlab.cli", "ui", "--port", str(ui.port)]
    env = project.env | {"PYTHONPATH": "src"}
    with (tmp_path / "server.log").open("w") as log:
        ui.process = subprocess.Popen(
            command, cwd=project.folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        ui.wait()
        server = psutil.Process(ui.process.pid)
        sockets = [
            socket
            for process in [server, *server.children(recursive=True)]
            for socket in process.net_connections("inet")
        ]
        assert {at.laddr.ip for at in sockets if at.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    finally:
        ui.kill()
