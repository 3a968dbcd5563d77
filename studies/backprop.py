"""`make backprop`: how a convolution back-propagates: by hand, in numpy and by autograd, as docs/studies/backprop.md and .png."""

import inspect
import sys
from collections import defaultdict
from itertools import product, zip_longest
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.lib.stride_tricks import sliding_window_view

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from cifarlab.files import atomic

Floats = npt.NDArray[np.float64]
Terms = list[tuple[str, float, str, float]]
PAGE = Path("docs/studies/backprop.md")
# The exercise: no number is zero, no filter is its own mirror image.
X, FILTER, UPSTREAM = (
    np.array(rows, float) for rows in ([[1, 2, 3], [-1, 4, 1], [2, 1, 5]], [[1, 2], [3, -1]], [[1, -1], [3, 2]])
)  # (3, 3), (2, 2), (2, 2)
OTHER = np.array([[2, -1], [1, 1]], float)  # a filter that differs
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MARK = "#d62728"


def convolve(x: Floats, f: Floats, stride: int = 1, padding: int = 0) -> Floats:
    """Slide the filters f (C_out, C_in, kh, kw) over x (C_in, H, W); return (C_out, OH, OW)."""
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(x, f.shape[2:], axis=(1, 2))[:, ::stride, ::stride]  # (C_in, OH, OW, kh, kw)
    output: Floats = np.einsum("cijab,ocab->oij", windows, f)
    return output


def gradients(x: Floats, f: Floats, upstream: Floats, stride: int = 1, padding: int = 0) -> tuple[Floats, Floats]:
    """Return ∂L/∂X like x and ∂L/∂F like f, where upstream is ∂L/∂O (C_out, OH, OW)."""
    (_, height, width), (_, _, kh, kw) = x.shape, f.shape
    # Dilated: as large as with stride 1, and zero where the stride skipped.
    dilated = np.zeros((len(f), height + 2 * padding - kh + 1, width + 2 * padding - kw + 1))
    dilated[:, ::stride, ::stride] = upstream
    # ∂L/∂F: X ⋆ ∂L/∂O, for each pair of an input and an output channel.
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(x, dilated.shape[1:], axis=(1, 2))  # (C_in, kh, kw, OH, OW)
    to_filter = np.einsum("cabij,oij->ocab", windows, dilated)
    # ∂L/∂X: ∂L/∂O, in zeros, ⋆ the filter turned by 180°, summed over output channels; then the padding is cropped.
    turned = f[:, :, ::-1, ::-1].swapaxes(0, 1)
    to_x = convolve(np.pad(dilated, [(0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1)]), turned)
    return to_x[:, padding : padding + height, padding : padding + width], to_filter


def autograd(x: Floats, f: Floats, upstream: Floats, stride: int = 1, padding: int = 0) -> tuple[Floats, Floats]:
    """Return what `gradients` returns, by PyTorch."""
    tx, tf = torch.tensor(x, requires_grad=True), torch.tensor(f, requires_grad=True)
    output = F.conv2d(tx[None], tf, stride=stride, padding=padding)
    to_x, to_filter = torch.autograd.grad(output, [tx, tf], torch.tensor(upstream)[None])
    return to_x.numpy(), to_filter.numpy()


def by_hand(x: Floats, f: Floats, upstream: Floats) -> dict[str, Terms]:
    """Collect the products whose sums are the gradients, from O_ij = Σ_ab X_(i+a-1)(j+b-1) F_ab and the chain rule alone.

    Parameters
    ----------
    x, f, upstream : (H, W), (kh, kw), (OH, OW)

    Returns
    -------
    {"∂L/∂F₁₁": [("X₁₁", its value, "∂L/∂O₁₁", its value), …], …}
    """
    terms: dict[str, Terms] = defaultdict(list)
    for i, j in np.ndindex(upstream.shape):
        for a, b in np.ndindex(f.shape):  # counted from 0, so that X is at i + a
            m, n = i + a, j + b
            # O_ij holds X_mn · F_ab: the derivative of this product by one factor is the other.
            above = name("∂L/∂O", i, j), upstream[i, j].item()
            terms[name("∂L/∂F", a, b)].append((name("X", m, n), x[m, n].item(), *above))
            terms[name("∂L/∂X", m, n)].append((name("F", a, b), f[a, b].item(), *above))
    return dict(sorted(terms.items()))


def name(symbol: str, row: int, column: int) -> str:
    """Return X₁₁ for X, 0, 0."""
    return symbol + f"{row + 1}{column + 1}".translate(SUBSCRIPTS)


