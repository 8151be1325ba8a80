"""Addition criteria: which inactive coordinates promise most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .active_set import ActiveSet, draw_distinct
from .distributions import rows_of, taken
from .evidence import addition_gain, laplace
from .exchange import read_at, top_inactive
from .gradient_record import GradientRecord
from .joint_step import squares_along

__all__ = ["Addition", "Evidence", "Gradient", "Random", "addition_criterion"]


@dataclass(frozen=True)
class Gradient:
    """Add where the loss's gradient with respect to the inactive coordinate is largest.

    This is the paper's criterion (arXiv 2402.11025, section 3.3), with the expectation under q
    estimated from draws in the last training steps, or replaced by its value at the mean.

    The largest gradients of one moment often belong to the same units and want the same thing.
    ``sampled=True`` draws the added coordinates instead, without replacement, with probabilities
    in proportion to their scores, by adding those that come first in an exponential race. That
    takes a random number for each coordinate of the site.

    :param batches: gradients are averaged over the last so many steps before an exchange.
    :param samples: and in each over so many draws; all but the step's own cost a pass each.
    :param at: ``"sample"`` takes the gradient of the training steps themselves, which costs no
        extra pass; ``"mean"`` makes an extra pass for each batch with q at its mean.
    :param score: ``score(gradient) -> scores`` of the same shape, elementwise; the largest are
        added. It sees a site's matrix by blocks of rows.
    :param sampled: draw by score, instead of taking the largest.
    """

    batches: int = 1
    samples: int = 1
    at: str = "sample"
    score: Callable[[Tensor], Tensor] = torch.abs
    sampled: bool = False

    def __post_init__(self) -> None:
        for name in ("batches", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Gradient expects {name} >= 1, got {value!r}")
        if self.at not in ("sample", "mean"):
            raise ValueError(f"Gradient expects at='sample' or at='mean', got {self.at!r}")
        if self.at == "mean" and self.samples > 1:
            raise ValueError("Gradient(at='mean') draws no samples: leave out samples=")

    def choose(self, active: ActiveSet, n: int, record: GradientRecord) -> Tensor:
        """``n`` inactive coordinates, as flat indices.

        :raises FloatingPointError: if one of the ``n`` largest scores is not finite.
        """
        added, scores = self.propose(active, n, record)
        # NaN and infinity come first among the largest.
        if len(added) < n or not scores.isfinite().all():
            raise FloatingPointError("its gradient is not finite")
        return added

    def propose(self, active: ActiveSet, n: int, record: GradientRecord) -> tuple[Tensor, Tensor]:
        """The ``n`` best inactive coordinates and their scores, to compete with other sites'."""

        def block(start: int, stop: int) -> Tensor:
            return self.scores(record.block(active, start, stop))

        return top_inactive(active, n, block)

    def read(self, active: ActiveSet, indices: Tensor, record: GradientRecord) -> Tensor:
        """The gradient's sum over batches and samples, ``[n]``, at sorted flat indices."""
        return read_at(active, indices, partial(record.block, active))

    def scores_at(
        self,
        active: ActiveSet,
        indices: Tensor,
        sums: Tensor,
        record: GradientRecord,
        processes: int = 1,
    ) -> Tensor:
        """The scores at some indices.

        :param sums: what :meth:`read` gave, or its mean over several processes.
        """
        return self.scores(sums)

    def scores(self, total: Tensor) -> Tensor:
        """What is compared, of the same shape as the gradient.

        :param total: the gradient's sum over batches and samples.
        """
        gradient = total
        if self.batches * self.samples > 1:
            gradient = total / (self.batches * self.samples)
        scores = self.score(gradient)
        if scores.shape != gradient.shape or not scores.is_floating_point():
            raise ValueError(
                f"the addition criterion gave {scores.dtype} scores of shape "
                f"{tuple(scores.shape)}, expected floats of shape {tuple(gradient.shape)}"
            )
        if self.sampled:
            times = torch.empty_like(scores).exponential_().clamp_(min=1e-20)
            scores = scores / times
        return scores


@dataclass(frozen=True)
class Random:
    """Add inactive coordinates drawn uniformly, as SET does."""

    batches: int = 0

    def choose(self, active: ActiveSet, n: int, record: GradientRecord) -> Tensor:
        """``n`` inactive coordinates, as flat indices."""
        return draw_distinct(active.numel(), n, exclude=active.indices)

    def propose(self, active: ActiveSet, n: int, record: GradientRecord) -> tuple[Tensor, Tensor]:
        """``n`` inactive coordinates, with scores that make all sites' alike to one another.

        They are the first to arrive if every inactive coordinate arrives after a time of its
        own, exponentially distributed, and a score is minus a time.
        """
        chosen = self.choose(active, n, record)
        waiting = active.numel() - len(active) - torch.arange(n, device=active.device)
        steps = torch.empty(n, dtype=torch.float64, device=active.device).exponential_() / waiting
        order = torch.randperm(n, device=active.device)  # they come sorted
        return chosen[order], -steps.cumsum(0)


@dataclass(frozen=True)
class Evidence:
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

    at: ClassVar[str] = "sample"
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.batches, int) or self.batches < 1:
            raise ValueError(f"Evidence expects batches >= 1, got {self.batches!r}")

    def choose(self, active: ActiveSet, n: int, record: GradientRecord) -> Tensor:
        """``n`` inactive coordinates, as flat indices.

        :raises FloatingPointError: if one of the ``n`` largest gains is not finite.
        """
        added, scores = self.propose(active, n, record)
        if len(added) < n or not scores.isfinite().all():
            raise FloatingPointError("its gradient is not finite")
        return added

    def propose(self, active: ActiveSet, n: int, record: GradientRecord) -> tuple[Tensor, Tensor]:
        """The ``n`` best inactive coordinates and their gains in nats."""
        return top_inactive(active, n, lambda a, b: self.gains(active, a, b, record))

    def gains(self, active: ActiveSet, start: int, stop: int, record: GradientRecord) -> Tensor:
        """The gains of these rows of the site's matrix."""
        sums = torch.stack([record.block(active, start, stop), record.squares(active, start, stop)])
        scale = rows_of(record.priors[active].normal.scale, start, stop)
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
        """The gains at some indices.

        :param sums: what :meth:`read` gave, or its mean over several processes.
        """
        scale = taken(record.priors[active].normal.scale, active.shape, indices)
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
        prior_scale = taken(record.priors[active].normal.scale, active.shape, indices)
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


Addition = Gradient | Random | Evidence
ADDITION: dict[str, Addition] = {
    "gradient": Gradient(),
    "sampled_gradient": Gradient(sampled=True),
    "random": Random(),
    "evidence": Evidence(),
}


def addition_criterion(spec: str | Addition | Callable[[Tensor], Tensor]) -> Addition:
    """The criterion of this name, or the criterion itself, or a score of the gradient.

    :raises ValueError: if no criterion has this name.
    """
    if isinstance(spec, Gradient | Random | Evidence):
        return spec
    if callable(spec) and not isinstance(spec, type):
        return Gradient(score=spec)
    if not isinstance(spec, str) or spec not in ADDITION:
        raise ValueError(
            f"unknown addition criterion {spec!r}; expected one of {sorted(ADDITION)}, "
            "addition.Gradient(batches=..., at=...), or a callable(gradient) -> scores"
        )
    return ADDITION[spec]
