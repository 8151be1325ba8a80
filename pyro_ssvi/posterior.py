"""A posterior for use: what predictions need of a training, in a small file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from .constraint_state import (
    check_constrained,
    constraint_difference,
    constraint_state,
    read_constraint,
)
from .guides import (
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    site_table,
)
from .plain_data import Maybe, check_form, plain
from .safe_file import Format
from .structures import read_structure

if TYPE_CHECKING:
    from .svi import SSVI

__all__ = [
    "FILES",
    "FORM",
    "KINDS",
    "export",
    "guide_of",
    "guide_state",
    "load_posterior",
    "module_state",
    "own_state",
    "put_own",
    "refuse_another",
]

#: The guides that a file can be of; a subclass comes before its base.
KINDS = (AutoSparseLowRankMultivariateNormal, AutoSparseNormal, AutoSparseDelta)

#: Of what :func:`guide_state` and :func:`own_state` give, beside numbers.
FORM = {
    "sites": site_table.FORM,
    "guide": Maybe(str),  # older files do not tell
    "dtype": str,
    "indices": Tensor,
    "loc": Tensor,
    "model": {str: object},
    "store": {str: {"value": Tensor, "constraint": object}},
}

FILES = Format(
    "pyro_ssvi posterior",
    1,
    "a file written by svi.export(). One written by svi.save() is for svi.load()",
)


def export(svi: SSVI, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write what :func:`load_posterior` reads, see :meth:`pyro_ssvi.SSVI.export`."""
    state = {"version": FILES.version, **guide_state(svi.guide, dtype), **own_state(svi)}
    FILES.write(path, state)


