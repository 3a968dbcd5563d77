"""The training loop: losses, batches, reproducibility, precision, progress and resuming."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from cifarlab.data.readers import digits
from cifarlab.errors import UserError
from cifarlab.nn.network import Network, predict
from cifarlab.params.sections import TrainParams
from cifarlab.runtime.device import precision, set_up
from cifarlab.training import graph
from cifarlab.training.batches import Images
from cifarlab.training.loop import Row, Trainer, class_weights, fit, ignore, loss_function
from cifarlab.training.ranks import ALONE
from tests.conftest import NOTEBOOK, PLAIN_NETWORK, MakeTrain
from tests.support.networks import (
    SIZE,
    MakeNetwork,
    colour_network,
    coloured,
    small_params,
)

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture
def make_network(content: dict[str, Any]) -> MakeNetwork:
    """Return a function that makes a small plain network: make_network(norm="none")."""
    return lambda **changes: colour_network(content["model"], **changes)


def probabilities(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# Losses


def test_quadratic_loss_by_hand() -> None:
    # softmax(0, ln 3) = (¼, ¾). The loss is ½ (¾² + ¾²) for class 0 and ½ (¼² + ¼²) for class 1.
    logits = torch.tensor([[0, math.log(3)]] * 2)
    assert loss_function("quadratic")(logits, torch.tensor([0, 1])).item() == pytest.approx(
        (9 / 16 + 1 / 16) / 2
    )
    # With smoothing 0.2 the target of class 0 is (0.9, 0.1), so the loss is ½ (0.65² + 0.65²).
    assert loss_function("quadratic", 0.2)(logits[:1], torch.tensor([0])).item() == pytest.approx(
        0.4225
    )


def test_class_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2])
    weights = class_weights(torch.from_numpy(labels), 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert float(class_weights(torch.tensor([0, 0]), 2)[0]) == 1  # the other has no image


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cross_entropy", "quadratic"])
def test_weights_are_factors_on_the_loss_of_each_image(name: str, smoothing: float) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 1, 2, 0]), torch.tensor([0.5, 1.5, 3.0])
    plain = loss_function(name, smoothing)
    each = [plain(logits[i : i + 1], labels[i : i + 1]).item() for i in range(4)]
    expected = np.mean([loss * weights[label].item() for loss, label in zip(each, labels)])  # noqa: B905
    weighted = loss_function(name, smoothing, weights)
    assert weighted(logits, labels).item() == pytest.approx(expected)
    # The same with shares of classes, as after CutMix, for images of one class.
    shares = F.one_hot(labels, 3).float()
    assert weighted(logits, shares).item() == pytest.approx(expected)
    ones = loss_function(name, smoothing, torch.ones(3))
    assert ones(logits, labels).item() == pytest.approx(plain(logits, labels).item())


@pytest.mark.slow
def test_balanced_weights_raise_the_balanced_accuracy_of_uneven_digits(
    train_params: MakeTrain,
) -> None:
    """Of the digits 5 to 9 only every tenth image is there."""
    data = digits()
    labels = data.labels["train"]
    rare = np.flatnonzero(labels >= 5)
    kept = np.sort(np.concatenate([np.flatnonzero(labels < 5), rare[::10]]))
    images = torch.from_numpy(data.images["train"][kept][:, ::4, ::4].copy())  # the 8×8 pixels
    train = Images(images, torch.from_numpy(labels[kept]))
    test = torch.from_numpy(data.images["test"][:, ::4, ::4].copy())
    found = {}
    for weights in ("none", "balanced"):
        for seed in range(3):
            torch.manual_seed(seed)
            model = small_params(stem="none", widths=[8, 16], pool_at="end")
            network = Network(model, 8, data.classes)
            network.measure(train.images)
            chosen = {"epochs": 6, "class_weights": weights, "translate": 0, "flip": "none"}
            fit(network, train_params(seed=seed, **chosen), train)
            predicted = predict(network, test, 100).argmax(1).numpy()
            score = balanced_accuracy_score(data.labels["test"], predicted)
            found.setdefault(weights, []).append(score)
    assert np.mean(found["balanced"]) > np.mean(found["none"]) + 0.03, found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cross_entropy", "quadratic"])
def test_losses_and_gradients_match_the_formulas(name: str, smoothing: float) -> None:
    logits = torch.randn(
        6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    loss = loss_function(name, smoothing)(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    p = probabilities(logits.detach())
    target = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4
    error = p - target
    if name == "cross_entropy":
        value, gradient = -(target * np.log(p)).sum(1).mean(), error
    else:  # with the Jacobian of the softmax, pⱼ (δⱼₖ - pₖ)
        value, gradient = (
            (error**2).sum(1).mean() / 2,
            p * (error - (error * p).sum(1, keepdims=True)),
        )
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
def test_every_recipe_learns_to_tell_colours_apart(
    train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]
) -> None:
    network, rows = make_network(), []
    params = train_params(epochs=6, **changes)
    [*_, last] = fit(
        network,
        params,
        coloured(96),
        coloured(60, seed=1),
        lambda history: rows.append(history[-1]),
        dtype=precision(params, torch.device("cpu")),
    )
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1] == last
    assert rows[0]["train_loss"] > 1.05 * last["train_loss"]
    assert last["train_accuracy"] > 0.9
    unseen = coloured(60, seed=2)
    assert (predict(network, unseen.images, 60).argmax(1) == unseen.labels).float().mean() > 0.9


def test_the_committed_recipe_learns_to_tell_colours_apart(
    content: dict[str, Any], make_network: MakeNetwork
) -> None:
    network = make_network(**{key: content["model"][key] for key in PLAIN_NETWORK})
    params = TrainParams(
        **content["train"] | {"epochs": 12, "batch_size": 16, "device": "cpu", "threads": 1}
    )
    fit(network, params, coloured(96), dtype=precision(params, torch.device("cpu")))
    unseen = coloured(60, seed=2)
    assert (predict(network, unseen.images, 60).argmax(1) == unseen.labels).float().mean() > 0.9


def test_the_notebook_variant_trains_like_a_textbook_loop(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    """The textbook loop minimises the mean cross-entropy of batches with Adam."""
    notebook = {
        key.removeprefix("train."): value
        for key, value in NOTEBOOK.items()
        if key.startswith("train.")
    }
    ours, data = make_network(norm="group", widths=[16, 16], dropout=[0, 0.1]), coloured(40)
    theirs, steps = copy.deepcopy(ours).train().to(memory_format=torch.channels_last), 0
    fit(ours, train_params(**notebook | {"seed": 3, "epochs": 2, "batch_size": 16}), data)
    optimizer = torch.optim.Adam(theirs.parameters(), 0.001)
    for epoch in (1, 2):
        torch.manual_seed(3 * 100_003 + epoch)
        order = torch.randperm(40)
        for chosen in (order[:16], order[16:32]):
            optimizer.zero_grad()
            F.cross_entropy(
                theirs(data.images[chosen].permute(0, 3, 1, 2)), data.labels[chosen]
            ).backward()
            optimizer.step()
            steps += 1
    assert steps == 4
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_training_changes_the_bias_of_the_stem_and_not_its_filters(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    network = make_network(stem="whiten")
    weight, bias = (p.detach().clone() for p in network.stem.parameters())
    fit(network, train_params(epochs=1, weight_decay=0.1), coloured(48))
    assert torch.equal(network.stem[0].weight, weight)
    assert not torch.equal(network.stem[0].bias, bias)


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_every_epoch_shows_each_image_once_and_mirrors_as_configured(
    train_params: MakeTrain, make_network: MakeNetwork, flip: str
) -> None:
    data, seen = coloured(48), []
    data.images[..., 0] = 100
    # Red is missing in the left column, so a mirrored image lacks it in the right column.
    data.images[:, :, 0, 0] = 0
    # Green in the top row is the number of the image.
    data.images[:, 0, :, 1] = torch.arange(48, dtype=torch.uint8)[:, None]
    network = make_network()
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    fit(network, train_params(epochs=2, flip=flip, translate=0, seed=5), data)
    ways: list[Tensor] = []
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        images = epoch[epoch[:, 1, 0, 0].argsort()]
        assert torch.equal(images[:, 1, 0, 0], torch.arange(48, dtype=torch.uint8))
        mirrored = images[:, 0, 0, 0] == 100
        assert torch.equal(
            torch.where(mirrored[:, None, None, None], images.flip(3), images).permute(0, 2, 3, 1),
            data.images,
        )
        ways.append(mirrored)
    changed = (ways[0] != ways[1]).float().mean().item()
    assert changed == {"none": 0, "alternating": 1, "random": pytest.approx(0.5, abs=0.3)}[flip]
    assert ways[0].float().mean().item() == (0 if flip == "none" else pytest.approx(0.5, abs=0.3))


@pytest.mark.parametrize(
    "recipe", [{"precision": "float32"}, {"precision": "bfloat16"}, {"optimizer": "muon"}], ids=str
)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    train_params: MakeTrain,
    make_network: MakeNetwork,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    recipe: dict[str, Any],
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the stages set it, too
    start = make_network(stem="whiten", dropout=0.3, pool="avg", global_pool="max")
    data = coloured(40)

    def trained(seed: int, noise: int) -> tuple[Tensor, list[Row]]:
        params = train_params(
            seed=seed, epochs=2, device=device, flip="alternating", translate=1, **recipe
        )
        there = set_up(params)
        network, images = copy.deepcopy(start).to(there), Images(*(t.to(there) for t in data))
        torch.manual_seed(noise)  # earlier random numbers must not matter
        rows = fit(network, params, images, dtype=precision(params, there))
        return torch.cat([t.cpu().float().flatten() for t in network.state_dict().values()]), rows

    (one, rows), (again, rows_again), (other, _) = trained(7, 1), trained(7, 2), trained(8, 1)
    assert torch.equal(one, again)
    assert rows == rows_again
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [{"flip": "none", "translate": 0}, {"batch_size": 40, "flip": "random", "translate": 1}],
    ids=["order", "augmentation"],
)
def test_the_seed_decides_order_and_augmentation(
    train_params: MakeTrain, make_network: MakeNetwork, changes: dict[str, Any]
) -> None:
    losses = [
        fit(make_network(), train_params(seed=seed, epochs=1, **changes), coloured(40))[-1][
            "train_loss"
        ]
        for seed in (0, 1)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_training_loss_and_accuracy_are_those_of_the_batches(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    # With a single batch and no randomness, the results are those of the untrained network.
    network, data = make_network(norm="none"), coloured(33)
    p = probabilities(predict(network, data.images, 33))
    params = train_params(epochs=1, batch_size=33, flip="none", translate=0, label_smoothing=0.2)
    [*_, last] = fit(network, params, data)
    assert last["train_loss"] == pytest.approx(
        0.8 * log_loss(data.labels, p) - 0.2 * np.log(p).mean(), rel=1e-5
    )
    assert last["train_accuracy"] == pytest.approx(accuracy_score(data.labels, p.argmax(1)))
    assert (last["val_loss"], last["val_accuracy"]) == (None, None)


@pytest.mark.parametrize("loss", ["cross_entropy", "quadratic"])
def test_cutmix_mixes_the_labels_in_proportion_to_the_pixels(
    train_params: MakeTrain, make_network: MakeNetwork, loss: str
) -> None:
    # A single batch without other randomness. The grey value of a pixel is the number of its image.
    network, seen, n = make_network(norm="none"), [], 30
    labels = torch.arange(n) % 3
    data = Images(
        torch.arange(n, dtype=torch.uint8)[:, None, None, None]
        .expand(n, SIZE, SIZE, 3)
        .contiguous(),
        labels,
    )
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    start = copy.deepcopy(network)
    params = train_params(
        epochs=1,
        batch_size=n,
        flip="none",
        translate=0,
        label_smoothing=0.1,
        cutmix=1,
        loss=loss,
        seed=3,
    )
    [last] = fit(network, params, data)
    origin = seen[0][:, 0].flatten(1).long()
    target = (
        np.stack([np.bincount(labels[pixels], minlength=3) / SIZE**2 for pixels in origin]) * 0.9
        + 0.1 / 3
    )
    assert 0 < (origin != origin.mode(1).values[:, None]).float().mean() < 0.5
    p = probabilities(start(seen[0]).detach())
    losses = (
        -(target * np.log(p)).sum(1) if loss == "cross_entropy" else ((p - target) ** 2).sum(1) / 2
    )
    assert last["train_loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("share", [0, 0.3])
def test_cutmix_changes_the_given_share_of_batches(
    train_params: MakeTrain, make_network: MakeNetwork, share: float
) -> None:
    network, data, seen = make_network(), coloured(400), []
    network.normalize.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    fit(network, train_params(epochs=1, batch_size=2, flip="none", translate=0, cutmix=share), data)
    originals = {image.numpy().tobytes() for image in data.images}
    mixed = sum(
        any(
            image.numpy().tobytes() not in originals
            for image in batch.permute(0, 2, 3, 1).contiguous()
        )
        for batch in seen
    )
    # 60 of 200 batches are expected, minus those with an empty rectangle. The standard deviation is
    # 6.5.
    assert mixed == 0 if share == 0 else 30 < mixed < 85


@pytest.mark.parametrize("loss", ["cross_entropy", "quadratic"])
def test_validation_results_are_those_of_the_network_in_evaluation_mode(
    train_params: MakeTrain, make_network: MakeNetwork, loss: str
) -> None:
    # Dropout, batch statistics, label smoothing and augmentation are for training only.
    network, held_out = make_network(dropout=0.5, norm="batch"), coloured(31, seed=1)
    [*_, last] = fit(
        network, train_params(epochs=2, loss=loss, label_smoothing=0.3), coloured(48), held_out
    )
    p = probabilities(predict(network, held_out.images, 7))
    expected = (
        log_loss(held_out.labels, p)
        if loss == "cross_entropy"
        else ((p - np.eye(3)[held_out.labels]) ** 2).sum(1).mean() / 2
    )
    assert last["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(accuracy_score(held_out.labels, p.argmax(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_does_not_change_the_training(
    train_params: MakeTrain, make_network: MakeNetwork, dtype: torch.dtype
) -> None:
    start = make_network(dropout=0.5)
    with_it, without = copy.deepcopy(start), copy.deepcopy(start)
    fit(with_it, train_params(epochs=2), coloured(48), coloured(9, seed=1), dtype=dtype)
    fit(without, train_params(epochs=2), coloured(48), dtype=dtype)
    assert all(
        torch.equal(a, b)
        for a, b in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("n", "counted"), [(5, 5), (16, 16), (20, 16), (35, 32)])
def test_any_number_of_images_trains_in_whole_batches(
    train_params: MakeTrain, make_network: MakeNetwork, n: int, counted: int
) -> None:
    # All images have the class that a network of zeros predicts. So the accuracy is 1 if exactly
    # the images in batches are counted.
    network, data, sizes = (
        make_network(init="zeros"),
        Images(coloured(n).images, torch.zeros(n, dtype=torch.long)),
        [],
    )
    network.stages.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    [*_, last] = fit(network, train_params(epochs=1, batch_size=16), data)
    assert sizes == [min(n, 16)] * (counted // min(n, 16))
    # Batch normalisation counts batches in training mode only.
    assert network.state_dict()["stages.0.first.1.num_batches_tracked"] == len(sizes)
    assert last["train_accuracy"] == 1


@pytest.mark.parametrize(("epochs", "n"), [(3, 64), (1, 16)])
def test_divergence_is_reported_with_the_epoch_and_advice(
    train_params: MakeTrain, make_network: MakeNetwork, epochs: int, n: int
) -> None:
    rows: list[Row] = []
    params = train_params(epochs=epochs, schedule="constant", batch_size=16).model_copy(
        update={"lr": 1e38}
    )
    # With one batch, divergence shows only after the last step.
    with pytest.raises(UserError, match=r"in epoch 1: .* NaN .* try a train\.lr below 1e\+38"):
        fit(
            make_network(norm="none"),
            params,
            coloured(n),
            coloured(9, seed=1),
            lambda history: rows.append(history[-1]),
        )
    assert rows == []


# The precision


def test_bfloat16_is_used_for_computing_and_not_for_the_weights(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    start, computed = make_network(stem="whiten"), set()
    exact, coarse = copy.deepcopy(start), copy.deepcopy(start)
    for module in coarse.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, out: computed.add(out.dtype))
    held_out = coloured(60, seed=1)
    [*_, one] = fit(exact, train_params(epochs=2, lr=0.01), coloured(48), held_out)
    [*_, other] = fit(
        coarse, train_params(epochs=2, lr=0.01), coloured(48), held_out, dtype=torch.bfloat16
    )
    assert computed == {torch.bfloat16}
    assert {p.dtype for p in coarse.parameters()} == {torch.float32}
    assert predict(coarse, held_out.images, 60).dtype == torch.float32
    # bfloat16 has eight significant bits, so the results are close but not equal.
    assert other["train_loss"] != one["train_loss"]
    assert other == pytest.approx(one, abs=0.1)
    moved = [(p - q).norm() for p, q in zip(exact.parameters(), start.parameters(), strict=True)]
    apart = [(p - q).norm() for p, q in zip(exact.parameters(), coarse.parameters(), strict=True)]
    assert 0 < sum(apart) < 0.2 * sum(moved)


def test_the_loss_of_bfloat16_logits_is_computed_in_float32(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    network, data, seen = make_network(), coloured(33), []
    network.head.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    params = train_params(epochs=1, batch_size=33, label_smoothing=0)
    [*_, last] = fit(network, params, data, dtype=torch.bfloat16)
    torch.manual_seed(params.seed * 100_003 + 1)
    assert seen[0].dtype == torch.bfloat16
    assert last["train_loss"] == pytest.approx(
        log_loss(data.labels[torch.randperm(33)], probabilities(seen[0])), rel=1e-5
    )


# Progress


class Recorder:
    """Records what `fit` reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []

    def batch(
        self, epoch: int, seen: int, images: int, results: Callable[[], tuple[float, float]]
    ) -> None:
        self.reports.append(("batch", epoch, seen, images))
        self.results = results()

    def epoch(self, history: list[Row]) -> None:
        self.reports.append(("epoch", len(history)))
        assert history[-1]["epoch"] == len(history)
        assert (history[-1]["train_loss"], history[-1]["train_accuracy"]) == self.results


