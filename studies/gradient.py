"""`make backprop`: compare the gradients of the two losses where a network is confidently wrong.

Writes docs/studies/gradient.md and .png, from formulas and from autograd. No training is needed.
"""

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from cifarlab.figures import style
from cifarlab.files import ANSWERS, atomic
from cifarlab.training.loop import loss_function

Floats = npt.NDArray[np.float64]
CLASSES = 10
LOSSES = {"cross_entropy": "cross-entropy", "quadratic": "quadratic"}


def probabilities(right: float) -> Floats:
    """Return probabilities of ten classes; class 0 is the right one and gets `right`.

    Almost all of the rest goes to class 1, a wrong one.
    """
    p = np.full(CLASSES, (1 - right) * 0.001)
    p[0], p[1] = right, (1 - right) * (1 - 0.001 * (CLASSES - 2))
    return p


def by_formula(loss: str, p: Floats) -> Floats:
    """Return dL/dz for logits z, p = softmax(z) and the one-hot label y of class 0.

    Cross-entropy: p - y. Quadratic, L = ½ Σ (p - y)²: (diag(p) - p pᵀ) (p - y). The matrix is
    dp/dz. It is small where one class gets almost all of the probability, even a wrong class.
    """
    y = np.eye(CLASSES)[0]
    if loss == "cross_entropy":
        return np.asarray(p - y)
    return np.asarray((np.diag(p) - np.outer(p, p)) @ (p - y))


def by_autograd(loss: str, p: Floats) -> Floats:
    """Return the same from PyTorch's autograd, with the losses that `train.loss` selects."""
    z = torch.from_numpy(np.log(p))[None].requires_grad_()
    [gradient] = torch.autograd.grad(loss_function(loss)(z, torch.tensor([0])), z)
    return np.asarray(gradient[0])


def draw() -> Figure:
    """Draw the norm of both gradients against the probability of the right class."""
    style.apply()
    plt.rcParams["text.parse_math"] = True  # for the powers of ten at the axes
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    steps = np.logspace(-5, np.log10(0.999), 60)
    for loss, label in LOSSES.items():
        formula = [np.linalg.norm(by_formula(loss, probabilities(right))) for right in steps]
        [line] = axes.plot(steps, formula, label=f"{label}, formula")
        some = steps[::5]
        autograd = [np.linalg.norm(by_autograd(loss, probabilities(right))) for right in some]
        colour = line.get_color()
        axes.plot(some, autograd, "o", color=colour, mfc="white", label=f"{label}, autograd")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="probability given to the right class", ylabel="norm of dL/d(logits)")
    axes.set_title("How much a network learns from one image (left: confidently wrong)")
    axes.legend()
    return figure


def page() -> str:
    """Return the page as Markdown."""
    rows = []
    for right in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9):
        cross, quadratic = (
            float(np.linalg.norm(by_autograd(loss, probabilities(right)))) for loss in LOSSES
        )
        rows.append(f"| {right:g} | {cross:.4f} | {quadratic:.6f} | {cross / quadratic:,.1f} |")
    table = "\n".join(rows)
    return f"""\
# How fast does a network learn where it is confidently wrong?

![the norm of the gradient against the probability of the right class](gradient.png)

There are ten classes. p is the softmax, y the one-hot label. Almost all of the probability that the
right class does not get goes to one wrong class.

- The gradient of cross-entropy with respect to the logits is p − y. It grows the more the network
  is wrong, up to √2.
- The gradient of the quadratic loss ½ Σ (p − y)² is (diag(p) − p pᵀ)(p − y). The first factor is
  the derivative of the softmax. It vanishes where the network is certain, rightly or wrongly.

A network that is confidently wrong therefore gets almost no gradient from the quadratic loss.

| probability of the right class | cross-entropy | quadratic | ratio |
|---|---|---|---|
{table}

The norms in the table come from autograd, with the losses of `train.loss`. The lines in the picture
come from the formulas. [loss.md](loss.md) shows the effect on a whole training.

`make backprop` writes this page.
"""


def main() -> None:
    """Write the page and its picture."""
    text = page()
    style.save(draw(), ANSWERS / "gradient.png", dpi=100)
    with atomic(ANSWERS / "gradient.md") as path:
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
