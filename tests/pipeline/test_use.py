"""All ways to use a trained network give the same classes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support.project import Project


@contextlib.contextmanager
def served(project: Project, uri: str) -> Iterator[str]:
    """Serve a model with MLflow's own server; yield its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri]
    command += ["--port", str(port), "--env-manager", "local", "--workers", "1"]
    env = project.env | {"MLFLOW_TRACKING_URI": f"sqlite:///{project.folder}/mlflow.db"}
    process = subprocess.Popen(
        command, env=env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)  # before it asks again
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, images: np.ndarray) -> list[dict[str, object]]:
    body = json.dumps({"inputs": images.tolist()}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        predictions: list[dict[str, object]] = json.load(answer)["predictions"]
    return predictions


@pytest.mark.slow
def test_every_way_gives_the_same_classes(finished: Project, tmp_path: Path) -> None:
    images = np.load(finished.folder / "data/test_images.npy")
    table = pd.read_csv(finished.folder / "plots/predictions.csv", dtype=str)
    expected = list(table["predicted"])
    [output] = finished.runs()[""].outputs.model_outputs
    uri = f"models:/{output.model_id}"
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    classes = [str(i) for i in range(10)]

    # cifarlab predict, on files
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:04}.png")
    command = ("python", "-m", "cifarlab.cli")
    done = finished.run(*command, "predict", str(tmp_path), "--json", PYTHONPATH="src")
    assert [row["class"] for row in json.loads(done.stdout)] == expected

    # MLflow in Python
    mlflow.set_tracking_uri(f"sqlite:///{finished.folder}/mlflow.db")
    predicted = mlflow.pyfunc.load_model(uri).predict(images)
    assert list(predicted["class"]) == expected
    logits = mlflow.pytorch.load_model(uri)(torch.from_numpy(channels_first))
    assert [classes[i] for i in logits.argmax(1)] == expected
    mlflow.set_tracking_uri(None)

    # ONNX and PyTorch's exported graph
    both = ("--onnx", str(tmp_path / "a.onnx"), "--torch", str(tmp_path / "a.pt2"))
    finished.run(*command, "export", *both, PYTHONPATH="src")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    [found] = session.run(None, {"images": channels_first})
    assert [classes[i] for i in found.argmax(1)] == expected
    np.testing.assert_allclose(found, logits.softmax(1).detach().numpy(), atol=1e-4)
    graph = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(graph(torch.from_numpy(channels_first)), logits)

    # HTTP, with a server that is killed and started again
    for start in (0, 3):
        with served(finished, uri) as address:
            answers = ask(address, images[start : start + 3])
            assert [row["class"] for row in answers] == expected[start : start + 3]
            assert [row["class"] for row in ask(address, images[7:8])] == expected[7:8]
