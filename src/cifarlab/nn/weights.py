"""Networks on disk: weights, and what other programs read: PyTorch's exported graph, and ONNX."""

import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cifarlab.errors import UserError, in_a_sentence
from cifarlab.files import write
from cifarlab.nn.network import Network
from cifarlab.params.geometry import ModelParams


def save(network: Network, path: Path) -> None:
    """Write the weights as safetensors, with a header that says how to build the network."""
    params, size, classes = network.params.model_dump(), network.image_size, network.classes
    header = json.dumps({"params": params, "image_size": size, "classes": classes})
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    # A single key: safetensors writes several in random order, so the bytes would differ.
    write(path, safetensors.torch.save(tensors, {"network": header}))


def load(path: Path) -> Network:
    """Return the network that `save` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    UserError
        The file is missing, damaged, or from another version of this project.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; `dvc repro` trains a network, `dvc pull` gets one")
    problem = f"{path} holds no network of this version (%s); `dvc repro -f train` trains it again"
    kinds = (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
    with in_a_sentence(problem, *kinds), safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["network"])
        params = ModelParams(**header["params"])
        network = Network(params, header["image_size"], header["classes"])
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return network.eval()


def export_torch(network: Network, path: Path) -> None:
    """Write the network as a graph for `torch.export.load`, for any number of images.

    It takes uint8 (N, 3, image_size, image_size) and returns logits. Names of the classes and size
    are in its extra file network.json.
    """
    program, content = torch.export.export(network, **_inputs(network)), io.BytesIO()
    # Not to the file: on a full disk, PyTorch's writer would abort the process.
    torch.export.save(program, content, extra_files={"network.json": _description(network)})
    write(path, content.getbuffer())


def export_onnx(network: Network, path: Path) -> None:
    """Write the network as ONNX, for any number of images.

    Input images, uint8 (N, 3, image_size, image_size), output probabilities, float32 (N, classes).
    The property network of the file holds names of the classes and size as JSON.
    """
    import onnx

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    module = nn.Sequential(OrderedDict(network=network, softmax=nn.Softmax(1))).eval()
    program = torch.onnx.export(module, **_inputs(network), **names, verbose=False)
    assert program
    model = program.model_proto
    onnx.helper.set_model_props(model, {"network": _description(network)})
    write(path, model.SerializeToString())


def _inputs(network: Network) -> dict[str, Any]:
    # With a single image, the exported graph would accept no other number.
    images = torch.zeros(2, 3, network.image_size, network.image_size, dtype=torch.uint8)
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("images", min=1)},)}


def _description(network: Network) -> str:
    return json.dumps({"classes": network.classes, "image_size": network.image_size})
