"""A site's active coordinates as whole tiles of its matrix."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .active_set import ActiveSet

__all__ = ["Tiling"]


class Tiling:
    """Which tiles are active, and where the values of each lie.

    Values stay in the order of the sorted flat indices, so a tile's are runs in several rows:
    entry ``(i, j)`` of a tile has its value at ``start + i * stride + j``.

    :param units: the U active tiles, in the grid of all tiles.
    :param shape: rows and columns of a tile.
    """

    def __init__(self, units: ActiveSet, shape: tuple[int, int]) -> None:
        self.units, self.shape = units, shape
        rows, cols = shape
        row = units.indices // units.matrix_shape[1]
        crow = units.csr.crow.long()
        before = crow[row]  # tiles in the rows of tiles above
        start = (rows - 1) * before + torch.arange(len(units), device=units.device)
        #: int32 ``[U]``, where the first value of each lies.
        self.start = (cols * start).to(torch.int32)
        #: int32 ``[U]``, from the value of a row to that of the next.
        self.stride = (cols * crow.diff()[row]).to(torch.int32)

    @property
    def places(self) -> Tensor:
        """For each tile the places of its values, int64 ``[U, rows * cols]``, made anew."""
        i, j = (torch.arange(n, device=self.start.device) for n in self.shape)
        down = self.start.unsqueeze(-1) + self.stride.unsqueeze(-1) * i
        return (down.unsqueeze(-1) + j).flatten(1)

    def coordinates(self, units: Tensor) -> Tensor:
        """Flat positions in the site of all entries of some tiles.

        :param units: flat indices in the grid, ``[n]``.
        :return: int64 ``[n, rows * cols]``.
        """
        (rows, cols), across = self.shape, self.units.matrix_shape[1]
        i, j = (torch.arange(n, device=units.device) for n in self.shape)
        row, column = units // across * rows, units % across * cols
        down = (row.unsqueeze(-1) + i) * (across * cols) + column.unsqueeze(-1)
        return (down.unsqueeze(-1) + j).flatten(1)

    def indices(self) -> Tensor:
        """The active coordinates, sorted int64 ``[K]``."""
        places = self.places.flatten()
        coordinates = self.coordinates(self.units.indices).flatten()
        return torch.empty_like(places).scatter_(0, places, coordinates)

    @cached_property
    def place_t(self) -> Tensor:
        """Of each tile, its place in the order of the transposed grid: int32 ``[U]``."""
        perm = self.units.csr_t.perm
        assert perm is not None
        return torch.empty_like(perm).scatter_(0, perm.long(), torch.arange(len(perm)).to(perm))
