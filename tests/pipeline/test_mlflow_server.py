"""The pipeline with a tracking server, and MLflow's own pages."""

import json
import re
import shutil
import signal
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import sync_playwright

from tests.support.project import Project
from tests.support.servers import Server


@pytest.mark.slow
def test_a_server_gets_the_run_and_its_artifacts(project: Project, mlflow_server: Server) -> None:
    mlflow_server.forget()
    project.edit("tracking", log_model=False)
    project.dvc("repro", MLFLOW_TRACKING_URI=mlflow_server.uri)
    run = project.runs(mlflow_server.uri)[""]
    assert run.info.status == "FINISHED"
    assert "accuracy/test" in run.data.metrics
    assert {
        "figures/confusion.png",
        "tables/history.csv",
        "confusion_matrix.json",
    } <= project.artifacts(run.info.run_id, mlflow_server.uri)
    assert not (project.folder / "mlflow.db").exists()


def test_the_ui_shows_accuracies_compares_runs_and_listens_on_this_machine_only(
    finished: Project, tmp_path: Path
) -> None:
    # A second run, of the same network with finer figures.
    finished.edit("plot", dpi=70)
    finished.run("python", "-m", "stages.plot", DVC_EXP_NAME="fine")
    port = str(Server(tmp_path).port)
    command = (sys.executable, "-m", "cifarlab.cli", "ui", "--port", port)
    environment = {"PYTHONPATH": "src"}
    del finished.env["MLFLOW_DISABLE_TELEMETRY"]
    with finished.start(*command, **environment) as ui:
        assert ui.wait_for("open http")
        address = ui.output.splitlines()[-1].split()[1]
        answers(f"http://127.0.0.1:{port}/health")
        telemetry = answers(f"http://127.0.0.1:{port}/ajax-api/3.0/mlflow/ui-telemetry")
        assert json.loads(telemetry)["disable_ui_telemetry"]
        processes = [psutil.Process(ui.process.pid), *psutil.Process(ui.process.pid).children(True)]
        sockets = [at for process in processes for at in process.net_connections("inet")]
        assert {at.laddr.ip for at in sockets if at.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        taken = finished.run(*command, check=False, **environment)
        assert (taken.returncode, taken.stdout.count("\n")) == (1, 1)
        assert f"port {port} is taken" in taken.stdout
        accuracy = finished.runs()[""].data.metrics["accuracy/test"]
        look(address, f"{accuracy:.6f}".rstrip("0"), [r.info.run_id for r in finished.all_runs()])
        assert ui.end(signal.SIGTERM) == 0
    assert not any(process.is_running() for process in processes)


def answers(url: str) -> bytes:
    """Return what a server on this machine answers at once."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return bytes(answer.read())


def look(address: str, accuracy: str, runs: list[str]) -> None:
    """See the accuracy in the table of runs, compare two runs, open a confusion matrix."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.get_by_text(accuracy, exact=True).nth(1).wait_for()  # both runs have it
        for _ in range(2):
            page.get_by_label("toggle row selection (unchecked)").first.dispatch_event("click")
        page.get_by_test_id("runs-compare-button").click()
        page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
        page.get_by_text(re.compile("^per_class/")).first.wait_for()  # MLflow shows what differs
        run = f"{address.partition('/runs?')[0]}/runs/{runs[0]}"
        # Accuracy and loss are above the ten bars of the classes.
        page.goto(f"{run}/model-metrics")
        heights = []
        for group in ("accuracy", "loss", "per_class"):
            title = page.get_by_text(re.compile(rf"^{group}\b")).first
            title.wait_for()
            heights.append((title.bounding_box() or {})["y"])
        assert heights == sorted(heights)
        page.goto(f"{run}/artifacts/figures/confusion.png")
        page.wait_for_function(
            "[...document.images].some(i => i.naturalWidth > 300 && !i.src.includes('/static/'))"
        )
        browser.close()
