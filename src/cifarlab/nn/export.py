"""The network in formats that other programs read: PyTorch's exported graph, and ONNX."""

import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifarlab.files import atomic
from cifarlab.nn.network import Network


def export_torch(network: Network, path: Path) -> None:
    """Write the network as a graph for `torch.export.load`, for any number of images.

    It takes uint8 (N, 3, image_size, image_size) and returns logits. Names of the classes and size
    are in its extra file network.json.
    """
    program, content = torch.export.export(network, **_inputs(network)), io.BytesIO()
    # Not to the file: on a full disk, PyTorch's writer would abort the process.
    torch.export.save(program, content, extra_files={"network.json": _description(network)})
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


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
    with atomic(path) as temporary:
        onnx.save(model, temporary)


def _inputs(network: Network) -> dict[str, Any]:
    # With a single image, the exported graph would accept no other number.
    images = torch.zeros(2, 3, network.image_size, network.image_size, dtype=torch.uint8)
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("images", min=1)},)}


def _description(network: Network) -> str:
    return json.dumps({"classes": network.classes, "image_size": network.image_size})
