import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from cifarlab import UserError
from cifarlab.architecture import ModelParams
from cifarlab.models import Network, predict
from cifarlab.params import TrainParams
from cifarlab.training import Epoch, Images, fit, loss_function, precision, set_up
from tests.conftest import NOTEBOOK, PLAIN_NETWORK, MakeTrain

SIZE = 8
MakeNetwork = Callable[..., Network]


@pytest.fixture(autouse=True)
def _settings_put_back() -> Iterator[None]:
    """What set_up switches on is torch's for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture
def make_network(content: dict[str, Any]) -> MakeNetwork:
    def make(**changes: Any) -> Network:
        torch.manual_seed(0)
        small = {"layers": 2, "widths": [8, 8]}
        network = Network(ModelParams(**content["model"] | small | PLAIN_NETWORK | changes), SIZE, ["red", "green", "blue"])
        network.measure(coloured(96).images)
        return network

    return make


def coloured(n: int, seed: int = 0) -> Images:
    """Noise, a little brighter in the channel that is the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 200, (n, SIZE, SIZE, 3))
    images[np.arange(n), :, :, labels] += 50
    return Images(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def ignore(_: list[Epoch]) -> None:
    pass


def probabilities(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# Losses


def test_quadratic_loss_by_hand() -> None:
    # softmax(0, ln 3) = (¼, ¾): ½ (¾² + ¾²) for class 0, ½ (¼² + ¼²) for class 1; the mean of both.
    logits = torch.tensor([[0, math.log(3)]] * 2)
    assert loss_function("quadratic")(logits, torch.tensor([0, 1])).item() == pytest.approx((9 / 16 + 1 / 16) / 2)
    # Smoothed by 0.2 the target of class 0 is (0.9, 0.1): ½ (0.65² + 0.65²).
    assert loss_function("quadratic", 0.2)(logits[:1], torch.tensor([0])).item() == pytest.approx(0.4225)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cross_entropy", "quadratic"])
def test_gradient_of_the_losses(name: str, smoothing: float) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = loss_function(name, smoothing)(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    p = probabilities(logits.detach())
    target = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4
    error = p - target
    if name == "cross_entropy":
        value, gradient = -(target * np.log(p)).sum(1).mean(), error
    else:  # the Jacobian of the softmax: pⱼ (δⱼₖ - pₖ)
        value, gradient = (error**2).sum(1).mean() / 2, p * (error - (error * p).sum(1, keepdims=True))
    assert loss.item() == pytest.approx(value)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, gradient / 6, rtol=1e-5)


# Training


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "sgd", "momentum": 0, "lr": 0.2, "schedule": "constant"},
        {"optimizer": "muon"},
        {"optimizer": "adam", "lr": 0.02},
        {"optimizer": "adamw", "lr": 0.02, "schedule": "constant"},
        {"optimizer": "sgd", "lr": 0.2, "loss": "quadratic", "label_smoothing": 0},
        {"optimizer": "sgd", "precision": "bfloat16"},
        {"optimizer": "sgd", "norm_bias_lr": 64, "flip": "alternating"},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_learns_colours(train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]) -> None:
    network, rows = make_network(), []
    [*_, last] = fit(
        network, train_params(epochs=6, **changes), coloured(96), coloured(60, seed=1), lambda history: rows.append(history[-1])
    )
    assert [row.epoch for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1] == last
    assert rows[0].train_loss > 1.05 * last.train_loss
    assert last.train_accuracy > 0.9
    unseen = coloured(60, seed=2)
    assert (predict(network, unseen.images, 60).argmax(1) == unseen.labels).float().mean() > 0.9


def test_the_committed_recipe_learns_colours(content: dict[str, Any], make_network: MakeNetwork) -> None:
    network = make_network(**{key: content["model"][key] for key in PLAIN_NETWORK})
    params = TrainParams(**content["train"] | {"epochs": 12, "batch_size": 16, "device": "cpu", "threads": 1})
    fit(network, params, coloured(96), None, ignore)
    unseen = coloured(60, seed=2)
    assert (predict(network, unseen.images, 60).argmax(1) == unseen.labels).float().mean() > 0.9


