"""First values, and first active sets, from what was trained before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor

from .site_table import Site

if TYPE_CHECKING:
    from .auto_sparse_guide import AutoSparseGuide

__all__ = ["warm_start"]


class Start(NamedTuple):
    """Of one site's unconstrained elements: those that the source has, ``[n]`` each."""

    loc: Tensor
    scale: Tensor | None
    indices: Tensor | None  # sorted flat positions; None for all

    @property
    def score(self) -> Tensor:
        """How much each matters: its size, in standard deviations if it has one."""
        return self.loc.abs() if self.scale is None else self.loc.abs() / self.scale


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
    for site, (loc, scale) in zip(guide.sites, parts, strict=True):
        chosen = guide.active_sets[site.name].indices
        if site.name in starts:
            take = _take if site.structure is None else partial(_take_structured, site)
            chosen = take(starts[site.name], chosen, loc, scale)
        if site.is_sparse:
            indices.append(chosen)
    guide.set_marginals(new_loc, new_scale, torch.cat(indices))


def _take(start: Start, own: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Give a site its first values, in place, ``[K]`` each.

    :param own: its active coordinates so far. Where the source has fewer, some of them stay, at 0
        as they are in the source.
    :return: its new active coordinates.
    """
    if len(start.loc) > len(own):
        place = start.score.topk(len(own), sorted=False).indices.sort().values
    else:
        place = torch.arange(len(start.loc), device=own.device)
    taken = place if start.indices is None else start.indices[place]
    stays = own.new_empty(0)
    if len(taken) < len(own):
        stays = torch.isin(own, taken, invert=True).nonzero().squeeze(-1)
        stays = stays[torch.randperm(len(stays), device=own.device)[: len(own) - len(taken)]]
    chosen, order = torch.cat([taken, own[stays]]).sort()
    if start.scale is not None:
        scale.copy_(torch.cat([start.scale[place].to(scale), scale[stays]])[order])
    loc.copy_(torch.cat([start.loc[place].to(loc), loc.new_zeros(len(stays))])[order])
    return chosen


def _take_structured(site: Site, start: Start, own: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """As :func:`_take`, for a site whose coordinates are active together."""
    assert site.structure is not None
    whole = _whole(site, start, start.score)
    if start.indices is not None:
        whole[own] += torch.finfo(whole.dtype).tiny  # its own before others without a value
    chosen = site.structure.best(whole.reshape(site.shape), site.k)
    loc.copy_(_whole(site, start, start.loc)[chosen])
    if start.scale is not None:
        known = _whole(site, start, start.scale)[chosen]
        scale.copy_(known.where(known > 0, start.scale.mean()))
    return chosen


def _whole(site: Site, start: Start, values: Tensor) -> Tensor:
    """A source's values at all coordinates of a site, 0 where it has none: ``[D]``."""
    if start.indices is None:
        return values
    return values.new_zeros(site.shape.numel()).index_copy(0, start.indices, values)


def _from_guide(guide: AutoSparseGuide, source: AutoGuide) -> dict[str, Start] | None:
    """Locations and scales, if the source has them as AutoNormal does, or as a sparse guide."""
    from .auto_sparse_guide import AutoSparseGuide  # which imports this module

    if not isinstance(source, AutoNormal | AutoSparseGuide):
        return None
    if source.prototype_trace is None and not getattr(source, "sites", []):
        raise ValueError(f"the {type(source).__name__} to start from has not seen data")
    if isinstance(source, AutoSparseGuide):
        return _from_sparse(guide, source)
    names = [name for name, _ in source.prototype_trace.iter_stochastic_nodes()]
    _refuse_unknown(guide, names)
    starts = {}
    for site in guide.sites:
        if site.name in names:
            loc, scale = source._get_loc_and_scale(site.name)
            _check_shape(site, loc.shape)
            starts[site.name] = Start(loc.flatten(), scale.flatten(), None)
    return starts


def _from_sparse(guide: AutoSparseGuide, source: AutoSparseGuide) -> dict[str, Start]:
    _refuse_unknown(guide, [site.name for site in source.sites])
    sites = {site.name: site for site in guide.sites}
    starts = {}
    parts = source.split(*source.marginals(*source.flat_parameters()))
    for theirs, (loc, scale) in zip(source.sites, parts, strict=True):
        _check_shape(sites[theirs.name], theirs.shape)
        indices = source.active_sets[theirs.name].indices if theirs.is_sparse else None
        starts[theirs.name] = Start(loc, scale if bool((scale > 0).all()) else None, indices)
    return starts


def _from_values(guide: AutoSparseGuide, values: Mapping[str, Tensor]) -> dict[str, Start]:
    _refuse_unknown(guide, list(values))
    starts = {}
    for site in guide.sites:
        if site.name in values:
            value = values[site.name]
            if site.transform is not None:
                value = site.transform.inv(value)
            _check_shape(site, value.shape)
            loc = value.flatten()
            # An exact 0 is what a sparse network has where it has no weight.
            indices = loc.nonzero().squeeze(-1) if site.is_sparse else None
            starts[site.name] = Start(loc if indices is None else loc[indices], None, indices)
    return starts


def _check_shape(site: Site, shape: torch.Size) -> None:
    if shape != site.shape:
        raise ValueError(
            f"site {site.name!r} has shape {tuple(site.shape)}, the source's values have "
            f"{tuple(shape)}"
        )


def _refuse_unknown(guide: AutoSparseGuide, names: list[str]) -> None:
    own = [site.name for site in guide.sites]
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ValueError(f"the source has {unknown}, but the guide's sites are {own}")
