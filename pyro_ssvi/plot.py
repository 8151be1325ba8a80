"""Plots of a guide and of its training. Each draws on an Axes and returns it; none shows it.

They need matplotlib (``pip install pyro-ssvi[examples]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, unravel_index

from .active_set import ActiveSet
from .diagnostics import overlap
from .guides import AutoSparseGuide
from .inclusion import Effects

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "accuracy",
    "active_set",
    "bands",
    "densities",
    "effects",
    "elbo",
    "posterior",
    "receptive_fields",
    "reliability",
    "turnover",
]

# Okabe and Ito's, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, GREY = COLOURS[0], "#999999"
# And apart in print without colours.
MARKERS = "osD^vPX"


def elbo(losses: Sequence[float], ax: Axes | None = None, window: int = 100) -> Axes:
    """The loss by step, and its running mean.

    :param losses: what ``svi.step()`` returned.
    :param window: steps that the mean is over.
    """
    ax = _axes(ax)
    values = torch.as_tensor(losses, dtype=torch.float64)
    ax.plot(range(1, len(values) + 1), values, color=GREY, lw=0.5, alpha=0.6)
    if len(values) >= window:
        means = values.unfold(0, window, 1).mean(-1)
        ax.plot(range(window, len(values) + 1), means, color=BLUE, label=f"mean of {window} steps")
        ax.legend(frameon=False)
    return _finish(ax, title="Negative ELBO", xlabel="step")


def densities(guide: AutoSparseGuide, ax: Axes | None = None) -> Axes:
    """The share of active coordinates of each site, with their number."""
    ax = _axes(ax)
    sets = guide.active_sets
    shares = [100 * active.density for active in sets.values()]
    bars = ax.barh(range(len(sets)), shares, color=BLUE)
    ax.bar_label(bars, [f"{len(active):,}" for active in sets.values()], padding=3, fontsize=8)
    ax.set_yticks(range(len(sets)), list(sets))
    ax.invert_yaxis()
    ax.set_xlim(0, 118)  # room for the numbers
    return _finish(ax, title="Active coordinates", xlabel="% of the site")


def turnover(history: Sequence[Mapping[str, ActiveSet]], ax: Axes | None = None) -> Axes:
    """How much of each active set is the same as the last one of the history.

    :param history: ``guide.active_sets`` at one time after another.
    """
    ax = _axes(ax)
    kept = [overlap(sets, history[-1]) for sets in history]
    sparse = [name for name, active in history[-1].items() if not active.is_full]
    for name, colour, marker in zip(sparse, cycle(COLOURS), cycle(MARKERS), strict=False):
        overlaps = [100 * each[name] for each in kept]
        ax.plot(overlaps, marker=marker, ms=5, label=name, color=colour)
    ax.legend(frameon=False)
    ax.set_ylim(0, 103)
    ax.locator_params(axis="x", integer=True)
    return _finish(ax, title="Overlap with the last active set, %", xlabel="entry of the history")


def active_set(
    active: ActiveSet, image_shape: tuple[int, int] | None = None, ax: Axes | None = None
) -> Axes:
    """Where the active coordinates lie.

    :param image_shape: height and width, for weights ``[out, height * width]`` of images: how many
        units look at each pixel. By default the site's matrix itself, in cells of several
        coordinates if it is large.
    """
    from matplotlib.ticker import MaxNLocator

    ax = _axes(ax)
    rows, cols = active.matrix_shape
    index = active.indices.cpu()
    if image_shape is not None:
        height, width = image_shape
        if cols % (height * width):
            raise ValueError(
                f"image_shape {image_shape} has {height * width} pixels, but the site's rows have "
                f"{cols} elements"
            )
        counts = torch.bincount(index % (height * width), minlength=height * width)
        image, title = counts.reshape(height, width), "Active weights of each pixel"
    else:
        n, m = min(rows, 200), min(cols, 200)
        cell = index // cols * n // rows * m + index % cols * m // cols
        image, title = torch.bincount(cell, minlength=n * m).reshape(n, m), "Active coordinates"
    drawn = ax.imshow(
        image.tolist(), cmap="viridis", aspect="equal" if image_shape else "auto", vmin=0
    )
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8, ticks=MaxNLocator(integer=True))
    ax.set(title=title, xticks=[], yticks=[])
    return ax


def receptive_fields(
    weights: Tensor, image_shape: tuple[int, int], units: int = 24, ax: Axes | None = None
) -> Axes:
    """What the first units of a layer look at: their weights as images, exact zeros in grey.

    The sign is in the colour alone (orange is negative, purple positive): print it in colour.

    :param weights: of a layer that sees images, ``[out, height * width]``, dense as
        ``guide.median()`` gives them.
    :param image_shape: height and width.
    :param units: how many to show: those with the largest weights, in the sum of squares.
    """
    ax = _axes(ax)
    height, width = image_shape
    if weights.dim() != 2 or weights.shape[1] != height * width:
        raise ValueError(
            f"image_shape {image_shape} asks for weights of shape (out, {height * width}), got "
            f"{tuple(weights.shape)}"
        )
    order = weights.square().sum(1).argsort(descending=True)[:units]
    columns = min(len(order), 8)
    rows = -(-len(order) // columns)
    fields = weights.new_zeros(rows * columns, height, width)
    fields[: len(order)] = weights[order].reshape(-1, height, width)
    image = fields.reshape(rows, columns, height, width).transpose(1, 2)
    image = image.reshape(rows * height, columns * width).cpu()
    most = float(image.abs().max())
    drawn = ax.imshow(
        image.where(image != 0, torch.nan).numpy(), cmap="PuOr", vmin=-most, vmax=most
    )
    for row in range(1, rows):
        ax.axhline(row * height - 0.5, color="white", lw=2)
    for column in range(1, columns):
        ax.axvline(column * width - 0.5, color="white", lw=2)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
    ax.set(title="Weights of each unit", xticks=[], yticks=[], facecolor="0.85")
    ax.spines[:].set_visible(False)
    return ax


def posterior(
    guide: AutoSparseGuide, site: str, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Means and 95 % intervals of a site's active coordinates, the 30 with the surest sign first.

    :param names: of the site's elements, in the order of its flattened value; by default their
        indices.
    """
    ax = _axes(ax)
    shape = guide.active_sets[site].shape
    active = guide.active_sets[site].indices.cpu()
    low, middle, high = (
        value.flatten().cpu()[active] for value in guide.quantiles([0.025, 0.5, 0.975])[site]
    )
    order = (middle.abs() / (high - low)).argsort(descending=True)[:30]
    low, middle, high, active = (part[order] for part in (low, middle, high, active))
    if names is None:
        where = zip(*(i.tolist() for i in unravel_index(active, shape)), strict=True)
        labels = [", ".join(map(str, index)) for index in where]
    else:
        labels = [names[i] for i in active.tolist()]
    _intervals(ax, low, middle, high, labels)
    return _finish(ax, title=f"{site}: mean and 95 % interval")


