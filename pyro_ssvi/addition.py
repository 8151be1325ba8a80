"""Addition criteria: which inactive coordinates promise most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .active_set import ActiveSet, draw_distinct
from .allocation import Proposals, Rounds, as_they_are, fill
from .distributions import rows_of, taken
from .evidence import addition_gain, laplace
from .exchange import read_at, top_inactive, unit_scores
from .gradient_record import GradientRecord
from .joint_step import squares_along

__all__ = [
    "ADDITION",
    "Addition",
    "Evidence",
    "Gradient",
    "Random",
    "addition_criterion",
    "choose_from",
    "race",
]


class Addition:
    """A criterion. Its subclasses give inactive coordinates, or tiles of them, their scores.

    One that wants gradients has :meth:`read` and :meth:`scores_at`, too, for several processes.

    :ivar batches: from how many steps before an exchange it wants gradients recorded; 0 for none.
    :ivar samples: how many draws each of them takes; all but the step's own cost a pass.
    :ivar at: ``"sample"``, or ``"mean"`` for a pass with q at its mean.
    """

    batches: int = 0
    samples: int = 1
    at: str = "sample"

    def rounds(self, n: int) -> Rounds:
        """How many of ``n`` are chosen by which function of the scores, one after the other."""
        return [(n, as_they_are)]

    def scores(self, active: ActiveSet, start: int, stop: int, record: GradientRecord) -> Tensor:
        """The scores of some rows of a site's units, single coordinates or tiles; the largest are
        added.

        :return: ``[stop - start, cols]``, of the matrix ``active.units.matrix_shape``.
        """
        raise NotImplementedError

    def propose(
        self,
        active: ActiveSet,
        rounds: Rounds,
        record: GradientRecord,
        room: Tensor | None = None,
    ) -> Proposals:
        """The best inactive units of a site, for each round, as
        :func:`pyro_ssvi.exchange.top_inactive` gives them.

        :param room: in groups that keep their number, how many of each, as
            :func:`pyro_ssvi.exchange.room` has it.
        """
        cols = active.units.matrix_shape[1]

        def scores(start: int, stop: int) -> Tensor:
            return _checked(self.scores(active, start, stop, record), (stop - start, cols))

        return top_inactive(active, rounds, scores, room=room)

    def read(self, active: ActiveSet, indices: Tensor, record: GradientRecord) -> Tensor:
        """What scores are computed from, at sorted flat indices of coordinates: sums that processes
        average, ``[..., n]``."""
        raise NotImplementedError

    def scores_at(
        self,
        active: ActiveSet,
        indices: Tensor,
        sums: Tensor,
        record: GradientRecord,
        processes: int = 1,
    ) -> Tensor:
        """The scores of coordinates, ``[n]``.

        :param sums: what :meth:`read` gave, or its mean over several processes.
        """
        raise NotImplementedError


def _checked(scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    if scores.shape != shape or not scores.is_floating_point():
        raise ValueError(
            f"the addition criterion gave {scores.dtype} scores of shape {tuple(scores.shape)}, "
            f"expected floats of shape {tuple(shape)}"
        )
    return scores


def choose_from(
    criterion: Addition,
    n: int,
    propose: Callable[[Rounds], Proposals],
    room: Tensor | None = None,
) -> Tensor:
    """``n`` inactive units of one site, as flat indices.

    :param propose: gives the best for some rounds, as :meth:`Addition.propose`.
    :param room: as there.
    :raises FloatingPointError: if one of the ``n`` largest scores is not finite.
    """
    rounds = criterion.rounds(n)
    if room is not None and len(rounds) > 1:
        rounds = [(n, as_they_are)]  # what one round leaves of a group is too little for another
    return fill(rounds, lambda _, wanted: propose(wanted), [0], [n])[0]


@dataclass(frozen=True)
class Gradient(Addition):
    """Add where the loss's gradient with respect to the inactive coordinate is largest.

    This is the paper's criterion (arXiv 2402.11025, section 3.3), with the expectation under q
    estimated from draws in the last training steps, or replaced by its value at the mean.

    The largest gradients of one moment often belong to the same units and want the same thing.
    ``sampled`` is the share of the added coordinates that is drawn instead, from all the others,
    without replacement, with probabilities in proportion to their scores: those that come first
    in an exponential race. That takes a random number for each coordinate of the site.

    :param batches: gradients are averaged over the last so many steps before an exchange.
    :param samples: and in each over so many draws; all but the step's own cost a pass each.
    :param at: ``"sample"`` takes the gradient of the training steps themselves, which costs no
        extra pass; ``"mean"`` makes an extra pass for each batch with q at its mean.
    :param score: ``score(gradient) -> scores`` of the same shape, elementwise; the largest are
        added. It sees a site's matrix by blocks of rows.
    :param sampled: share that is drawn by score, rounded down; the rest are the largest. With a
        structure of :class:`~pyro_ssvi.structures.NM` all are the largest, if not all are drawn.
    """

    batches: int = 1
    samples: int = 1
    at: str = "sample"
    score: Callable[[Tensor], Tensor] = torch.abs
    sampled: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batches", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Gradient expects {name} >= 1, got {value!r}")
        if not 0 <= self.sampled <= 1:
            raise ValueError(f"Gradient expects sampled in [0, 1], got {self.sampled!r}")
        if self.at not in ("sample", "mean"):
            raise ValueError(f"Gradient expects at='sample' or at='mean', got {self.at!r}")
        if self.at == "mean" and self.samples > 1:
            raise ValueError("Gradient(at='mean') draws no samples: leave out samples=")

    def rounds(self, n: int) -> Rounds:
        drawn = math.floor(self.sampled * n)
        rounds: Rounds = [(n - drawn, as_they_are), (drawn, race)]
        return [each for each in rounds if each[0]] or rounds[:1]

    def scores(self, active: ActiveSet, start: int, stop: int, record: GradientRecord) -> Tensor:
        units = unit_scores(active, lambda a, b: self._of(record.block(active, a, b)))
        return units(start, stop)

    def read(self, active: ActiveSet, indices: Tensor, record: GradientRecord) -> Tensor:
        """The gradient's sum over batches and samples, ``[n]``."""
        return read_at(active, indices, partial(record.block, active))

    def scores_at(
        self,
        active: ActiveSet,
        indices: Tensor,
        sums: Tensor,
        record: GradientRecord,
        processes: int = 1,
    ) -> Tensor:
        return self._of(sums)

    def _of(self, total: Tensor) -> Tensor:
        """The scores of coordinates, of the same shape as the gradient.

        :param total: the gradient's sum over batches and samples.
        """
        gradient = total
        if self.batches * self.samples > 1:
            gradient = total / (self.batches * self.samples)
        return _checked(self.score(gradient), gradient.shape)


