"""First values, and first active sets, from what was trained before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor

from .site_table import Site

if TYPE_CHECKING:
    from .auto_sparse_guide import AutoSparseGuide

__all__ = ["warm_start"]


class Start(NamedTuple):
    """Of one site's unconstrained elements, ``site.shape`` each."""

    loc: Tensor
    scale: Tensor | None


@torch.no_grad()
def warm_start(guide: AutoSparseGuide, source: AutoGuide | Mapping[str, Tensor]) -> None:
    """See :meth:`AutoSparseGuide.warm_start`."""
    starts = _from_guide(guide, source) if isinstance(source, AutoGuide) else None
    if starts is None:
        values = source.median() if isinstance(source, AutoGuide) else source
        starts = _from_values(guide, values)
    new_loc, new_scale = (each.clone() for each in guide.marginals(*guide.flat_parameters()))
    indices = [guide.indices[:0]]
    parts = guide.split(new_loc, new_scale)  # views
    for site, (site_loc, site_scale) in zip(guide.sites, parts, strict=True):
        start = starts.get(site.name)
        chosen: Tensor | slice = slice(None)
        if site.is_sparse:
            chosen = guide.active_sets[site.name].indices
            if start is not None:
                score = start.loc.abs() if start.scale is None else start.loc.abs() / start.scale
                if site.structure is None:
                    chosen = score.flatten().topk(site.k, sorted=False).indices.sort().values
                else:
                    chosen = site.structure.best(score, site.k)
            indices.append(chosen)
        if start is not None:
            site_loc.copy_(start.loc.flatten()[chosen])
            if start.scale is not None:
                site_scale.copy_(start.scale.flatten()[chosen])
    guide.set_marginals(new_loc, new_scale, torch.cat(indices))


def _from_guide(guide: AutoSparseGuide, source: AutoGuide) -> dict[str, Start] | None:
    """Locations and scales, if the source has them as AutoNormal does."""
    if not isinstance(source, AutoNormal):
        return None
    if source.prototype_trace is None:
        raise ValueError("the AutoNormal to start from has not seen data")
    names = [name for name, _ in source.prototype_trace.iter_stochastic_nodes()]
    _refuse_unknown(guide, names)
    starts = {}
    for site in guide.sites:
        if site.name in names:
            loc, scale = source._get_loc_and_scale(site.name)
            starts[site.name] = Start(_shaped(site, loc), _shaped(site, scale))
    return starts


def _from_values(guide: AutoSparseGuide, values: Mapping[str, Tensor]) -> dict[str, Start]:
    _refuse_unknown(guide, list(values))
    starts = {}
    for site in guide.sites:
        if site.name in values:
            value = values[site.name]
            if site.transform is not None:
                value = site.transform.inv(value)
            starts[site.name] = Start(_shaped(site, value), None)
    return starts


def _shaped(site: Site, value: Tensor) -> Tensor:
    if value.shape != site.shape:
        raise ValueError(
            f"site {site.name!r} has shape {tuple(site.shape)}, the source's values have "
            f"{tuple(value.shape)}"
        )
    return value


def _refuse_unknown(guide: AutoSparseGuide, names: list[str]) -> None:
    own = [site.name for site in guide.sites]
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ValueError(f"the source has {unknown}, but the guide's sites are {own}")
