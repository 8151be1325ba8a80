"""A draw of a normal with low-rank correlations, and its log density, in few passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import as_it_is

__all__ = ["low_rank_draw"]


def low_rank_draw(loc: Tensor, scale: Tensor, cov_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from ``Normal(loc, S (I + F F^T) S)``, where ``S = diag(scale)``.

    With the random numbers that Pyro's LowRankMultivariateNormal draws. A distribution that is
    given a value must find out what noise it came from; here it is known, and that saves most of
    the passes over ``F``, forwards and backwards.

    :param loc: ``[K]``, as is ``scale``.
    :param cov_factor: ``F``, ``[K, rank]``.
    :return: the draw, ``[K]``, and its log density, a number.
    """
    common = torch.randn(cov_factor.shape[1], dtype=loc.dtype, device=loc.device)
    own = torch.randn_like(loc)
    return _LowRankDraw.apply(loc, scale, cov_factor, common, own)


class _LowRankDraw(torch.autograd.Function):
    """With ``z = own + F common`` the draw is ``loc + S z``, and ``(I + F F^T)^-1 z = z - F c``,
    where ``(I + F^T F) c = F^T z``."""

    @staticmethod
    @as_it_is
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, factor: Tensor, common: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = torch.addmv(own, factor, common)
        capacitance = factor.T @ factor
        capacitance.diagonal().add_(1.0)
        root = torch.linalg.cholesky(capacitance)
        projected = factor.T @ z
        c = torch.cholesky_solve(projected.unsqueeze(-1), root).squeeze(-1)
        square = torch.dot(z, z) - torch.dot(projected, c)
        log_scales = scale.log().sum() + root.diagonal().log().sum()
        log_density = -0.5 * (square + len(z) * math.log(2 * math.pi)) - log_scales
        ctx.save_for_backward(scale, factor, common, z, root, c)
        return torch.addcmul(loc, scale, z), log_density

    @staticmethod
    @as_it_is
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        scale, factor, common, z, root, c = ctx.saved_tensors
        whitened = torch.addmv(z, factor, c, alpha=-1)
        grad_factor = factor @ (-weight * torch.cholesky_inverse(root))
        sides = (
            torch.stack([scale * grad, whitened], 1),
            torch.stack([common, weight * (c - common)]),
        )
        return grad, grad * z - weight / scale, grad_factor.addmm_(*sides), None, None
