"""The active coordinates of one site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .tiling import Tiling

if TYPE_CHECKING:
    from .structures import Structure

__all__ = ["CSR", "ActiveSet", "Lines", "draw_distinct", "matrix_shape"]


class CSR(NamedTuple):
    """Where the active coordinates lie in a matrix, row by row.

    :param crow: ``[n + 1]``, row ``i`` holds entries ``crow[i]`` to ``crow[i + 1]``.
    :param col: ``[K]``, the column of each entry.
    :param perm: ``[K]``, the place of each entry's value, or ``None`` where values lie in order.
    :param shape: ``(n, m)``.
    """

    crow: Tensor
    col: Tensor
    perm: Tensor | None
    shape: tuple[int, int]


class Lines(NamedTuple):
    """The rows or columns of a matrix that are active as a whole, where nothing else is.

    :param dim: 0 for rows, 1 for columns.
    :param numbers: which, sorted int64 ``[k]``.
    """

    dim: int
    numbers: Tensor


class ActiveSet:
    """The K active coordinates of a site with D elements: sorted, unique flat indices.

    An active set never changes; an exchange makes a new one. The matrix views that sparse
    products need are made when first asked for and kept.

    :param indices: int64 ``[K]``, sorted and unique positions in the flattened site.
    :param shape: shape of the site.
    :param structure: what coordinates are exchanged by, where not one by one.
    :raises ValueError: if the indices are not a sorted set of positions in ``shape``, or do not
        have the structure.
    """

    #: Of :mod:`pyro_ssvi.structures`, or ``None``.
    structure: Structure | None = None

    def __init__(
        self, indices: Tensor, shape: Sequence[int], structure: Structure | None = None
    ) -> None:
        self.shape = torch.Size(shape)
        self._indices: Tensor | None = indices
        self._device = indices.device
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                "ActiveSet expects a 1-d int64 tensor of indices, "
                f"got {indices.dtype} with shape {tuple(indices.shape)}"
            )
        if not 1 <= len(indices) <= self.numel():
            raise ValueError(
                f"ActiveSet of shape {tuple(shape)} expects 1 to {self.numel()} indices, "
                f"got {len(indices)}"
            )
        # One host sync, and only where a set is made: never in a training step.
        if bool((indices.diff() <= 0).any() | (indices[0] < 0) | (indices[-1] >= self.numel())):
            raise ValueError(
                f"ActiveSet expects sorted, unique indices in [0, {self.numel()}): "
                "try indices.unique()"
            )
        if structure is not None:
            self.structure = structure
            structure.check(self)

    @classmethod
    def full(cls, shape: Sequence[int], device: torch.device | None = None) -> ActiveSet:
        """Every coordinate active. Indices are only made if asked for."""
        self = cls.__new__(cls)
        self.shape = torch.Size(shape)
        self._indices = None
        self._device = torch.device("cpu") if device is None else device
        return self

    @classmethod
    def random(cls, shape: Sequence[int], k: int, device: torch.device | None = None) -> ActiveSet:
        """``k`` coordinates drawn uniformly from torch's global generator, at O(k)."""
        return cls(draw_distinct(math.prod(shape), k, device=device), shape)

    @property
    def indices(self) -> Tensor:
        """Sorted flat positions, int64 ``[K]``."""
        if self._indices is None:
            self._indices = torch.arange(self.numel(), device=self._device)
        return self._indices

    @property
    def is_full(self) -> bool:
        return len(self) == self.numel()

    @cached_property
    def density(self) -> float:
        return len(self) / max(self.numel(), 1)

    @property
    def mask(self) -> Tensor:
        """Boolean tensor of the site's shape, made anew at each call."""
        mask = torch.zeros(self.numel(), dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, self.indices, True).reshape(self.shape)

    @property
    def device(self) -> torch.device:
        return self._device

    def numel(self) -> int:
        """D, the number of elements of the site."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.numel() if self._indices is None else len(self._indices)

    def __repr__(self) -> str:
        return f"ActiveSet({len(self)} of {tuple(self.shape)}, density={self.density:.3g})"

    def __getstate__(self) -> dict:
        # Matrix views are caches: they are not worth a byte in a file.
        keys = ("shape", "_indices", "_device", "structure")
        return {key: self.__dict__[key] for key in keys if key in self.__dict__}

    def same(self, other: ActiveSet) -> bool:
        """Whether both hold the same coordinates; free when they are one object."""
        if self is other:
            return True
        return self.shape == other.shape and torch.equal(self.indices, other.indices)

    def to(self, device: torch.device) -> ActiveSet:
        if device == self.device:
            return self
        if self._indices is None:
            return ActiveSet.full(self.shape, device)
        return ActiveSet(self.indices.to(device), self.shape, self.structure)

    def gather(self, dense: Tensor) -> Tensor:
        """The active entries of a tensor.

        :param dense: ``[*batch, *shape]``.
        :return: ``[*batch, K]``.
        """
        batch = dense.shape[: dense.dim() - len(self.shape)]
        return dense.reshape(*batch, self.numel()).index_select(-1, self.indices)

    def scatter(self, values: Tensor) -> Tensor:
        """The tensor with ``values`` at the active entries and 0 elsewhere.

        :param values: ``[*batch, K]``.
        :return: ``[*batch, *shape]``.
        """
        batch = values.shape[:-1]
        dense = values.new_zeros(*batch, self.numel())
        return dense.index_copy(-1, self.indices, values).reshape(*batch, *self.shape)

    def batch_index(self, batch_dims: int) -> Tensor:
        """For each active coordinate, the flat position of its batch element, int64 ``[K]``.

        :param batch_dims: how many leading dimensions of the site are batch dimensions.
        """
        return self.indices // math.prod(self.shape[batch_dims:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The site as a matrix: its first dimension by all others."""
        return matrix_shape(self.shape)

    def in_tiles(self, rows: int, cols: int) -> Tiling:
        """The active coordinates as tiles of the site's matrix.

        :raises ValueError: if they are not whole tiles.
        """
        if (rows, cols) not in self._tilings:
            n, m = self.matrix_shape
            row, column = self.indices // m, self.indices % m
            first = (row % rows == 0) & (column % cols == 0)
            units = (row // rows * (m // cols) + column // cols)[first]
            whole = len(units) * rows * cols == len(self)
            if whole:
                tiling = Tiling(ActiveSet(units, (n // rows, m // cols)), (rows, cols))
                whole = torch.equal(tiling.indices(), self.indices)
            if not whole:
                raise ValueError(
                    f"ActiveSet of shape {tuple(self.shape)} expects whole tiles of "
                    f"{rows} x {cols}, some have active and inactive coordinates"
                )
            self._tilings[rows, cols] = tiling
        return self._tilings[rows, cols]

    @cached_property
    def _tilings(self) -> dict[tuple[int, int], Tiling]:
        return {}

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of what an exchange moves as one."""
        return (1, 1) if self.structure is None else self.structure.tile(self.shape)

    @cached_property
    def lines(self) -> Lines | None:
        """The active coordinates as whole rows or columns, where what is exchanged is made of
        such."""
        (n, m), (rows, cols) = self.matrix_shape, self.tile
        if cols == m:
            return Lines(0, self.indices[::m] // m)
        return Lines(1, self.indices[: len(self) // n]) if rows == n else None

    @property  # a cache that holds the set itself would keep it until garbage is collected
    def units(self) -> ActiveSet:
        """What an exchange moves: the active tiles, in the grid of all tiles, or coordinates."""
        return self if self.tile == (1, 1) else self.in_tiles(*self.tile).units

    def unit_sums(self, values: Tensor) -> Tensor:
        """The sum over each active unit, ``[K]`` to ``[U]``."""
        if self.tile == (1, 1):
            return values
        return values[self.in_tiles(*self.tile).places].sum(-1)

    def unit_coordinates(self, units: Tensor) -> Tensor:
        """The flat positions in the site of all coordinates of some units, active or not.

        :param units: flat indices in the shape of :attr:`units`, ``[n]``.
        :return: int64 ``[n, size]``.
        """
        if self.tile == (1, 1):
            return units.unsqueeze(-1)
        return self.in_tiles(*self.tile).coordinates(units)

    def block_diagonal(self, groups: int) -> ActiveSet:
        """The site's matrix with its rows in ``groups`` blocks, each with columns of its own.

        That is the matrix of a grouped convolution: ``[n, groups * m]``.
        """
        if groups == 1:
            return self
        if groups not in self._blocks:
            rows, cols = self.matrix_shape
            row = self.indices // cols
            column = row // (rows // groups) * cols + self.indices % cols
            indices = row * (groups * cols) + column
            self._blocks[groups] = ActiveSet(indices, (rows, groups * cols))
        return self._blocks[groups]

    @cached_property
    def _blocks(self) -> dict[int, ActiveSet]:
        return {}

    def by_channel(self, taps: int, used: tuple[bool, ...]) -> CSR:
        """The matrix of a convolution, grouped by input channel, with some of its taps.

        :param taps: how many of the matrix's columns belong to one channel.
        :param used: which of them count.
        :return: the matrix of shape ``(channels, n * taps)``.
        """
        if (taps, used) not in self._channels:
            rows, cols = self.matrix_shape
            column = self.indices % cols
            channel, tap = column // taps, column % taps
            place = torch.tensor(used, device=self.device)[tap].nonzero().squeeze(-1)
            key = (channel * rows + self.indices // cols) * taps + tap
            key, order = key[place].sort()
            crow = _offsets(key // (rows * taps), cols // taps)
            self._channels[taps, used] = CSR(
                crow,
                _narrow(key % (rows * taps)),
                _narrow(place[order]),
                (cols // taps, rows * taps),
            )
        return self._channels[taps, used]

    @cached_property
    def _channels(self) -> dict[tuple[int, tuple[bool, ...]], CSR]:
        return {}

    @cached_property
    def csr(self) -> CSR:
        """The site's matrix, row by row."""
        rows, cols = self.matrix_shape
        row = self.indices // cols
        return CSR(_offsets(row, rows), _narrow(self.indices % cols), None, (rows, cols))

    @cached_property
    def csr_t(self) -> CSR:
        """The transposed matrix, row by row."""
        rows, cols = self.matrix_shape
        column, perm = self.csr.col.sort(stable=True)
        crow, perm = _offsets(column, cols), _narrow(perm)
        return CSR(crow, _narrow(self.indices[perm] // cols), perm, (cols, rows))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a site as a matrix: its first dimension by all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _narrow(indices: Tensor) -> Tensor:
    # Every sparse library's fast path takes 32-bit indices; positions in a row always fit.
    return indices.to(torch.int32)


def _offsets(sorted_rows: Tensor, n: int) -> Tensor:
    bounds = torch.arange(n + 1, device=sorted_rows.device)
    return _narrow(torch.searchsorted(sorted_rows, bounds))


def draw_distinct(
    n: int,
    k: int,
    exclude: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw ``k`` distinct integers uniformly from ``range(n)``, sorted, at O(k) for k << n.

    :param exclude: sorted int64 tensor of integers that must not be drawn.
    """
    excluded = 0 if exclude is None else len(exclude)
    if not 0 <= k <= n - excluded:
        raise ValueError(f"cannot draw {k} distinct integers of {n - excluded}")
    if exclude is None:
        exclude = torch.empty(0, dtype=torch.int64, device=device)
    if 4 * (k + excluded) > n:
        allowed = torch.ones(n, dtype=torch.bool, device=exclude.device)
        pool = allowed.index_fill_(0, exclude, False).nonzero().squeeze(-1)
    else:
        # Rejection: at least three in four draws are new, so this ends after a few rounds.
        pool = exclude.new_empty(0)
        while len(pool) < k:
            draws = torch.randint(n, (2 * (k - len(pool)) + 8,), device=exclude.device)
            pool = torch.cat([pool, draws]).unique()
            pool = pool[~torch.isin(pool, exclude)]
    chosen = torch.randperm(len(pool), device=pool.device)[:k]
    return pool[chosen].sort().values
