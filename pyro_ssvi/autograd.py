"""The ways in which a sparse value meets a dense one, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .active_set import ActiveSet
from .gradient_record import recording
from .patches import Patches
from .precision import as_it_is

__all__ = ["conv", "matmul", "mv", "rows", "scatter"]


class _Matmul(torch.autograd.Function):
    @staticmethod
    @as_it_is
    def forward(
        ctx: Any, values: Tensor, x: Tensor, active: ActiveSet, transposed: bool, record: bool
    ) -> Tensor:
        x = x.contiguous()  # once, for both passes
        ctx.save_for_backward(values, x)
        ctx.active, ctx.transposed = active, transposed
        ctx.record = recording() if record else None
        return kernels.matmul(active, values, x, transposed)

    @staticmethod
    @as_it_is
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        # W @ x has the gradient g @ x.T, W.T @ x has x @ g.T: rows first, columns second.
        rows, cols = (x, g) if ctx.transposed else (g, x)
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.record is not None:
                ctx.record.add_product(ctx.active, rows, cols)
            grad_values = kernels.sampled(ctx.active, rows, cols)
        if ctx.needs_input_grad[1]:
            grad_x = kernels.matmul(ctx.active, values, g, not ctx.transposed)
        return grad_values, grad_x, None, None, None


class _Mv(torch.autograd.Function):
    @staticmethod
    @as_it_is
    def forward(ctx: Any, values: Tensor, x: Tensor, active: ActiveSet, record: bool) -> Tensor:
        columns = x.index_select(1, active.indices)
        ctx.record = recording() if record else None
        # All of x for the record alone: a vector's product reads few of its columns.
        ctx.save_for_backward(values, columns, None if ctx.record is None else x)
        ctx.active, ctx.width = active, x.shape[1]
        return columns @ values

    @staticmethod
    @as_it_is
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, columns, x = ctx.saved_tensors
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.record is not None:
                ctx.record.add_product(ctx.active, x.t(), g.unsqueeze(0))
            grad_values = columns.t() @ g
        if ctx.needs_input_grad[1]:
            grad_x = g.new_zeros(len(g), ctx.width)
            grad_x.index_copy_(1, ctx.active.indices, torch.outer(g, values))
        return grad_values, grad_x, None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    @as_it_is
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        active: ActiveSet,
        patches: Patches,
        groups: int,
        record: bool,
    ) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.active, ctx.patches, ctx.groups = active, patches, groups
        ctx.record = recording() if record else None
        return kernels.conv(active, values, x, patches, groups)

    @staticmethod
    @as_it_is
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        how = ctx.patches, ctx.groups
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_values = kernels.conv_sampled(ctx.active, g, x, *how)
            if ctx.record is not None:
                ctx.record.add_convolution(ctx.active, g, x, *how)
        if ctx.needs_input_grad[1]:
            grad_x = kernels.conv_input(ctx.active, values, g, *how, x.shape)
        return grad_values, grad_x, None, None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, index: Tensor, active: ActiveSet, frozen: int | None
    ) -> Tensor:
        crow, col, _, (_, width) = active.csr
        start = crow.index_select(0, index).long()  # which refuses what is out of range
        count = crow.index_select(0, index + 1) - start
        owner = torch.repeat_interleave(count)
        first = count.cumsum(0) - count
        entry = torch.arange(len(owner), device=index.device) + (start - first)[owner]
        column = col[entry].long()
        ctx.save_for_backward(index, owner, entry, column)
        ctx.active, ctx.frozen, ctx.record = active, frozen, recording()
        out = values.new_zeros(len(index), width)
        return out.index_put_((owner, column), values[entry])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        index, owner, entry, column = ctx.saved_tensors
        if ctx.frozen is not None:
            g = g.masked_fill((index == ctx.frozen).unsqueeze(-1), 0.0)
        if ctx.record is not None:
            ctx.record.add_rows(ctx.active, index, g)
        grad = g.new_zeros(len(ctx.active)).index_add_(0, entry, g[owner, column])
        return grad, None, None, None


class _Scatter(torch.autograd.Function):
    """Unlike the others, this may be used within torch.func's transforms."""

    @staticmethod
    def forward(values: Tensor, active: ActiveSet) -> Tensor:
        return active.scatter(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.active, ctx.record = inputs[1], recording()

    @staticmethod
    def vmap(info: Any, in_dims: tuple, values: Tensor, active: ActiveSet) -> tuple[Tensor, int]:
        return _Scatter.apply(values.movedim(in_dims[0], 0), active), 0

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


def mv(values: Tensor, active: ActiveSet, x: Tensor, record: bool = True) -> Tensor:
    """A dense matrix times the site, which is a vector; differentiable once.

    :param values: ``[K]``.
    :param x: ``[b, m]``.
    :return: ``[b]``.
    """
    return _Mv.apply(values, x, active, record)


def conv(
    values: Tensor,
    active: ActiveSet,
    x: Tensor,
    patches: Patches,
    groups: int = 1,
    record: bool = True,
) -> Tensor:
    """A two-dimensional convolution with a sparse kernel; differentiable once.

    :param values: ``[K]``.
    :param x: ``[b, c, h, w]``.
    :return: ``[b, n, out_h, out_w]``.
    """
    return _Conv.apply(values, x, active, patches, groups, record)


def rows(values: Tensor, active: ActiveSet, index: Tensor, frozen: int | None = None) -> Tensor:
    """Rows of the site's matrix, as dense ones; differentiable once.

    :param values: ``[K]``.
    :param index: int64 ``[b]``.
    :param frozen: a row that gets no gradient.
    :return: ``[b, m]``.
    """
    return _Rows.apply(values, index, active, frozen)


def scatter(values: Tensor, active: ActiveSet) -> Tensor:
    """The dense tensor with ``values`` at the active entries and 0 elsewhere; differentiable.

    :param values: ``[*batch, K]``.
    :return: ``[*batch, *shape]``.
    """
    return _Scatter.apply(values, active)
