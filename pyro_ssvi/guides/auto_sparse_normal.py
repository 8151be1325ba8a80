"""A sparse mean-field normal guide."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor

from .auto_sparse_guide import AutoSparseGuide
from .prototype import Density, Structures
from .site_table import Site

__all__ = ["AutoSparseNormal"]


class AutoSparseNormal(AutoSparseGuide):
    """A drop-in for :class:`~pyro.infer.autoguide.AutoNormal` with sparse support.

    A latent site with D elements gets K = density·D *active* coordinates with independent
    normal posteriors; all others are exactly 0 and cost nothing. Train it with
    :class:`~pyro_ssvi.SSVI`, which exchanges active coordinates as training goes on::

        guide = AutoSparseNormal(model, density=0.05)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    Sparse are real-valued sites with two or more dimensions and independent elements. Sites
    that are constrained, have fewer dimensions, are local to a subsampled plate, or stand for
    data that ``obs_mask`` leaves out are dense, as in AutoNormal, and so is everything at
    ``density=1``.

    All sites share two parameters, ``loc`` and ``scale``, each a vector of the active
    coordinates of one site after the other: an optimizer handles two tensors, whatever the
    number of sites.

    :param model: a Pyro model.
    :param density: share of active coordinates, in (0, 1]: a number for all sites that are
        sparse by default; or a policy from :mod:`pyro_ssvi.densities`, which shares out the
        active coordinates among them; or a mapping from names of sites (all others are dense; a
        1-d site is sparse only if named here); or a ``callable(name, shape)``, asked about each
        site that is sparse by default.
    :param init_loc_fn: a per-site initialization function, see Pyro's autoguide documentation.
        Pyro's own functions draw K numbers for a sparse site; any other gives a value of the
        site's full shape once, of which the active entries are taken.
    :param init_scale: initial standard deviation of each (unconstrained) active coordinate. Its
        default is smaller than AutoNormal's 0.1, for the sake of large models.
    :param structure: what is active and exchanged as one, see :mod:`pyro_ssvi.structures`: of
        every sparse site, or a mapping from names of some.
    :param create_plates: as for AutoNormal.
    :raises ValueError: at once for a density outside (0, 1]; at the first call for a name that
        the model does not have, a site that cannot be sparse or have its structure, or one that
        would get no active coordinates.
    """

    scale_constraint = constraints.softplus_positive
    mean_field = True
    scale: Tensor

    def __init__(
        self,
        model: Callable,
        *,
        density: Density = 0.1,
        structure: Structures = None,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.01,
        create_plates: Callable | None = None,
    ) -> None:
        if not isinstance(init_scale, float) or not init_scale > 0:
            raise ValueError(f"expected a float init_scale > 0, got {init_scale!r}")
        super().__init__(
            model,
            density=density,
            structure=structure,
            init_loc_fn=init_loc_fn,
            create_plates=create_plates,
        )
        self.first_scale = init_scale

    @property
    def parameter_constraints(self) -> dict[str, constraints.Constraint]:
        return {"loc": constraints.real, "scale": self.scale_constraint}

    def from_marginals(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return loc, scale

    def marginals(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return loc, scale

    def valid(self, loc: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return (loc == loc) & (scale > 0)

    def site_posterior(  # type: ignore[override]
        self, site: Site, loc: Tensor, scale: Tensor
    ) -> dist.TorchDistribution:
        """The posterior of one site, given its part of the flat parameters."""
        return self.normal(site, loc, scale)
