"""Logistic regression on breast cancer with all squares and interactions: which matter?

495 features for 398 patients. AutoNormal keeps them all, AutoSparseNormal a few::

    python examples/logistic_regression.py
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from comparison import fit
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide, init_to_mean
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

NUM_SAMPLES = 100  # posterior samples of a prediction
# A vector is sparse only if it is named.
OPTIONS = {"lr": 0.03, "site": "beta", "init_loc_fn": init_to_mean, "init_scale": 0.1}


def model(x: Tensor, y: Tensor | None = None) -> None:
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    logits = pyro.deterministic("logits", x @ beta + bias)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


def score(guide: AutoGuide, x: Tensor, y: Tensor) -> dict[str, float]:
    samples = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x)
    probs = samples["logits"].reshape(NUM_SAMPLES, len(x)).sigmoid().mean(0)
    accuracy = ((probs > 0.5) == (y > 0.5)).float().mean()
    return {"accuracy": accuracy.item(), "nll": F.binary_cross_entropy(probs, y).item()}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    data = load_breast_cancer()
    x, test_x, y, test_y = train_test_split(
        data.data, data.target, test_size=0.3, stratify=data.target, random_state=args.seed
    )
    squares = PolynomialFeatures(degree=2, include_bias=False)
    # Standardised first, too: products of features far from 0 are hardly new features.
    prepare = make_pipeline(StandardScaler(), squares, StandardScaler()).fit(x)
    x, test_x = (torch.tensor(prepare.transform(a)).float() for a in (x, test_x))
    y, test_y = (torch.tensor(a).float() for a in (y, test_y))
    print(f"breast cancer: {len(x)} patients for training, {len(test_x)} for test, ", end="")
    print(f"{x.shape[1]} features, {args.steps} steps\n")

    print("                        active  accuracy    NLL")
    print("-----------------------------------------------")
    rows = []
    for density in (1, 0.2, 0.05, 0.02):
        guide = fit(model, (x, y), density, args.steps, args.seed, **OPTIONS)
        name = "AutoNormal" if density == 1 else f"AutoSparseNormal {density:.0%}"
        active = round(density * x.shape[1])
        row = {"name": name, "active": active, **score(guide, test_x, test_y)}
        rows.append(row)
        print(f"{name:<22}{active:>8}{row['accuracy']:>10.1%}{row['nll']:>7.3f}")

    print(f"\nWhat speaks for benign (+) or malignant (-), by {name}; 90 % credible intervals:\n")
    features = prepare[:2].get_feature_names_out(data.feature_names)
    low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["beta"]
    for i in middle.abs().topk(8).indices.tolist():
        print(f"{middle[i]:6.2f}  [{low[i]:5.2f}, {high[i]:5.2f}]  {features[i]}")
    return rows


if __name__ == "__main__":
    main()
