import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from cifarlab import UserError
from cifarlab.architecture import ModelParams
from cifarlab.models import Network, predict
from cifarlab.params import TrainParams
from cifarlab.training import Epoch, Images, fit, loss_function, make_optimizer, set_up

SIZE = 8
MakeTrain = Callable[..., TrainParams]
MakeNetwork = Callable[..., Network]


@pytest.fixture(autouse=True)
def _settings_put_back() -> Iterator[None]:
    """What set_up switches on is torch's for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


@pytest.fixture
def train_params(content: dict[str, Any]) -> MakeTrain:
    return lambda **changes: TrainParams(**content["train"] | {"batch_size": 16, "device": "cpu", "threads": 1} | changes)


@pytest.fixture
def make_network(content: dict[str, Any]) -> MakeNetwork:
    def make(**changes: Any) -> Network:
        torch.manual_seed(0)
        network = Network(ModelParams(**content["model"] | {"layers": 2, "widths": [8, 8]} | changes), SIZE, ["red", "green", "blue"])
        network.normalize.measure(coloured(96).images)
        return network

    return make


def coloured(n: int, seed: int = 0) -> Images:
    """Noise, a little brighter in the channel that is the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 200, (n, SIZE, SIZE, 3))
    images[np.arange(n), :, :, labels] += 50
    return Images(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


def ignore(_: Epoch) -> None:
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


# Steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # One step from 2 with gradient 1; weight decay 0.5 makes it 1 + 0.5 · 2 = 2.
        ({"optimizer": "sgd", "momentum": 0}, 2 - 0.1 * 2),
        ({"optimizer": "sgd", "momentum": 0.9}, 2 - 0.1 * (2 + 0.9 * 2)),  # Nesterov looks one step ahead
        ({"optimizer": "adam"}, 2 - 0.1),  # the first step has length lr
        ({"optimizer": "adamw"}, 2 * (1 - 0.1 * 0.5) - 0.1),  # the decay goes beside it
    ],
)
def test_first_step_of_the_optimizers(train_params: MakeTrain, changes: dict[str, Any], expected: float) -> None:
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 2)
    optimizer, _ = make_optimizer(weight, train_params(lr=0.1, weight_decay=0.5, schedule="constant", **changes), 10)  # type: ignore[arg-type]
    weight(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert weight.weight.item() == pytest.approx(expected, abs=1e-6)


def rates(params: TrainParams, steps: int) -> list[float]:
    """Return the learning rate of every step, and the one left at the end."""
    optimizer, schedule = make_optimizer(nn.Linear(1, 1), params, steps)  # type: ignore[arg-type]
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_one_cycle_rises_for_a_quarter_and_falls_to_zero(train_params: MakeTrain, optimizer: str) -> None:
    lrs = np.array(rates(train_params(lr=0.4, optimizer=optimizer), 200))
    peak = int(lrs.argmax())
    assert peak / 200 == pytest.approx(0.25, abs=0.01)
    assert lrs[peak] == pytest.approx(0.4, rel=0.02)
    assert (lrs <= 0.4).all()
    assert (np.diff(lrs[: peak + 1]) > 0).all()
    assert (np.diff(lrs[peak:]) < 0).all()
    assert np.ptp(np.diff(lrs[peak + 1 :])) < 1e-9  # a straight line
    assert 0 < lrs[-1] < 1e-4


@pytest.mark.parametrize("steps", range(1, 9))
def test_one_cycle_fits_the_shortest_training(train_params: MakeTrain, steps: int) -> None:
    lrs = rates(train_params(lr=0.4), steps)
    assert 0.1 < max(lrs) <= 0.4
    assert 0 < lrs[-1] < 1e-4


def test_one_cycle_leaves_the_momentum_alone(train_params: MakeTrain) -> None:
    optimizer, schedule = make_optimizer(nn.Linear(1, 1), train_params(momentum=0.7), 20)  # type: ignore[arg-type]
    for _ in range(10):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["momentum"] == 0.7


def test_constant_schedule_stays(train_params: MakeTrain) -> None:
    assert set(rates(train_params(lr=0.4, schedule="constant"), 20)) == {0.4}


# Training


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "sgd", "momentum": 0, "lr": 0.2, "schedule": "constant"},
        {"optimizer": "adam", "lr": 0.02},
        {"optimizer": "adamw", "lr": 0.02, "schedule": "constant"},
        {"optimizer": "sgd", "lr": 0.2, "loss": "quadratic", "label_smoothing": 0},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_learns_colours(train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]) -> None:
    network, rows = make_network(), []
    last = fit(network, train_params(epochs=6, **changes), coloured(96), coloured(60, seed=1), rows.append)
    assert [row.epoch for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1] == last
    assert rows[0].train_loss > 1.05 * last.train_loss
    assert last.train_accuracy > 0.9
    unseen = coloured(60, seed=2)
    assert (predict(network, unseen.images, 60).argmax(1) == unseen.labels).float().mean() > 0.9


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])],
)
def test_same_seed_same_bits_other_seed_other_bits(
    train_params: MakeTrain, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what the stages set
    start = make_network(dropout=0.3, pool="avg", global_pool="max")
    data = coloured(40)

    def trained(seed: int, noise: int) -> tuple[Tensor, list[Epoch]]:
        params = train_params(seed=seed, epochs=2, device=device, flip=True, translate=1)
        network, rows = copy.deepcopy(start).to(set_up(params)), []
        torch.manual_seed(noise)  # whatever has been drawn before does not matter
        fit(network, params, Images(data.images.to(device), data.labels.to(device)), None, rows.append)
        return torch.cat([t.cpu().float().flatten() for t in network.state_dict().values()]), rows

    (one, rows), (again, rows_again), (other, _) = trained(7, 1), trained(7, 2), trained(8, 1)
    assert torch.equal(one, again)
    assert rows == rows_again
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "changes", [{"flip": False, "translate": 0}, {"batch_size": 40, "flip": True, "translate": 1}], ids=["order", "augmentation"]
)
def test_seed_decides_order_and_augmentation(train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]) -> None:
    losses = [fit(make_network(), train_params(seed=seed, epochs=1, **changes), coloured(40), None, ignore).train_loss for seed in (0, 1)]
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
    params = train_params(epochs=1, batch_size=33, flip=False, translate=0, label_smoothing=0.2)
    last = fit(network, params, data, None, ignore)
    assert last.train_loss == pytest.approx(0.8 * log_loss(data.labels, p) - 0.2 * np.log(p).mean(), rel=1e-5)
    assert last.train_accuracy == pytest.approx(accuracy_score(data.labels, p.argmax(1)))
    assert (last.val_loss, last.val_accuracy) == (None, None)


