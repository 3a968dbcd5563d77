"""`make backprop`: show how a convolution back-propagates, by hand, in numpy and by autograd.

Writes docs/studies/backprop.md and .png. Every number is computed in all three ways. The script
fails if they differ.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.lib.stride_tricks import sliding_window_view

from cifarlab.figures import style
from cifarlab.files import ANSWERS, atomic

Floats = npt.NDArray[np.float64]
# The products of a sum, each as the name and the value of its two factors.
Terms = list[tuple[str, float, str, float]]
PAGE, PICTURE = ANSWERS / "backprop.md", ANSWERS / "backprop.png"
# The exercise. No number is zero and the filter is not symmetric, so that no mistake stays hidden.
X = np.array([[1, 2, 3], [-1, 4, 1], [2, 1, 5]], float)
FILTER = np.array([[1, 2], [3, -1]], float)
UPSTREAM = np.array([[1, -1], [3, 2]], float)  # ∂L/∂O
OTHER_FILTER = np.array([[2, -1], [1, 1]], float)
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
RED = "#d62728"


def convolve(x: Floats, f: Floats, stride: int = 1, padding: int = 0) -> Floats:
    """Slide the filters f (C_out, C_in, kh, kw) over x (C_in, H, W); return (C_out, OH, OW)."""
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(x, f.shape[2:], axis=(1, 2))  # (C_in, OH, OW, kh, kw)
    output: Floats = np.einsum("cijab,ocab->oij", windows[:, ::stride, ::stride], f)
    return output


def gradients(
    x: Floats, f: Floats, upstream: Floats, stride: int = 1, padding: int = 0
) -> tuple[Floats, Floats]:
    """Return ∂L/∂X, shaped like x, and ∂L/∂F, shaped like f; upstream is ∂L/∂O (C_out, OH, OW)."""
    (_, height, width), (_, _, kh, kw) = x.shape, f.shape
    # Dilate ∂L/∂O to the size it has with stride 1: zeros where the stride skipped an output.
    dilated = np.zeros((len(f), height + 2 * padding - kh + 1, width + 2 * padding - kw + 1))
    dilated[:, ::stride, ::stride] = upstream
    # ∂L/∂F is X ⋆ ∂L/∂O, for every pair of an input channel and an output channel.
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(x, dilated.shape[1:], axis=(1, 2))  # (C_in, kh, kw, OH, OW)
    to_filter = np.einsum("cabij,oij->ocab", windows, dilated)
    # ∂L/∂X is ∂L/∂O, framed with zeros, ⋆ the filter rotated by 180°, summed over output channels.
    rotated = f[:, :, ::-1, ::-1].swapaxes(0, 1)
    to_x = convolve(np.pad(dilated, [(0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1)]), rotated)
    # The gradient of the padding is cropped.
    return to_x[:, padding : padding + height, padding : padding + width], to_filter


def autograd(
    x: Floats, f: Floats, upstream: Floats, stride: int = 1, padding: int = 0
) -> tuple[Floats, Floats]:
    """Return what `gradients` returns, computed by PyTorch."""
    tx, tf = torch.tensor(x, requires_grad=True), torch.tensor(f, requires_grad=True)
    output = F.conv2d(tx[None], tf, stride=stride, padding=padding)
    to_x, to_filter = torch.autograd.grad(output, [tx, tf], torch.tensor(upstream)[None])
    return to_x.numpy(), to_filter.numpy()


def by_hand(x: Floats, f: Floats, upstream: Floats) -> dict[str, Terms]:
    """Collect the products whose sums are the gradients.

    Uses only O_ij = Σ_ab X_(i+a-1)(j+b-1) F_ab and the chain rule.

    Parameters
    ----------
    x, f, upstream : (H, W), (kh, kw), (OH, OW)

    Returns
    -------
    {"∂L/∂F₁₁": [("X₁₁", its value, "∂L/∂O₁₁", its value), …], …}
    """
    terms: dict[str, Terms] = defaultdict(list)
    for i, j in np.ndindex(upstream.shape):
        for a, b in np.ndindex(f.shape):
            m, n = i + a, j + b  # all indices count from 0 here
            # O_ij contains X_mn · F_ab. Its derivative by one factor is the other factor.
            above = symbol("∂L/∂O", i, j), upstream[i, j].item()
            terms[symbol("∂L/∂F", a, b)].append((symbol("X", m, n), x[m, n].item(), *above))
            terms[symbol("∂L/∂X", m, n)].append((symbol("F", a, b), f[a, b].item(), *above))
    return dict(sorted(terms.items()))


def symbol(name: str, row: int, column: int) -> str:
    """Return X₁₁ for X, 0, 0."""
    return name + f"{row + 1}{column + 1}".translate(SUBSCRIPTS)


def plain(number: float) -> str:
    """Return a number with a minus sign that is as wide as a plus sign."""
    return f"{number:g}".replace("-", "−")


def factor(number: float) -> str:
    """Return a number as it is written in a product: negative numbers in brackets."""
    return plain(number) if number >= 0 else f"({plain(number)})"


def value(terms: Terms) -> float:
    """Return the sum of the products."""
    return float(sum(left * right for _, left, _, right in terms))


def formula(terms: Terms, separator: str = " + ") -> str:
    """Return the sum in symbols."""
    return separator.join(f"{left}·{right}" for left, _, right, _ in terms)


def substituted(terms: Terms) -> str:
    """Return the sum with numbers instead of symbols."""
    return " + ".join(f"{factor(left)}·{factor(right)}" for _, left, _, right in terms)


def check_equal(what: str, *results: Floats) -> None:
    """End the script with an error unless all results are equal: integers, so exactly equal."""
    if not all(np.array_equal(results[0], other) for other in results[1:]):
        sys.exit(f"error: {what} differs: {', '.join(map(str, results))}")


def side_by_side(matrices: Mapping[str, Floats]) -> str:
    """Return matrices (rows, columns) next to each other, as a block of Markdown."""
    blocks = []
    for title, matrix in matrices.items():
        lines = [title, *("".join(f"{entry:4g}" for entry in row) for row in matrix)]
        width = max(map(len, lines))
        blocks.append([line.ljust(width) for line in [title.rjust(width), *lines[1:]]])
    text = []
    for row in zip_longest(*blocks):
        cells = (cell or " " * len(block[0]) for cell, block in zip(row, blocks, strict=True))
        text.append("    ".join(cells).rstrip())
    return "\n".join(["```text", *text, "```"])


def exercise() -> str:
    """Return the table of both gradients of the exercise; check that all three ways agree."""
    hand = by_hand(X, FILTER, UPSTREAM)
    operands = X[None], FILTER[None, None], UPSTREAM[None]
    ours, theirs = (
        np.concatenate([to_filter.ravel(), to_x.ravel()])
        for to_x, to_filter in (gradients(*operands), autograd(*operands))
    )
    values = np.array([value(terms) for terms in hand.values()])
    check_equal("a gradient by hand, numpy or autograd", values, ours, theirs)
    rows = [
        "| | the sum | with numbers | by hand | numpy | autograd |",
        "|---|---|---|---|---|---|",
    ]
    for (what, terms), *results in zip(hand.items(), values, ours, theirs, strict=True):
        cells = [what, formula(terms), substituted(terms), *map(plain, results)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def compare() -> None:
    """Check that numpy and autograd agree with stride, padding and several channels."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (3, 8, 7)).astype(float)
    f = rng.integers(-9, 10, (2, 3, 3, 2)).astype(float)
    for stride, padding in product((1, 2, 3), (0, 1, 2)):
        where = f"with stride {stride} and padding {padding}"
        output = convolve(x, f, stride, padding)
        torchs = F.conv2d(torch.tensor(x), torch.tensor(f), stride=stride, padding=padding)
        check_equal(f"the output {where}", output, torchs.numpy())
        upstream = rng.integers(-9, 10, output.shape).astype(float)
        ours, theirs = (way(x, f, upstream, stride, padding) for way in (gradients, autograd))
        for one, other in zip(ours, theirs, strict=True):
            check_equal(f"a gradient {where}", one, other)