def plain(number: float) -> str:
    """Return a number with a minus sign that is as wide as a plus."""
    return f"{number:g}".replace("-", "−")


def factor(number: float) -> str:
    """Return a number as it is written in a product."""
    return plain(number) if number >= 0 else f"({plain(number)})"


def value(terms: Terms) -> float:
    """Return the sum of the products."""
    return float(sum(left * right for _, left, _, right in terms))


def substituted(terms: Terms) -> str:
    """Return the sum with numbers for symbols."""
    return " + ".join(f"{factor(left)}·{factor(right)}" for _, left, _, right in terms)


def same(what: str, *results: Floats) -> None:
    """End the script where not all results are the same: integers, so exactly."""
    if not all(np.array_equal(results[0], other) for other in results[1:]):
        sys.exit(f"error: {what} differs: {', '.join(map(str, results))}")


def beside(matrices: dict[str, Floats]) -> str:
    """Return matrices (rows, columns) beside each other, as a block of Markdown."""
    blocks = []
    for title, matrix in matrices.items():
        lines = [title, *("".join(f"{entry:4g}" for entry in row) for row in matrix)]
        width = max(map(len, lines))
        blocks.append([line.ljust(width) for line in [title.rjust(width), *lines[1:]]])
    rows = zip_longest(*blocks)
    text = ("    ".join(cell or " " * len(block[0]) for cell, block in zip(row, blocks, strict=True)).rstrip() for row in rows)
    return "\n".join(["```text", *text, "```"])


def exercise() -> str:
    """Return the table of both gradients of the exercise by hand, numpy and autograd, which must agree."""
    hand = by_hand(X, FILTER, UPSTREAM)
    operands = X[None], FILTER[None, None], UPSTREAM[None]
    (x, f), (auto_x, auto_f) = gradients(*operands), autograd(*operands)
    numpy, torchs = np.concatenate([f.ravel(), x.ravel()]), np.concatenate([auto_f.ravel(), auto_x.ravel()])
    same("a gradient by hand, numpy or autograd", np.array([value(terms) for terms in hand.values()]), numpy, torchs)
    rows = ["| | the sum | with numbers | by hand | numpy | autograd |", "|---|---|---|---|---|---|"]
    for (what, terms), ours, theirs in zip(hand.items(), numpy, torchs, strict=True):
        formula = " + ".join(f"{left}·{right}" for left, _, right, _ in terms)
        rows.append(f"| {what} | {formula} | {substituted(terms)} | {plain(value(terms))} | {plain(ours)} | {plain(theirs)} |")
    return "\n".join(rows)


def compare() -> None:
    """Compare numpy and autograd with stride, padding and channels."""
    rng = np.random.default_rng(0)
    x, f = rng.integers(-9, 10, (3, 8, 7)).astype(float), rng.integers(-9, 10, (2, 3, 3, 2)).astype(float)
    for stride, padding in product((1, 2, 3), (0, 1, 2)):
        output = convolve(x, f, stride, padding)
        same("O", output, F.conv2d(torch.tensor(x), torch.tensor(f), stride=stride, padding=padding).numpy())
        upstream = rng.integers(-9, 10, output.shape).astype(float)
        for ours, theirs in zip(gradients(x, f, upstream, stride, padding), autograd(x, f, upstream, stride, padding), strict=True):
            same(f"a gradient with stride {stride} and padding {padding}", ours, theirs)


def symmetry() -> str:
    """Return the gradients of three filters, two of them equal, in X → convolution → ReLU → convolution → L."""
    filters, outgoing = np.stack([FILTER, FILTER, OTHER])[:, None], np.stack([UPSTREAM] * 3)[None]  # (3, 1, 2, 2), (1, 3, 2, 2)
    output = convolve(X[None], filters)
    to_hidden, to_outgoing = gradients(output.clip(0), outgoing, np.ones((1, 1, 1)))
    upstream = to_hidden * (output > 0)
    _, to_filters = gradients(X[None], filters, upstream)
    weights = [torch.tensor(filters, requires_grad=True), torch.tensor(outgoing, requires_grad=True)]
    loss = F.conv2d(F.conv2d(torch.tensor(X)[None, None], weights[0]).relu(), weights[1]).sum()
    auto_filters, auto_outgoing = torch.autograd.grad(loss, weights)
    same("the filters' gradient", to_filters, auto_filters.numpy())
    same("the outgoing weights' gradient", to_outgoing, auto_outgoing.numpy())
    rows = ["| filter | F | outgoing | O before ReLU | ∂L/∂O | ∂L/∂F | ∂L/∂outgoing |", "|---|---|---|---|---|---|---|"]
    for k, matrices in enumerate(zip(filters[:, 0], outgoing[0], output, upstream, to_filters[:, 0], to_outgoing[0], strict=True)):
        cells = ("; ".join(" ".join(map(plain, row)) for row in matrix) for matrix in matrices)
        rows.append(f"| {k + 1} | {' | '.join(cells)} |")
    return "\n".join(rows)


