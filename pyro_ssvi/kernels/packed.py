"""Whole rows or columns: their values, as they lie, are a smaller matrix, and a dense product's.

What comes in is read, and what comes out is written, at these rows or columns alone.
"""

from __future__ import annotations

from torch import Tensor

from ..active_set import ActiveSet

__all__ = ["matmul", "sampled"]


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    lines = active.lines
    assert lines is not None
    (n, m), dim = active.matrix_shape, lines.dim
    matrix = values.reshape(-1, m) if dim == 0 else values.reshape(n, -1)
    if transposed:
        matrix, n, dim = matrix.t(), m, 1 - dim
    if dim == 1:
        return matrix @ x.index_select(0, lines.numbers)
    return x.new_zeros(n, x.shape[1]).index_copy_(0, lines.numbers, matrix @ x)


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    lines = active.lines
    assert lines is not None
    if lines.dim == 0:
        g = g.index_select(0, lines.numbers)
    else:
        x = x.index_select(0, lines.numbers)
    return (g @ x.t()).flatten()