@pytest.mark.parametrize("loss", ["cross_entropy", "quadratic"])
def test_validation_figures_are_those_of_the_network_in_evaluation(train_params: MakeTrain, make_network: MakeNetwork, loss: str) -> None:
    # Dropout, batch statistics, label smoothing and augmentation all belong to training only.
    network, held_out = make_network(dropout=0.5, norm="batch"), coloured(31, seed=1)
    last = fit(network, train_params(epochs=2, loss=loss, label_smoothing=0.3), coloured(48), held_out, ignore)
    p = probabilities(predict(network, held_out.images, 7))
    expected = log_loss(held_out.labels, p) if loss == "cross_entropy" else ((p - np.eye(3)[held_out.labels]) ** 2).sum(1).mean() / 2
    assert last.val_loss == pytest.approx(expected, rel=1e-5)
    assert last.val_accuracy == pytest.approx(accuracy_score(held_out.labels, p.argmax(1)))


def test_validation_does_not_change_the_training(train_params: MakeTrain, make_network: MakeNetwork) -> None:
    start = make_network(dropout=0.5)
    with_it, without = copy.deepcopy(start), copy.deepcopy(start)
    fit(with_it, train_params(epochs=2), coloured(48), coloured(9, seed=1), ignore)
    fit(without, train_params(epochs=2), coloured(48), None, ignore)
    assert all(torch.equal(a, b) for a, b in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True))


@pytest.mark.parametrize(("n", "counted"), [(5, 5), (16, 16), (20, 16), (35, 32)])
def test_any_number_of_images_trains_in_whole_batches(train_params: MakeTrain, make_network: MakeNetwork, n: int, counted: int) -> None:
    # All of one class, which a network of zeros guesses: its accuracy is 1 if the images seen are counted, and only they.
    network, data, sizes = make_network(init="zeros"), Images(coloured(n).images, torch.zeros(n, dtype=torch.long)), []
    network.stages.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    last = fit(network, train_params(epochs=1, batch_size=16), data, None, ignore)
    assert sizes == [min(n, 16)] * (counted // min(n, 16))
    # Batch normalisation counts what it sees in training mode only.
    assert network.state_dict()["stages.0.first.1.num_batches_tracked"] == len(sizes)
    assert last.train_accuracy == 1


@pytest.mark.parametrize(("epochs", "n"), [(3, 64), (1, 16)])
def test_divergence_is_told_with_the_epoch_and_the_way_out(train_params: MakeTrain, make_network: MakeNetwork, epochs: int, n: int) -> None:
    rows: list[Epoch] = []
    params = train_params(epochs=epochs, lr=1e38, schedule="constant", batch_size=16)
    # The last of the batches may be the one that diverges.
    with pytest.raises(UserError, match=r"in epoch 1; try a train\.lr below 1e\+38"):
        fit(make_network(norm="none"), params, coloured(n), coloured(9, seed=1), rows.append)
    assert rows == []


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
