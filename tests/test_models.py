import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cifarlab import UserError, models
from cifarlab.architecture import ModelParams
from cifarlab.models import Network, Normalize, predict
from cifarlab.params import Params
from tests.conftest import NOTEBOOK, REPO

Make = Callable[..., ModelParams]
POOLS, PADDINGS = ("max", "avg", "stride", "none"), ("same", "valid")


@pytest.fixture
def make(content: dict[str, Any]) -> Make:
    """Return a function: make(layers=3) gives the committed model parameters with changes, small ones first of all."""
    small = content["model"] | {"widths": [8, 16, 24]}
    return lambda **changes: ModelParams(**small | changes)


def pixels(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Random images as they are on disk."""
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(n: int, size: int = 32) -> Tensor:
    return pixels(n, size).permute(0, 3, 1, 2)


def seeded(params: ModelParams, size: int = 32, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(params, size, ["a", "b", "c"])


def layers_of(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


# The architecture


def test_notebook_variant_is_the_handwritten_network(make_params: Callable[..., Params]) -> None:
    torch.manual_seed(0)
    network = Network(make_params(NOTEBOOK).model, 32, [str(i) for i in range(10)])
    network.normalize.measure(pixels(4))
    network.train()(batch(8))  # moves the running statistics away from 0 and 1
    reference = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(128, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    weights = [tensor for name, tensor in network.state_dict().items() if not name.startswith("normalize")]
    reference.load_state_dict(dict(zip(reference.state_dict(), weights, strict=True)))
    x = (batch(8).float() - network.normalize.mean) / network.normalize.std
    for mode in (False, True):  # in training mode the same seed drops the same channels
        torch.manual_seed(1)
        expected = reference.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(network.train(mode)(batch(8)), expected)
    assert network.count_parameters() == sum(p.numel() for p in reference.parameters()) == 538_506


def torch_sizes(pool: str, padding: str, kernel: int, stages: list[int], size: int) -> list[tuple[int, int]] | None:
    """In and out sizes of the convolutions by running torch's own on an image without data; None where one refuses."""
    sizes, x = [], torch.empty(1, 1, size, size, device="meta")
    weight = torch.empty(1, 1, kernel, kernel, device="meta")
    try:
        for convolutions in stages:
            for i in range(convolutions):
                before = x.shape[-1]
                x = F.conv2d(x, weight, stride=2 if pool == "stride" and i == 0 else 1, padding=kernel // 2 if padding == "same" else 0)
                sizes.append((before, x.shape[-1]))
            if pool in ("max", "avg"):
                x = F.max_pool2d(x, 2)
    except RuntimeError:
        return None
    return sizes


@pytest.mark.parametrize(("pool", "padding"), list(itertools.product(POOLS, PADDINGS)))
def test_plan_has_the_sizes_of_torch_and_refuses_what_torch_does(make: Make, pool: str, padding: str) -> None:
    accepted = refused = 0
    for kernel, layers, size in itertools.product((1, 2, 3, 5), range(1, 10), (1, 4, 7, 32)):
        if padding == "same" and kernel == 2:
            continue
        params = make(pool=pool, padding=padding, kernel_size=kernel, layers=layers)
        try:
            planned = [(c.in_size, c.out_size) for c in params.plan(size)]
        except ValueError:
            planned = None
        assert planned == torch_sizes(pool, padding, kernel, params.stages, size), (kernel, layers, size)
        accepted, refused = accepted + (planned is not None), refused + (planned is None)
    assert accepted > 30
    assert refused > 20 or (padding == "same" and pool in ("stride", "none"))


@pytest.mark.parametrize(("pool", "padding"), list(itertools.product(POOLS, PADDINGS)))
def test_every_valid_combination_computes_and_learns(make: Make, pool: str, padding: str) -> None:
    activations = itertools.cycle(models.ACTIVATIONS)  # seven, prime to the sizes of the other choices: each meets each
    options = itertools.product(range(1, 10), ("batch", "group", "none"), (False, True), ("max", "avg", "none"))
    size = 24 if padding == "valid" else 16
    built, images = 0, batch(4, size)
    for layers, norm, residual, global_pool in options:
        choice = {"layers": layers, "norm": norm, "residual": residual, "global_pool": global_pool, "activation": next(activations)}
        try:
            # Two channels in a group at least: of one value, nothing is left by group normalisation.
            params = make(pool=pool, padding=padding, widths=[16, 16, 32], head=[8], **choice)
            plan = list(params.plan(size))
        except ValueError:
            continue
        network = seeded(params, size)
        inputs: list[tuple[int, ...]] = []
        for module in network.stages.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, x, y, seen=inputs: seen.append((*x[0].shape[1:], *y.shape[1:])))
        logits = network(images)
        assert inputs == [(c.in_channels, c.in_size, c.in_size, c.out_channels, c.out_size, c.out_size) for c in plan], choice
        assert logits.shape == (4, 3), choice
        assert logits.isfinite().all(), choice
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, (choice, name)
            assert parameter.grad.isfinite().all(), (choice, name)
        assert all(module.weight.grad is not None and module.weight.grad.any() for module in layers_of(network)), choice
        built += 1
    assert built >= 27


def test_residual_adds_the_first_output_to_the_last(make: Make) -> None:
    params = make(residual=True, layers=4, norm="none", activation="relu", pool="max", padding="same")
    network = seeded(params).eval()
    x = torch.randn(2, 3, 8, 8)
    conv = [(module.weight, module.bias) for module in network.stages.modules() if isinstance(module, nn.Conv2d)]
    layer = [lambda t, w=w, b=b: F.relu(F.conv2d(t, w, b, padding=1)) for w, b in conv]
    for i in (0, 1):  # a stage of one convolution has nothing to skip
        x = F.max_pool2d(layer[i](x), 2)
    first = layer[2](x)
    torch.testing.assert_close(network.stages[2](x), F.max_pool2d(first + layer[3](first), 2))


def test_group_norm_has_eight_groups(make: Make) -> None:
    network, outputs = seeded(make(norm="group", widths=[24], layers=1)), []
    next(m for m in network.modules() if isinstance(m, nn.GroupNorm)).register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    network(batch(2))
    groups = outputs[0].reshape(2, 8, -1)  # three channels each
    torch.testing.assert_close(groups.mean(2), torch.zeros(2, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(2, 8), atol=1e-3, rtol=0)
    assert outputs[0].mean((2, 3)).abs().max() > 0.01  # a single channel is not centred


def test_dropout_drops_whole_channels_after_its_stage_only(make: Make) -> None:
    # A sigmoid is never zero: what is zero has been dropped.
    params = make(layers=3, norm="none", activation="sigmoid", dropout=[0, 0.5, 0])
    network = seeded(params).train()
    outputs: list[Tensor] = []
    for stage in network.stages:
        stage.register_forward_hook(lambda _, __, out: outputs.append(out.detach()))
    network(batch(16))
    dropped = [(out == 0).all(dim=(2, 3)) for out in outputs]
    assert [bool((out == 0).any()) for out in outputs] == [False, True, False]
    assert torch.equal((outputs[1] == 0).any(dim=(2, 3)), dropped[1])
    assert 0.35 < dropped[1].float().mean() < 0.65
    network.eval()(batch(16))
    torch.testing.assert_close(outputs[4], torch.where(dropped[1][:, :, None, None], outputs[4], outputs[1] / 2))  # the rest is scaled up


def test_a_single_share_drops_after_every_stage(make: Make) -> None:
    network = seeded(make(layers=2, dropout=0.25))
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout2d)] == [0.25, 0.25]


