"""Removal criteria: how much each active coordinate matters, as a function of q alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import ndtr

from .evidence import removal_loss

__all__ = [
    "REMOVAL",
    "Criterion",
    "abs_mean",
    "mean_abs",
    "mean_exp_abs",
    "removal_criterion",
    "snr",
    "snr_abs",
    "snr_exp_abs",
]

#: ``criterion(loc, scale) -> scores``, all of one shape; the smallest scores are removed.
Criterion = Callable[[Tensor, Tensor], Tensor]

#: Below this scale :func:`snr_exp_abs` and :func:`mean_exp_abs` are summed as a series in it.
SMALL = 1 / 32

# Every criterion takes q = Normal(mu, s), mu = loc and s = scale > 0, elementwise and in any
# shape, and returns scores of that shape for theta ~ q; see arXiv 2402.11025, "removal criteria".
# Only the order of scores counts, so where the paper's quantity ties or overflows, a strictly
# increasing function of it is returned. Float64 inside, which costs O(K) once an exchange, also
# keeps apart coordinates with one scale whose scores differ by (mu/s)^2, down to mu/s = 1e-6.


def abs_mean(loc: Tensor, scale: Tensor) -> Tensor:
    """``|mu|``: the size of the mean, in the units of theta."""
    return loc.abs()


def snr(loc: Tensor, scale: Tensor) -> Tensor:
    """``|mu| / s``: the signal-to-noise ratio of theta, a pure number."""
    return loc.abs() / scale


def snr_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """The signal-to-noise ratio of ``|theta|``, the paper's default; returned as ``|mu| / s``.

    ``SNR(|theta|) = m / sqrt(s^2 + mu^2 - m^2)`` with ``m`` from :func:`mean_abs` depends on
    ``r = |mu| / s`` alone and increases strictly in it, from 1.3236 at 0, so :func:`snr` ranks
    exactly alike. Computed as written it would not: it is flat to fourth order at ``r = 0``,
    where the candidates for removal lie, and it cancels where ``r`` is large.
    """
    return snr(loc, scale)


def mean_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """``E|theta| = mu erf(mu / (s sqrt 2)) + s sqrt(2/pi) exp(-mu^2 / (2 s^2))``.

    Returned as it is, in float64 and in the units of theta: both terms are positive.
    """
    mu, s, r = _standardise(loc, scale)
    return mu * (r / math.sqrt(2)).erf() + 2 * s * _phi(r)


def mean_exp_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """``E exp|theta|``; returned as its logarithm, in float64, since it overflows.

    ``E exp|theta| = M(1)`` with the moment generating function of ``|theta|``, ``M(l) =
    exp(l^2 s^2/2 + l mu) Phi(mu/s + l s) + exp(l^2 s^2/2 - l mu) Phi(-mu/s + l s)``.
    The logarithm is ``|mu| + s^2/2 + log1p(D)``, a sum of positive terms: the first two are
    ``log E exp(theta)``, the last is what folding at 0 adds. It keeps its relative precision
    as ``mu`` and ``s`` go to 0, where ``M(1)`` itself would round to 1.
    """
    mu, s, r = _standardise(loc, scale)
    linear, rest = _fold_series(s, r)
    lift = torch.where(s < SMALL, linear + rest, _fold(s, r))
    return mu + s.square() / 2 + lift.log1p()


def snr_exp_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """The signal-to-noise ratio of ``exp|theta|``; returned as its logarithm, in float64.

    ``SNR(exp|theta|) = M(1) / sqrt(M(2) - M(1)^2)``, with ``M`` as in :func:`mean_exp_abs`, is
    ``expm1(C)^(-1/2)`` with ``C = log M(2) - 2 log M(1) = s^2 + log1p(D_2) - 2 log1p(D_1)``.
    The exponents linear in ``mu`` are gone from ``C``, and for small ``s``, where ``C`` is of
    order ``s^2`` and ``D`` of order ``s``, the terms linear in ``s`` are cancelled by hand.
    At small ``s`` it is about ``1 / std|theta|``, which *falls* as ``|mu|`` grows.
    """
    _, s, r = _standardise(loc, scale)
    (linear, rest), (_, rest2) = _fold_series(s, r), _fold_series(2 * s, r)
    lift = linear + rest
    # D_2 - 2 D_1: the linear terms of the two differ only by their common factor, exp(-t r - ..).
    bend = 2 * linear * torch.expm1(-s * (r + 1.5 * s)) + rest2 - 2 * rest
    series = ((bend - lift.square()) / (1 + lift).square()).log1p()
    direct = _fold(2 * s, r).log1p() - 2 * _fold(s, r).log1p()
    c = s.square() + torch.where(s < SMALL, series, direct)
    return -(c + (-torch.expm1(-c)).log()) / 2


def _standardise(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``|mu|``, ``s`` and ``r = |mu| / s``, in float64."""
    mu, s = loc.double().abs(), scale.double()
    return mu, s, mu / s


def _phi(x: Tensor) -> Tensor:
    """The standard normal density."""
    return (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


def _fold(t: Tensor, r: Tensor) -> Tensor:
    """What folding adds to a normal's moment generating function, in ``[0, 1]``.

    It is the D of ``E exp(t |z + r|) = exp(t^2/2 + t r) (1 + D)``, with z standard normal.
    """
    return (-2 * t * r).exp() * ndtr(t - r) - ndtr(-t - r)


def _fold_series(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_fold` for small ``t``: the first term of its series, and the sum of the rest.

    ``D = 2 exp(-t r - t^2/2) (w_1 t + w_3 t^3/3! + w_5 t^5/5! + ..)``, in which
    ``w_n = E max(z - r, 0)^n`` obeys ``w_n = (n - 1) w_(n-2) - r w_(n-1)``.
    """
    w0 = ndtr(-r)
    w1 = _phi(r) - r * w0
    w2 = w0 - r * w1
    w3 = 2 * w1 - r * w2
    w4 = 3 * w2 - r * w3
    w5 = 4 * w3 - r * w4
    w6 = 5 * w4 - r * w5
    w7 = 6 * w5 - r * w6
    factor = 2 * (-t * (r + t / 2)).exp()
    tt = t.square()
    rest = t * tt * (w3 / 6 + tt * (w5 / 120 + tt * w7 / 5040))
    return factor * w1 * t, factor * rest


REMOVAL: dict[str, Criterion] = {
    "abs_mean": abs_mean,
    "mean_abs": mean_abs,
    "snr": snr,
    "snr_abs": snr_abs,
    "mean_exp_abs": mean_exp_abs,
    "snr_exp_abs": snr_exp_abs,
}


def removal_criterion(spec: str | Criterion) -> Callable[..., Tensor]:
    """The criterion of this name, or the callable itself.

    ``"evidence"`` is :func:`~pyro_ssvi.evidence.removal_loss`, which takes the prior's scale, too.

    :raises ValueError: if no criterion has this name.
    """
    if callable(spec):
        return spec
    if spec == "evidence":
        return removal_loss
    if not isinstance(spec, str) or spec not in REMOVAL:
        raise ValueError(
            f"unknown removal criterion {spec!r}; expected one of {sorted(REMOVAL)}, "
            "'evidence', or a callable(loc, scale) -> scores"
        )
    return REMOVAL[spec]
