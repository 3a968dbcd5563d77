"""The network in formats that other programs read: PyTorch's exported graph, and ONNX."""

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cifarlab.files import atomic
from cifarlab.nn.network import Network


class Probabilities(nn.Module):
    """Raw pixels in, probabilities of the classes out."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, image_size, image_size) to float32 (N, classes)."""
        return cast(Tensor, self.network(images).softmax(1))


def export_torch(network: Network, path: Path) -> None:
    """Write the network as a graph for `torch.export.load`, for any number of images.

    It takes uint8 (N, 3, image_size, image_size) and returns logits. Names of the classes and size
    are in its extra file network.json.
    """
    program = torch.export.export(network, _example(network), dynamic_shapes=_any_number())
    with atomic(path) as temporary:
        # It wants this suffix.
        target = temporary.with_suffix(".pt2")
        torch.export.save(program, target, extra_files={"network.json": _description(network)})
        target.replace(temporary)


def export_onnx(network: Network, path: Path) -> None:
    """Write the network as ONNX, for any number of images.

    Input images, uint8 (N, 3, image_size, image_size), output probabilities, float32 (N, classes).
    The property network of the file holds names of the classes and size as JSON.
    """
    import onnx

    program = torch.onnx.export(
        Probabilities(network).eval(),
        _example(network),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=_any_number(),
        verbose=False,
    )
    assert program
    model = program.model_proto
    onnx.helper.set_model_props(model, {"network": _description(network)})
    with atomic(path) as temporary:
        onnx.save(model, temporary)


def _example(network: Network) -> tuple[Tensor]:
    # With a single image, the exported graph would accept no other number.
    size = network.image_size
    return (torch.zeros(2, 3, size, size, dtype=torch.uint8),)


def _any_number() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("images", min=1)},)


def _description(network: Network) -> str:
    return json.dumps({"classes": network.classes, "image_size": network.image_size})
