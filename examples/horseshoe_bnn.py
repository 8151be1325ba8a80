"""A Bayesian neural network with horseshoe priors: a curve with its uncertainty.

How does the ratio of total cholesterol to HDL fall as HDL rises? Every unit has a half-Cauchy
scale of its own, and every layer another: units that are not needed shrink to 0 (Ghosh, Yao,
Doshi-Velez, ICML 2018). AutoSparseNormal keeps a few of their weights::

    python examples/horseshoe_bnn.py
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from comparison import fit, log_density
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide, init_to_median
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor

NUM_SAMPLES = 100  # posterior samples of a prediction
SIZES = (1, 50, 1)


def model(x: Tensor, y: Tensor | None = None) -> None:
    out = x.unsqueeze(-1)
    for i, (n_in, n_out) in enumerate(pairwise(SIZES)):
        layer_scale = pyro.sample(f"layer_scale{i}", dist.HalfCauchy(1.0))
        unit_scale = pyro.sample(f"unit_scale{i}", dist.HalfCauchy(1.0).expand([n_in]).to_event(1))
        prior = dist.Normal(0.0, layer_scale * unit_scale)
        w = pyro.sample(f"w{i}", prior.expand([n_out, n_in]).to_event(2))
        b = pyro.sample(f"b{i}", dist.Normal(0.0, 1.0).expand([n_out]).to_event(1))
        out = F.linear(out if i == 0 else out.tanh(), w, b)
    mean = pyro.deterministic("mean", out.squeeze(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def make_init(density: float):
    """First locations: weights by the inputs that a unit really has, all else at the median."""

    def init(site: dict) -> Tensor:
        shape = site["fn"].shape()
        if len(shape) < 2:
            return init_to_median(site)
        return torch.randn(shape) / math.sqrt(max(1.0, density * shape[1]))

    return init


def predict(guide: AutoGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of the curve and of observations, ``[S, N]`` each."""
    samples = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x)
    mean, obs = samples["mean"], samples["obs"]
    return mean.reshape(NUM_SAMPLES, len(x)), obs.reshape(NUM_SAMPLES, len(x))


def score(guide: AutoGuide, x: Tensor, y: Tensor) -> dict[str, float]:
    """On test data: error, log density, and how many lie within the 90 % band."""
    mean, obs = predict(guide, x)
    low, high = obs.quantile(torch.tensor([0.05, 0.95]), dim=0)
    return {
        "rmse": (mean.mean(0) - y).square().mean().sqrt().item(),
        "log density": log_density(mean, guide.median()["sigma"], y),
        "inside": ((low < y) & (y < high)).float().mean().item(),
    }


def load(seed: int) -> tuple[Tensor, ...]:
    """HDL and its ratio, standardised: training and test of the one, then of the other."""
    data = load_diabetes(scaled=False).data
    columns = train_test_split(data[:, 6], data[:, 7], test_size=0.3, random_state=seed)
    result = []
    for train, test in (columns[:2], columns[2:]):
        mean, sd = train.mean(), train.std()
        result += [torch.tensor((part - mean) / sd).float() for part in (train, test)]
    return tuple(result)


def plot(guides: dict[str, AutoGuide], x: Tensor, y: Tensor, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(guides), figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained"
    )
    grid = torch.linspace(x.min() - 2, x.max() + 2, 120)  # and what lies beyond the data
    for ax, (name, guide) in zip(axes, guides.items(), strict=True):
        mean, obs = predict(guide, grid)
        for draws, alpha, label in ((obs, 0.2, "observations"), (mean, 0.45, "curve")):
            low, high = draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
            ax.fill_between(grid, low, high, color="#0072B2", alpha=alpha, lw=0, label=label)
        ax.plot(grid, mean.mean(0), color="#D55E00", lw=2, label="posterior mean")
        ax.plot(x, y, ".", color="black", ms=3, label="training data")
        ax.set(title=name, xlabel="HDL, standardised")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="total cholesterol / HDL", ylim=(-3, 5))
    axes[-1].legend(title="90 % bands", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("results/horseshoe_bnn.png"))
    args = parser.parse_args(argv)

    x, test_x, y, test_y = load(args.seed)
    print(f"diabetes: cholesterol ratio by HDL, {len(x)} patients for training, ", end="")
    print(f"network {'-'.join(map(str, SIZES))}, {args.steps} steps\n")
    print("                      weights    RMSE  log density  in 90 % band")
    print("----------------------------------------------------------------")
    rows, guides = [], {}
    for density in (1, 0.2):
        options = {"lr": 0.01, "every": 50, "init_loc_fn": make_init(density), "init_scale": 0.01}
        guide = fit(model, (x, y), density, args.steps, args.seed, **options)
        name = "AutoNormal" if density == 1 else f"AutoSparseNormal {density:.0%}"
        guides[name] = guide
        weights = sum(int((w != 0).sum()) for key, w in guide.median().items() if key[0] == "w")
        row = {"name": name, "weights": weights, **score(guide, test_x, test_y)}
        rows.append(row)
        print(f"{name:<22}{weights:>7}{row['rmse']:>8.3f}{row['log density']:>13.3f}", end="")
        print(f"{row['inside']:>14.1%}")
    plot(guides, x, y, args.plot)
    print(f"\nPlot: {args.plot}")
    return rows


if __name__ == "__main__":
    main()
