"""A guide's sites as plain data, so that a saved guide knows what its numbers belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..active_set import ActiveSet
from ..constraint_state import constraint_difference, constraint_state
from ..densities import Policy
from ..plain_data import Maybe, check_form, check_tensor
from ..structures import Structure, count, read_structure, structure_state
from .prototype import Density, Structures, structure_of

__all__ = [
    "FORM",
    "NEEDS_MODEL",
    "Site",
    "density_differences",
    "failing",
    "read_table",
    "table",
    "table_differences",
    "take_counts",
]

VERSION = 2  # 1, which older versions read, where no site has a structure
FORM = {
    "version": int,
    "observed": Maybe([str]),
    "constraints": Maybe({str: object}),
    "sites": [
        {
            "name": str,
            "shape": [int],
            "dtype": str,
            "event_dim": int,
            "k": int,
            "initial_k": Maybe(int),  # told where they differ
            "real": bool,
            "structure": Maybe({"class": str}),
        }
    ],
}


class _NeedsModel:
    """Stands for the transform of a constrained site until the model has run."""

    def _refuse(self, *args: Any) -> NoReturn:
        raise RuntimeError(
            "a site is constrained, and the loaded guide has not seen the model: call "
            "guide(*args, **kwargs) once with the model's arguments, or take a step"
        )

    __call__ = with_cache = _refuse


NEEDS_MODEL = _NeedsModel()


@dataclass
class Site:
    """Where a latent site lies in the flat parameters, and how its value is made from them."""

    name: str
    shape: torch.Size  # of the unconstrained value, before any subsampling
    dtype: torch.dtype
    event_dim: int  # of the unconstrained value
    k: int
    frames: list
    transform: Any  # None for a real-valued site
    structure: Structure | None = None
    initial_k: int = -1  # k, before sites competed for it

    def __post_init__(self) -> None:
        if self.initial_k < 0:
            self.initial_k = self.k

    @property
    def is_sparse(self) -> bool:
        return self.k < math.prod(self.shape)


def table(sites: list[Site], observed: list[str], constraints: Mapping[str, Any]) -> dict[str, Any]:
    """The sites as plain data, all but what only the model knows: plates and transforms.

    :param observed: names of the sites of the model that are not the guide's.
    :param constraints: of the guide's parameters, by name.
    """
    structured = any(site.structure is not None for site in sites)
    return {
        "version": VERSION if structured else 1,
        "observed": observed,
        "constraints": {name: constraint_state(each) for name, each in constraints.items()},
        "sites": [
            {
                "name": site.name,
                "shape": list(site.shape),
                "dtype": str(site.dtype).removeprefix("torch."),
                "event_dim": site.event_dim,
                "k": site.k,
                **({} if site.k == site.initial_k else {"initial_k": site.initial_k}),
                "real": site.transform is None,
                **(
                    {} if site.structure is None else {"structure": structure_state(site.structure)}
                ),
            }
            for site in sites
        ],
    }


def read_table(state: Mapping[str, Any], prefix: str, constraints: Mapping[str, Any]) -> list[Site]:
    """The sites of a saved guide; their plates and transforms are left to the model.

    :param state: a state dict that holds the guide's under ``prefix``.
    :param constraints: of the guide's parameters, ``[K, ...]`` each, by name.
    :raises ValueError: if it is not one of such a guide, or its tensors are damaged.
    """
    saved = state.get(f"{prefix}_extra_state")
    if not isinstance(saved, Mapping) or "sites" not in saved:
        raise ValueError(
            f"no table of sites at '{prefix}_extra_state': expected what state_dict() of a sparse "
            "guide gave"
        )
    if isinstance(saved.get("version"), int) and saved["version"] > VERSION:
        raise ValueError(
            f"it was saved by a newer pyro_ssvi (version {saved['version']} of a guide's state, "
            f"{VERSION} is known here): upgrade pyro_ssvi"
        )
    try:
        check_form(saved, FORM)
        sites = [_read_site(row) for row in saved["sites"]]
        names = [site.name for site in sites]
        if len(set(names)) < len(names):
            raise ValueError(f"two sites of one name among {names}")
        if sum(site.k - site.initial_k for site in sites):
            raise ValueError("active coordinates were lost")
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"its table of sites is damaged: {error}") from error
    parameters = [f"{name}_unconstrained" for name in constraints]
    own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    if sites:
        unknown = [key for key in own if key.endswith("_unconstrained") and key not in parameters]
        if unknown:
            raise ValueError(f"it has {unknown}: it was saved by a guide of another class")
        _check_tensors(sites, own, parameters)
    elif own.keys() & {*parameters, "indices"}:
        raise ValueError("its table of sites is damaged: it has parameters, but no sites")
    told = saved.get("constraints", dict.fromkeys(constraints))  # older files do not tell
    if told.keys() != constraints.keys():
        raise ValueError(f"it has {list(told)}: it was saved by a guide of another class")
    for name, constraint in told.items():
        difference = constraint_difference(constraint, constraints.get(name))
        if difference:
            raise ValueError(f"the constraint of {name!r}: {difference}")
    return sites


def _read_site(row: Mapping[str, Any]) -> Site:
    shape, dtype = torch.Size(row["shape"]), getattr(torch, row["dtype"], None)
    k, numel = row["k"], math.prod(shape)
    initial_k = row.get("initial_k", k)
    sizes_fit = all(size >= 0 for size in shape) and numel < 2**63
    counts_fit = all(min(numel, 1) <= count <= numel for count in (k, initial_k))
    if not (sizes_fit and counts_fit and 0 <= row["event_dim"] <= len(shape)):
        raise ValueError(f"site {row['name']!r} cannot be {dict(row)}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"site {row['name']!r} cannot be of {row['dtype']!r}")
    if k < numel and not row["real"]:
        raise ValueError(f"site {row['name']!r} is sparse, and constrained")
    transform = None if row["real"] else NEEDS_MODEL
    structure = read_structure(row.get("structure"))
    event_dim = row["event_dim"]
    return Site(row["name"], shape, dtype, event_dim, k, [], transform, structure, initial_k)


def _check_tensors(sites: list[Site], state: Mapping[str, Any], parameters: Sequence[str]) -> None:
    sparse = [site for site in sites if site.is_sparse]
    for name, part in (*((name, sites) for name in parameters), ("indices", sparse)):
        tensor, size = state.get(name), sum(site.k for site in part)
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (size,):
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else "none"
            raise ValueError(
                f"expected a tensor {name} of shape ({size},), got {got}: it is damaged, or was "
                "saved by a guide of another class"
            )
        check_tensor(tensor, name)
    dtypes = {name: state[name].dtype for name in parameters}
    if len(set(dtypes.values())) > 1 or not all(d.is_floating_point for d in dtypes.values()):
        raise ValueError(f"its parameters are damaged: their dtypes are {dtypes}")
    indices = state["indices"]
    for site, part in zip(sparse, indices.split([site.k for site in sparse]), strict=True):
        try:
            ActiveSet(part, site.shape, site.structure)
        except ValueError as error:
            raise ValueError(f"the indices of site {site.name!r} are damaged: {error}") from None


def table_differences(theirs: list[Site], ours: list[Site], here: str) -> list[str]:
    """What keeps the values of one list of sites from another, a line for each site.

    Sites that compete may have another number of active coordinates than at first: what must
    agree is the first.
    """
    if [site.name for site in theirs] != [site.name for site in ours]:
        names = [[site.name for site in sites] for sites in (theirs, ours)]
        return [f"saved with the sites {names[0]}, {here} has {names[1]}"]
    lines = []
    for their, our in zip(theirs, ours, strict=True):
        was, has = _described(their, our), _described(our, their)
        if was != has:
            lines.append(f"site {their.name!r}: saved with {was}, {here} has {has}")
    return lines


def failing(sites: list[Site], ok: Tensor) -> list[str]:
    """The names of the sites of which not every coordinate is ok, ``[K]``."""
    parts = ok.split([site.k for site in sites])
    return [site.name for site, part in zip(sites, parts, strict=True) if not part.all()]


def take_counts(sites: list[Site], source: list[Site]) -> None:
    """Give sites the numbers of active coordinates that others have, for whose values they are."""
    for site, other in zip(sites, source, strict=True):
        site.k = other.k


def _described(site: Site, other: Site) -> str:
    words = f"{site.initial_k} active of {tuple(site.shape)}"
    if site.dtype != other.dtype:
        words += f" in {site.dtype}"
    if (site.transform is None) != (other.transform is None):
        words += ", real-valued" if site.transform is None else ", constrained"
    if site.structure != other.structure:
        words += f", structure {site.structure}"
    return words


def density_differences(sites: list[Site], density: Density, structure: Structures) -> list[str]:
    """What can be known of the differences before the model has run: of sparse sites alone."""
    lines: list[str] = []
    for site in sites:
        ours = structure_of(structure, site.name)
        if site.is_sparse and site.structure != ours:
            lines.append(
                f"site {site.name!r}: saved with structure {site.structure}, this guide has {ours}"
            )
    if lines:
        return lines
    if isinstance(density, Policy):
        return lines  # which sites take part, only the model can tell
    for site in sites:
        if isinstance(density, Mapping):
            share = density.get(site.name, 1.0)
        elif site.is_sparse:
            share = density(site.name, site.shape) if callable(density) else density
        else:
            continue  # by default, or because it has to be: only the model can tell
        ours = structure_of(structure, site.name) if share < 1 else None
        k = count(ours, site.shape, share)
        if k != site.initial_k:
            lines.append(
                f"site {site.name!r}: saved with {site.initial_k} active of {tuple(site.shape)}, "
                f"this guide has {k}"
            )
    return lines
