"""Linear regression with more features than matter, by AutoNormal and by AutoSparseNormal.

First real data: diabetes, with all squares and interactions. Then simulated data with 5000
features, of which 20 count: does the posterior find them? ::

    python examples/sparse_regression.py
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from comparison import fit, log_density
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide, init_to_mean
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

from pyro_ssvi.addition import ADDITION

NUM_SAMPLES = 100  # posterior samples of a prediction
NONZERO = 20  # features that count in the simulation
# A vector is sparse only if it is named.
OPTIONS = {"lr": 0.03, "site": "beta", "init_loc_fn": init_to_mean, "init_scale": 0.01}


def model(x: Tensor, y: Tensor | None = None) -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    mean = pyro.deterministic("mean", x @ beta)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def score(guide: AutoGuide, x: Tensor, y: Tensor) -> dict[str, float]:
    """Root mean square error, and mean log density of test data under the posterior."""
    samples = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x)
    mean, median = samples["mean"].reshape(NUM_SAMPLES, len(x)), guide.median()
    rmse = (x @ median["beta"] - y).square().mean().sqrt()
    return {"rmse": rmse.item(), "log density": log_density(mean, median["sigma"], y)}


def recovery(guide: AutoGuide, truth: Tensor) -> dict[str, float]:
    """How well the support is found: by 95 % credible intervals, and by rank."""
    low, middle, high = guide.quantiles([0.025, 0.5, 0.975])["beta"].reshape(3, -1)
    found = (low > 0) | (high < 0)
    hits = (found & (truth != 0)).sum().item()
    # An inactive coefficient is 0 for sure: 0 / tiny.
    ratio = middle.abs() / (high - low).clamp(min=1e-12)
    top = ratio.topk(NONZERO).indices
    return {
        "found": found.sum().item(),
        "precision": hits / max(found.sum().item(), 1),
        "recall": hits / NONZERO,
        "top recall": (truth[top] != 0).float().mean().item(),
    }


def load_polynomial_diabetes(seed: int) -> list[Tensor]:
    """Standardised features and targets: training, test, training, test."""
    x, y = load_diabetes(return_X_y=True)
    x = PolynomialFeatures(degree=2, include_bias=False).fit_transform(x)
    parts = train_test_split(x, y.reshape(-1, 1), test_size=0.3, random_state=seed)
    result = []
    for train, test in (parts[:2], parts[2:]):
        scaler = StandardScaler().fit(train)
        result += [torch.tensor(scaler.transform(a)).float().squeeze() for a in (train, test)]
    return result


def simulate(num_data: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_data, features, generator=generator)
    truth = torch.zeros(features)
    place = torch.randperm(features, generator=generator)[:NONZERO]
    sign = torch.randint(2, (NONZERO,), generator=generator) * 2 - 1
    truth[place] = sign * (0.5 + torch.rand(NONZERO, generator=generator))
    return x, x @ truth + torch.randn(num_data, generator=generator), truth


def name(density: float) -> str:
    return "AutoNormal" if density == 1 else f"AutoSparseNormal {density:.1%}"


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--features", type=int, default=5000, help="in the simulation")
    parser.add_argument("--addition", choices=sorted(ADDITION), help="SSVI's own by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    options = {**OPTIONS, "addition": args.addition}
    results: dict[str, list[dict]] = {"diabetes": [], "simulation": []}

    x, test_x, y, test_y = load_polynomial_diabetes(args.seed)
    print(f"diabetes: {len(x)} patients for training, {x.shape[1]} features, {args.steps} steps\n")
    print("                        active    RMSE  log density")
    print("---------------------------------------------------")
    for density in (1, 0.5, 0.2, 0.1):
        guide = fit(model, (x, y), density, args.steps, args.seed, **options)
        active = round(density * x.shape[1])
        row = {"name": name(density), "active": active, **score(guide, test_x, test_y)}
        results["diabetes"].append(row)
        print(f"{row['name']:<22}{active:>8}{row['rmse']:>8.3f}{row['log density']:>13.3f}")

    x, y, truth = simulate(1000, args.features, args.seed)
    x, test_x, y, test_y = x[:500], x[500:], y[:500], y[500:]
    print(f"\nsimulation: 500 data, {args.features} features of which {NONZERO} count\n")
    print(
        "                        active    RMSE  log density  found  precision  recall  in top 20"
    )
    print(
        "----------------------------------------------------------------------------------------"
    )
    for active in (args.features, 250, 50, NONZERO):
        density = active / args.features
        guide = fit(model, (x, y), density, args.steps, args.seed, **options)
        row = {"name": name(density), "active": active, **score(guide, test_x, test_y)}
        row |= recovery(guide, truth)
        results["simulation"].append(row)
        print(
            f"{row['name']:<22}{active:>8}{row['rmse']:>8.3f}{row['log density']:>13.3f}"
            f"{row['found']:>7}{row['precision']:>11.0%}{row['recall']:>8.0%}"
            f"{row['top recall']:>11.0%}"
        )
    print(
        "\nfound: coefficients whose 95 % credible interval is without 0; in top 20: share of the "
        "20 true\nones among the 20 with the largest mean in standard deviations."
    )
    return results


if __name__ == "__main__":
    main()
