"""Why a network that is confidently wrong learns slowly from the quadratic cost: docs/studies/gradient.md, from formula and autograd."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
import torch

from cifarlab.files import atomic
from cifarlab.training import loss_function

Floats = npt.NDArray[np.float64]
CLASSES = 10
TARGET = Path("docs/studies")
COSTS = {"cross_entropy": "cross-entropy", "quadratic": "quadratic"}


def probabilities(right: float) -> Floats:
    """Return what the softmax gives ten classes: `right` to the right one, nearly all of the rest to one wrong one."""
    p = np.full(CLASSES, (1 - right) * 0.001)
    p[0], p[1] = right, (1 - right) * (1 - 0.001 * (CLASSES - 2))
    return p


def by_formula(cost: str, p: Floats) -> Floats:
    """Return dL/dz for logits z, p = softmax(z) and the right class 0, one-hot y.

    cross-entropy: p - y. Quadratic, L = ½ Σ (p - y)²: (diag(p) - p pᵀ) (p - y), for that matrix is dp/dz: small where p is
    near a corner, the wrong corner included.
    """
    y = np.eye(CLASSES)[0]
    gradient: Floats = p - y if cost == "cross_entropy" else (np.diag(p) - np.outer(p, p)) @ (p - y)
    return gradient


def by_autograd(cost: str, p: Floats) -> Floats:
    """Return the same from the losses that networks are trained with."""
    z = torch.from_numpy(np.log(p))[None].requires_grad_()
    loss_function(cost)(z, torch.zeros(1, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    gradient: Floats = z.grad[0].numpy()
    return gradient


def main() -> None:
    """Write the page and its picture."""
    sns.set_theme(style="whitegrid", rc={"figure.constrained_layout.use": True})
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    steps = np.logspace(-5, np.log10(0.999), 60)
    for cost, label in COSTS.items():
        formula = [np.linalg.norm(by_formula(cost, probabilities(right))) for right in steps]
        [line] = axes.plot(steps, formula, label=f"{label}, formula")
        some = steps[::5]
        autograd = [np.linalg.norm(by_autograd(cost, probabilities(right))) for right in some]
        axes.plot(some, autograd, "o", color=line.get_color(), mfc="white", label=f"{label}, autograd")
    axes.set(xscale="log", yscale="log", xlabel="probability given to the right class", ylabel="norm of dL/d(logits)")
    axes.set_title("How much a network learns from one image (left: confidently wrong)")
    axes.legend()
    with atomic(TARGET / "gradient.png") as path:
        figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    rows = []
    for right in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9):
        cross, quadratic = (float(np.linalg.norm(by_autograd(cost, probabilities(right)))) for cost in COSTS)
        rows.append(f"| {right:g} | {cross:.4f} | {quadratic:.6f} | {cross / quadratic:,.1f} |")
    page = [
        "# How fast does a network learn where it is confidently wrong?\n",
        "![the norm of the gradient against the probability of the right class](gradient.png)\n",
        "Ten classes, the softmax p, the label y; nearly all that the right class does not get goes to one wrong class.",
        "The gradient of cross-entropy with respect to the logits is p − y: the more wrong, the larger, up to √2.",
        "That of the quadratic cost ½ Σ (p − y)² is (diag(p) − p pᵀ)(p − y): the first factor, the derivative of the softmax,",
        "vanishes where p is certain, rightly or wrongly. A network that is surely wrong gets next to no gradient from it.\n",
        "| probability of the right class | cross-entropy | quadratic | ratio |",
        "|---|---|---|---|",
        *rows,
        "\nThe norms are autograd's, of the very losses of `train.loss`; the lines of the picture are the formulas.",
        "What that does to a whole training: [loss.md](loss.md).\n",
        "    make backprop\n\nwrites this page anew.",
    ]
    with atomic(TARGET / "gradient.md") as path:
        path.write_text("\n".join(page) + "\n", "utf-8")


if __name__ == "__main__":
    main()