def test_every_batch_and_epoch_is_reported(
    train_params: MakeTrain, make_network: MakeNetwork, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder, data = Recorder(), coloured(40)
    params = train_params(epochs=2)
    fit(make_network(), params, data, None, recorder.epoch, on_batch=recorder.batch)
    assert recorder.reports == [
        *(("batch", 1, 16, 32), ("batch", 1, 32, 32), ("epoch", 1)),
        *(("batch", 2, 16, 32), ("batch", 2, 32, 32), ("epoch", 2)),
    ]
    assert capsys.readouterr().out == ""


class Memory:
    """A checkpoint that is kept in memory."""

    def __init__(self, stop_after: int = 0) -> None:
        self.state: dict[str, Any] | None = None
        self.stop_after = stop_after

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        if len(state["history"]) == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam", "adamw"])
def test_a_resumed_training_gives_the_same_bits(
    train_params: MakeTrain,
    make_network: MakeNetwork,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
) -> None:
    changes = {"flip": "alternating", "translate": 1, "cutmix": 0.5, "lr": 0.01}
    params = train_params(epochs=4, optimizer=optimizer, diagnostics=True, **changes)
    whole, resumed = make_network(dropout=0.3), make_network(dropout=0.3)
    expected = fit(whole, params, coloured(40), coloured(9, seed=1))
    memory, recorder = Memory(stop_after=2), Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, params, coloured(40), coloured(9, seed=1), checkpoint=memory)
    memory.stop_after, resumed = 0, make_network(dropout=0.3, init="kaiming")
    data = coloured(40), coloured(9, seed=1)
    history = fit(resumed, params, *data, on_batch=recorder.batch, checkpoint=memory)
    assert recorder.reports[0] == ("batch", 3, 16, 32)
    assert capsys.readouterr().out == "continuing after epoch 2 of 4\n"
    assert history == expected
    weights = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


