"""Scatter, then the dense operation: fastest where few coordinates are inactive."""

from __future__ import annotations

from torch import Tensor

from ..active_set import ActiveSet

__all__ = ["matmul", "sampled"]


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    matrix = active.scatter(values).reshape(active.matrix_shape)
    return (matrix.t() if transposed else matrix) @ x


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    return (g @ x.t()).flatten().index_select(0, active.indices)
