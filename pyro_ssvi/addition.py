"""Addition criteria: which inactive coordinates promise most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .active_set import ActiveSet, draw_distinct
from .exchange import top_inactive, unit_scores
from .gradient_record import GradientRecord

__all__ = ["Addition", "Gradient", "Random", "addition_criterion"]


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

    def choose(
        self, active: ActiveSet, n: int, record: GradientRecord, room: Tensor | None = None
    ) -> Tensor:
        """``n`` inactive coordinates, or tiles of them, as flat indices of ``active.units``.

        :param room: in groups that keep their number, how many of each.
        :raises FloatingPointError: if one of the ``n`` largest scores is not finite.
        """
        units = unit_scores(active, lambda a, b: self.scores(record.block(active, a, b)))
        added, scores = top_inactive(active, n, lambda a, b: self.race(units(a, b)), room=room)
        # NaN and infinity come first among the largest.
        if len(added) < n or not scores.isfinite().all():
            raise FloatingPointError("its gradient is not finite")
        return added

    def scores(self, total: Tensor) -> Tensor:
        """The scores of coordinates, of the same shape as the gradient.

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
        return scores

    def race(self, scores: Tensor) -> Tensor:
        """What is compared: the scores, or the speeds of those who race for a place."""
        if not self.sampled:
            return scores
        return scores / torch.empty_like(scores).exponential_().clamp_(min=1e-20)


@dataclass(frozen=True)
class Random:
    """Add inactive coordinates drawn uniformly, as SET does."""

    batches: int = 0

    def choose(
        self, active: ActiveSet, n: int, record: GradientRecord, room: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Gradient.choose`."""
        units = active.units
        if room is None:
            return draw_distinct(units.numel(), n, exclude=units.indices)
        cols = active.matrix_shape[1]
        return top_inactive(
            active, n, lambda a, b: torch.rand(b - a, cols, device=active.device), room=room
        )[0]


Addition = Gradient | Random
ADDITION: dict[str, Addition] = {
    "gradient": Gradient(),
    "sampled_gradient": Gradient(sampled=True),
    "random": Random(),
}


def addition_criterion(spec: str | Addition | Callable[[Tensor], Tensor]) -> Addition:
    """The criterion of this name, or the criterion itself, or a score of the gradient.

    :raises ValueError: if no criterion has this name.
    """
    if isinstance(spec, Gradient | Random):
        return spec
    if callable(spec) and not isinstance(spec, type):
        return Gradient(score=spec)
    if not isinstance(spec, str) or spec not in ADDITION:
        raise ValueError(
            f"unknown addition criterion {spec!r}; expected one of {sorted(ADDITION)}, "
            "addition.Gradient(batches=..., at=...), or a callable(gradient) -> scores"
        )
    return ADDITION[spec]
