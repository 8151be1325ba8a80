"""What the examples share: training by AutoNormal or by AutoSparseNormal, all else being equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule
from pyro_ssvi.progress import progress


def make(
    model: Callable,
    density: float,
    steps: int,
    lr: float,
    every: int = 20,
    site: str | None = None,
    addition: str | None = None,
    **options: Any,
) -> SVI:
    """Inference with AutoNormal (for a density of 1) or with AutoSparseNormal.

    :param lr: learning rate of the first step, which falls to 3 % of it.
    :param every: steps between exchanges.
    :param site: the only site that is sparse; by default all are that have two dimensions or more.
    :param addition: criterion of SSVI, by default SSVI's own.
    :param options: of either guide.
    """
    pyro.clear_param_store()
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.03 ** (1 / steps)})
    if density == 1:
        return SVI(model, AutoNormal(model, **options), optim, Trace_ELBO())
    densities = density if site is None else {site: density}
    guide = AutoSparseNormal(model, density=densities, **options)
    schedule = CosineSchedule(every=every, stop=int(0.75 * steps))
    criterion = {} if addition is None else {"addition": addition}
    return SSVI(model, guide, optim, Trace_ELBO(), schedule=schedule, **criterion)


def fit(
    model: Callable, data: Sequence[Tensor], density: float, steps: int, seed: int, **options: Any
) -> AutoGuide:
    """The guide after so many steps, each on all data; options are those of :func:`make`."""
    pyro.set_rng_seed(seed)
    svi = make(model, density, steps, **options)
    for _ in progress(svi, [data] * steps, desc=f"density {density:g}", leave=False):
        pass
    return svi.guide


def log_density(mean: Tensor, sigma: Tensor, y: Tensor) -> float:
    """Mean log density of data under the posterior of a regression.

    :param mean: draws of the data's means, ``[S, N]``.
    :param sigma: the noise's standard deviation.
    :param y: ``[N]``.
    """
    draws = dist.Normal(mean, sigma).log_prob(y)
    return draws.logsumexp(0).mean().item() - math.log(len(mean))