def test_without_additions_the_loop_is_the_textbook_s(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    """The notebook's training, written down: Adam on the mean cross-entropy of batches in random order."""
    notebook = {key.removeprefix("train."): value for key, value in NOTEBOOK.items() if key.startswith("train.")}
    ours, data = make_network(norm="group", widths=[16, 16], dropout=[0, 0.1]), coloured(40)
    theirs, steps = copy.deepcopy(ours).train().to(memory_format=torch.channels_last), 0
    fit(ours, train_params(**notebook | {"seed": 3, "epochs": 2, "batch_size": 16}), data, None, ignore)
    optimizer = torch.optim.Adam(theirs.parameters(), 0.001)
    for epoch in (1, 2):
        torch.manual_seed(3 * 100_003 + epoch)
        order = torch.randperm(40)
        for chosen in (order[:16], order[16:32]):
            optimizer.zero_grad()
            F.cross_entropy(theirs(data.images[chosen].permute(0, 3, 1, 2)), data.labels[chosen]).backward()
            optimizer.step()
            steps += 1
    assert steps == 4
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_the_stem_stays_as_measured_but_for_its_bias(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    network = make_network(stem="whiten")
    weight, bias = (p.detach().clone() for p in network.stem.parameters())
    fit(network, train_params(epochs=1, weight_decay=0.1), coloured(48), None, ignore)
    assert torch.equal(network.stem[0].weight, weight)
    assert not torch.equal(network.stem[0].bias, bias)


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_every_epoch_shows_each_image_once_and_mirrored_as_asked(train_params: MakeTrain, make_network: MakeNetwork, flip: str) -> None:
    data, seen = coloured(48), []
    data.images[..., 0] = 100
    data.images[:, :, 0, 0] = 0  # red is missing in the left column, in the right one of a mirror image
    data.images[:, 0, :, 1] = torch.arange(48, dtype=torch.uint8)[:, None]  # green at the top is the number of the image
    network = make_network()
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    fit(network, train_params(epochs=2, flip=flip, translate=0, seed=5), data, None, ignore)
    ways: list[Tensor] = []
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        images = epoch[epoch[:, 1, 0, 0].argsort()]
        assert torch.equal(images[:, 1, 0, 0], torch.arange(48, dtype=torch.uint8))
        mirrored = images[:, 0, 0, 0] == 100
        assert torch.equal(torch.where(mirrored[:, None, None, None], images.flip(3), images).permute(0, 2, 3, 1), data.images)
        ways.append(mirrored)
    changed = (ways[0] != ways[1]).float().mean().item()
    assert changed == {"none": 0, "alternating": 1, "random": pytest.approx(0.5, abs=0.3)}[flip]
    assert ways[0].float().mean().item() == (0 if flip == "none" else pytest.approx(0.5, abs=0.3))


@pytest.mark.parametrize("recipe", [{"precision": "float32"}, {"precision": "bfloat16"}, {"optimizer": "muon"}], ids=str)
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])],
)
def test_same_seed_same_bits_other_seed_other_bits(
    train_params: MakeTrain, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch, device: str, recipe: dict[str, Any]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what the stages set
    start = make_network(stem="whiten", dropout=0.3, pool="avg", global_pool="max")
    data = coloured(40)

    def trained(seed: int, noise: int) -> tuple[Tensor, list[Epoch]]:
        params = train_params(seed=seed, epochs=2, device=device, flip="alternating", translate=1, **recipe)
        network, rows = copy.deepcopy(start).to(set_up(params)), []
        torch.manual_seed(noise)  # whatever has been drawn before does not matter
        fit(network, params, Images(data.images.to(device), data.labels.to(device)), None, lambda history: rows.append(history[-1]))
        return torch.cat([t.cpu().float().flatten() for t in network.state_dict().values()]), rows

    (one, rows), (again, rows_again), (other, _) = trained(7, 1), trained(7, 2), trained(8, 1)
    assert torch.equal(one, again)
    assert rows == rows_again
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "changes", [{"flip": "none", "translate": 0}, {"batch_size": 40, "flip": "random", "translate": 1}], ids=["order", "augmentation"]
)
def test_seed_decides_order_and_augmentation(train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]) -> None:
    losses = [
        fit(make_network(), train_params(seed=seed, epochs=1, **changes), coloured(40), None, ignore)[-1].train_loss for seed in (0, 1)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_set_up_seeds_the_initial_weights(train_params: MakeTrain, content: dict[str, Any]) -> None:
    def initial(seed: int) -> Tensor:
        assert set_up(train_params(seed=seed)) == torch.device("cpu")
        return next(Network(ModelParams(**content["model"]), 32, ["a"]).parameters())

    assert torch.equal(initial(3), initial(3))
    assert not torch.equal(initial(3), initial(4))


def test_training_figures_are_those_of_the_batches(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    # One batch of all images, nothing random in the network: the first epoch's figures are the untrained network's.
    network, data = make_network(norm="none"), coloured(33)
    p = probabilities(predict(network, data.images, 33))
    params = train_params(epochs=1, batch_size=33, flip="none", translate=0, label_smoothing=0.2)
    [*_, last] = fit(network, params, data, None, ignore)
    assert last.train_loss == pytest.approx(0.8 * log_loss(data.labels, p) - 0.2 * np.log(p).mean(), rel=1e-5)
    assert last.train_accuracy == pytest.approx(accuracy_score(data.labels, p.argmax(1)))
    assert (last.val_loss, last.val_accuracy) == (None, None)


@pytest.mark.parametrize("loss", ["cross_entropy", "quadratic"])
def test_cutmix_shares_out_the_label_as_it_does_the_pixels(train_params: MakeTrain, make_network: MakeNetwork, loss: str) -> None:
    # One batch, nothing else random; each image is of one grey, which tells whose a pixel is.
    network, seen, n = make_network(norm="none"), [], 30
    labels = torch.arange(n) % 3
    data = Images(torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, SIZE, SIZE, 3).contiguous(), labels)
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    start = copy.deepcopy(network)
    params = train_params(epochs=1, batch_size=n, flip="none", translate=0, label_smoothing=0.1, cutmix=1, loss=loss, seed=3)
    [last] = fit(network, params, data, None, ignore)
    whose = seen[0][:, 0].flatten(1).long()
    target = np.stack([np.bincount(labels[pixels], minlength=3) / SIZE**2 for pixels in whose]) * 0.9 + 0.1 / 3
    assert 0 < (whose != whose.mode(1).values[:, None]).float().mean() < 0.5
    p = probabilities(start(seen[0]).detach())
    losses = -(target * np.log(p)).sum(1) if loss == "cross_entropy" else ((p - target) ** 2).sum(1) / 2
    assert last.train_loss == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("share", [0, 0.3])
def test_cutmix_changes_the_share_of_batches_that_it_is_asked_to(train_params: MakeTrain, make_network: MakeNetwork, share: float) -> None:
    network, data, seen = make_network(), coloured(400), []
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    fit(network, train_params(epochs=1, batch_size=2, flip="none", translate=0, cutmix=share), data, None, ignore)
    originals = {image.numpy().tobytes() for image in data.images}
    mixed = sum(any(image.numpy().tobytes() not in originals for image in batch.permute(0, 2, 3, 1).contiguous()) for batch in seen)
    # A few rectangles are empty: 200 batches, a standard deviation of 6.5.
    assert mixed == 0 if share == 0 else 30 < mixed < 85


@pytest.mark.parametrize("loss", ["cross_entropy", "quadratic"])
def test_validation_figures_are_those_of_the_network_in_evaluation(train_params: MakeTrain, make_network: MakeNetwork, loss: str) -> None:
    # Dropout, batch statistics, label smoothing and augmentation all belong to training only.
    network, held_out = make_network(dropout=0.5, norm="batch"), coloured(31, seed=1)
    [*_, last] = fit(network, train_params(epochs=2, loss=loss, label_smoothing=0.3), coloured(48), held_out, ignore)
    p = probabilities(predict(network, held_out.images, 7))
    expected = log_loss(held_out.labels, p) if loss == "cross_entropy" else ((p - np.eye(3)[held_out.labels]) ** 2).sum(1).mean() / 2
    assert last.val_loss == pytest.approx(expected, rel=1e-5)
    assert last.val_accuracy == pytest.approx(accuracy_score(held_out.labels, p.argmax(1)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_validation_does_not_change_the_training(train_params: MakeTrain, make_network: MakeNetwork, precision: str) -> None:
    start = make_network(dropout=0.5)
    with_it, without = copy.deepcopy(start), copy.deepcopy(start)
    fit(with_it, train_params(epochs=2, precision=precision), coloured(48), coloured(9, seed=1), ignore)
    fit(without, train_params(epochs=2, precision=precision), coloured(48), None, ignore)
    assert all(torch.equal(a, b) for a, b in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True))


@pytest.mark.parametrize(("n", "counted"), [(5, 5), (16, 16), (20, 16), (35, 32)])
def test_any_number_of_images_trains_in_whole_batches(train_params: MakeTrain, make_network: MakeNetwork, n: int, counted: int) -> None:
    # All of one class, which a network of zeros guesses: its accuracy is 1 if the images seen are counted, and only they.
    network, data, sizes = make_network(init="zeros"), Images(coloured(n).images, torch.zeros(n, dtype=torch.long)), []
    network.stages.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    [*_, last] = fit(network, train_params(epochs=1, batch_size=16), data, None, ignore)
    assert sizes == [min(n, 16)] * (counted // min(n, 16))
    # Batch normalisation counts what it sees in training mode only.
    assert network.state_dict()["stages.0.first.1.num_batches_tracked"] == len(sizes)
    assert last.train_accuracy == 1


@pytest.mark.parametrize(("epochs", "n"), [(3, 64), (1, 16)])
def test_divergence_is_told_with_the_epoch_and_the_way_out(train_params: MakeTrain, make_network: MakeNetwork, epochs: int, n: int) -> None:
    rows: list[Epoch] = []
    params = train_params(epochs=epochs, schedule="constant", batch_size=16).model_copy(update={"lr": 1e38})
    # The last of the batches may be the one that diverges.
    with pytest.raises(UserError, match=r"in epoch 1; try a train\.lr below 1e\+38"):
        fit(make_network(norm="none"), params, coloured(n), coloured(9, seed=1), lambda history: rows.append(history[-1]))
    assert rows == []


# The precision


def test_bfloat16_is_for_the_arithmetic_and_not_for_the_weights(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    start, computed = make_network(stem="whiten"), set()
    exact, coarse = copy.deepcopy(start), copy.deepcopy(start)
    for module in coarse.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, out: computed.add(out.dtype))
    held_out = coloured(60, seed=1)
    [*_, one] = fit(exact, train_params(epochs=2, lr=0.01), coloured(48), held_out, ignore)
    [*_, other] = fit(coarse, train_params(epochs=2, lr=0.01, precision="bfloat16"), coloured(48), held_out, ignore)
    assert computed == {torch.bfloat16}
    assert {p.dtype for p in coarse.parameters()} == {torch.float32}
    assert predict(coarse, held_out.images, 60).dtype == torch.float32
    # Eight bits of mantissa: close, not equal.
    assert other.train_loss != one.train_loss
    assert other.row() == pytest.approx(one.row(), abs=0.1)
    moved = [(p - q).norm() for p, q in zip(exact.parameters(), start.parameters(), strict=True)]
    apart = [(p - q).norm() for p, q in zip(exact.parameters(), coarse.parameters(), strict=True)]
    assert 0 < sum(apart) < 0.2 * sum(moved)


def test_the_loss_of_bfloat16_logits_is_reckoned_in_float32(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    network, data, seen = make_network(), coloured(33), []
    network.head.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    params = train_params(epochs=1, batch_size=33, precision="bfloat16", label_smoothing=0)
    [*_, last] = fit(network, params, data, None, ignore)
    torch.manual_seed(params.seed * 100_003 + 1)
    assert seen[0].dtype == torch.bfloat16
    assert last.train_loss == pytest.approx(log_loss(data.labels[torch.randperm(33)], probabilities(seen[0])), rel=1e-5)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision_is_what_is_asked_for(train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, asked: str, device: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": asked == "float32"})
    assert precision(train_params(precision=asked), torch.device(device)) == getattr(torch, asked)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC 9R45"}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_is_faster_at_it(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision(train_params(precision="auto"), torch.device("cpu")) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_gpu_has_it(train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not native})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert precision(train_params(precision="auto"), torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


# The device


def test_cuda_is_refused_where_there_is_none(train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device = cuda: .* use train\.device: auto or cpu"):
        set_up(train_params(device="cuda"))


@pytest.mark.parametrize(
    ("device", "available", "expected"), [("auto", False, "cpu"), ("cpu", False, "cpu"), ("cpu", True, "cpu"), ("auto", True, "cuda")]
)
def test_device(train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, device: str, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert set_up(train_params(device=device)).type == expected


@pytest.mark.parametrize(("threads", "expected"), [(2, 2), ("auto", 1)])
def test_threads(train_params: MakeTrain, threads: int | str, expected: int) -> None:
    set_up(train_params(threads=threads))
    assert torch.get_num_threads() == expected