def page() -> str:
    """Return the page, everything on it computed and checked."""
    compare()
    skipped = np.zeros((3, 3))
    skipped[::2, ::2] = UPSTREAM
    return f"""# How does a convolution back-propagate?

![forward, and the two convolutions backward](backprop.png)

By two more convolutions. With O = X ⋆ F on the way forward and ∂L/∂O come back from the layer after it,

- **∂L/∂F = X ⋆ ∂L/∂O**: the input, convolved with the gradient of the output;
- **∂L/∂X = (∂L/∂O in a frame of zeros) ⋆ (F turned by 180°)**: a *full* convolution, as large as the input again.

⋆ is what deep learning calls convolution: the filter slides as it is, not turned.

## By hand

`O_ij = Σ X_(i+a-1)(j+b-1) · F_ab`, summed over a and b. In numbers:

{beside({"X": X, "F": FILTER, "O": convolve(X[None], FILTER[None, None])[0], "∂L/∂O": UPSTREAM})}

Chain rule: `∂L/∂F_ab = Σ ∂O_ij/∂F_ab · ∂L/∂O_ij`, and `∂O_ij/∂F_ab` is the number of X that `F_ab` is multiplied with in `O_ij`.
The same for X: a corner takes part in one output, an edge in two, the middle in all four, each time under another number of
the filter. When the output moves to the right, a number of X moves to the left under the filter: hence the turn by 180°.

{exercise()}

The sums are collected from the definition of `O_ij`, numpy's column is the code below, autograd's is PyTorch's in float64.
The script that writes this page fails where one differs.

## In numpy

```python
{inspect.getsource(convolve)}

{inspect.getsource(gradients).rstrip()}
```

## Stride, padding, channels

- **Stride dilates.** With stride 2 the outputs between were never computed, so they ask for nothing: ∂L/∂O gets zeros between
  its numbers (and at its end, where the stride does not divide), and both convolutions go on with stride 1:

{beside({"∂L/∂O": UPSTREAM, "dilated": skipped})}

- **Padding crops.** Forward, X lies in zeros; ∂L/∂F sees these zeros, and of ∂L/∂X their share is cut off.
- **Channels sum.** An input channel feeds every output channel, so its ∂L/∂X is the sum over them. Every pair of an input and an
  output channel has a filter of its own, so ∂L/∂F has no sum over channels; over a batch it is summed, and a bias gets Σ ∂L/∂O.

autograd gives the same for 3 channels of 8 × 7, 2 × 3 filters of 3 × 2, strides 1, 2, 3 and paddings 0, 1, 2.

This is what the `train` stage does: at `loss.backward()` autograd calls these two convolutions for every convolution of the network,
the last one first, and hands ∂L/∂X on, through activation, normalisation and pooling, as the ∂L/∂O of the one before.

## Why equal filters stay equal

Three filters see the X above; after ReLU a second convolution, whose weights are the same for all three, sums them up to L
(matrices by rows):

{symmetry()}

Filters 1 and 2 are equal and so are their outgoing weights: same output, same ∂L/∂O, same gradient, on both sides. A step of the
optimizer leaves them equal, and so does the next one: two filters, one feature. Only the third, which started elsewhere, learns
something else. Where *all* start equal (`model.init=constant`), a layer of any width stays a layer of one filter.
Random numbers break the symmetry; [studies/initialisation.yaml](../../studies/initialisation.yaml) asks what it costs.

    make backprop

computes, checks and writes this page again.
"""


