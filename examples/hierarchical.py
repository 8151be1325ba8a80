"""A hierarchical regression: which groups of patients differ from the others, and in what?

The course of diabetes by sex and age group. All groups share slopes; each may deviate, as far as
its feature's scale allows. AutoNormal lets every group deviate in everything, AutoSparseNormal in
a few things::

    python examples/hierarchical.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from comparison import fit, log_density
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide, init_to_median
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

NUM_SAMPLES = 100  # posterior samples of a prediction
AGES = (30, 40, 50, 60)  # where a new age group begins
GROUPS = 2 * (len(AGES) + 1)
OPTIONS = {"lr": 0.02, "init_loc_fn": init_to_median, "init_scale": 0.01}


def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    intercept_scale = pyro.sample("intercept_scale", dist.HalfNormal(0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5).expand([x.shape[1]]).to_event(1))
    prior = dist.Gamma(2.0, 10.0).expand([x.shape[1]]).to_event(1)
    deviation_scale = pyro.sample("deviation_scale", prior)
    with pyro.plate("groups", GROUPS):
        intercept = pyro.sample("intercept", dist.Normal(0.0, intercept_scale))
        deviation = pyro.sample("deviation", dist.Normal(0.0, deviation_scale).to_event(1))
    # deviation[group] would do, too, by way of a dense tensor.
    own = slope + F.embedding(group, deviation)
    mean = pyro.deterministic("mean", intercept[group] + (x * own).sum(-1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def load(seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[str]]:
    """Standardised features, groups and targets, for training and for test; features' names."""
    data = load_diabetes(scaled=False)
    age, sex, x = data.data[:, 0], data.data[:, 1], data.data[:, 2:]
    group = np.digitize(age, AGES) + (len(AGES) + 1) * (sex == 2)
    parts = train_test_split(
        x, data.target.reshape(-1, 1), group, test_size=0.3, random_state=seed, stratify=group
    )
    columns = []
    for train, test in (parts[:2], parts[2:4]):
        scaler = StandardScaler().fit(train)
        columns.append([torch.tensor(scaler.transform(a)).float() for a in (train, test)])
    (train_x, test_x), (train_y, test_y) = columns
    train_group, test_group = (torch.tensor(a) for a in parts[4:])
    train = (train_x, train_group, train_y.squeeze(-1))
    return train, (test_x, test_group, test_y.squeeze(-1)), data.feature_names[2:]


def score(guide: AutoGuide, x: Tensor, group: Tensor, y: Tensor) -> dict[str, float]:
    """Root mean square error, and mean log density of test data under the posterior."""
    samples = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x, group)
    mean = samples["mean"].reshape(NUM_SAMPLES, len(x))
    rmse = (mean.mean(0) - y).square().mean().sqrt()
    return {"rmse": rmse.item(), "log density": log_density(mean, guide.median()["sigma"], y)}


def plot(deviations: dict[str, Tensor], features: list[str], path: Path) -> None:
    """Deviations of each group's slopes ``[groups, features]``, by guide."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(deviations), figsize=(9, 4.5), sharey=True, layout="constrained"
    )
    top = max(float(each.abs().max()) for each in deviations.values())
    for ax, (name, each) in zip(axes, deviations.items(), strict=True):
        # Exact zeros stay grey.
        image = ax.imshow(
            each.where(each != 0, torch.nan).numpy(), cmap="PuOr", vmin=-top, vmax=top
        )
        ax.set(title=name, facecolor="0.85", xticks=range(len(features)), xticklabels=features)
    starts, ends = ("", *AGES), (*AGES, "")
    ages = [
        f"{a} to {b}" if a and b else f"from {a}" if a else f"below {b}"
        for a, b in zip(starts, ends, strict=True)
    ]
    axes[0].set(yticks=range(GROUPS))
    axes[0].set_yticklabels([f"sex {sex}, {age}" for sex in (1, 2) for age in ages])
    figure.colorbar(image, ax=axes, label="deviation from the common slope")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("results/hierarchical.png"))
    args = parser.parse_args(argv)

    train, test, features = load(args.seed)
    print(f"diabetes: {len(test[0])} of {len(train[0]) + len(test[0])} patients for test, ", end="")
    print(f"{GROUPS} groups, {len(features)} features, {args.steps} steps\n")
    print("                      deviations    RMSE  log density  sigma")
    print("------------------------------------------------------------")
    rows, deviations = [], {}
    for density in (1, 0.5, 0.25, 0.1):
        guide = fit(model, train, density, args.steps, args.seed, **OPTIONS)
        name = "AutoNormal" if density == 1 else f"AutoSparseNormal {density:.0%}"
        median = guide.median()
        deviations[name] = median["deviation"]
        active = round(density * median["deviation"].numel())
        row = {"name": name, "active": active, **score(guide, *test)}
        rows.append(row)
        print(f"{name:<22}{active:>10}{row['rmse']:>8.3f}{row['log density']:>13.3f}", end="")
        print(f"{median['sigma']:>7.3f}")
    plot({"AutoNormal": deviations["AutoNormal"], name: deviations[name]}, features, args.plot)
    print(f"\nPlot of the deviations: {args.plot}")
    return rows


if __name__ == "__main__":
    main()
