"""The pipeline with a tracking server, and MLflow's own pages."""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.project import Project
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
