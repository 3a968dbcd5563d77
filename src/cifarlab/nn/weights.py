"""Weights on disk."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model

from cifarlab.errors import UserError, first_line
from cifarlab.files import atomic
from cifarlab.nn.network import Network
from cifarlab.params.geometry import ModelParams


def save(network: Network, path: Path) -> None:
    """Write the weights as safetensors, with a header that says how to build the network.

    Raises
    ------
    OSError
        The disk is full.
    """
    params, size, classes = network.params.model_dump(), network.image_size, network.classes
    header = json.dumps({"params": params, "image_size": size, "classes": classes})
    with atomic(path) as temporary:
        try:
            # A single key: safetensors writes several in random order, so the bytes would differ.
            save_model(network, temporary, {"network": header})
        except SafetensorError as error:  # safetensors' error for a full disk
            raise OSError(first_line(error)) from error
        temporary.chmod(0o644)  # safetensors makes it readable for its owner only


def load(path: Path) -> Network:
    """Return the network that `save` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    UserError
        The file is missing, damaged, or from another version of this project.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["network"])
            params = ModelParams(**header["params"])
            network = Network(params, header["image_size"], header["classes"])
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = f"{path} holds no network of this version ({first_line(error)})"
        raise UserError(f"{problem}; `dvc repro -f train` trains it again") from error
    return network.eval()
