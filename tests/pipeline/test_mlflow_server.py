"""A tracking server beside the pipeline: a real one, and one that is away."""

import socket
import time

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
