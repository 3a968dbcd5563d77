"""The logged model: raw images in, names of classes out."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image, ImageOps

from cifarlab.nn import weights
from cifarlab.nn.network import Network
from cifarlab.tracking import model
from tests.support.networks import small_params

CLASSES = ["NA", "C+", "C#"]
CONFIG = {"classes": CLASSES, "image_size": 32}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(small_params(), 32, CLASSES).eval()


@pytest.fixture(scope="module")
def written(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weights.save(network, folder / "network.safetensors")
    known = mlflow.models.Model(metadata={"training_key": "abc"})
    weights.export_torch(network, folder / "graph")
    path = folder / "network.safetensors"
    model.write(folder / "model", path, folder / "graph", CONFIG, known)
    return folder / "model"


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 60), (7, 100)])
@pytest.mark.parametrize("count", [1, 3, 130])
def test_pyfunc_takes_raw_images_of_any_size(
    written: Path, network: Network, height: int, width: int, count: int
) -> None:
    images = RNG.integers(0, 256, (count, height, width, 3), np.uint8)
    table = mlflow.pyfunc.load_model(str(written)).predict(images)
    squares = [np.asarray(ImageOps.fit(Image.fromarray(image), (32, 32))) for image in images]
    with torch.no_grad():
        logits = network(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))
    expected = logits.softmax(1).numpy()
    names = [f"probability/{name}" for name in CLASSES]
    assert list(table.columns) == ["class", "probability", *names]
    np.testing.assert_allclose(table[names], expected, atol=1e-6)
    assert list(table["class"]) == [CLASSES[i] for i in expected.argmax(1)]
    np.testing.assert_allclose(table["probability"], expected.max(1), atol=1e-6)


def test_pyfunc_refuses_other_shapes(written: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(written))
    for wrong in (np.zeros((1, 3, 32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8)):
        with pytest.raises((MlflowException, ValueError), match=r"shape|must be"):
            loaded.predict(wrong)
    assert isinstance(loaded.predict(np.zeros((0, 32, 32, 3), np.uint8)), pd.DataFrame)


@pytest.mark.parametrize("count", [1, 4])
def test_pytorch_gives_logits(written: Path, network: Network, count: int) -> None:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    loaded = mlflow.pytorch.load_model(str(written))
    torch.testing.assert_close(loaded(images), network(images))


def test_pypi_has_the_required_packages(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "version", lambda name: "2.14.1+cpu")
    weights.save(network, tmp_path / "network.safetensors")
    path = tmp_path / "network.safetensors"
    (tmp_path / "graph").touch()
    model.write(tmp_path / "model", path, tmp_path / "graph", CONFIG, mlflow.models.Model())
    required = (tmp_path / "model/requirements.txt").read_text().split()
    assert required == [f"{name}==2.14.1" for name in model.PACKAGES]


def test_the_model_says_what_it_is_and_holds_no_pickle(written: Path) -> None:
    described = mlflow.models.Model.load(str(written))
    assert described.metadata["training_key"] == "abc"
    assert described.flavors["pytorch"]["pytorch_version"] == torch.__version__  # MLflow compares
    assert described.flavors["python_function"]["config"] == {
        "classes": CLASSES,
        "image_size": 32,
    }
    files = [path for path in written.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert not [path for path in files if path.suffix in (".pkl", ".pth")]
    for path in files:  # nothing of this machine
        assert str(written.parent).encode() not in path.read_bytes(), path
    loaded = weights.load(written / "artifacts/network.safetensors")
    assert loaded.classes == CLASSES
