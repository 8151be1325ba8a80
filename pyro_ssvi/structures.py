"""Structures: which coordinates of a site are active together, or in which number.

A structure speaks of the site's matrix: its first dimension by all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .active_set import ActiveSet, matrix_shape
from .tiling import Tiling

__all__ = [
    "NM",
    "Columns",
    "Rows",
    "Structure",
    "Tiles",
    "count",
    "read_structure",
    "structure_state",
]


@dataclass(frozen=True)
class Tiles:
    """Whole tiles of the matrix are active, and an exchange moves whole tiles.

    Scores for removal and addition are summed over each tile. For the kernel of a convolution
    ``[out, in, height, width]``, ``Tiles(1, height * width)`` are its filters.

    :param rows: of a tile; ``None`` for all rows of the site.
    :param cols: of a tile; ``None`` for all columns of the site.
    :raises ValueError: for a number under 1.
    """

    rows: int | None
    cols: int | None

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size is not None:
                _check_int(size, "Tiles expects rows and cols >= 1, or None for all")

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of what an exchange moves, for a site of this shape.

        :raises ValueError: if the site cannot be cut into such tiles.
        """
        n, m = matrix_shape(shape)
        rows, cols = self.rows or n, self.cols or m
        if n % rows or m % cols:
            raise ValueError(
                f"its shape {tuple(shape)}, a matrix of {n} x {m}, cannot be cut into tiles of "
                f"{rows} x {cols}"
            )
        return rows, cols

    def count(self, shape: Sequence[int], density: float) -> int:
        """How many coordinates are active at a density: as many whole tiles as come nearest.

        :raises ValueError: if the structure does not fit.
        """
        size = math.prod(self.tile(shape))
        return size * math.floor(density * (math.prod(shape) // size) + 0.5)

    def random(self, shape: Sequence[int], k: int, device: torch.device | None = None) -> ActiveSet:
        """``k`` coordinates, in tiles drawn uniformly."""
        rows, cols = self.tile(shape)
        grid = self._grid(shape)
        units = ActiveSet.random(grid, k // (rows * cols), device)
        return ActiveSet(Tiling(units, (rows, cols)).indices(), shape, self)

    def best(self, scores: Tensor, k: int) -> Tensor:
        """The ``k`` coordinates, in tiles, with the largest scores.

        :param scores: of the site's shape.
        :return: sorted flat indices, ``[k]``.
        """
        rows, cols = self.tile(scores.shape)
        n, m = self._grid(scores.shape)
        sums = scores.reshape(n, rows, m, cols).sum((1, 3)).flatten()
        units = sums.topk(k // (rows * cols), sorted=False).indices.sort().values
        return Tiling(ActiveSet(units, (n, m)), (rows, cols)).indices()

    def check(self, active: ActiveSet) -> None:
        """:raises ValueError: if some tiles are not whole."""
        if self.tile(active.shape) != (1, 1):
            active.in_tiles(*self.tile(active.shape))

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        (rows, cols), (n, m) = self.tile(shape), matrix_shape(shape)
        return n // rows, m // cols


def Rows() -> Tiles:
    """Whole rows: of a linear layer's weight, all that leads to one output."""
    return Tiles(1, None)


def Columns() -> Tiles:
    """Whole columns: of a linear layer's weight, all that one input leads to."""
    return Tiles(None, 1)


@dataclass(frozen=True)
class NM:
    """In each group of ``m`` consecutive columns of a row, exactly ``n`` are active.

    An exchange removes where scores are least, and adds in the same groups. The density is
    ``n / m``.

    :raises ValueError: unless ``1 <= n < m``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for size in (self.n, self.m):
            _check_int(size, "NM expects 1 <= n < m")
        if self.n >= self.m:
            raise ValueError(f"NM expects 1 <= n < m, got {self}")

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """Coordinates are exchanged one by one.

        :raises ValueError: if the site's rows cannot be cut into such groups.
        """
        rows, cols = matrix_shape(shape)
        if cols % self.m:
            raise ValueError(
                f"its shape {tuple(shape)}, a matrix of {rows} x {cols}, has rows that cannot be "
                f"cut into groups of {self.m}"
            )
        return 1, 1

    def count(self, shape: Sequence[int], density: float) -> int:
        """How many coordinates are active.

        :raises ValueError: if the structure does not fit, or has another density.
        """
        self.tile(shape)
        numel = math.prod(shape)
        k = numel // self.m * self.n
        if k != math.floor(density * numel + 0.5):
            raise ValueError(f"{self} has density {self.n / self.m:g}, not {density:g}")
        return k

    def random(self, shape: Sequence[int], k: int, device: torch.device | None = None) -> ActiveSet:
        """``n`` coordinates of each group, drawn uniformly."""
        return ActiveSet(self.best(torch.rand(*shape, device=device), k), shape, self)

    def best(self, scores: Tensor, k: int) -> Tensor:
        """The ``n`` coordinates of each group with the largest scores, sorted.

        :param scores: of the site's shape.
        :return: flat indices, ``[k]``.
        """
        place = scores.reshape(-1, self.m).topk(self.n, sorted=False).indices.sort().values
        first = torch.arange(0, scores.numel(), self.m, device=scores.device)
        return (first.unsqueeze(-1) + place).flatten()

    def check(self, active: ActiveSet) -> None:
        """:raises ValueError: if a group has more or less than ``n`` active coordinates."""
        self.tile(active.shape)
        # Before anything of the number of groups is made: a file may tell any number.
        n = active.numel() // self.m
        groups = n if len(active) == n * self.n else 0
        wanted = torch.arange(groups, device=active.device).repeat_interleave(self.n)
        if not torch.equal(active.indices // self.m, wanted):
            raise ValueError(
                f"ActiveSet of shape {tuple(active.shape)} expects {self.n} active coordinates in "
                f"each group of {self.m}"
            )


Structure = Tiles | NM


def count(structure: Structure | None, shape: Sequence[int], density: float) -> int:
    """How many coordinates of a site are active at a density.

    :raises ValueError: if the structure does not fit.
    """
    if structure is None:
        return math.floor(density * math.prod(shape) + 0.5)
    return structure.count(shape, density)


def structure_state(structure: Structure | None) -> dict[str, Any] | None:
    """A structure as plain data, for a file."""
    if structure is None:
        return None
    return {"class": type(structure).__name__, **asdict(structure)}


def read_structure(state: Mapping[str, Any] | None) -> Structure | None:
    """What :func:`structure_state` gave.

    :raises ValueError: for a structure that is not known.
    """
    if state is None:
        return None
    kinds: dict[str, type[Structure]] = {"Tiles": Tiles, "NM": NM}
    fields = {key: value for key, value in state.items() if key != "class"}
    if state["class"] not in kinds:
        raise ValueError(f"unknown structure {state['class']!r}: upgrade pyro_ssvi")
    try:
        return kinds[state["class"]](**fields)
    except TypeError as error:
        raise ValueError(f"structure {dict(state)} is damaged: {error}") from None


def _check_int(value: object, expected: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{expected}, got {value!r}")
