"""A tracking server beside the pipeline: a real one, and one that is away."""

import shlex
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.conftest import REPO
from tests.pipeline.conftest import Project, stages_run
from tests.servers import Server


def test_a_server_gets_the_run_and_its_artifacts(project: Project, mlflow_server: Server) -> None:
    project.dvc("repro", MLFLOW_TRACKING_URI=mlflow_server.uri)
    run = project.runs(mlflow_server.uri)[""]
    assert run.info.status == "FINISHED"
    assert "test_accuracy" in run.data.metrics
    assert {"figures/confusion.png", "tables/history.csv", "confusion_matrix.json"} <= project.artifacts(run.info.run_id, mlflow_server.uri)
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


def test_the_ui_listens_on_this_machine_only(project: Project, tmp_path: Path) -> None:
    ui = Server(tmp_path)
    makefile = ("--file", str(REPO / "Makefile"), f"PORT={ui.port}", f"CURDIR={tmp_path}")
    recipe = project.run("make", "--dry-run", "--no-print-directory", *makefile, "ui").stdout
    command = shlex.split(recipe.splitlines()[-1])
    assert command[:2] == ["mlflow", "ui"]
    with (tmp_path / "server.log").open("w") as log:
        ui.process = subprocess.Popen(command, cwd=tmp_path, env=project.env, stdout=log, stderr=log, start_new_session=True)
    try:
        ui.wait()
        server = psutil.Process(ui.process.pid)
        sockets = [socket for process in [server, *server.children(recursive=True)] for socket in process.net_connections("inet")]
        assert {at.laddr.ip for at in sockets if at.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    finally:
        ui.kill()
