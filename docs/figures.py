"""The pictures of how_it_works.md, from a network that learns scikit-learn's digits in seconds.

python docs/figures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_ssvi import SSVI, ActiveSet, AutoSparseNormal, CosineSchedule, criteria, plot

ORANGE, LIGHT = plot.COLOURS[1], "#BBBBBB"
EVERY = 20  # steps from one exchange to the next


class Exchange(NamedTuple):
    """What one exchange saw in the first layer, and what it did."""

    snr: Tensor  # of the active weights before, [K]
    removed: Tensor  # which of them left, bool [K]
    gradient: Tensor  # sizes, of the weights that were inactive before, [D - K]
    added: Tensor  # which of them came, bool [D - K]


class Training(NamedTuple):
    history: list[dict[str, ActiveSet]]  # before training and after each exchange
    exchange: Exchange


def train(steps: int) -> Training:
    """Train 64-100-10 at a density of 10 %, and watch the exchange at a sixth of the steps."""
    images, labels = load_digits(return_X_y=True)
    data_x, data_y = torch.tensor(images / 16).float(), torch.tensor(labels)

    def model(x: Tensor, y: Tensor) -> None:
        w0 = pyro.sample("w0", dist.Normal(0.0, 0.5).expand([100, 64]).to_event(2))
        w1 = pyro.sample("w1", dist.Normal(0.0, 0.5).expand([10, 100]).to_event(2))
        logits = F.linear(F.relu(F.linear(x, w0)), w1)
        with pyro.plate("data", len(x)), poutine.scale(scale=len(data_x) / len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    ratios: list[Tensor] = []
    sizes: list[Tensor] = []
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSparseNormal(model, density=0.1)
    schedule = CosineSchedule(every=EVERY, stop=int(0.75 * steps))
    optim = pyro.optim.Adam({"lr": 5e-3})
    loss = TraceMeanField_ELBO()
    svi = SSVI(
        model,
        guide,
        optim,
        loss,
        removal=remembered(criteria.snr, ratios),
        addition=remembered(torch.abs, sizes),
        schedule=schedule,
        kl_weight=0.1,
    )
    guide(data_x[:1], data_y[:1])
    history = [guide.active_sets]
    watched = steps // 6 // EVERY * EVERY
    for step in range(1, steps + 1):
        ratios.clear()
        sizes.clear()
        batch = torch.randint(len(data_x), (128,))
        svi.step(data_x[batch], data_y[batch])
        if schedule.due(step):
            history.append(guide.active_sets)
        if step == watched:
            before, after = (each["w0"].mask for each in history[-2:])
            # The first layer is asked about first.
            exchange = Exchange(ratios[0], ~after[before], sizes[0][~before], after[~before])
    return Training(history, exchange)


def remembered(score: Callable, seen: list[Tensor]) -> Callable:
    """The criterion, which also appends its scores to ``seen``."""

    def remember(*args: Tensor) -> Tensor:
        seen.append(score(*args))
        return seen[-1]

    return remember


def draw_moving(training: Training) -> plt.Figure:
    """Where the first layer looks at four times, and how its active set settles."""
    figure, axes = plt.subplots(
        1, 5, figsize=(11, 2.5), layout="constrained", width_ratios=[1, 1, 1, 1, 1.5]
    )
    last = len(training.history) - 1
    for ax, i in zip(axes, (0, last // 8, last // 3, last), strict=False):
        counts = training.history[i]["w0"].mask.sum(0).reshape(8, 8)
        image = ax.imshow(counts.tolist(), cmap="viridis", vmin=0, vmax=24)
        ax.set(title=f"step {EVERY * i}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[3], label="active weights", shrink=0.8)
    plot.turnover([{"first layer": each["w0"]} for each in training.history], ax=axes[4])
    axes[4].set(title="Overlap with the last, %", xlabel="exchanges")
    axes[4].get_legend().remove()
    return figure


def draw_exchange(exchange: Exchange) -> plt.Figure:
    """The statistics by which one exchange chose."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    stacked(left, exchange.snr, exchange.removed, ("removed", "kept"), (ORANGE, plot.BLUE))
    left.set(title="Active weights", xlabel="signal-to-noise ratio |mean| / sd", ylabel="weights")
    names = ("added", "left out")
    stacked(right, exchange.gradient, exchange.added, names, (plot.BLUE, LIGHT), log=True)
    right.set(title="Inactive weights", xlabel="size of the gradient", ylabel="weights")
    return figure


def stacked(
    ax: Axes,
    values: Tensor,
    chosen: Tensor,
    names: tuple[str, str],
    colours: tuple[str, str],
    log: bool = False,
) -> None:
    """A histogram of values, those that were chosen apart from the others."""
    parts = values[chosen], values[~chosen]
    ax.hist(
        [part.tolist() for part in parts],
        torch.linspace(0, float(values.max()), 41).tolist(),
        stacked=True,
        color=colours,
        label=[f"{name}: {len(part)}" for name, part in zip(names, parts, strict=True)],
        log=log,
    )
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "figures")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    training = train(args.steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("moving", draw_moving(training)),
        ("exchange", draw_exchange(training.exchange)),
    ):
        figure.savefig(args.folder / f"{name}.png", dpi=100)
        plt.close(figure)


if __name__ == "__main__":
    main()