def effects(
    table: Effects, image_shape: tuple[int, int] | None = None, ax: Axes | None = None
) -> Axes:
    """Means and credible intervals of the 30 inputs with the largest effects.

    :param table: what :func:`pyro_ssvi.inclusion.effects` gave.
    :param image_shape: height and width of inputs that are pixels: their mean effects as an image,
        those without active weights in grey.
    """
    ax = _axes(ax)
    if image_shape is not None:
        height, width = image_shape
        if height * width != len(table.mean):
            raise ValueError(
                f"image_shape {image_shape} has {height * width} pixels, but there are "
                f"{len(table.mean)} inputs"
            )
        image = table.mean.where(table.active > 0, torch.nan).reshape(height, width).cpu()
        drawn = ax.imshow(image.numpy(), cmap="viridis")
        ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
        ax.set(title="Effect of each pixel", xticks=[], yticks=[], facecolor="0.85")
        return ax
    order = table.order[:30]
    low, middle, high = (part[order].cpu() for part in (table.low, table.mean, table.high))
    _intervals(ax, low, middle, high, [table.names[i] for i in order.tolist()])
    return _finish(ax, title=f"Effect: mean and {100 * table.level:g} % interval")


def reliability(
    probs: Tensor, labels: Tensor, bins: int = 15, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Accuracy against confidence: on the diagonal, probabilities mean what they say.

    :param probs: class probabilities, ``[N, classes]``.
    :param labels: int64 ``[N]``.
    """
    ax = _axes(ax)
    confidence, predicted = probs.max(-1)
    right = (predicted == labels).to(probs)
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    some = count > 0
    x, y = (
        (torch.bincount(place, weights, minlength=bins) / count)[some].cpu()
        for weights in (confidence, right)
    )
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=GREY, lw=1)
    curve = len(ax.lines) - 1  # besides the diagonal
    colour, marker = COLOURS[curve % len(COLOURS)], MARKERS[curve % len(MARKERS)]
    ax.plot(x, y, marker=marker, ms=5, label=label, color=colour)
    if label is not None:
        ax.legend(frameon=False)
    return _finish(ax, title="Reliability", xlabel="confidence", ylabel="accuracy")


def bands(
    x: Tensor, draws: Tensor, label: str | None = None, colour: str = BLUE, ax: Axes | None = None
) -> Axes:
    """A curve with its uncertainty: the median of the draws, and bands of 50 and 90 % of them.

    :param x: where the curve is drawn, ``[N]``, ascending.
    :param draws: from the posterior, of the curve or of observations, ``[S, N]``.
    :param label: of the curve.
    """
    ax = _axes(ax)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).to(draws)
    low, lower, middle, upper, high = draws.quantile(levels, dim=0).cpu().numpy()
    places = x.cpu().numpy()
    for bottom, top in ((low, high), (lower, upper)):
        ax.fill_between(places, bottom, top, color=colour, alpha=0.25, lw=0)
    ax.plot(places, middle, color=colour, lw=2, label=label)
    if label is not None:
        ax.legend(frameon=False)
    return _finish(ax)


def accuracy(results: Mapping[str, tuple[int, float]], ax: Axes | None = None) -> Axes:
    """Accuracy against active parameters.

    :param results: by name, how many parameters are active and which share of the predictions is
        right::

            plot.accuracy({"AutoNormal": (478_410, 0.898), "5 %": (24_690, 0.889)})
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    ax = _axes(ax)
    for (name, (active, right)), colour, marker in zip(
        results.items(), cycle(COLOURS), cycle(MARKERS), strict=False
    ):
        ax.plot(active, 100 * right, marker, ms=8, color=colour, label=name)
    ax.set_xscale("log")
    numbers = [active for active, _ in results.values()]
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    if max(numbers) < 100 * min(numbers):
        ax.xaxis.set_minor_formatter(EngFormatter(sep=""))
    else:  # they would overlap
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False)
    return _finish(ax, title="Accuracy, %", xlabel="active parameters")


def _intervals(ax: Axes, low: Tensor, middle: Tensor, high: Tensor, labels: Sequence[str]) -> None:
    """A line for each label, from above; a mean may lie outside of its interval."""
    bars = torch.stack([middle - low, high - middle]).clamp(min=0)
    places = range(len(labels))
    ax.errorbar(middle, places, xerr=bars, fmt="o", color=BLUE, ms=4, capsize=2)
    ax.axvline(0, color=GREY, lw=1)
    ax.set_yticks(places, labels, fontsize=8)
    ax.invert_yaxis()


def _axes(ax: Axes | None) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # not needed by those who plot nothing

    return plt.subplots(layout="constrained")[1]


def _finish(ax: Any, **labels: str) -> Axes:
    ax.set(**labels)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    return ax
