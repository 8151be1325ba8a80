"""Scatter, then the dense operation: fastest where few coordinates are inactive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..active_set import ActiveSet
from ..patches import Patches, plain

__all__ = ["conv", "conv_input", "conv_sampled", "matmul", "sampled"]


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    matrix = active.scatter(values).reshape(active.matrix_shape)
    return (matrix.t() if transposed else matrix) @ x


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    return (g @ x.t()).flatten().index_select(0, active.indices)


def _kernel(active: ActiveSet, values: Tensor, patches: Patches) -> Tensor:
    return active.scatter(values).reshape(active.shape[0], -1, *patches.kernel)


def conv(active: ActiveSet, values: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    x = F.pad(x, patches.padding)
    weight = _kernel(active, values, patches)
    return F.conv2d(x, weight, None, patches.stride, 0, patches.dilation, groups)


def conv_input(
    active: ActiveSet,
    values: Tensor,
    g: Tensor,
    patches: Patches,
    groups: int,
    shape: tuple[int, ...],
) -> Tensor:
    left, right, top, bottom = patches.padding
    b, c, h, w = shape
    padded = (b, c, h + top + bottom, w + left + right)
    weight = _kernel(active, values, patches)
    grad = conv2d_input(padded, weight, plain(g), patches.stride, 0, patches.dilation, groups)
    return grad[:, :, top : top + h, left : left + w]


def conv_sampled(active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    x, g = plain(F.pad(x, patches.padding)), plain(g)
    shape = (active.shape[0], x.shape[1] // groups, *patches.kernel)
    grad = conv2d_weight(x, shape, g, patches.stride, 0, patches.dilation, groups)
    return grad.flatten().index_select(0, active.indices)