def guide_state(guide: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A posterior as plain data, for :func:`guide_of`; raises as :func:`export`."""
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"expected a dtype such as torch.bfloat16, got {dtype!r}")
    kind: Any = next((kind for kind in KINDS if isinstance(guide, kind)), None)
    # One with a posterior of its own would come back as another.
    if kind is None or any(
        getattr(type(guide), name) is not getattr(kind, name)
        for name in ("parameter_constraints", "site_posterior", "forward")
    ):
        raise ValueError(
            f"expected one of {[kind.__name__ for kind in KINDS]}, got "
            f"{type(guide).__name__}: use svi.save()"
        )
    with torch.no_grad():
        values = [each.to(dtype or each.dtype) for each in guide.flat_parameters()]
    _refuse_lost(guide, *values)
    numel = max((site.shape.numel() for site in guide.sites), default=0)
    state = {
        "sites": guide.get_extra_state(),
        "guide": kind.__name__,
        "dtype": str(guide.loc.dtype).removeprefix("torch."),
        **dict(zip(guide.parameter_constraints, values, strict=True)),
        "indices": guide.indices.to(torch.int32 if numel < 2**31 else torch.int64),
    }
    return plain(state, "the posterior")


def own_state(svi: SSVI) -> dict[str, Any]:
    """What the model has of its own, for :func:`put_own`: parameters and buffers."""
    state = {"model": module_state(svi.model.model), "store": _other_parameters(svi)}
    return plain(state, "the model's state")


def module_state(model: Callable) -> dict[str, Any]:
    return model.state_dict() if isinstance(model, nn.Module) else {}


def _refuse_lost(guide: AutoSparseGuide, *values: Tensor) -> None:
    lost = site_table.failing(guide.sites, guide.finite(*values))
    if lost:
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
    :raises ValueError: for a file that is damaged or of another kind, or if the model has other
        parameters or buffers; then nothing has changed. At the guide's first call, for one of
        another model.
    """
    state = FILES.read(path, map_location)
    # First everything is read and checked, then everything is changed.
    guide = guide_of(state, model, path)
    refuse_another(state, model, path)
    put_own(state, model)
    return guide


def guide_of(
    state: Any, model: Callable, source: str | os.PathLike, name: str | None = None
) -> AutoSparseGuide:
    """A guide with the posterior that :func:`guide_state` gave.

    :param source: where it is from, for messages.
    :param name: of its parameters, where the parameter store may hold those of another guide.
    :raises ValueError: if it is damaged, in its form or its numbers.
    """
    try:
        check_form(state, FORM)
        guide, values = _new_guide(state, model)
        if name is not None:
            guide._pyro_name = name
        guide.load_state_dict(values)
    except Exception as error:
        raise ValueError(f"{source} cannot be loaded: {error}") from error
    return guide


def _new_guide(state: Mapping[str, Any], model: Callable) -> tuple[AutoSparseGuide, dict[str, Any]]:
    """A guide as yet without numbers, and its state."""
    rows = state["sites"]["sites"]
    sizes = {row["name"]: torch.Size(row["shape"]).numel() for row in rows}
    densities = {  # a site without elements is dense
        row["name"]: row.get("initial_k", row["k"]) / sizes[row["name"]]
        for row in rows
        if sizes[row["name"]]
    }
    structures = {row["name"]: read_structure(row.get("structure")) for row in rows}
    structures = {name: each for name, each in structures.items() if each is not None}
    kinds: dict[str, Any] = {kind.__name__: kind for kind in KINDS}
    kind = state.get("guide", "AutoSparseNormal")
    if kind not in kinds:
        raise ValueError(f"unknown guide {kind!r}: upgrade pyro_ssvi")
    guide = kinds[kind](model, density=densities, structure=structures)
    check_form(state, dict.fromkeys(guide.parameter_constraints, Tensor))
    dtype = getattr(torch, state["dtype"])
    values = {
        f"{name}_unconstrained": transform_to(constraint).inv(state[name].to(dtype))
        for name, constraint in guide.parameter_constraints.items()
    }
    indices = state["indices"]
    if indices.dtype == torch.int32:
        indices = indices.to(torch.int64)
    # Values are constrained, and this guide may have other constraints: their names have to do.
    table = state["sites"]
    if "constraints" in table:
        table = {**table, "constraints": dict.fromkeys(table["constraints"])}
    return guide, {**values, "indices": indices, "_extra_state": table}


def refuse_another(state: Mapping[str, Any], model: Callable, path: str | os.PathLike) -> None:
    """Compare parameters and buffers: they would be loaded in part before that failed.

    :raises ValueError: if those of the model are others.
    """
    theirs, ours = state["model"], module_state(model)
    lines = []
    for key in dict.fromkeys([*theirs, *ours]) if isinstance(model, nn.Module) else ():
        was, has = (_described(part[key]) if key in part else None for part in (theirs, ours))
        if was != has:
            lines.append(f"{key!r}: saved as {was}, here it is {has}")
    store = pyro.get_param_store()
    for name, entry in state["store"].items():
        try:
            constraint = check_constrained(name, entry)
        except ValueError as error:
            lines.append(str(error))
            continue
        if _takes(store, name, entry):
            difference = constraint_difference(entry["constraint"], store._constraints[name])
            if difference:
                lines.append(f"the constraint of parameter {name!r}: {difference}")
        elif constraint is None:
            lines.append(_run_first(name))
    if lines:
        raise ValueError(f"{path} is of another model: " + "; ".join(lines))


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value).__name__
    dense = value.layout == torch.strided and not value.is_meta
    return tuple(value.shape) if dense else (tuple(value.shape), value.layout, value.is_meta)


def _takes(store: Any, name: str, entry: Mapping[str, Any]) -> bool:
    held = store._params.get(name)
    return held is not None and held.shape == entry["value"].shape


def _run_first(name: str) -> str:
    return f"parameter {name!r} has a constraint of your own: run the model once before you load"


def put_own(state: Mapping[str, Any], model: Callable) -> None:
    """Give the model what :func:`own_state` gave, in place where it is trained on."""
    if isinstance(model, nn.Module):
        model.load_state_dict(state["model"])
    store = pyro.get_param_store()
    for name, entry in state["store"].items():
        if _takes(store, name, entry):
            with torch.no_grad():
                store._params[name].copy_(entry["value"])
            continue
        where = read_constraint(entry["constraint"])
        if where is None:
            raise ValueError(_run_first(name))
        if name in store:
            del store[name]
        store.setdefault(name, transform_to(where)(entry["value"].clone()), where)