def symmetry() -> str:
    """Return the gradients of three filters, two of which are equal.

    The network is X → convolution → ReLU → convolution → L.
    """
    filters = np.stack([FILTER, FILTER, OTHER_FILTER])[:, None]  # (3, 1, 2, 2)
    outgoing = np.stack([UPSTREAM] * 3)[None]  # (1, 3, 2, 2)
    output = convolve(X[None], filters)
    to_hidden, to_outgoing = gradients(output.clip(0), outgoing, np.ones((1, 1, 1)))
    upstream = to_hidden * (output > 0)
    _, to_filters = gradients(X[None], filters, upstream)
    weights = [
        torch.tensor(filters, requires_grad=True),
        torch.tensor(outgoing, requires_grad=True),
    ]
    hidden = F.conv2d(torch.tensor(X)[None, None], weights[0]).relu()
    loss = F.conv2d(hidden, weights[1]).sum()
    auto_filters, auto_outgoing = torch.autograd.grad(loss, weights)
    check_equal("the filters' gradient", to_filters, auto_filters.numpy())
    check_equal("the outgoing weights' gradient", to_outgoing, auto_outgoing.numpy())
    rows = [
        "| filter | F | outgoing | O before ReLU | ∂L/∂O | ∂L/∂F | ∂L/∂outgoing |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = filters[:, 0], outgoing[0], output, upstream, to_filters[:, 0], to_outgoing[0]
    for number, matrices in enumerate(zip(*columns, strict=True), 1):
        cells = ("; ".join(" ".join(map(plain, row)) for row in matrix) for matrix in matrices)
        rows.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(rows)


def page() -> str:
    """Return the page as Markdown, with every number on it computed and checked."""
    compare()
    return "\n".join([page_answer(), page_code(), page_details(), page_symmetry()])


def page_answer() -> str:
    """Return the answer and the exercise by hand."""
    output = convolve(X[None], FILTER[None, None])[0]
    matrices = side_by_side({"X": X, "F": FILTER, "O": output, "∂L/∂O": UPSTREAM})
    return f"""\
# How does a convolution back-propagate?

![forward, and the two convolutions backward](backprop.png)

By two more convolutions. The forward pass computes O = X ⋆ F. The backward pass of the next layer
gives ∂L/∂O. Then

- **∂L/∂F = X ⋆ ∂L/∂O**: the input, convolved with the gradient of the output;
- **∂L/∂X = (∂L/∂O framed with zeros) ⋆ (F rotated by 180°)**: a *full* convolution, whose result is
  as large as the input.

⋆ is what deep learning calls a convolution: the filter slides without being rotated.

## By hand

`O_ij = Σ X_(i+a-1)(j+b-1) · F_ab`, summed over a and b. In numbers:

{matrices}

The chain rule says `∂L/∂F_ab = Σ ∂O_ij/∂F_ab · ∂L/∂O_ij`. Here `∂O_ij/∂F_ab` is the number of X
that `F_ab` is multiplied by in `O_ij`. The same holds for X: a corner contributes to one output, an
edge to two and the centre to all four, each time multiplied by another number of the filter. When
the output position moves to the right, a given number of X moves to the left in the filter's
window. This is why the filter is rotated by 180°.

{exercise()}

The sums are collected from the definition of `O_ij`. The numpy column comes from the code below,
the autograd column from PyTorch in float64. The script that writes this page fails if they differ.
"""


def page_code() -> str:
    """Return the section with the source code of this module's convolution."""
    return f"""\
## In numpy

```python
{inspect.getsource(convolve)}

{inspect.getsource(gradients).rstrip()}
```
"""


def page_details() -> str:
    """Return the section about stride, padding and channels."""
    dilated = np.zeros((3, 3))
    dilated[::2, ::2] = UPSTREAM
    return f"""\
## Stride, padding, channels

- **Stride dilates.** With stride 2, every second output was never computed, so it has no gradient.
  ∂L/∂O gets zeros in these places (and at its end, if the stride does not divide the size). Both
  convolutions then use stride 1:

{side_by_side({"∂L/∂O": UPSTREAM, "dilated": dilated})}

- **Padding crops.** In the forward pass X is framed with zeros. ∂L/∂F uses these zeros too, and the
  part of ∂L/∂X that belongs to them is cut off.
- **Channels sum.** An input channel contributes to every output channel, so its ∂L/∂X is the sum
  over the output channels. Every pair of an input and an output channel has its own filter, so
  ∂L/∂F is not summed over channels. Over a batch it is summed. The gradient of a bias is Σ ∂L/∂O.

autograd gives the same result for 3 channels of 8 × 7, 2 × 3 filters of 3 × 2, strides 1, 2, 3 and
paddings 0, 1, 2.

This is what happens in the `train` stage. `loss.backward()` computes these two convolutions for
every convolution of the network, starting with the last one. ∂L/∂X passes back through activation,
normalisation and pooling and becomes the ∂L/∂O of the convolution before.
"""


def page_symmetry() -> str:
    """Return the section about equal filters."""
    return f"""\
## Why equal filters stay equal

Three filters see the X above. After ReLU, a second convolution sums their outputs up to L. Its
weights are the same for all three filters. (Matrices are written row by row.)

{symmetry()}

Filters 1 and 2 are equal, and so are their outgoing weights. They therefore have the same output
and the same ∂L/∂O. Both the filters and their outgoing weights get equal gradients. A step of the
optimizer leaves them equal, and so does every later step: two filters, but one feature. Only the
third filter, which started with other numbers, learns something else. If *all* filters start equal
(`model.init=constant`), a layer of any width behaves like a layer with one filter.
Random numbers break the symmetry.
[studies/initialisation.yaml](../../studies/initialisation.yaml) measures what symmetry costs.

`make backprop` computes, checks and writes this page.
"""


def draw() -> Figure:
    """Draw the forward pass and both backward passes, one row each.

    In every row, one number of the result is framed, with the numbers that it is made of.
    """
    style.reset()
    # DejaVu Sans comes with matplotlib, so the picture is the same on every machine.
    sns.set_theme(style="white", font="DejaVu Sans")
    spacing = {"wspace": 0.22, "hspace": 0.25}
    figure, grid = plt.subplots(3, 4, figsize=(14, 11.5), gridspec_kw=spacing)
    draw_row(
        grid[0],
        "Forward: O = X ⋆ F",
        [
            ("X", X, (0, 0), FILTER),
            ("F", FILTER, None, None),
            ("O", convolve(X[None], FILTER[None, None])[0], (0, 0), None),
            ("∂L/∂O, from the layer after", UPSTREAM, None, None),
        ],
    )
    to_x, to_filter = gradients(X[None], FILTER[None, None], UPSTREAM[None])
    draw_row(
        grid[1],
        "Back to the filter: ∂L/∂F = X ⋆ ∂L/∂O",
        [
            ("X", X, (0, 0), UPSTREAM),
            ("∂L/∂O", UPSTREAM, None, None),
            ("∂L/∂F", to_filter[0, 0], (0, 0), None),
        ],
    )
    rotated = FILTER[::-1, ::-1]
    draw_row(
        grid[2],
        "Back to the input: ∂L/∂X = ∂L/∂O in zeros ⋆ F turned by 180°",
        [
            ("∂L/∂O in zeros", np.pad(UPSTREAM, 1), (1, 1), rotated),
            ("F turned by 180°", rotated, None, None),
            ("∂L/∂X", to_x[0], (1, 1), None),
        ],
    )
    hand = by_hand(X, FILTER, UPSTREAM)
    explain(grid[1, 3], hand, symbol("∂L/∂F", 0, 0))
    explain(grid[2, 3], hand, symbol("∂L/∂X", 1, 1), start=symbol("∂L/∂X", 0, 0))
    return figure


# Title, matrix, the upper left cell of the frame, and the weights that the framed cells are
# multiplied by. Without weights the frame is one cell.
Panel = tuple[str, Floats, tuple[int, int] | None, Floats | None]


def draw_row(row: Sequence[Axes], heading: str, panels: list[Panel]) -> None:
    """Draw the matrices of one convolution and the signs between them."""
    for axes, content in zip(row, panels, strict=False):
        draw_matrix(axes, *content)
    for axes, sign in zip(row, ("⋆", "=", "→ L →")[: len(panels) - 1], strict=False):
        inside = axes.transAxes
        axes.text(1.1, 0.5, sign, transform=inside, ha="center", va="center", fontsize=26)
    inside = row[0].transAxes
    row[0].text(0, 1.16, heading, transform=inside, fontsize=15, fontweight="bold")


def draw_matrix(
    axes: Axes,
    title: str,
    matrix: Floats,
    frame: tuple[int, int] | None,
    weights: Floats | None,
) -> None:
    """Draw a matrix (rows, columns) with its numbers, its frame and the weights in the frame."""
    limit = 3 * np.abs(matrix).max()  # pale colours, so that the numbers can be read
    sns.heatmap(
        matrix,
        annot=True,
        fmt="g",
        cmap="vlag",
        vmin=-limit,
        vmax=limit,
        cbar=False,
        linewidths=1,
        annot_kws={"size": 16, "color": "0.1"},
        ax=axes,
    )
    rows, columns = matrix.shape
    # The same limits around the centre make cells equally large in all panels.
    axes.set(xlim=(columns / 2 - 2.05, columns / 2 + 2.05), ylim=(rows / 2 + 2.05, rows / 2 - 2.05))
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.patch.set_visible(False)
    axes.text(columns / 2, -0.12, title, ha="center", va="bottom", fontsize=13)
    if frame is not None:
        draw_frame(axes, frame, (1, 1) if weights is None else weights.shape)
    if frame is not None and weights is not None:
        for (a, b), weight in np.ndenumerate(weights):
            row, column = frame[0] + a, frame[1] + b
            axes.texts[row * columns + column].set_y(row + 0.4)  # makes room for the weight
            text = axes.text(column + 0.93, row + 0.94, f"×{plain(weight)}", fontsize=11)
            text.set(ha="right", va="bottom", color=RED)


def draw_frame(axes: Axes, frame: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Draw a frame of `shape` cells at `frame`, and a dashed one at the first position."""
    height, width = shape
    for (row, column), (colour, line) in {(0, 0): ("0.4", "--"), frame: (RED, "-")}.items():
        box = Rectangle((column, row), width, height, fill=False, ec=colour, ls=line, lw=3)
        box.set(clip_on=False, zorder=3)
        axes.add_patch(box)


def explain(axes: Axes, hand: Mapping[str, Terms], what: str, start: str = "") -> None:
    """Write the framed sum and, where the first position is another one, its only product."""
    terms = hand[what]
    text = f"Framed: {what}\n= {formula(terms, chr(10) + '+ ')}\n= {substituted(terms)}"
    text += f"\n= {plain(value(terms))}"
    if start:
        text += f"\n\nDashed: {start}, where F starts\n= {formula(hand[start])}"
        text += f" = {plain(value(hand[start]))}"
    inside = axes.transAxes
    axes.text(0, 0.5, text, transform=inside, va="center", fontsize=13, linespacing=1.4)
    axes.axis("off")


def main() -> None:
    """Write the page and its picture, unless the three ways differ."""
    text = page()
    with atomic(PICTURE) as temporary:
        draw().savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
    with atomic(PAGE) as temporary:
        temporary.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
