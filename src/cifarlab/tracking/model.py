"""The trained network as an MLflow model: raw images in, names of classes out, and no pickle."""

import platform
import runpy
import shutil
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CLASSIFIER = Path(__file__).with_name("classifier.py")
PACKAGES = ("mlflow", "numpy", "pandas", "pillow", "torch")


def write(
    folder: Path, network_file: Path, graph: Path, config: dict[str, Any], model: Any
) -> None:
    """Write an MLflow model into a new folder.

    mlflow.pyfunc takes uint8 (N, height, width, 3) of any size and returns names of classes and
    probabilities. mlflow.pytorch takes uint8 (N, 3, image_size, image_size) and returns logits.
    artifacts/network.safetensors is the network itself, for `cifarlab predict`.

    Parameters
    ----------
    graph : what `weights.export_torch` wrote of this network; it is moved into the folder
    config : the "classes" and the "image_size" of the network
    model : mlflow.models.Model with its ids; it gets the description of what was written
    """
    import mlflow
    from mlflow.types import ColSpec, Schema, TensorSpec

    for part in ("artifacts", "pytorch"):
        (folder / part).mkdir(parents=True)
    shutil.move(graph, folder / "pytorch/model.pt2")  # MLflow's loader wants a folder
    shutil.copy(network_file, folder / "artifacts")
    shutil.copy(CLASSIFIER, folder)
    _write_requirements(folder)
    names = ["probability", *(f"probability/{name}" for name in config["classes"])]
    columns = [ColSpec("string", "class"), *(ColSpec("double", name) for name in names)]
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    model.signature = mlflow.models.ModelSignature(images, Schema(columns))
    paths = {"network": "pytorch/model.pt2", "weights": f"artifacts/{network_file.name}"}
    # Not save_model, which reads the files of every installed package, and that takes seconds.
    mlflow.pyfunc.add_to_model(
        model,
        "mlflow.pyfunc.loaders.code_model",
        python_env="python_env.yaml",
        model_config=config,
        model_code_path=CLASSIFIER.name,
        artifacts={name: {"path": path, "uri": path} for name, path in paths.items()},
        streamable=False,
    )
    # From PyTorch's own file: the package has no local version, and importing it takes seconds.
    torch_file = distribution("torch").locate_file("torch/version.py")
    torch_version = runpy.run_path(str(torch_file))["__version__"]
    model.add_flavor("pytorch", model_data="pytorch", pytorch_version=torch_version, code=None)
    model.model_size_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    model.save(folder / "MLmodel")


def _write_requirements(folder: Path) -> None:
    # PyPI does not have what follows a +, such as "2.14.1+cpu".
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(packages), "utf-8")
    python = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(python), "utf-8")
