"""Allocation: whether each site keeps its number of active coordinates, or all compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ALLOCATIONS",
    "FLOOR",
    "Compare",
    "Proposals",
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
    least, most = [0] * len(rooms), [room.removable for room in rooms]
    return largest([-scores for scores in removal], n, least, most, n)


#: A function of scores; the largest results are chosen.
Compare = Callable[[Tensor], Tensor]
#: How many are chosen by which function, one round after the other.
Rounds = list[tuple[int, Compare]]
#: For each round the indices of the best, and their compared scores.
Proposals = list[tuple[Tensor, Tensor]]


def as_they_are(scores: Tensor) -> Tensor:
    return scores


def fill(
    rounds: Rounds,
    propose: Callable[[int, Rounds], Proposals],
    least: Sequence[int],
    most: Sequence[int],
) -> list[Tensor]:
    """The best of several pools together, round by round.

    :param rounds: how many are chosen by which function of their scores.
    :param propose: ``propose(i, wanted)`` gives the best of pool ``i`` for all rounds at once: for
        each ``m, compare`` in ``wanted`` the indices and compared scores of the ``m`` best.
    :param least: how many of each pool are chosen at least.
    :param most: and how many at most.
    :return: the indices chosen of each pool.
    :raises FloatingPointError: if one of the largest scores is not finite.
    """
    # So many that enough are left when those that rounds before have chosen are gone.
    sums = list(accumulate(n for n, _ in rounds))
    wanted = [(n, compare) for n, (_, compare) in zip(sums, rounds, strict=True)]
    proposals = [
        propose(i, [(min(n, cap), compare) for n, compare in wanted]) for i, cap in enumerate(most)
    ]
    chosen: list[Tensor] = []
    for (n, _), total, *pools in zip(rounds, sums, *proposals, strict=True):
        have = [len(each) for each in chosen] or [0] * len(most)
        need = [max(0, low - k) for low, k in zip(least, have, strict=True)]
        free = [cap - k for cap, k in zip(most, have, strict=True)]
        left = sums[-1] - total + n
        scores = [
            score.masked_fill(torch.isin(indices, chosen[i]), -math.inf) if chosen else score
            for i, (indices, score) in enumerate(pools)
        ]
        places = largest(scores, n, need, free, left - sum(need))
        finite = all(score[p].isfinite().all() for score, p in zip(scores, places, strict=True))
        if not finite or sum(map(len, places)) < n:
            raise FloatingPointError("its gradient is not finite")
        new = [indices[p] for (indices, _), p in zip(pools, places, strict=True)]
        chosen = [torch.cat(pair) for pair in zip(chosen, new, strict=True)] if chosen else new
    return chosen


def largest(
    scores: Sequence[Tensor], n: int, least: Sequence[int], most: Sequence[int], spare: int
) -> list[Tensor]:
    """The places of the ``n`` largest scores of several groups together, or of all there are.

    :param scores: of each group, 1-d. NaN counts as the largest.
    :param least: how many each group is to have, whatever the others have.
    :param most: how many of each group are taken at most.
    :param spare: how many are taken at most beyond what groups are to have. If it is ``n`` less
        the sum of ``least``, they all get that now; if it is more, later choices see to the rest.
    :return: the places in each group.
    """
    ranked = [part.topk(min(cap, n, len(part))) for part, cap in zip(scores, most, strict=True)]
    sizes = [len(values) for values, _ in ranked]
    device = scores[0].device
    keys = torch.cat([values.double() for values, _ in ranked])
    ranks = torch.cat([torch.arange(size, device=device) for size in sizes])
    group = torch.repeat_interleave(torch.tensor(sizes, device=device))
    needed = ranks < torch.tensor(least, device=device)[group]
    others = top(keys, needed.logical_not().nonzero().squeeze(-1), spare)
    winners = top(keys, torch.cat([needed.nonzero().squeeze(-1), others]), n)
    counts = torch.bincount(group[winners], minlength=len(sizes)).tolist()
    return [places[:count] for (_, places), count in zip(ranked, counts, strict=True)]


def top(keys: Tensor, places: Tensor, n: int) -> Tensor:
    """Those of some places, all of them if there are no more, that have the ``n`` largest keys."""
    return places[keys[places].topk(min(n, len(places)), sorted=False).indices]
