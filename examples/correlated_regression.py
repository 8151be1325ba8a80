"""Linear regression with correlated inputs: independent normals, and one with correlations.

A few common factors drive all features, some of which count, and there are fewer data than active
coefficients. Those are chosen once, by an AutoSparseNormal, from which both guides start: they
differ in the posterior alone. Held-out data say how good predictions are, over several data sets.
Try ``--data 400``, where there are enough of them, and ``--factors 0``, for independent features::

    python examples/correlated_regression.py
"""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, init_to_mean
from torch import Tensor

from pyro_ssvi import (
    SSVI,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    CosineSchedule,
)
from pyro_ssvi.progress import progress

NUM_SAMPLES = 300  # posterior samples of a prediction
NUM_TEST = 1000
NONZERO = 20  # features that count
NOISE = 0.3  # of the data, known
GUIDES = {
    "AutoSparseNormal": AutoSparseNormal,
    "AutoSparseLowRankMultivariateNormal": AutoSparseLowRankMultivariateNormal,
}


def model(x: Tensor, y: Tensor | None = None) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    mean = pyro.deterministic("mean", x @ beta)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)


def simulate(num_data: int, features: int, factors: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of unit variance, three quarters of it that of common factors, if there are any."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_data, features, generator=generator)
    if factors:
        loadings = torch.randn(factors, features, generator=generator) / factors**0.5
        x = 3**-0.5 * x + torch.randn(num_data, factors, generator=generator) @ loadings
    x = x / x.std(0)
    beta = torch.zeros(features)
    place = torch.randperm(features, generator=generator)[:NONZERO]
    beta[place] = 0.5 * torch.randn(len(place), generator=generator)
    return x, x @ beta + NOISE * torch.randn(num_data, generator=generator)


def fit(
    family: type, data: tuple[Tensor, Tensor], args: argparse.Namespace, start: AutoGuide | None
) -> AutoGuide:
    """A guide that chooses its active coefficients, or one that keeps those of ``start``."""
    pyro.clear_param_store()
    options = {} if family is AutoSparseNormal else {"rank": args.rank}
    guide = family(
        model,
        density={"beta": args.active / args.features},
        init_loc_fn=init_to_mean,
        init_scale=0.1,
        **options,
    )
    every = 20
    if start is not None:
        guide.warm_start(start, *data)
        every = args.steps + 1
    schedule = CosineSchedule(every=every, stop=max(every, int(0.75 * args.steps)))
    # Without clipping, which would change what noisy gradients are on average. A factor starts
    # far from where it ends: the learning rate is large at first, and falls to 1 % of that.
    settings = {"lr": args.lr, "lrd": 0.01 ** (1 / args.steps), "clip_norm": math.inf}
    svi = SSVI(model, guide, pyro.optim.ClippedAdam(settings), Trace_ELBO(), schedule=schedule)
    for _ in progress(svi, [data] * args.steps, desc=family.__name__, leave=False):
        pass
    return guide


def score(guide: AutoGuide, x: Tensor, y: Tensor) -> Tensor:
    """Of test data: negative log likelihood, RMSE, and the share in 90 % intervals, ``[3]``."""
    draws = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x)["mean"]
    draws = draws.reshape(NUM_SAMPLES, len(x))
    # Coefficients and noise are normal, so predictions are: two moments say all.
    prediction = dist.Normal(draws.mean(0), (draws.var(0) + NOISE**2).sqrt())
    nll = -prediction.log_prob(y).mean()
    rmse = (prediction.loc - y).square().mean().sqrt()
    inside = (prediction.cdf(y) - 0.5).abs() < 0.45
    return torch.stack([nll, rmse, inside.float().mean()])


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """The scores of each guide, ``[runs, 3]``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=30, help="for training")
    parser.add_argument("--features", type=int, default=60)
    parser.add_argument("--factors", type=int, default=3, help="0: independent features")
    parser.add_argument("--active", type=int, default=40, help="coefficients")
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=0.1, help="of the first step")
    parser.add_argument("--runs", type=int, default=5, help="data sets, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the first data set")
    args = parser.parse_args(argv)

    results: dict[str, list[Tensor]] = {name: [] for name in GUIDES}
    for seed in range(args.seed, args.seed + args.runs):
        x, y = simulate(args.data + NUM_TEST, args.features, args.factors, seed)
        train, test = (x[: args.data], y[: args.data]), (x[args.data :], y[args.data :])
        pyro.set_rng_seed(seed)
        start = fit(AutoSparseNormal, train, args, None)
        for name, family in GUIDES.items():
            guide = fit(family, train, args, start)
            results[name].append(score(guide, *test))

    scores = {name: torch.stack(rows) for name, rows in results.items()}
    print(f"{args.data} data, {args.features} features, {args.factors} common factors, ", end="")
    print(f"{args.active} active coefficients, rank {args.rank},")
    print(f"{args.steps} steps, {args.runs} data sets: mean ± standard deviation\n")
    print("                                                   NLL           RMSE  in 90 % interval")
    print("---------------------------------------------------------------------------------------")
    for name, rows in scores.items():
        cells = [f"{row.mean():.3f} ± {row.std():.3f}" for row in rows.T]
        print(f"{name:<38}{cells[0]:>16}{cells[1]:>15}{cells[2]:>18}")
    independent, correlated = scores.values()
    gain = (independent - correlated)[:, 0]
    print(f"\nNLL less by correlations: {gain.mean():.3f} ± {gain.std():.3f}, ", end="")
    print(f"from {gain.min():.3f} to {gain.max():.3f}; in {int((gain > 0).sum())} of {args.runs}")
    return scores


if __name__ == "__main__":
    main()
