"""What a sparse posterior says about inputs and coordinates: which matter, and how surely.

A *history* is a list of ``guide.active_sets``: at one time after another of a training, or at the
end of several with different seeds. Active sets never change, so they may be kept, at K indices
each::

    history = []
    for x, y in batches:
        svi.step(x, y)
        if svi.schedule.due(svi.steps):
            history.append(guide.active_sets)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .active_set import ActiveSet
from .guides import AutoSparseGuide
from .sparse_tensor import SparseTensor
from .tables import Table

__all__ = ["Effects", "Stability", "effects", "frequency", "stability"]

History = Sequence[Mapping[str, ActiveSet]]


@dataclass(frozen=True, repr=False)
class Effects(Table):
    """What each input contributes, all ``[inputs]``; print it for the largest.

    :ivar names: of the inputs.
    :ivar active: number of active weights.
    :ivar mean: posterior mean of the effect, as :func:`effects` says; 0 without active weights.
    :ivar sd: its standard deviation.
    :ivar low: lower end of its credible interval.
    :ivar high: upper end.
    :ivar level: of the interval.
    """

    names: Sequence[str]
    active: Tensor
    mean: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor
    level: float

    shown = 20
    has_total = True

    @property
    def order(self) -> Tensor:
        """The inputs with active weights, those with the largest mean effect first."""
        order = self.mean.abs().argsort(descending=True, stable=True)
        return order[self.active[order] > 0]

    def _lines(self) -> list[tuple[str, ...]]:
        order = self.order
        interval = f"{100 * self.level:g} % interval"
        lines: list[tuple[str, ...]] = [("input", "active", "mean", "sd", interval)]
        for i in order[: self.shown].tolist():
            lines.append(
                (
                    self.names[i],
                    f"{int(self.active[i]):,}",
                    f"{float(self.mean[i]):.4g}",
                    f"{float(self.sd[i]):.2g}",
                    f"{float(self.low[i]):.3g} to {float(self.high[i]):.3g}",
                )
            )
        some = f"{len(order):,} of {len(self.active):,}"
        return [*lines, (some, f"{int(self.active.sum()):,}", "", "", "")]


@torch.no_grad()
def effects(
    guide: AutoSparseGuide,
    site: str,
    *,
    dim: int | None = None,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    num_samples: int = 1000,
) -> Effects:
    """Which inputs of a layer or a regression matter::

        table = effects(guide, "w0")
        print(table)
        table.order[:10]            # the ten inputs with the largest effect

    The effect of an input with a single weight is that weight. With several, as in a layer, it is
    the root of the sum of their squares, whose posterior is estimated from draws of the active
    coordinates, in memory for ``num_samples`` numbers for each input that has active weights.
    Effects can be compared if inputs are on one scale.

    :param site: name of a real-valued site with one dimension or more.
    :param dim: dimension of the site that counts the inputs: by default the second, as torch's
        layers have it, or the only one.
    :param names: of the inputs; by default their numbers.
    :param level: of the credible interval, which leaves as much on either side.
    :param num_samples: number of draws.
    :raises ValueError: if there is no such real-valued site, or not one name for each input.
    :raises RuntimeError: if the guide has not seen data.
    """
    active_sets = guide.active_sets
    real = [each.name for each in guide.sites if each.transform is None and each.shape]
    if site not in real:
        raise ValueError(f"expected one of the real-valued sites {real}, got {site!r}")
    place, active = list(active_sets).index(site), active_sets[site]
    shape = active.shape
    dim = min(1, len(shape) - 1) if dim is None else dim
    inputs = shape[dim]
    if names is not None and len(names) != inputs:
        raise ValueError(f"expected {inputs} names, one for each input, got {len(names)}")
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level!r}")
    column = active.indices // math.prod(shape[dim:][1:]) % inputs
    count = torch.bincount(column, minlength=inputs)
    loc, scale = guide.split(*guide.marginals(*guide.flat_parameters()))[place]
    if active.numel() == inputs:
        tail = scale * math.sqrt(2) * torch.erfinv(scale.new_tensor(level))
        parts = [loc, scale, loc - tail, loc + tail]
    else:
        column, group = column.unique(return_inverse=True)
        squares = loc.new_zeros(num_samples, len(column))
        for row, draw in zip(squares, _draws(guide, place, num_samples), strict=True):
            row.index_add_(0, group, draw.square())
        norms = squares.sqrt_()
        some = norms.split(10**7 // num_samples + 1, 1)  # quantile() has a limit
        low, high = (
            torch.cat([each.quantile(q, 0) for each in some])
            for q in ((1 - level) / 2, (1 + level) / 2)
        )
        parts = [norms.mean(0), norms.std(0), low, high]
    mean, sd, low, high = (loc.new_zeros(inputs).index_copy(0, column, part) for part in parts)
    names = [str(i) for i in range(inputs)] if names is None else names
    return Effects(names, count, mean, sd, low, high, level)


def _draws(guide: AutoSparseGuide, place: int, n: int) -> Iterator[Tensor]:
    """Of a site's active coordinates, ``[K]`` each."""
    flat = guide.flat_parameters()
    if hasattr(guide, "joint"):  # coordinates are correlated
        joint = guide.joint(*flat)
        for _ in range(n):
            yield guide.split(joint.sample())[place][0]
        return
    loc, scale = guide.split(*guide.marginals(*flat))[place]
    for _ in range(n):
        yield torch.addcmul(loc, scale, torch.randn_like(loc))


