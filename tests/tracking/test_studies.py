"""What a study reads from MLflow."""

from pathlib import Path

import pytest

from cifarlab.pipeline import Revision
from cifarlab.tracking import studies
from tests.tracking.conftest import client_of


def test_the_time_of_an_epoch_that_was_trained_again_counts_once(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(checkout)
    experiment = client.create_experiment("cifarlab", (checkout / "mlartifacts").as_uri())
    tags = {"device": "a CPU", "threads": "1", "precision": "float32", "torch": "2"}
    run_id = client.create_run(experiment, start_time=1000, tags=tags).info.run_id
    for timestamp, (epoch, seconds) in enumerate([(1, 5.0), (2, 6.0), (1, 2.0), (2, 3.0)]):
        client.log_metric(run_id, "epoch_seconds", seconds, timestamp, epoch)
    client.set_terminated(run_id, end_time=10_000)
    monkeypatch.setattr(studies, "run_of", lambda _: run_id)
    found = studies.timing_of(Revision("a", "b", "c"))
    assert found["seconds"] == 5
    assert (found["run"], found["wall"]) == (run_id, 9)
    assert found["machine"] == "a CPU, 1 threads, float32, PyTorch 2"
