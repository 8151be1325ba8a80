"""Allocation: whether each site keeps its number of active coordinates, or all compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ALLOCATIONS",
    "FLOOR",
    "Compare",
    "Room",
    "Rounds",
    "as_they_are",
    "check_allocation",
    "depart",
    "fill",
    "largest",
]

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


def depart(rooms: Sequence[Room], removal: Sequence[Tensor], share: float) -> list[Tensor]:
    """Those that go, of a share of all sites' active coordinates: as many as can be replaced.

    :param rooms: of each site.
    :param removal: the scores of each site's active coordinates; the smallest go.
    :return: places among each site's active coordinates; no sites if none can go.
    """
    n = min(
        math.floor(share * sum(room.k for room in rooms) + 0.5),
        sum(room.removable for room in rooms),
        sum(room.numel - 1 - room.k for room in rooms),
    )
    if n <= 0:
        return []
    none = [0] * len(rooms)
    return largest([-scores for scores in removal], n, none, [room.removable for room in rooms])


#: A function of scores; the largest results are chosen.
Compare = Callable[[Tensor], Tensor]
#: How many are chosen by which function, one round after the other.
Rounds = list[tuple[int, Compare]]


def as_they_are(scores: Tensor) -> Tensor:
    return scores


def fill(
    rounds: Rounds,
    propose: Callable[[int, int, Compare], tuple[Tensor, Tensor]],
    least: Sequence[int],
    most: Sequence[int],
) -> list[Tensor]:
    """The best of several pools together, round by round.

    :param rounds: how many are chosen by which function of their scores.
    :param propose: ``propose(i, m, compare)`` gives the ``m`` best of pool ``i``, as indices and
        compared scores; the largest are chosen.
    :param least: how many of each pool are chosen at least.
    :param most: and how many at most.
    :return: the indices chosen of each pool.
    :raises FloatingPointError: if one of the largest scores is not finite.
    """
    chosen: list[Tensor] = []
    for last, (n, compare) in enumerate(rounds, start=1 - len(rounds)):
        have = [len(each) for each in chosen] or [0] * len(most)
        free = [cap - k for cap, k in zip(most, have, strict=True)]
        need = [0 if last else max(0, low - k) for low, k in zip(least, have, strict=True)]
        # So many that enough are left when those that are chosen already have gone.
        pools = [
            propose(i, min(n, cap) + k, compare)
            for i, (cap, k) in enumerate(zip(free, have, strict=True))
        ]
        scores = [
            score.masked_fill(torch.isin(indices, chosen[i]), -math.inf) if chosen else score
            for i, (indices, score) in enumerate(pools)
        ]
        places = largest(scores, n, need, free)
        if not all(score[p].isfinite().all() for score, p in zip(scores, places, strict=True)):
            raise FloatingPointError("its gradient is not finite")
        new = [indices[p] for (indices, _), p in zip(pools, places, strict=True)]
        chosen = [torch.cat(pair) for pair in zip(chosen, new, strict=True)] if chosen else new
    return chosen


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
