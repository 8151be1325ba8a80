"""A sparse point estimate."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from .auto_sparse_guide import AutoSparseGuide
from .prototype import Density, Structures
from .site_table import Site

__all__ = ["AutoSparseDelta"]


class AutoSparseDelta(AutoSparseGuide):
    """Pyro's :class:`~pyro.infer.autoguide.AutoDelta` with sparse support: MAP.

    Each active coordinate is a point; all others are exactly 0. Removal criteria rank points by
    magnitude, so that this is RigL (Evci, Gale, Menick, Castro, Elsen, ICML 2020) for the weights
    of a Pyro model if those with the largest gradients are added::

        guide = AutoSparseDelta(model, density=0.05)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), addition="gradient")

    All sites share one parameter, ``loc``. As in AutoDelta, the estimate of a constrained site is
    that of the largest density of the site itself, not of its unconstrained coordinates.

    :param model: a Pyro model.
    :param density: as for :class:`~pyro_ssvi.AutoSparseNormal`, as are the others.
    :param init_loc_fn: by default AutoDelta's. A network whose weights all start at 0 stays there.
    :param create_plates: as for AutoDelta.
    :raises ValueError: as AutoSparseNormal.
    """

    def __init__(
        self,
        model: Callable,
        *,
        density: Density = 0.1,
        structure: Structures = None,
        init_loc_fn: Callable = init_to_median,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(
            model,
            density=density,
            structure=structure,
            init_loc_fn=init_loc_fn,
            create_plates=create_plates,
        )

    def from_marginals(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (loc,)

    def marginals(self, loc: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return loc, torch.zeros_like(loc)

    def for_removal(self) -> tuple[Tensor, Tensor]:
        """As if all had one standard deviation: criteria then rank by magnitude."""
        (loc,) = self._values()
        return loc, torch.ones_like(loc)

    def site_posterior(self, site: Site, loc: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        """The point of one site, given its part of ``loc``."""
        return self.point(site, loc)

    site_value = site_posterior
