"""The trained network as an MLflow model: raw images in, names of classes out, and no pickle."""

import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cifarlab.nn import weights
from cifarlab.nn.export import export_torch

CLASSIFIER = Path(__file__).with_name("classifier.py")


def write(folder: Path, network_file: Path, model: Any) -> None:
    """Write an MLflow model into a new folder.

    mlflow.pyfunc takes uint8 (N, height, width, 3) of any size and returns names of classes and
    probabilities. mlflow.pytorch takes uint8 (N, 3, image_size, image_size) and returns logits.
    artifacts/network.safetensors is the network itself, for `cifarlab predict`.

    Parameters
    ----------
    model : mlflow.models.Model with its ids; it gets the description of what was written
    """
    import mlflow
    import torch
    from mlflow.types import ColSpec, Schema, TensorSpec

    network = weights.load(network_file)
    exported = folder.with_name("network.pt2")
    export_torch(network, exported)
    names = ["probability", *(f"probability/{name}" for name in network.classes)]
    columns = [ColSpec("string", "class"), *(ColSpec("double", name) for name in names)]
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    packages = ("mlflow", "numpy", "pandas", "pillow", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's: it has no example of the input
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(CLASSIFIER),
            artifacts={"network": str(exported), "weights": str(network_file)},
            model_config={"classes": network.classes, "image_size": network.image_size},
            signature=mlflow.models.ModelSignature(images, Schema(columns)),
            pip_requirements=[f"{name}=={version(name)}" for name in packages],
            mlflow_model=model,
        )
    # MLflow's loader for PyTorch wants a folder with this name in it.
    (folder / "pytorch").mkdir()
    shutil.move(folder / "artifacts/network.pt2", folder / "pytorch/model.pt2")
    function = model.flavors["python_function"]
    paths = {"network": "pytorch/model.pt2", "weights": f"artifacts/{network_file.name}"}
    # Without the paths of this machine.
    function["artifacts"] = {name: {"path": path, "uri": path} for name, path in paths.items()}
    function["model_code_path"] = CLASSIFIER.name
    torch_version = str(torch.__version__)
    model.add_flavor("pytorch", model_data="pytorch", pytorch_version=torch_version, code=None)
    model.save(folder / "MLmodel")