# Initial weights

STD = {
    "kaiming": lambda fan_in, _: math.sqrt(2 / fan_in),
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "normal": lambda *_: 1.0,
    "default": lambda fan_in, _: math.sqrt(1 / (3 * fan_in)),  # uniform within ± 1 / √fan_in
}


@pytest.mark.parametrize("gain", [1.0, 0.3])
@pytest.mark.parametrize("init", STD)
def test_spread_of_random_weights(make: Make, init: str, gain: float) -> None:
    network = seeded(make(init=init, init_gain=gain, widths=[64, 128], layers=2, head=[128], global_pool="none"), 8)
    for module in layers_of(network)[1:3]:  # over 70,000 weights each
        fan_out, *rest = module.weight.shape
        area = module.weight[0, 0].numel()
        assert module.weight.std().item() == pytest.approx(gain * STD[init](math.prod(rest), fan_out * area), rel=0.02)
        assert module.weight.mean().item() == pytest.approx(0, abs=gain * 0.02)


@pytest.mark.parametrize(("init", "gain", "expected"), [("zeros", 1.0, 0.0), ("constant", 0.2, 0.2)])
def test_weights_without_chance(make: Make, init: str, gain: float, expected: float) -> None:
    assert all((module.weight == expected).all() for module in layers_of(seeded(make(init=init, init_gain=gain))))


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_dirac_passes_channels_on(make: Make, gain: float) -> None:
    first, second = layers_of(seeded(make(init="dirac", init_gain=gain, widths=[8], layers=2)))[:2]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(first(x)[:, :3], gain * x)
    assert not first(x)[:, 3:].any()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(second(x), gain * x)