def race(scores: Tensor) -> Tensor:
    """Speeds of an exponential race: the first ``n`` are ``n`` draws in proportion to scores.

    Scores of 0 come last, in an order that is drawn as well.
    """
    # Half precision has no such small times. Logarithms of uniform numbers, of 24 bits, take a
    # fifth of the time of exponential_() on CPU.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    times = torch.empty_like(scores, dtype=dtype).uniform_().log_().neg_()
    least = 32 * torch.finfo(dtype).tiny  # by a time, which is 17 at most, it is no subnormal
    return scores.to(dtype).add(least).div_(times.clamp_(min=2.0**-25))


@dataclass(frozen=True)
class Random(Addition):
    """Add inactive coordinates drawn uniformly, as SET does."""

    def scores(self, active: ActiveSet, start: int, stop: int, record: GradientRecord) -> Tensor:
        return torch.rand(stop - start, active.units.matrix_shape[1], device=active.device)

    def propose(
        self,
        active: ActiveSet,
        rounds: Rounds,
        record: GradientRecord,
        room: Tensor | None = None,
    ) -> Proposals:
        if room is not None:
            return super().propose(active, rounds, record, room)
        return [self._first_to_arrive(active.units, m) for m, _ in rounds]

    def _first_to_arrive(self, units: ActiveSet, m: int) -> tuple[Tensor, Tensor]:
        """Some units, without a look at the others."""
        chosen = draw_distinct(units.numel(), m, exclude=units.indices)
        # Scores that make those of all sites alike: every inactive unit arrives after a time of
        # its own, exponentially distributed, and these are the first to arrive.
        waiting = units.numel() - len(units) - torch.arange(m, device=units.device)
        steps = torch.empty(m, dtype=torch.float64, device=units.device).exponential_() / waiting
        order = torch.randperm(m, device=units.device)  # they come sorted
        return chosen[order], -steps.cumsum(0)


