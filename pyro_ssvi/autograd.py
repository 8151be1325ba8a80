"""The two ways in which a sparse value meets a dense one, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .active_set import ActiveSet
from .gradient_record import recording

__all__ = ["matmul", "scatter"]


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, active: ActiveSet, transposed: bool, record: bool
    ) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.active, ctx.transposed = active, transposed
        ctx.record = recording() if record else None
        return kernels.matmul(active, values, x, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        # W @ x has the gradient g @ x.T, W.T @ x has x @ g.T: rows first, columns second.
        rows, cols = (x, g) if ctx.transposed else (g, x)
        if ctx.record is not None:
            ctx.record.add_product(ctx.active, rows, cols)
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_values = kernels.sampled(ctx.active, rows, cols)
        if ctx.needs_input_grad[1]:
            grad_x = kernels.matmul(ctx.active, values, g, not ctx.transposed)
        return grad_values, grad_x, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, active: ActiveSet) -> Tensor:
        ctx.active, ctx.record = active, recording()
        return active.scatter(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.record is not None:
            ctx.record.add_dense(ctx.active, g)
        return ctx.active.gather(g), None


def matmul(
    values: Tensor, active: ActiveSet, x: Tensor, transposed: bool = False, record: bool = True
) -> Tensor:
    """The site's matrix, or its transpose, times a dense one; differentiable once.

    :param values: ``[K]``.
    :param x: ``[m, b]``, or ``[n, b]`` if ``transposed``.
    :param record: whether an open :class:`GradientRecord` should hear of the gradient.
    :return: ``[n, b]``, or ``[m, b]`` if ``transposed``.
    """
    return _Matmul.apply(values, x, active, transposed, record)


def scatter(values: Tensor, active: ActiveSet) -> Tensor:
    """The dense tensor with ``values`` at the active entries and 0 elsewhere; differentiable.

    :param values: ``[*batch, K]``.
    :return: ``[*batch, *shape]``.
    """
    return _Scatter.apply(values, active)
