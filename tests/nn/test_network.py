"""The network compared with handwritten PyTorch networks; initialisation; weights on disk."""

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

from cifarlab.errors import UserError
from cifarlab.nn.layers import ACTIVATIONS, GlobalPool, Normalize, StridedPointwise, Whiten
from cifarlab.nn.network import Network, initialise, predict
from cifarlab.nn.weights import load, save
from cifarlab.params.geometry import ModelParams
from cifarlab.params.sections import Params
from tests.conftest import NOTEBOOK, PLAIN_NETWORK, REPO

Make = Callable[..., ModelParams]
POOLS, PADDINGS = ("max", "avg", "stride", "none"), ("same", "valid")


@pytest.fixture
def make(content: dict[str, Any]) -> Make:
    """Return a function: make(layers=3) gives a small plain network's parameters with changes."""
    return lambda **changes: ModelParams(
        **content["model"] | PLAIN_NETWORK | {"widths": [8, 16, 24]} | changes
    )


def pixels(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Return random images in the layout of the files, uint8 (n, size, size, 3)."""
    return torch.randint(
        0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def batch(n: int, size: int = 32) -> Tensor:
    return pixels(n, size).permute(0, 3, 1, 2)


def seeded(params: ModelParams, size: int = 32, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(params, size, ["a", "b", "c"])


def natural(n: int, size: int = 16) -> Tensor:
    """Return smooth images, in which neighbouring pixels and colours are correlated."""
    noise = torch.rand(
        n, 3, size // 2 + 1, size // 2 + 1, generator=torch.Generator().manual_seed(0)
    )
    mixed = torch.einsum(
        "oc,nchw->nohw", torch.tensor([[1.0, 0.2, 0.1], [0.7, 0.7, 0.1], [0.5, 0.3, 0.9]]), noise
    )
    return (F.interpolate(mixed, (size, size), mode="bilinear") * 150).byte().permute(0, 2, 3, 1)


def layers_of(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


# The architecture


def test_notebook_variant_matches_the_handwritten_network(
    make_params: Callable[..., Params],
) -> None:
    torch.manual_seed(0)
    network = Network(make_params(NOTEBOOK).model, 32, [str(i) for i in range(10)])
    network.normalize.measure(pixels(4))
    network.train()(batch(8))  # moves the running statistics away from 0 and 1
    reference = nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(
            nn.Conv2d(64, 128, 3),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.1),
        ),
        *(nn.Conv2d(128, 256, 3), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    weights = [
        tensor for name, tensor in network.state_dict().items() if not name.startswith("normalize")
    ]
    reference.load_state_dict(dict(zip(reference.state_dict(), weights, strict=True)))
    x = (batch(8).float() - network.normalize.mean) / network.normalize.std
    for mode in (False, True):  # in training mode the same seed drops the same channels
        torch.manual_seed(1)
        expected = reference.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(network.train(mode)(batch(8)), expected)
    assert network.count_parameters() == sum(p.numel() for p in reference.parameters()) == 538_506


def test_stem_pooling_at_the_start_momentum_and_scale_match_a_handwritten_network(
    make: Make,
) -> None:
    choice = {
        "stem": "whiten",
        "layers": 3,
        "widths": [8, 16],
        "pool": "max",
        "pool_at": "start",
        "activation": "gelu",
    }
    network = seeded(
        make(
            **choice,
            norm="batch",
            norm_momentum=0.4,
            global_pool="max",
            dropout=[0.2, 0],
            logit_scale=0.125,
        ),
        16,
    )
    network.measure(pixels(4, 16))
    reference = nn.Sequential(
        *(nn.Conv2d(3, 24, 2), nn.GELU()),  # 15
        *(
            nn.Conv2d(24, 8, 3, padding=1),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(8, momentum=0.4),
            nn.GELU(),
            nn.Dropout2d(0.2),
        ),  # 7
        *(
            nn.Conv2d(8, 16, 3, padding=1),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(16, momentum=0.4),
            nn.GELU(),
        ),  # 3
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=0.4), nn.GELU()),
        *(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 3)),
    )

    def weights() -> list[Tensor]:
        return [
            tensor
            for name, tensor in network.state_dict().items()
            if not name.startswith("normalize")
        ]

    reference.load_state_dict(
        {
            name: tensor.clone()
            for name, tensor in zip(reference.state_dict(), weights(), strict=True)
        }
    )
    x = (batch(8, 16).float() - network.normalize.mean) / network.normalize.std
    # In training mode the same seed drops the same channels, and the running statistics change.
    for mode in (True, True, False):
        torch.manual_seed(1)
        expected = reference.train(mode)(x) / 8
        torch.manual_seed(1)
        torch.testing.assert_close(network.train(mode)(batch(8, 16)), expected)
    for ours, theirs in zip(weights(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    frozen = 24 * 3 * 2 * 2
    trained = sum(p.numel() for p in reference.parameters()) - frozen
    assert network.count_parameters() == trained


@pytest.mark.parametrize("head", [[], [6]])
def test_logits_are_scaled(make: Make, head: list[int]) -> None:
    one, quarter = (seeded(make(layers=2, head=head, logit_scale=scale)) for scale in (1, 0.25))
    assert one(batch(4)).abs().max() > 0.01
    torch.testing.assert_close(quarter(batch(4)), one(batch(4)) / 4)


def torch_sizes(params: ModelParams, size: int) -> list[tuple[int, int, int]] | None:
    """Run PyTorch's own layers on an image without data.

    Returns the sizes before and after each convolution and after its pooling, or None if a layer
    raises an error.
    """
    sizes, x = [], torch.empty(1, 1, size, size, device="meta")
    weight = torch.empty(1, 1, params.kernel_size, params.kernel_size, device="meta")
    padding = params.kernel_size // 2 if params.padding == "same" else 0
    try:
        if params.stem == "whiten":
            x = F.conv2d(x, torch.empty(1, 1, 2, 2, device="meta"))
        for convolutions in params.stages:
            places = (
                ["alone"]
                if convolutions == 1
                else ["first", *["middle"] * (convolutions - 2), "last"]
            )
            for place in places:
                before = x.shape[-1]
                x = F.conv2d(
                    x,
                    weight,
                    stride=2 if params.pool == "stride" and place in ("alone", "first") else 1,
                    padding=padding,
                )
                after = x.shape[-1]
                if params.pool in ("max", "avg") and place in (
                    "alone",
                    {"start": "first", "end": "last"}[params.pool_at],
                ):
                    x = F.max_pool2d(x, 2)
                sizes.append((before, after, x.shape[-1]))
    except RuntimeError:
        return None
    return sizes


def test_a_strided_pointwise_convolution_matches_the_one_of_torch() -> None:
    ours, theirs = StridedPointwise(5, 4, 1, 2).double(), nn.Conv2d(5, 4, 1, 2).double()
    theirs.load_state_dict(ours.state_dict())
    for size in (1, 2, 7, 8):
        x = torch.randn(3, 5, size, size, dtype=torch.double, requires_grad=True)
        outputs = [layer(x) for layer in (ours, theirs)]
        gradients = [
            torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])
            for y, layer in zip(outputs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_strided_pointwise_convolutions_do_not_corrupt_memory_on_avx2(make: Make) -> None:
    """In a separate process, because glibc aborts a process with corrupted memory."""
    params = make(kernel_size=1, pool="stride", layers=4, widths=[5, 3, 4]).model_dump_json()
    code = """if True:
        import sys, torch
        from cifarlab.nn.network import Network
        from cifarlab.params.geometry import ModelParams
        torch.set_num_threads(1)
        for i in range(100):
            network = Network(ModelParams.model_validate_json(sys.argv[1]), 16, ["a", "b"])
            images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            network.to(memory_format=torch.channels_last)(images).sum().backward()
    """
    env = os.environ | {"PYTHONPATH": str(REPO / "src"), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code, params], env=env, check=True, timeout=60)


@pytest.mark.parametrize("pool_at", ["start", "end"])
@pytest.mark.parametrize("stem", ["none", "whiten"])
@pytest.mark.parametrize(("pool", "padding"), list(itertools.product(POOLS, PADDINGS)))
def test_plan_has_the_sizes_of_torch_and_refuses_what_torch_refuses(
    make: Make, pool: str, padding: str, stem: str, pool_at: str
) -> None:
    accepted = refused = 0
    for kernel, layers, size in itertools.product((1, 2, 3, 5), range(1, 10), (1, 4, 7, 32)):
        if padding == "same" and kernel == 2:
            continue
        params = make(
            stem=stem,
            pool=pool,
            pool_at=pool_at,
            padding=padding,
            kernel_size=kernel,
            layers=layers,
        )
        try:
            planned = [
                (c.in_size, c.out_size, c.out_size // 2 if c.pooled else c.out_size)
                for c in params.plan(size)
            ]
        except ValueError:
            planned = None
        assert planned == torch_sizes(params, size), (kernel, layers, size)
        accepted, refused = accepted + (planned is not None), refused + (planned is None)
    assert accepted > 20
    assert refused > 20 or (padding == "same" and pool in ("stride", "none"))


@pytest.mark.parametrize(
    ("pool", "padding", "pool_at"),
    [
        c
        for c in itertools.product(POOLS, PADDINGS, ("start", "end"))
        if c[0] in ("max", "avg") or c[2] == "end"
    ],
)
def test_every_valid_combination_computes_and_learns(
    make: Make, pool: str, padding: str, pool_at: str
) -> None:
    # The cycles of seven activations and five stems are coprime to the other choices, so that all
    # pairs occur.
    activations, stems = (
        itertools.cycle(ACTIVATIONS),
        itertools.cycle(["none", "whiten", "whiten", "none", "whiten"]),
    )
    options = itertools.product(
        range(1, 10), ("batch", "group", "none"), (False, True), ("max", "avg", "none")
    )
    size = 24 if padding == "valid" else 17
    built, images = 0, batch(4, size)
    for layers, norm, residual, global_pool in options:
        choice = {"layers": layers, "norm": norm, "residual": residual, "global_pool": global_pool}
        choice |= {"activation": next(activations), "stem": next(stems)}
        try:
            # At least two channels in a group, because normalising a single value gives zero.
            params = make(
                pool=pool, padding=padding, pool_at=pool_at, widths=[16, 16, 32], head=[8], **choice
            )
            plan = list(params.plan(size))
        except ValueError:
            continue
        network = seeded(params, size)
        inputs: list[tuple[int, ...]] = []
        for module in network.stages.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda _, x, y, seen=inputs: seen.append((*x[0].shape[1:], *y.shape[1:]))
                )
        logits = network(images)
        assert inputs == [
            (c.in_channels, c.in_size, c.in_size, c.out_channels, c.out_size, c.out_size)
            for c in plan
        ], choice
        assert logits.shape == (4, 3), choice
        assert logits.isfinite().all(), choice
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters():
            assert (parameter.grad is None) == (name == "stem.0.weight"), (choice, name)
            assert parameter.grad is None or parameter.grad.isfinite().all(), (choice, name)
        trained = [
            module.weight.grad for module in layers_of(network) if not isinstance(module, Whiten)
        ]
        assert all(gradient is not None and gradient.any() for gradient in trained), choice
        built += 1
    assert built >= 27


@pytest.mark.parametrize("pool_at", ["start", "end"])
def test_residual_adds_the_first_output_to_the_last(make: Make, pool_at: str) -> None:
    params = make(
        residual=True,
        layers=4,
        norm="none",
        activation="relu",
        pool="max",
        pool_at=pool_at,
        padding="same",
    )
    network = seeded(params).eval()
    x = torch.randn(2, 3, 8, 8)
    conv = [
        (module.weight, module.bias)
        for module in network.stages.modules()
        if isinstance(module, nn.Conv2d)
    ]
    layer = [lambda t, w=w, b=b: F.relu(F.conv2d(t, w, b, padding=1)) for w, b in conv]
    for i in (0, 1):  # a stage of one convolution has nothing to skip
        x = F.max_pool2d(layer[i](x), 2)
    first = layer[2](x)
    if pool_at == "start":  # the maximum is the same before and after the ReLU
        first = F.max_pool2d(first, 2)
        torch.testing.assert_close(network.stages[2](x), first + layer[3](first))
    else:
        torch.testing.assert_close(network.stages[2](x), F.max_pool2d(first + layer[3](first), 2))


def test_group_norm_has_eight_groups(make: Make) -> None:
    network, outputs = seeded(make(norm="group", widths=[24], layers=1)), []
    next(m for m in network.modules() if isinstance(m, nn.GroupNorm)).register_forward_hook(
        lambda _, __, out: outputs.append(out.detach())
    )
    network(batch(2))
    groups = outputs[0].reshape(2, 8, -1)  # three channels each
    torch.testing.assert_close(groups.mean(2), torch.zeros(2, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(2, 8), atol=1e-3, rtol=0)
    assert outputs[0].mean((2, 3)).abs().max() > 0.01  # a single channel is not centred


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("scale", [True, False])
def test_norm_scale_is_learned_or_one(make: Make, norm: str, scale: bool) -> None:
    network = seeded(make(norm=norm, norm_scale=scale, layers=2))
    norms = [
        module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
    ]
    assert [(m.weight.requires_grad, m.bias.requires_grad) for m in norms] == [(scale, True)] * 2
    assert all((m.weight == 1).all() for m in norms)
    assert seeded(
        make(norm=norm, norm_scale=True, layers=2)
    ).count_parameters() - network.count_parameters() == (0 if scale else 8 + 16)


@pytest.mark.parametrize(("kind", "expected"), [("max", np.max), ("avg", np.mean)])
def test_global_pooling_takes_maps_of_any_size(kind: str, expected: Callable[..., Any]) -> None:
    for height, width in ((1, 1), (3, 4), (7, 2)):
        x = torch.randn(5, 6, height, width)
        np.testing.assert_allclose(
            GlobalPool(kind)(x), expected(x.numpy(), axis=(2, 3)), rtol=1e-5, atol=1e-6
        )


def test_dropout_drops_whole_channels_after_its_stage_only(make: Make) -> None:
    # A sigmoid is never zero, so every zero was dropped.
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
    # In training the remaining channels are scaled up.
    torch.testing.assert_close(
        outputs[4], torch.where(dropped[1][:, :, None, None], outputs[4], outputs[1] / 2)
    )


def test_a_single_dropout_share_applies_to_every_stage(make: Make) -> None:
    network = seeded(make(layers=2, dropout=0.25))
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout2d)] == [
        0.25,
        0.25,
    ]


# The whitening stem


def test_whitened_patches_are_uncorrelated_with_unit_variance_and_both_signs(make: Make) -> None:
    network, images = seeded(make(stem="whiten"), 16), natural(300)
    values = images.numpy() / 255.0
    patches = np.stack(
        [
            values[:, y : y + 15, x : x + 15, c].ravel()
            for y in (0, 1)
            for x in (0, 1)
            for c in range(3)
        ]
    )
    assert np.abs(np.corrcoef(patches) - np.eye(12)).max() > 0.5  # the raw patches are correlated
    network.measure(images)
    stem = network.stem[0]
    out = (stem(network.normalize(images.permute(0, 3, 1, 2))) - stem.bias[:, None, None]).detach()
    assert out.shape == (300, 24, 15, 15)
    components = out.transpose(0, 1).flatten(1).double().numpy()
    np.testing.assert_allclose(np.cov(components[:12]), np.eye(12), atol=0.04)
    np.testing.assert_allclose(components[12:], -components[:12], atol=1e-5)


def test_patches_without_variance_give_finite_components(make: Make) -> None:
    network, grey = seeded(make(stem="whiten"), 16), natural(20)[..., :1].expand(-1, -1, -1, 3)
    for images in (grey, torch.full_like(grey, 7)):
        network.measure(images)
        assert predict(network, images, 20).isfinite().all()
        # Components without variance are not amplified without bound.
        assert network.stem[0].weight.abs().max() <= 1 / math.sqrt(5e-4)


def test_only_the_bias_of_the_stem_is_trained(make: Make) -> None:
    network, without = seeded(make(stem="whiten", layers=2)), seeded(make(stem="none", layers=2))
    # The stem has 24 biases, and gives the first layer of 8 filters 24 channels instead of 3.
    assert network.count_parameters() - without.count_parameters() == 24 + (24 - 3) * 9 * 8
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == [
        "stem.0.weight"
    ]


@pytest.mark.parametrize("init", ["zeros", "constant", "normal"])
def test_initialisation_does_not_change_the_stem(make: Make, init: str) -> None:
    network = seeded(make(stem="whiten", init="default"))
    network.measure(pixels(20))
    before = [p.clone() for p in network.stem.parameters()]
    initialise(network, init, 3.0)
    assert all(map(torch.equal, network.stem.parameters(), before))


def test_the_stem_is_measured_on_all_classes(make: Make) -> None:
    """Images of a folder are sorted by class, so the first ones all have the same class."""
    images = torch.cat([torch.full((2100, 16, 16, 3), 90, dtype=torch.uint8), natural(2100)])
    network = seeded(make(stem="whiten", layers=1), 16)
    network.measure(images)
    stem = network.stem[0]
    out = (stem(network.normalize(images.permute(0, 3, 1, 2))) - stem.bias[:, None, None]).detach()
    second_moments = out[:, :12].double().square().mean((0, 2, 3))
    assert 0.7 < second_moments.min() < second_moments.max() < 1.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measuring_images_on_the_gpu_gives_the_same_network(make: Make) -> None:
    here, there = seeded(make(stem="whiten"), 16), seeded(make(stem="whiten"), 16)
    here.measure(natural(50))
    there.measure(natural(50).cuda())  # the network itself is still on the CPU
    torch.testing.assert_close(predict(there, natural(9), 9), predict(here, natural(9), 9))


# Initial weights

STD = {
    "kaiming": lambda fan_in, _: math.sqrt(2 / fan_in),
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "normal": lambda *_: 1.0,
    "default": lambda fan_in, _: math.sqrt(1 / (3 * fan_in)),  # uniform within ± 1 / √fan_in
}


@pytest.mark.parametrize("gain", [1.0, 0.3])
@pytest.mark.parametrize("init", STD)
def test_standard_deviation_of_random_weights(make: Make, init: str, gain: float) -> None:
    network = seeded(
        make(init=init, init_gain=gain, widths=[64, 128], layers=2, head=[128], global_pool="none"),
        8,
    )
    for module in layers_of(network)[1:3]:  # over 70,000 weights each
        fan_out, *rest = module.weight.shape
        area = module.weight[0, 0].numel()
        assert module.weight.std().item() == pytest.approx(
            gain * STD[init](math.prod(rest), fan_out * area), rel=0.02
        )
        assert module.weight.mean().item() == pytest.approx(0, abs=gain * 0.02)


@pytest.mark.parametrize(
    ("init", "gain", "expected"), [("zeros", 1.0, 0.0), ("constant", 0.2, 0.2)]
)
def test_weights_that_are_not_random(make: Make, init: str, gain: float, expected: float) -> None:
    assert all(
        (module.weight == expected).all()
        for module in layers_of(seeded(make(init=init, init_gain=gain)))
    )


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_dirac_copies_channels_and_leaves_the_other_filters_random(make: Make, gain: float) -> None:
    choice = {"widths": [8, 4], "layers": 3, "init_gain": gain}
    layers, default = (
        layers_of(seeded(make(init="dirac", **choice))),
        layers_of(seeded(make(init="default", **choice))),
    )
    first, second, third = layers[:3]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(first(x)[:, :3], gain * x)
    assert torch.equal(first.weight[3:], default[0].weight[3:])
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(second(x), gain * x[:, :4])
    torch.testing.assert_close(third(x[:, :4]), gain * x[:, :4])
    assert torch.equal(layers[3].weight, default[3].weight)  # the classifier


@pytest.mark.parametrize(
    "init", ["default", "kaiming", "xavier", "dirac", "normal", "constant", "zeros"]
)
def test_biases_start_at_zero_except_with_the_default(make: Make, init: str) -> None:
    assert any(
        module.bias is not None and module.bias.any()
        for module in layers_of(seeded(make(init=init)))
    ) == (init == "default")


# Data in, predictions out


def test_normalize_has_the_mean_and_standard_deviation_of_the_images() -> None:
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


def test_normalize_of_images_of_one_colour_gives_zeros() -> None:
    normalize = Normalize()
    normalize.measure(torch.full((2, 4, 4, 3), 200, dtype=torch.uint8))
    assert not normalize(torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)).any()


@pytest.mark.parametrize("mode", [True, False])
def test_predict_uses_evaluation_mode_and_restores_the_mode(make: Make, mode: bool) -> None:
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
    """A network in which a training step has changed all weights and statistics."""
    network = seeded(
        make(stem="whiten", layers=4, dropout=[0, 0.5, 0], residual=True, head=[6], logit_scale=0.5)
    ).train()
    network.measure(pixels(3))
    network(batch(8)).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    return network.to(memory_format=torch.channels_last)


def test_saving_and_loading_is_exact(trained: Network, tmp_path: Path) -> None:
    path = tmp_path / "models" / "network.safetensors"
    save(trained, path)
    loaded = load(path)
    assert (loaded.params, loaded.image_size, loaded.classes) == (
        trained.params,
        32,
        ["a", "b", "c"],
    )
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert all(
        torch.equal(loaded.state_dict()[name], tensor)
        for name, tensor in trained.state_dict().items()
    )
    assert not loaded.training
    assert loaded.count_parameters() == trained.count_parameters()
    torch.testing.assert_close(predict(loaded, pixels(5), 5), predict(trained, pixels(5), 5))


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes_in_another_process(
    tmp_path: Path, make: Make
) -> None:
    params = make(layers=2)
    save(seeded(params), tmp_path / "one.safetensors")
    save(seeded(params), tmp_path / "two.safetensors")
    code = """
import sys
from pathlib import Path
import torch
from cifarlab.nn.network import Network
from cifarlab.nn.weights import save
from cifarlab.params.geometry import ModelParams
torch.manual_seed(0)
params = ModelParams.model_validate_json(sys.argv[1])
save(Network(params, 32, ["a", "b", "c"]), Path("three.safetensors"))
"""
    env = os.environ | {"PYTHONPATH": str(REPO / "src"), "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, params.model_dump_json()],
        cwd=tmp_path,
        env=env,
        check=True,
        timeout=60,
    )
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_the_file_holds_numbers_and_names_and_no_pickle(trained: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save(trained, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    assert header.keys() == {"__metadata__", *trained.state_dict()}
    rest = {
        name: content[end:][slice(*entry["data_offsets"])]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    assert rest == {
        name: tensor.contiguous().numpy().tobytes() for name, tensor in trained.state_dict().items()
    }
    assert end + sum(map(len, rest.values())) == len(content)  # nothing else is in the file


def _missing(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 100)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _foreign_header(path: Path) -> None:
    save_file(
        {"weight": torch.zeros(2)},
        path,
        {"network": '{"params": {"layers": 3}, "image_size": 32, "classes": []}'},
    )


def _other_shapes(path: Path) -> None:
    with safe_open(path, "pt") as file:
        header, tensors = (
            file.metadata(),
            {n: file.get_tensor(n)[:1] for n in file.keys() if "head" in n},  # noqa: SIM118
        )
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    "damage", [_missing, _garbage, _cut_short, _foreign, _foreign_header, _other_shapes]
)
def test_a_file_without_a_network_is_refused_in_one_sentence(
    trained: Network, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "network.safetensors"
    save(trained, path)
    damage(path)
    held = r"network\.safetensors holds no network .* `dvc repro -f train`"
    missing = r"network\.safetensors is missing; `dvc repro` trains a network"
    with pytest.raises(UserError, match=missing if damage is _missing else held) as caught:
        load(path)
    assert "\n" not in str(caught.value)
