"""The change of the log evidence by one coordinate more, or less; all in nats.

Of a coordinate the posterior is taken to be ``N(mu, s^2)``, the prior is ``N(0, t^2)``, and the
log likelihood of all data is a parabola in it, with gradient ``g`` and curvature ``h`` at 0. Then
what is said here is exact. Removal and addition are one scale: a coordinate that is added, at
:func:`laplace`, and then removed, changes the evidence by 0 in all.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["addition_gain", "laplace", "removal_gain", "removal_loss"]


def removal_gain(loc: Tensor, scale: Tensor, prior_scale: Tensor) -> Tensor:
    """The change of the log evidence if an active coordinate is removed.

    It is ``ln(t/s) - mu^2 / (2 s^2)``, the log of the ratio of posterior and prior density at 0
    (Savage and Dickey).

    :param loc: ``mu``.
    :param scale: ``s``, of the same shape.
    :param prior_scale: ``t``, of this shape or one that broadcasts to it.
    :return: in nats; where it is positive, the data do not pay for the coordinate.
    """
    return prior_scale.log() - scale.log() - 0.5 * (loc / scale).square()


def removal_loss(loc: Tensor, scale: Tensor, prior_scale: Tensor) -> Tensor:
    """``-removal_gain``: as a score, of which the smallest are removed."""
    return -removal_gain(loc, scale, prior_scale)


def addition_gain(gradient: Tensor, curvature: Tensor, prior_scale: Tensor) -> Tensor:
    """The change of the log evidence if an inactive coordinate is added.

    It is ``(t^2 g^2 / (1 + t^2 h) - ln(1 + t^2 h)) / 2``.

    :param gradient: ``g``, of the log likelihood of all data at 0.
    :param curvature: ``h``, minus its second derivative, not negative.
    :param prior_scale: ``t``.
    :return: in nats; where it is positive, the data pay for the coordinate.
    """
    shrinkage = prior_scale.square() * curvature
    pull = (prior_scale * gradient).square() / (1 + shrinkage)
    return 0.5 * (pull - shrinkage.log1p())


def laplace(gradient: Tensor, curvature: Tensor, prior_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of an added coordinate.

    They are ``mu = t^2 g / (1 + t^2 h)`` and ``s`` with ``s^2 = t^2 / (1 + t^2 h)``.
    Arguments are as for :func:`addition_gain`.
    """
    shrinkage = 1 + prior_scale.square() * curvature
    return prior_scale.square() * gradient / shrinkage, prior_scale * shrinkage.rsqrt()
