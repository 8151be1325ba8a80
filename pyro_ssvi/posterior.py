"""A posterior for use: what predictions need of a training, in a small file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from .checkpoint import constraint_state, plain, read_constraint
from .guides import (
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
)
from .safe_file import Format

if TYPE_CHECKING:
    from .svi import SSVI

__all__ = ["FILES", "KINDS", "export", "load_posterior"]

#: The guides that a file can be of; a subclass comes before its base.
KINDS = (AutoSparseLowRankMultivariateNormal, AutoSparseNormal, AutoSparseDelta)

FILES = Format(
    "pyro_ssvi posterior",
    1,
    "a file written by svi.export(). One written by svi.save() is for svi.load()",
)


def export(svi: SSVI, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write the posterior that :func:`load_posterior` reads; :meth:`pyro_ssvi.SSVI.export`.

    :param dtype: of locations and scales in the file, such as ``torch.bfloat16``; by default
        their own.
    :raises ValueError: if there is another guide than one sparse guide of this package, ``dtype``
        cannot hold the numbers of a site, or the model trains a module that is no part of it.
    """
    guide, model = svi.guide, svi.model.model
    kind: Any = next((kind for kind in KINDS if isinstance(guide, kind)), None)
    # One with parameters of its own would come back without them.
    if kind is None or type(guide).parameter_constraints is not kind.parameter_constraints:
        raise ValueError(
            f"export() writes one of {[kind.__name__ for kind in KINDS]}, got "
            f"{type(guide).__name__}: use svi.save()"
        )
    with torch.no_grad():
        values = [each.to(dtype or each.dtype) for each in guide.flat_parameters()]
    _refuse_lost(guide, *values)
    numel = max((site.shape.numel() for site in guide.sites), default=0)
    state = {
        "version": FILES.version,
        "sites": guide.get_extra_state(),
        "guide": kind.__name__,
        "dtype": str(guide.loc.dtype).removeprefix("torch."),
        **dict(zip(guide.parameter_constraints, values, strict=True)),
        "indices": guide.indices.to(torch.int32 if numel < 2**31 else torch.int64),
        "model": model.state_dict() if isinstance(model, nn.Module) else {},
        "store": _other_parameters(svi),
    }
    FILES.write(path, plain(state, "the posterior"))


def _refuse_lost(guide: AutoSparseGuide, *values: Tensor) -> None:
    ok = guide.valid(*values)
    for value in values:
        ok = ok & value.isfinite().flatten(1).all(-1) if value.dim() > 1 else ok & value.isfinite()
    if not ok.all():
        lost = [
            site.name
            for site, (kept,) in zip(guide.sites, guide.split(ok), strict=True)
            if not kept.all()
        ]
        raise ValueError(
            f"{values[0].dtype} cannot hold the locations or scales of sites {lost}: use "
            "torch.bfloat16, which has the range of float32, or no dtype"
        )


def _other_parameters(svi: SSVI) -> dict[str, Any]:
    """What the model's own ``pyro.param`` statements hold, of those that were trained."""
    model = svi.model.model
    own = {*svi.guide.parameters(), *(model.parameters() if isinstance(model, nn.Module) else ())}
    store = pyro.get_param_store()
    others = {}
    for name, value in store.named_parameters():
        if value not in svi.optim.optim_objs or value in own:
            continue
        if "$$$" in name:  # of a module; its buffers, and the module itself, are out of sight
            module = name.split("$$$")[0]
            raise ValueError(
                f"parameter {name!r} is of a module that the model only has in sight while it "
                "runs, so load_posterior() could not give it back: make the model a "
                f"torch.nn.Module that has it as a part, self.{module} = ..."
            )
        others[name] = {"value": value, "constraint": constraint_state(store._constraints[name])}
    return others


def load_posterior(
    path: str | os.PathLike, model: Callable, map_location: Any = None
) -> AutoSparseGuide:
    """A guide with the posterior in a file that :meth:`pyro_ssvi.SSVI.export` wrote::

        guide = load_posterior("net.posterior", model)
        SparsePredictive(model, guide, num_samples=16)(x)

    Parameters and buffers of the model, such as those of normalisation layers, are loaded into
    it, and those of its ``pyro.param`` statements into the parameter store. No code in the file
    can run.

    :param model: the model that the posterior is of.
    :param map_location: as for :func:`torch.load`.
    :raises ValueError: for a file that is damaged or of another kind; at the guide's first call,
        for one of another model.
    :raises RuntimeError: if the model has other parameters or buffers than those saved.
    """
    state = FILES.read(path, map_location)
    rows = state["sites"]["sites"]
    sizes = {row["name"]: torch.Size(row["shape"]).numel() for row in rows}
    densities = {row["name"]: row["k"] / sizes[row["name"]] for row in rows}
    kinds: dict[str, Any] = {kind.__name__: kind for kind in KINDS}
    # Older files do not tell.
    guide = kinds[state.get("guide", "AutoSparseNormal")](model, density=densities)
    dtype = getattr(torch, state["dtype"])
    values = {
        f"{name}_unconstrained": transform_to(constraint).inv(state[name].to(dtype))
        for name, constraint in guide.parameter_constraints.items()
    }
    indices = state["indices"].to(torch.int64)
    guide.load_state_dict({**values, "indices": indices, "_extra_state": state["sites"]})
    if isinstance(model, nn.Module):
        model.load_state_dict(state["model"])
    store = pyro.get_param_store()
    for name, entry in state["store"].items():
        if name in store:
            del store[name]
        where = read_constraint(entry["constraint"])
        store.setdefault(name, transform_to(where)(entry["value"]), where)
    return guide