def panel(axes: Axes, title: str, matrix: Floats, frame: tuple[int, int], weights: Floats) -> None:
    """Draw matrix (rows, columns) with its numbers.

    The cells from `frame` on are framed, as many as there are weights, and the small numbers in them are what they are multiplied with.
    Dashed is the first such frame.
    """
    limit = 3 * np.abs(matrix).max()  # pale: the numbers matter
    text = {"size": 16, "color": "0.1"}
    sns.heatmap(matrix, annot=True, fmt="g", cmap="vlag", vmin=-limit, vmax=limit, cbar=False, linewidths=1, annot_kws=text, ax=axes)
    rows, columns = matrix.shape
    # Cells are of one size in all panels.
    axes.set(xlim=(columns / 2 - 2.05, columns / 2 + 2.05), ylim=(rows / 2 + 2.05, rows / 2 - 2.05), xticks=[], yticks=[], aspect="equal")
    axes.patch.set_visible(False)
    axes.text(columns / 2, -0.12, title, ha="center", va="bottom", fontsize=13)
    if weights.size:
        for (row, column), (colour, style) in {(0, 0): ("0.4", "--"), frame: (MARK, "-")}.items():
            box = Rectangle((column, row), *weights.shape[::-1], fill=False, ec=colour, ls=style, lw=3, clip_on=False, zorder=3)
            axes.add_patch(box)
    for (a, b), weight in np.ndenumerate(weights):
        row, column = frame[0] + a, frame[1] + b
        if not np.isnan(weight):
            axes.texts[row * columns + column].set_y(row + 0.4)  # room below
            axes.text(column + 0.93, row + 0.94, f"×{plain(weight)}", ha="right", va="bottom", fontsize=11, color=MARK)


def draw(path: Path) -> None:
    """Draw the way forward and both ways back, a row each; framed is one number of the result and what it is made of."""
    hand, output, turned = by_hand(X, FILTER, UPSTREAM), convolve(X[None], FILTER[None, None])[0], FILTER[::-1, ::-1]
    to_x, to_filter = gradients(X[None], FILTER[None, None], UPSTREAM[None])
    none, result = np.empty((0, 0)), np.full((1, 1), np.nan)
    ways = {
        "Forward: O = X ⋆ F": (
            ("X", X, (0, 0), FILTER),
            ("F", FILTER, (0, 0), none),
            ("O", output, (0, 0), result),
            ("∂L/∂O, from the layer after", UPSTREAM, (0, 0), none),
        ),
        "Back to the filter: ∂L/∂F = X ⋆ ∂L/∂O": (
            ("X", X, (0, 0), UPSTREAM),
            ("∂L/∂O", UPSTREAM, (0, 0), none),
            ("∂L/∂F", to_filter[0, 0], (0, 0), result),
        ),
        "Back to the input: ∂L/∂X = ∂L/∂O in zeros ⋆ F turned by 180°": (
            ("∂L/∂O in zeros", np.pad(UPSTREAM, 1), (1, 1), turned),
            ("F turned by 180°", turned, (0, 0), none),
            ("∂L/∂X", to_x[0], (1, 1), result),
        ),
    }
    with plt.rc_context():
        sns.set_theme(style="white", font="DejaVu Sans")  # the font that matplotlib brings along: the same picture everywhere
        figure, grid = plt.subplots(3, 4, figsize=(14, 11.5), gridspec_kw={"wspace": 0.22, "hspace": 0.25})
        for row, (heading, panels) in zip(grid, ways.items(), strict=True):
            for axes, content in zip(row, panels, strict=False):
                panel(axes, *content)
            for axes, sign in zip(row, ("⋆", "=", "→ L →")[: len(panels) - 1], strict=False):
                axes.text(1.1, 0.5, sign, transform=axes.transAxes, ha="center", va="center", fontsize=26)
            row[0].text(0, 1.16, heading, transform=row[0].transAxes, fontsize=15, fontweight="bold")
        for axes, what, start in ((grid[1, 3], name("∂L/∂F", 0, 0), ""), (grid[2, 3], name("∂L/∂X", 1, 1), name("∂L/∂X", 0, 0))):
            formula = "\n+ ".join(f"{left}·{right}" for left, _, right, _ in hand[what])
            text = f"Framed: {what}\n= {formula}\n= {substituted(hand[what])}\n= {plain(value(hand[what]))}"
            if start:
                [(left, _, right, _)] = hand[start]
                text += f"\n\nDashed: {start}, where F starts\n= {left}·{right} = {plain(value(hand[start]))}"
            axes.text(0, 0.5, text, transform=axes.transAxes, va="center", fontsize=13, linespacing=1.4)
            axes.axis("off")
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    """Write the page and its picture, or fail where the three ways differ."""
    text = page()
    draw(PAGE.with_suffix(".png"))
    with atomic(PAGE) as temporary:
        temporary.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
