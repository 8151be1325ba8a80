"""Convolutions as CSR products with columns of patches: as many times the input as taps."""

from __future__ import annotations

from torch import Tensor

from ..active_set import ActiveSet
from ..patches import Patches
from . import csr

__all__ = ["conv", "conv_input", "conv_sampled"]


def conv(active: ActiveSet, values: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    out = csr.matmul(active.block_diagonal(groups), values, patches.columns(x), False)
    height, width = patches.out_size((x.shape[2], x.shape[3]))
    return out.view(active.shape[0], len(x), height, width).transpose(0, 1)


def conv_input(
    active: ActiveSet,
    values: Tensor,
    g: Tensor,
    patches: Patches,
    groups: int,
    shape: tuple[int, ...],
) -> Tensor:
    g = g.transpose(0, 1).flatten(1)
    columns = csr.matmul(active.block_diagonal(groups), values, g, True)
    return patches.images(columns, shape)


def conv_sampled(active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    g = g.transpose(0, 1).flatten(1)
    return csr.sampled(active.block_diagonal(groups), g, patches.columns(x))
