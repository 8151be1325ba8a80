"""Allocation: whether each site keeps its number of active coordinates, or all compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ALLOCATIONS", "FLOOR", "Room", "check_allocation", "compete", "largest"]

ALLOCATIONS = ("per_site", "global")

#: The share of a site's first number of active coordinates that it keeps, whatever the scores.
#: A layer without weights would cut a network in two.
FLOOR = 0.25


def check_allocation(name: str) -> str:
    """The name itself.

    :raises ValueError: if no allocation has this name.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"expected allocation to be one of {ALLOCATIONS}, got {name!r}")
    return name


class Room(NamedTuple):
    """What a sparse site has room for.

    :param numel: D; it stays sparse, with D - 1 active coordinates at most.
    :param k: how many are active.
    :param initial_k: how many were active at first.
    """

    numel: int
    k: int
    initial_k: int

    @property
    def floor(self) -> int:
        """How many stay active at least."""
        return max(1, math.ceil(FLOOR * self.initial_k))

    @property
    def removable(self) -> int:
        """How many may go, so that the floor can be filled with others."""
        return min(self.k, self.numel - self.floor)

    def addable(self, removed: int) -> tuple[int, int]:
        """How many must come at least, and may come at most, once so many have gone."""
        left = self.k - removed
        return max(0, self.floor - left), min(self.numel - self.k, self.numel - 1 - left)


class Choice(NamedTuple):
    """What happens to one site.

    :param removed: places among its active coordinates, int64.
    :param added: flat indices, int64.
    :param scores: of those added.
    """

    removed: Tensor
    added: Tensor
    scores: Tensor


def compete(
    rooms: Sequence[Room],
    removal: Sequence[Tensor],
    share: float,
    propose: Callable[[int, int], tuple[Tensor, Tensor]],
) -> list[Choice]:
    """Exchange a share of all sites' active coordinates: as many come as go, all sites together.

    A coordinate that goes cannot be one that comes.

    :param rooms: of each site.
    :param removal: the scores of each site's active coordinates; the smallest go.
    :param propose: ``propose(i, m)`` gives the ``m`` best coordinates to add to site ``i``, as
        flat indices and scores; the largest scores come.
    :return: what happens to each site.
    """
    n = min(
        math.floor(share * sum(room.k for room in rooms) + 0.5),
        sum(room.removable for room in rooms),
        sum(room.numel - 1 - room.k for room in rooms),
    )
    if n <= 0:
        return []
    none = [0] * len(rooms)
    removed = largest([-scores for scores in removal], n, none, [r.removable for r in rooms])
    bounds = [room.addable(len(gone)) for room, gone in zip(rooms, removed, strict=True)]
    proposals = [propose(i, min(n, most)) for i, (_, most) in enumerate(bounds)]
    least, most = zip(*bounds, strict=True)
    chosen = largest([scores for _, scores in proposals], n, least, most)
    return [
        Choice(gone, indices[places], scores[places])
        for gone, (indices, scores), places in zip(removed, proposals, chosen, strict=True)
    ]


def largest(
    scores: Sequence[Tensor], n: int, least: Sequence[int], most: Sequence[int]
) -> list[Tensor]:
    """The places of the ``n`` largest scores of several groups together.

    :param scores: of each group, 1-d. NaN counts as the largest.
    :param least: how many of each group are taken whatever the others have, ``n`` in all at most.
    :param most: how many of each group are taken at most, ``n`` in all at least.
    :return: the places in each group.
    """
    ranked = [part.topk(min(cap, n, len(part))) for part, cap in zip(scores, most, strict=True)]
    keys = [
        values.double().index_fill(0, torch.arange(need, device=values.device), math.inf)
        for (values, _), need in zip(ranked, least, strict=True)
    ]
    sizes = torch.tensor([len(key) for key in keys], device=keys[0].device)
    winners = torch.cat(keys).topk(n, sorted=False).indices
    group = torch.repeat_interleave(sizes)[winners]
    counts = torch.bincount(group, minlength=len(keys)).tolist()
    return [places[:count] for (_, places), count in zip(ranked, counts, strict=True)]
