"""Policies: how the active coordinates of a guide are shared out among its sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

__all__ = ["ErdosRenyiKernel", "Policy", "Uniform", "check_density"]


def check_density(density: object, site: str | None = None) -> float:
    """``density`` as a float.

    :raises ValueError: if it is not a number in (0, 1].
    """
    number = isinstance(density, float | int) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:  # type: ignore[operator]
        where = "" if site is None else f" of site {site!r}"
        raise ValueError(f"expected a density{where} in (0, 1], got {density!r}")
    return float(density)  # type: ignore[arg-type]


@runtime_checkable
class Policy(Protocol):
    """What a sparse guide's ``density=`` takes for a policy."""

    def allocate(self, shapes: Mapping[str, torch.Size]) -> dict[str, float]:
        """The density of each site.

        :param shapes: of the sites that can be sparse, in the model's order.
        :return: a number in (0, 1] for each; sites that are left out are dense.
        """


@dataclass(frozen=True)
class Uniform:
    """The same density for every site, as a plain number has it, but perhaps for the first.

    :param density: share of active coordinates, in (0, 1].
    :param first_dense: leave the first site dense, as the code of the SSVI paper does.
    """

    density: float
    first_dense: bool = False

    def __post_init__(self) -> None:
        check_density(self.density)

    def allocate(self, shapes: Mapping[str, torch.Size]) -> dict[str, float]:
        """See :class:`Policy`."""
        return {
            name: 1.0 if self.first_dense and i == 0 else self.density
            for i, name in enumerate(shapes)
        }


@dataclass(frozen=True)
class ErdosRenyiKernel:
    """Small sites get more: a site's density is in proportion to the sum of its sizes over their
    product (RigL; Evci, Gale, Menick, Castro, Elsen, ICML 2020, section 3).

    A weight ``[out, in, height, width]`` gets ``(out + in + height + width) / (out in height
    width)`` times a factor, the same for all sites, so that ``density`` is met over all sites
    together. Where that is more than 1 the site is dense, and the others share the rest.

    :param density: share of active coordinates of all sites that can be sparse, in (0, 1].
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def allocate(self, shapes: Mapping[str, torch.Size]) -> dict[str, float]:
        """See :class:`Policy`."""
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        left = self.density * sum(numel.values())
        sizes = {name: sum(shape) for name, shape in shapes.items()}
        densities: dict[str, float] = {}
        while sizes:
            factor = left / sum(sizes.values())
            full = [name for name in sizes if factor * sizes[name] >= numel[name]]
            if not full:
                break
            for name in full:
                densities[name] = 1.0
                left -= numel[name]
                del sizes[name]
        return densities | {name: factor * size / numel[name] for name, size in sizes.items()}
