"""The first run of a model: which sites are sparse, and where they start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..active_set import ActiveSet
from ..densities import Policy, check_density
from ..distributions import elementwise_base, is_elementwise_real, restrict
from ..sparse_tensor import SparseTensor
from ..structures import Structure, count

__all__ = ["Density", "ShapesMessenger", "SparseInitMessenger", "Structures", "structure_of"]

Structures = Structure | Mapping[str, Structure] | None
Density = float | Mapping[str, float] | Callable[[str, torch.Size], float] | Policy

# These treat every element alike: K of them need not be picked out of D.
_ELEMENTWISE = (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)


class SparseInitMessenger(InitMessenger):
    """Gives each latent site its first value: sparse, on a random active set, or dense.

    Nothing of a sparse site's full size is drawn, unless ``init_loc_fn`` is a function of the
    user's that draws it.

    :param init_loc_fn: as for Pyro's autoguides.
    :param density: a number for every site that is sparse by default, or a mapping from names,
        or a callable of name and shape.
    :param structure: of every sparse site, or a mapping from names.
    """

    def __init__(
        self, init_loc_fn: Callable, density: Density, structure: Structures = None
    ) -> None:
        super().__init__(init_loc_fn)
        self.density = density
        self.structure = structure
        #: Sites that have data now, or had data when a loaded guide was saved.
        self.observed: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] not in self.observed:
            self.observed.append(msg["name"])
        if msg["name"] in self.observed or site_is_subsample(msg):
            return
        density = self._density(msg)
        if density == 1:
            super()._pyro_sample(msg)
        else:
            msg["value"] = self._sparse_value(msg, density)

    def _density(self, msg: Any) -> float:
        name, shape = msg["name"], msg["fn"].shape()
        if isinstance(self.density, Mapping):
            density = self.density.get(name, 1.0)
            refusal = _why_not_sparse(msg) if density < 1 else None
            if refusal is not None:
                raise ValueError(
                    f"site {name!r} cannot be sparse: {refusal}. "
                    f"Leave it out of density=, or set density={{{name!r}: 1.0, ...}}"
                )
            return density
        if len(shape) < 2 or _is_missing_data(msg) or _why_not_sparse(msg) is not None:
            return 1.0
        if callable(self.density):
            return check_density(self.density(name, shape), name)
        assert isinstance(self.density, float)
        return self.density

    def _sparse_value(self, msg: Any, density: float) -> SparseTensor:
        name, fn = msg["name"], msg["fn"]
        shape, structure = fn.shape(), structure_of(self.structure, name)
        try:
            k = count(structure, shape, density)
        except ValueError as error:
            raise ValueError(
                f"site {name!r} cannot have the structure {structure}: {error}. Set another "
                f"density, or structure={{...}} for other sites only"
            ) from None
        if k == 0:
            size = 1 if structure is None else math.prod(structure.tile(shape))
            raise ValueError(
                f"site {name!r} of shape {tuple(shape)} would get 0 active coordinates at "
                f"density {density:g}: use at least {size / math.prod(shape):.3g} there, or leave "
                f"it dense with density={{..., {name!r}: 1.0}}"
            )
        base, _ = elementwise_base(fn)
        like = _prior_number(base)
        draw = ActiveSet.random if structure is None else structure.random
        active = draw(shape, k, device=like.device)
        init_fn = getattr(self.init_fn, "func", self.init_fn)
        elementwise = any(init_fn is known for known in _ELEMENTWISE)
        restricted = restrict(base, active) if elementwise else None
        with torch.no_grad():
            if msg["value"] is not None:  # as poutine.reparam gives its auxiliary sites
                value = active.gather(msg["value"].detach())
            elif restricted is not None:
                fn = restricted.expand(torch.Size([k]))
                value = self.init_fn({**msg, "fn": fn, "value": None})
            else:
                value = active.gather(self.init_fn(msg).detach())
        return SparseTensor(value.to(like), active)


def structure_of(structure: Structures, name: str) -> Structure | None:
    """The structure of one site."""
    return structure.get(name) if isinstance(structure, Mapping) else structure


class ShapesMessenger(SparseInitMessenger):
    """Learns the shapes of the sites that are sparse by default; each gets a single 0."""

    def __init__(self, init_loc_fn: Callable) -> None:
        super().__init__(init_loc_fn, 0.5)
        self.shapes: dict[str, torch.Size] = {}

    def _sparse_value(self, msg: Any, density: float) -> SparseTensor:
        self.shapes[msg["name"]] = shape = msg["fn"].shape()
        base, _ = elementwise_base(msg["fn"])
        zero = _prior_number(base).new_zeros(1)
        return SparseTensor(zero, ActiveSet(zero.long(), shape))


def _why_not_sparse(msg: Any) -> str | None:
    fn = msg["fn"]
    if fn.support.is_discrete:
        return "it is discrete"
    if fn.shape().numel() == 0:
        return "it has no elements"
    if not is_elementwise_real(fn):
        return f"its prior {fn} is not a distribution of independent real numbers"
    for frame in msg["cond_indep_stack"]:
        if frame.vectorized and frame.full_size not in (None, frame.size):
            return f"it is local to the subsampled plate {frame.name!r}"
    return None


def _is_missing_data(msg: Any) -> bool:
    """Whether this is what ``pyro.sample(..., obs_mask=...)`` has no observation of."""
    return msg["name"].endswith("_unobserved") and msg["mask"] is not None


def _prior_number(base: Any) -> Tensor:
    """Any number of the prior's, for its dtype and device."""
    for name in base.arg_constraints:
        param = getattr(base, name, None)
        if isinstance(param, Tensor) and param.is_floating_point():
            return param
    return base.sample()
