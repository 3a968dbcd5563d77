"""Exported networks compute what the network computes."""

import json
import resource
from pathlib import Path

import onnxruntime
import pytest
import torch

from cifarlab.nn.network import Network
from cifarlab.nn.weights import export_onnx, export_torch
from cifarlab.params.sections import Params

CLASSES = ["NA", "C+", "C#", "Käfer", "猫", "7"]
IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def network(make_params) -> Network:  # type: ignore[no-untyped-def]
    params: Params = make_params({"model.widths": [8, 8, 8], "model.layers": 3})
    torch.manual_seed(0)
    network = Network(params.model, 32, CLASSES)
    network.measure(IMAGES.permute(0, 2, 3, 1))
    network(IMAGES)  # running statistics that are not those of the start
    return network.eval()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_graph_of_pytorch_takes_any_number_of_images(
    network: Network, tmp_path: Path, count: int
) -> None:
    export_torch(network, tmp_path / "a file")
    extra = {"network.json": ""}
    loaded = torch.export.load(tmp_path / "a file", extra_files=extra).module()
    assert torch.equal(loaded(IMAGES[:count]), network(IMAGES[:count]))
    assert json.loads(extra["network.json"]) == {"classes": CLASSES, "image_size": 32}


def test_the_same_network_gives_the_same_file(network: Network, tmp_path: Path) -> None:
    for name in ("first", "another"):
        export_torch(network, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "another").read_bytes()


def test_a_full_disk_is_an_error_and_leaves_no_file(network: Network, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the error of a full disk
    try:
        for export in (export_torch, export_onnx):
            with pytest.raises(OSError, match="File too large"):
                export(network, tmp_path / "network")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*tmp_path.glob("*network*")]


def test_onnx_gives_the_probabilities(network: Network, tmp_path: Path) -> None:
    export_onnx(network, tmp_path / "network.onnx")
    assert [path.name for path in tmp_path.glob("network*")] == ["network.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    described = json.loads(session.get_modelmeta().custom_metadata_map["network"])
    assert described == {"classes": CLASSES, "image_size": 32}
    for count in (1, 2, 5):
        [found] = session.run(["probabilities"], {"images": IMAGES[:count].numpy()})
        expected = network(IMAGES[:count]).softmax(1).detach()
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