def frequency(history: History, site: str) -> SparseTensor:
    """How often each coordinate was active, as a share of the history.

    :return: sparse: ``.active`` are the coordinates that were active at any time, ``.values``
        their shares, and ``.to_dense()`` is of the site's shape.
    :raises ValueError: for an empty history, or a site that is not in it.
    """
    sets = _sets(history, site)
    indices, counts = torch.cat([active.indices for active in sets]).unique(return_counts=True)
    shape = sets[0].shape
    return SparseTensor(counts / len(sets), ActiveSet(indices, shape))


def _sets(history: History, site: str) -> list[ActiveSet]:
    if not history:
        raise ValueError("the history is empty: append guide.active_sets to it")
    if site not in history[0]:
        raise ValueError(f"unknown site {site!r}; the history has {list(history[0])}")
    return [sets[site] for sets in history]


class Row(NamedTuple):
    """How a site's active set behaved.

    :ivar active: number of active coordinates, at the end.
    :ivar ever: coordinates that were active at any time.
    :ivar coverage: their share of all.
    :ivar always: coordinates that were active at all times.
    :ivar stability: 1 if all active sets are the same, 0 if they agree as random ones do.
    """

    site: str
    active: int
    ever: int
    coverage: float
    always: int
    stability: float


@dataclass(frozen=True, repr=False)
class Stability(Table):
    """How the active sets of a history agree; print it."""

    rows: tuple[Row, ...]
    times: int

    def _lines(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            ("site", "active", "ever", "coverage", f"in all {self.times}", "stability")
        ]
        for row in self.rows:
            lines.append(
                (
                    row.site,
                    f"{row.active:,}",
                    f"{row.ever:,}",
                    f"{row.coverage:.1%}",
                    f"{row.always:,}",
                    f"{row.stability:.3f}",
                )
            )
        return lines


def stability(history: History) -> Stability:
    """How much of a choice of coordinates is more than chance::

        history = [guide.active_sets]
        svi.exchange(x, y, share=0.3)
        history.append(guide.active_sets)
        stability(history[-10:])    # over the last ten exchanges

    The index is that of Nogueira, Sechidis, Brown (JMLR 18, 2018), equation 4, which corrects for
    agreement by chance. Coverage is the share of coordinates that were tried out at any time, which
    explains how good a sparse training gets (Liu, Yin, Mocanu, Pechenizkiy, ICML 2021).

    :param history: at two times or more. Dense sites are left out.
    :raises ValueError: for a shorter history.
    """
    if len(history) < 2:
        raise ValueError(f"expected a history of two times or more, got {len(history)}")
    rows = []
    for name, last in history[-1].items():
        if last.is_full:
            continue
        share = frequency(history, name)
        size, p = last.numel(), share.values.double()
        mean = float(p.sum()) / size
        disagreement = float((p * (1 - p)).sum()) / size * len(history) / (len(history) - 1)
        rows.append(
            Row(
                name,
                len(last),
                len(p),
                len(p) / size,
                int((p == 1).sum()),
                1 - disagreement / (mean * (1 - mean)),
            )
        )
    return Stability(tuple(rows), len(history))