@pytest.mark.parametrize("init", ["default", "kaiming", "xavier", "dirac", "normal", "constant", "zeros"])
def test_biases_start_at_zero_but_for_the_default(make: Make, init: str) -> None:
    assert any(module.bias is not None and module.bias.any() for module in layers_of(seeded(make(init=init)))) == (init == "default")


# Data in, predictions out


def test_normalize_has_the_mean_and_spread_of_the_images() -> None:
    images = pixels(50, 6) // torch.tensor([1, 2, 5], dtype=torch.uint8)
    normalize = Normalize()
    normalize.measure(images)
    values = images.numpy().astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(normalize.mean.flatten(), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(normalize.std.flatten(), values.std(0), rtol=1e-6)
    out = normalize(images.permute(0, 3, 1, 2))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3))


def test_normalize_survives_images_of_one_colour() -> None:
    normalize = Normalize()
    normalize.measure(torch.full((2, 4, 4, 3), 200, dtype=torch.uint8))
    assert not normalize(torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)).any()


@pytest.mark.parametrize("mode", [True, False])
def test_predict_evaluates_and_puts_the_mode_back(make: Make, mode: bool) -> None:
    network = seeded(make(layers=3, dropout=0.5))
    network.train()(batch(8, 32))
    expected = network.eval()(batch(7)).detach()
    network.train(mode)
    for size in (1, 3, 7, 100):
        torch.testing.assert_close(predict(network, pixels(7), size), expected)
        assert all(module.training == mode for module in network.modules())


# On disk


@pytest.fixture
def trained(make: Make) -> Network:
    """A network none of whose numbers are the initial ones."""
    network = seeded(make(layers=4, dropout=[0, 0.5, 0], residual=True, head=[6])).train()
    network.normalize.measure(pixels(3))
    network(batch(8)).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    return network.to(memory_format=torch.channels_last)


def test_round_trip_is_exact(trained: Network, tmp_path: Path) -> None:
    path = tmp_path / "models" / "network.safetensors"
    models.save(trained, path)
    loaded = models.load(path)
    assert (loaded.params, loaded.image_size, loaded.classes) == (trained.params, 32, ["a", "b", "c"])
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())
    assert not loaded.training
    torch.testing.assert_close(predict(loaded, pixels(5), 5), predict(trained, pixels(5), 5))


def test_the_same_network_gives_the_same_bytes_in_another_process(tmp_path: Path, make: Make) -> None:
    params = make(layers=2)
    models.save(seeded(params), tmp_path / "one.safetensors")
    models.save(seeded(params), tmp_path / "two.safetensors")
    code = """
import sys
from pathlib import Path
import torch
from cifarlab import models
from cifarlab.architecture import ModelParams
torch.manual_seed(0)
models.save(models.Network(ModelParams.model_validate_json(sys.argv[1]), 32, ["a", "b", "c"]), Path("three.safetensors"))
"""
    env = os.environ | {"PYTHONPATH": str(REPO / "src"), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, params.model_dump_json()], cwd=tmp_path, env=env, check=True, timeout=60)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_the_file_holds_numbers_and_names_but_no_pickle(trained: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    models.save(trained, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    assert header.keys() == {"__metadata__", *trained.state_dict()}
    rest = {name: content[end:][slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    assert rest == {name: tensor.contiguous().numpy().tobytes() for name, tensor in trained.state_dict().items()}
    assert end + sum(map(len, rest.values())) == len(content)  # and nothing else


def _missing(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 100)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _foreign_header(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"network": '{"params": {"layers": 3}, "image_size": 32, "classes": []}'})


def _other_shapes(path: Path) -> None:
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name)[:1] for name in file.keys() if "head" in name}  # noqa: SIM118
    save_file(tensors, path, header)


@pytest.mark.parametrize("damage", [_missing, _garbage, _cut_short, _foreign, _foreign_header, _other_shapes])
def test_a_file_that_holds_no_network_is_refused_in_one_sentence(trained: Network, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "network.safetensors"
    models.save(trained, path)
    damage(path)
    with pytest.raises(UserError, match=r"network\.safetensors holds no network .* `dvc repro -f train`") as caught:
        models.load(path)
    assert "\n" not in str(caught.value)
