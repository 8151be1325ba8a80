"""One billion Bayesian weights on a laptop.

The same number of active weights is trained in networks of 10 million, 100 million and one billion
weights. What a step costs follows the active weights, not the size of the network::

    python examples/billion_weights.py
    python examples/billion_weights.py --weights 1e7 1e8 --active 5e5 --steps 200

Each network is trained in a process of its own, to tell its peak memory.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
from typing import NamedTuple

import datasets
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_sample
from torch import Tensor
from tqdm import tqdm

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule

INPUTS_PER_UNIT = 16  # active weights of each unit of the first layer
BATCH = 128


class Net:
    """The network inputs - H - H - classes, with as wide a middle as the number of weights asks."""

    def __init__(self, inputs: int, classes: int, weights: int, active: int) -> None:
        ends = inputs + classes
        self.hidden = hidden = round((math.sqrt(ends**2 + 4 * weights) - ends) / 2)
        self.shapes = [(hidden, inputs), (hidden, hidden), (classes, hidden)]
        first, last = hidden * min(INPUTS_PER_UNIT, inputs), hidden * classes
        middle = active - first - last
        if not 0 < middle <= hidden**2:
            raise SystemExit(f"{active:,} active weights do not fit a net of {weights:,}")
        actives = (first, middle, last)
        self.densities = [k / math.prod(s) for k, s in zip(actives, self.shapes, strict=True)]

    def model(self, x: Tensor, y: Tensor | None = None, num_data: int = 1) -> Tensor:
        for i, (fan_out, fan_in) in enumerate(self.shapes):
            density = self.densities[i]
            prior = dist.Normal(0.0, (2 / (density * fan_in)) ** 0.5)
            w = pyro.sample(f"w{i}", prior.expand([fan_out, fan_in]).to_event(2))
            x = F.linear(x if i == 0 else F.relu(x), w)
        with pyro.plate("data", len(x)), poutine.scale(scale=num_data / len(x)):
            pyro.sample("obs", dist.Categorical(logits=x), obs=y)
        return x

    def density(self, name: str, shape: torch.Size) -> float:
        return self.densities[int(name[1:])]


class Result(NamedTuple):
    weights: int
    active: int
    hidden: int
    step: float  # seconds, as all times
    exchange: float
    accuracy: float
    before: int  # bytes of this process after its imports
    peak: int


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(weights: int, active: int, steps: int, threads: int | None) -> Result:
    if threads:
        torch.set_num_threads(threads)
    pyro.set_rng_seed(0)
    data = datasets.load("digits")
    before = peak_bytes()
    net = Net(data.train_x.shape[1], data.num_classes, weights, active)
    guide = AutoSparseNormal(
        net.model, density=net.density, init_loc_fn=init_to_sample, init_scale=0.01
    )
    schedule = CosineSchedule(every=max(steps // 4, 1), stop=max(3 * steps // 4, 1))
    optim = pyro.optim.Adam({"lr": 1e-3})
    loss = TraceMeanField_ELBO()
    svi = SSVI(net.model, guide, optim, loss, schedule=schedule, kl_weight=0.1)
    num_data = len(data.train_x)
    times: dict[bool, list[float]] = {False: [], True: []}  # by whether the step exchanges
    progress = tqdm(range(1, steps + 1), desc=f"{weights:,} weights", leave=False)
    for step in progress:
        rows = torch.randint(num_data, (BATCH,))
        start = time.perf_counter()
        elbo = -svi.step(data.train_x[rows], data.train_y[rows], num_data)
        times[schedule.due(step)].append(time.perf_counter() - start)
        progress.set_postfix(elbo=f"{elbo:.3g}")
    means = {name: q.mean for name, q in guide.posterior().items()}
    with torch.no_grad():
        logits = poutine.condition(net.model, means)(data.test_x)
    sets = guide.active_sets.values()
    usual = statistics.median(times[False])
    return Result(
        sum(s.numel() for s in sets),
        sum(len(s) for s in sets),
        net.hidden,
        usual,
        statistics.median(times[True]) - usual if times[True] else math.nan,
        (logits.argmax(-1) == data.test_y).double().mean().item(),
        before,
        peak_bytes(),
    )


def table(results: list[Result]) -> str:
    lines = [
        "      weights     active   density  hidden  ms/step  vs. first  exchange s  peak MB"
        "  AutoNormal MB  accuracy"
    ]
    lines.append("-" * len(lines[0]))
    for r in results:
        # AutoNormal with Adam: loc, scale, gradients and two moments of each, and one draw.
        dense = 9 * 4 * r.weights / 1e6
        lines.append(
            f"{r.weights:13,}  {r.active:9,}  {r.active / r.weights:8.2%}  {r.hidden:6,}  "
            f"{1e3 * r.step:7.1f}  {r.step / results[0].step:8.2f}x  {r.exchange:10.2f}  "
            f"{(r.peak - r.before) / 1e6:7,.0f}  {dense:13,.0f}  {r.accuracy:8.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--weights", type=number, nargs="+", default=[10**7, 10**8, 10**9])
    parser.add_argument("--active", type=number, default=2_000_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    results = []
    for weights in args.weights:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            task = (weights, args.active, args.steps, args.threads)
            results.append(pool.apply(train, task))
    print(table(results))
    print(
        f"\nms/step: median, batch {BATCH}. exchange s: extra time of an exchange. peak MB: above "
        "that after\nthe imports. AutoNormal MB: what its parameters, gradients, Adam's state and "
        "one draw would\ntake, computed. accuracy: on held-out digits, at the posterior mean."
    )


if __name__ == "__main__":
    main()
