"""One exchange: which coordinates leave, which come, and where everything else moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .active_set import ActiveSet
from .allocation import Proposals, Rounds
from .structures import NM
from .tiling import Tiling

__all__ = [
    "Move",
    "best",
    "carry",
    "read_at",
    "room",
    "rows_at_once",
    "swap",
    "top_inactive",
    "unit_scores",
    "weakest",
]

#: One score in so many is looked at to see where the largest begin.
STRIDE = 16
#: Bytes of float32 scores held at once while a site is searched for coordinates to add.
BLOCK_BYTES = 2 * 2**20


class Move(NamedTuple):
    """What an exchange does to one site.

    :param indices: the new active coordinates, sorted int64 ``[K]``; K may be another than before
        if what all sites of the guide have together stays the same.
    :param source: for each of them its place among the old ones, or -1 if it is new: ``[K]``.
    :param size: how many are new.
    :param first: location and scale of the new ones, in the order of their indices, where they
        have any of their own: ``[size]`` each.
    """

    indices: Tensor
    source: Tensor
    size: int
    first: tuple[Tensor, Tensor] | None = None


def weakest(active: ActiveSet, scores: Tensor, n: int) -> Tensor:
    """The places, in ``active.units``, of the ``n`` that are to be removed.

    :param scores: of the active coordinates, ``[K]``; those of a unit are summed.
    """
    structure = active.structure
    if isinstance(structure, NM) and 2 * structure.n > structure.m:
        # No more can leave a group than can come.
        group = torch.arange(len(scores), device=scores.device) // structure.n
        spare = _rank(group, -scores) < structure.m - structure.n
        scores = scores.where(spare, math.inf)
    return active.unit_sums(scores).topk(n, largest=False, sorted=False).indices


def room(active: ActiveSet, removed: Tensor) -> Tensor | None:
    """How many coordinates are to be added to each group, where groups keep their number.

    :param removed: as for :func:`swap`.
    :return: int64 ``[groups]``, or ``None`` where there are no groups.
    """
    if not isinstance(active.structure, NM):
        return None
    groups = active.numel() // active.structure.m
    counts = torch.zeros(groups, dtype=torch.int64, device=active.device)
    return counts.index_add_(0, removed // active.structure.n, torch.ones_like(removed))


def swap(active: ActiveSet, removed: Tensor, added: Tensor) -> Move:
    """Take ``removed`` out of an active set and put ``added`` in.

    :param removed: int64 ``[n]``, distinct places in ``active.units``.
    :param added: int64 ``[m]``, distinct flat indices of inactive units.
    """
    move = _swap(active.units, removed, added)
    if active.units is active:
        return move
    old = active.in_tiles(*active.tile)
    new = Tiling(ActiveSet(move.indices, old.units.shape), old.shape)
    places = old.places[move.source.clamp(min=0)].where(move.source.unsqueeze(-1) >= 0, -1)
    source = torch.empty_like(active.indices)
    source.scatter_(0, new.places.flatten(), places.flatten())
    return Move(new.indices(), source, move.size * math.prod(old.shape))


def _swap(active: ActiveSet, removed: Tensor, added: Tensor) -> Move:
    leaves = torch.zeros(len(active), dtype=torch.int8, device=active.device)
    leaves.index_fill_(0, removed, 1)
    # Those that stay come first: a sort, where nonzero() would wait for the device.
    kept = leaves.argsort(stable=True)[: len(active) - len(removed)]
    indices, order = torch.cat([active.indices[kept], added]).sort()
    source = torch.cat([kept, torch.full_like(added, -1)])[order]
    return Move(indices, source, len(added))


def carry(tensor: Tensor, source: Tensor, first: Tensor) -> None:
    """Move a per-coordinate tensor along, in place.

    :param tensor: ``[K, ...]``.
    :param source: ``[K]``, as in :class:`Move`.
    :param first: ``[K, ...]``, what new coordinates start from.
    """
    moved = tensor.index_select(0, source.clamp(min=0))
    new = (source < 0).reshape(-1, *(1,) * (tensor.dim() - 1))
    tensor.copy_(torch.where(new, first, moved))


def unit_scores(
    active: ActiveSet, block: Callable[[int, int], Tensor]
) -> Callable[[int, int], Tensor]:
    """The scores of units, from those of coordinates, which are summed over each unit.

    :param block: ``block(start, stop)`` gives the scores of these rows of the site's matrix.
    :return: a function that gives those of rows of the units' matrix.
    """
    if active.units is active:
        return block
    rows, cols = active.tile

    def summed(start: int, stop: int) -> Tensor:
        if stop - start > 1:
            scores = block(start * rows, stop * rows)
            return scores.unflatten(0, (-1, rows)).unflatten(-1, (-1, cols)).sum((1, 3))
        # Units may be as tall as the site.
        step = rows_at_once(active.matrix_shape[1])
        parts = [
            block(first, min(first + step, stop * rows)).unflatten(1, (-1, cols)).sum((0, 2))
            for first in range(start * rows, stop * rows, step)
        ]
        return torch.stack(parts).sum(0, keepdim=True)

    return summed


def top_inactive(
    active: ActiveSet,
    rounds: Rounds,
    block: Callable[[int, int], Tensor],
    room: Tensor | None = None,
) -> Proposals:
    """The inactive units, mostly single coordinates, with the largest scores.

    Scores are asked for by blocks of rows, once for all rounds, and only those that may be among
    the largest are kept: the memory needed does not grow with the site.

    :param rounds: how many are wanted, and by which function of their scores.
    :param block: ``block(start, stop)`` gives the scores of these rows of the units' matrix, see
        :func:`unit_scores`.
    :param room: how many are taken in each group, as :func:`room` gave.
    :return: for each ``n, compare`` of the rounds flat indices and compared scores, both ``[n]``.
        NaN counts as the largest. Where there are not so many above -inf, the rest have -inf, and
        any index, or are missing.
    """
    step = rows_at_once(active.matrix_shape[1] * active.tile[0])
    structure, active = active.structure, active.units
    rows, cols = active.matrix_shape
    if step >= rows and room is None:
        scores = block(0, rows).reshape(-1)
        ranked = [
            compare(scores).index_fill(0, active.indices, -math.inf).topk(n, sorted=False)
            for n, compare in rounds
        ]
        return [(indices, values) for values, indices in ranked]
    starts = torch.arange(0, rows + step, step, device=active.device) * cols
    bounds = torch.searchsorted(active.indices, starts).tolist()
    leaders = [_Leaders(n, active.device) for n, _ in rounds]
    for i, start in enumerate(range(0, rows, step)):
        scores = block(start, min(start + step, rows)).reshape(-1)
        inside = active.indices[bounds[i] : bounds[i + 1]] - start * cols
        for leading, (_, compare) in zip(leaders, rounds, strict=True):
            compared = compare(scores)
            index = leading.candidates(compared).index_fill_(0, inside, False).nonzero().squeeze(-1)
            if room is not None:
                assert isinstance(structure, NM)
                group = (index + start * cols) // structure.m
                index = index[_rank(group, compared[index]) < room[group]]
            leading.add(index + start * cols, compared[index])
    return [leading.result() for leading in leaders]


class _Leaders:
    """The largest ``n`` of many scores that come in parts."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n = n
        self._kept = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._least = torch.tensor(-math.inf, device=device)

    def candidates(self, scores: Tensor) -> Tensor:
        """Which may be among them: not "larger than", which NaN would not be."""
        return (scores <= self._least).logical_not_()

    def add(self, indices: Tensor, scores: Tensor) -> None:
        self._parts.append((indices, scores))
        self._kept += len(scores)
        if self._kept > 2 * self.n:
            self._drop()

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices and scores of those that lead now."""
        indices, scores = self._joined()
        scores, place = scores.topk(min(self.n, self._kept), sorted=False)
        return indices[place], scores

    def _joined(self) -> tuple[Tensor, Tensor]:
        indices, scores = zip(*self._parts, strict=True)
        return torch.cat(indices), torch.cat(scores)

    def _drop(self) -> None:
        """Keep the leaders, and not many others: topk, on CPU, takes ten times as long as this."""
        indices, scores = self._joined()
        sample = scores[::STRIDE]
        # A fifth more than are wanted, so that it is rare that the sample leaves too few.
        likely = min(len(sample), int(1.2 * self.n / STRIDE) + 1)
        least = sample.topk(likely, sorted=False).values.min()
        place = (scores <= least).logical_not_().nonzero().squeeze(-1)
        if not self.n <= len(place) <= 1.5 * self.n:  # few scores, equal ones, or NaN
            scores, place = scores.topk(self.n, sorted=False)
            least = scores.min() if self.n else torch.full_like(self._least, math.inf)
        else:
            scores = scores[place]
        self._parts, self._kept, self._least = [(indices[place], scores)], len(scores), least


def best(
    active: ActiveSet,
    rounds: Rounds,
    candidates: Tensor,
    scores: Tensor,
    room: Tensor | None = None,
) -> Proposals:
    """As :func:`top_inactive`, but of some units alone.

    :param candidates: sorted flat indices of inactive units, ``[m]``.
    :param scores: ``[m]``.
    """
    proposals = []
    for n, compare in rounds:
        compared = compare(scores)
        if room is not None:
            assert isinstance(active.structure, NM)
            group = candidates // active.structure.m
            compared = compared.where(_rank(group, compared) < room[group], -math.inf)
        values, place = compared.topk(min(n, len(compared)), sorted=False)
        proposals.append((candidates[place], values))
    return proposals


def _rank(group: Tensor, scores: Tensor) -> Tensor:
    """The rank of each score in its group, the largest first: 0, 1, ..; groups are sorted."""
    order = scores.argsort(descending=True)
    order = order[group[order].argsort(stable=True)]
    sizes = group.unique_consecutive(return_counts=True)[1] if len(group) else group
    rank = torch.arange(len(group), device=group.device)
    rank -= torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return torch.empty_like(rank).scatter_(0, order, rank)


def read_at(active: ActiveSet, indices: Tensor, block: Callable[[int, int], Tensor]) -> Tensor:
    """Some entries of a site's matrix that is made by blocks of rows.

    :param indices: flat, sorted, ``[n]``.
    :param block: ``block(start, stop)`` gives these rows.
    :return: ``[n]``.
    """
    rows, cols = active.matrix_shape
    step = rows_at_once(cols)
    starts = torch.arange(0, rows + step, step, device=active.device) * cols
    sizes = torch.searchsorted(indices, starts).diff().tolist()
    parts = [
        block(start, min(start + step, rows)).reshape(-1)[part - start * cols]
        for start, part in zip(range(0, rows, step), indices.split(sizes), strict=True)
        if len(part)
    ]
    return torch.cat(parts or [block(0, 1).reshape(-1)[:0]])


def rows_at_once(cols: int) -> int:
    """How many rows of a site's matrix make a block."""
    return max(1, BLOCK_BYTES // (4 * cols))