@dataclass(frozen=True)
class Evidence(Addition):
    """Add where the log evidence would grow most, beyond the paper: see
    :func:`~pyro_ssvi.evidence.addition_gain`.

    New coordinates do not start at loc 0, but on their way to where the parabolas that the gains
    are computed from have their posteriors, as far as is best for all of them together. A
    curvature is the sum of the squares of the examples' gradients, the empirical Fisher
    information. What of a squared gradient is due to the choice of the batches is subtracted.
    The price: sites have normal priors around 0, the loss one particle, and the memory is that of
    as many batches' activations.

    :param batches: gradients and curvatures are averaged over the last so many steps.
    """

    batches: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.batches, int) or self.batches < 1:
            raise ValueError(f"Evidence expects batches >= 1, got {self.batches!r}")

    def scores(self, active: ActiveSet, start: int, stop: int, record: GradientRecord) -> Tensor:
        """The gains in nats of these rows of the site's matrix."""
        sums = torch.stack([record.block(active, start, stop), record.squares(active, start, stop)])
        scale = rows_of(record.priors[active].scale, start, stop)
        return addition_gain(*self.parabola(active, sums, record), scale)

    def read(self, active: ActiveSet, indices: Tensor, record: GradientRecord) -> Tensor:
        """The sums of gradients and of their squares, ``[2, n]``, at sorted flat indices."""
        parts = (partial(record.block, active), partial(record.squares, active))
        return torch.stack([read_at(active, indices, part) for part in parts])

    def scores_at(
        self,
        active: ActiveSet,
        indices: Tensor,
        sums: Tensor,
        record: GradientRecord,
        processes: int = 1,
    ) -> Tensor:
        """The gains at some indices."""
        scale = taken(record.priors[active].scale, active.shape, indices)
        return addition_gain(*self.parabola(active, sums, record, processes), scale)

    def first_values(
        self,
        active: ActiveSet,
        indices: Tensor,
        sums: Tensor,
        record: GradientRecord,
        processes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Location and scale of new coordinates; arguments as for :meth:`scores_at`.

        Each has its :func:`~pyro_ssvi.evidence.laplace` values, but that all go only as far as is
        best for all of them together: many want the same thing, and would overshoot.
        """
        prior_scale = taken(record.priors[active].scale, active.shape, indices)
        gradient, curvature = self.parabola(active, sums, record, processes)
        loc, scale = laplace(gradient, curvature, prior_scale)
        # The parabola along loc, with the curvature that the examples' gradients have along it.
        along = torch.stack([sums[0].new_zeros(()), squares_along(record, active, indices, loc)])
        _, resistance = self.parabola(active, along, record)
        resistance = resistance + (loc / prior_scale).square().sum()
        pull = torch.dot(gradient, loc)
        return loc * (pull / resistance).nan_to_num().clamp(max=1), scale

    def parabola(
        self, active: ActiveSet, sums: Tensor, record: GradientRecord, processes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Gradient and curvature of the log likelihood of all data at 0.

        With ``m`` batches, in each of which an example stands for ``s`` and has the gradient
        ``s g_i``, gradients add up to ``m g``, and their squares to ``m s h``. The latter are
        also ``m^2`` times the variance of ``g`` as estimated, but for the share of all data that
        was seen, ``m / s``. If the loss has ``weight`` times the prior's log density, all of it
        is taken ``1 / weight`` times: the likelihood is tempered.

        :param sums: as :meth:`read` gives them, of any shape ``[2, ...]``.
        """
        weight = record.priors[active].weight
        m = len(record.scales)
        stands_for = sum(record.scales) / m / weight
        gradient, squares = -sums[0] / (m * weight), sums[1] / (m * weight**2)
        m *= processes
        noise = squares * (max(1 - m / stands_for, 0) / m)
        gradient = gradient.sign() * (gradient.square() - noise).clamp(min=0).sqrt()
        return gradient, squares / stands_for


ADDITION: dict[str, Addition] = {
    "gradient": Gradient(),
    "sampled_gradient": Gradient(sampled=1.0),
    "mixed_gradient": Gradient(sampled=0.75),
    "random": Random(),
    "evidence": Evidence(),
}


def addition_criterion(spec: str | Addition | Callable[[Tensor], Tensor]) -> Addition:
    """The criterion of this name, or the criterion itself, or a score of the gradient.

    :raises ValueError: if no criterion has this name.
    """
    if isinstance(spec, Addition):
        return spec
    if callable(spec) and not isinstance(spec, type):
        return Gradient(score=spec)
    if not isinstance(spec, str) or spec not in ADDITION:
        raise ValueError(
            f"unknown addition criterion {spec!r}; expected one of {sorted(ADDITION)}, "
            "addition.Gradient(batches=..., at=...), or a callable(gradient) -> scores"
        )
    return ADDITION[spec]
