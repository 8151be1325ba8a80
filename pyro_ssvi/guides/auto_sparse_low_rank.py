"""A sparse normal guide with correlations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor

from .auto_sparse_normal import AutoSparseNormal
from .prototype import Density, Structures
from .site_table import Site

__all__ = ["AutoSparseLowRankMultivariateNormal"]


class AutoSparseLowRankMultivariateNormal(AutoSparseNormal):
    """Pyro's :class:`~pyro.infer.autoguide.AutoLowRankMultivariateNormal` with sparse support.

    The active coordinates of all sites have one joint normal posterior, with covariance
    ``S (I + F F^T) S``, where ``S = diag(scale)`` and ``F`` is ``cov_factor``, ``[K, rank]``: O(K
    rank) numbers, and O(K rank^2) time a step, where a dense guide would need D. All other
    coordinates are exactly 0. An exchange carries rows of ``F`` along; a new coordinate starts
    uncorrelated::

        guide = AutoSparseLowRankMultivariateNormal(model, density=0.05, rank=10)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    The KL divergence is estimated from the draw, with any loss. :meth:`posterior`,
    :meth:`quantiles` and removal criteria see marginals.

    :param model: a Pyro model.
    :param rank: number of columns of ``F``; by default about ``sqrt(K)``, which is much for a
        network.
    :param density: as for :class:`~pyro_ssvi.AutoSparseNormal`, as are the others.
    :raises ValueError: as AutoSparseNormal; and at the first call for a site that is local to a
        subsampled plate.
    """

    mean_field = False
    cov_factor: Tensor

    def __init__(
        self,
        model: Callable,
        *,
        density: Density = 0.1,
        rank: int | None = None,
        structure: Structures = None,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.01,
        create_plates: Callable | None = None,
    ) -> None:
        if rank is not None and not (isinstance(rank, int) and rank > 0):
            raise ValueError(f"expected an int rank > 0, got {rank!r}")
        super().__init__(
            model,
            density=density,
            structure=structure,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            create_plates=create_plates,
        )
        self.rank = rank

    @property
    def parameter_constraints(self) -> dict[str, constraints.Constraint]:
        return {**super().parameter_constraints, "cov_factor": constraints.real}

    def from_marginals(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        if self.rank is None:
            self.rank = round(len(loc) ** 0.5)
        # As Pyro has it: half of a marginal's variance is shared.
        cov_factor = torch.randn(len(loc), self.rank, dtype=loc.dtype, device=loc.device)
        cov_factor = cov_factor / self.rank**0.5
        return loc, scale / _inflation(cov_factor), cov_factor

    def added(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return loc, scale, scale.new_zeros(len(scale), self.cov_factor.shape[1])

    def marginals(self, loc: Tensor, scale: Tensor, cov_factor: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return loc, scale * _inflation(cov_factor)

    def valid(self, loc: Tensor, scale: Tensor, cov_factor: Tensor) -> Tensor:  # type: ignore[override]
        return super().valid(loc, scale) & (cov_factor == cov_factor).all(-1)

    def joint(
        self, loc: Tensor, scale: Tensor, cov_factor: Tensor
    ) -> dist.LowRankMultivariateNormal:
        """The posterior of all unconstrained active coordinates, event shape ``[K]``."""
        factor = scale.unsqueeze(-1) * cov_factor
        return dist.LowRankMultivariateNormal(loc, factor, scale.square(), validate_args=False)

    def site_posterior(  # type: ignore[override]
        self, site: Site, loc: Tensor, scale: Tensor, cov_factor: Tensor
    ) -> dist.TorchDistribution:
        """The marginals of one site, given its part of the flat parameters."""
        return self.normal(site, *self.marginals(loc, scale, cov_factor))

    def site_value(self, site: Site, value: Tensor) -> dist.TorchDistribution:
        """One site, given its part of a draw of :meth:`joint`, ``[k, ...]``."""
        value = value.movedim(0, -1)
        # Dimensions of vectorised particles or samples come before those of the site's plates.
        plates = len(site.shape) - site.event_dim
        extra = value.shape[:-1][: max(value.dim() - 1 - plates, 0)]
        return self.point(site, value.reshape(*extra, site.k), density=True)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        plates, flat = self._begin(args, kwargs)
        # As in Pyro's joint guides: one site for all, and a point for each.
        name = f"_{self._pyro_name}_latent"
        draw = pyro.sample(name, self.joint(*flat), infer={"is_auxiliary": True})
        return self._sample_sites(plates, self.site_value, draw.movedim(-1, 0))

    def saved_sites(self, state_dict: Mapping[str, Any], prefix: str = "") -> list[Site]:
        saved = state_dict.get(f"{prefix}cov_factor_unconstrained")
        if isinstance(saved, Tensor) and (
            saved.dim() != 2 or not saved.shape[1] or self.rank not in (None, saved.shape[1])
        ):
            raise ValueError(
                "it does not fit this guide: cov_factor was saved with shape "
                f"{tuple(saved.shape)}, this guide has rank {self.rank}"
            )
        return super().saved_sites(state_dict, prefix)

    def take_sites(
        self, sites: list[Site], raw: Sequence[torch.nn.Parameter], indices: Tensor
    ) -> None:
        super().take_sites(sites, raw, indices)
        self.rank = self.cov_factor.shape[1]

    def _setup_site(self, name: str, node: Any) -> tuple[Site, Tensor]:
        site, loc = super()._setup_site(name, node)
        local = [frame.name for frame in site.frames if frame.full_size not in (None, frame.size)]
        if local:
            raise ValueError(
                f"site {name!r} is local to the subsampled plate {local[0]!r}, and cannot be "
                "correlated with others: give it a guide of its own in an AutoGuideList"
            )
        return site, loc


def _inflation(cov_factor: Tensor) -> Tensor:
    """How much wider the marginals are than without correlations, ``[K]``."""
    return (1 + cov_factor.square().sum(-1)).sqrt()