# Steps as CUDA graphs


def stand_in(step: Callable[[], None]) -> Callable[[], None]:
    """Do what `graph.record` does: run the step to warm up; the recording itself runs nothing."""
    for _ in range(graph.WARM_UP):
        step()
    return step


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Let the CPU record its steps with `stand_in`; return the steps that were recorded."""
    recorded: list[Callable[[], None]] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step)
        return stand_in(step)

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    return recorded


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_recording_a_step_leaves_no_trace(
    train_params: MakeTrain,
    make_network: MakeNetwork,
    recording: list[Callable[[], None]],
    optimizer: str,
    interrupted: bool,
) -> None:
    """Weights, running statistics, optimizers and random generators are as without it."""
    changes = {"optimizer": optimizer, "lr": 0.01, "translate": 1, "cutmix": 0.5}
    params = train_params(epochs=3, batch_size=32, **changes)  # one step in each epoch
    eager, replayed = make_network(dropout=0.3), make_network(dropout=0.3)
    expected = fit(eager, params.model_copy(update={"graph": "off"}), coloured(40))
    assert not recording
    memory = Memory(stop_after=1 if interrupted else 0)
    with contextlib.suppress(KeyboardInterrupt):
        history = fit(replayed, params, coloured(40), checkpoint=memory)
    if interrupted:
        memory.stop_after, replayed = 0, make_network(init="kaiming", dropout=0.3)
        history = fit(replayed, params, coloured(40), checkpoint=memory)
    assert len(recording) == 1 + interrupted
    assert history == expected
    weights = zip(eager.state_dict().values(), replayed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_a_step_reads_and_writes_the_same_memory_in_every_epoch(
    train_params: MakeTrain, make_network: MakeNetwork
) -> None:
    """A graph that was recorded in the first epoch works in the others."""
    params = train_params(epochs=3, cutmix=0.5, translate=1, class_weights="balanced")
    trainer = Trainer(make_network(dropout=0.3), params, coloured(40), torch.float32, ALONE)

    def addresses() -> list[int]:
        batches = trainer.batches
        assert batches.draws is not None
        read = batches.order, *batches.draws, batches.boxes, batches.position, trainer.rates
        return [t.data_ptr() for t in (*read, trainer.sums, *trainer.tensors())]

    trainer.epoch(1, ignore)
    first = addresses()
    trainer.epoch(2, ignore)
    assert addresses() == first


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_step_that_cannot_be_recorded_is_called(
    train_params: MakeTrain,
    make_network: MakeNetwork,
    recording: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    epochs: int,
) -> None:
    def fails(step: Callable[[], None]) -> Callable[[], None]:
        stand_in(step)
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graph, "record", fails)
    params, eager, other = train_params(epochs=epochs), make_network(), make_network()
    expected = fit(eager, params.model_copy(update={"graph": "off"}), coloured(40))
    assert fit(other, params, coloured(40)) == expected
    reason = "CUDA error: operation not permitted"
    assert capsys.readouterr().out == f"no CUDA graph, the training is slower: {reason}\n"


def test_a_recording_without_enough_memory_ends_the_training(
    train_params: MakeTrain,
    make_network: MakeNetwork,
    recording: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph, "record", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fit(make_network(), train_params(epochs=1), coloured(40))
