"""How far new coordinates go together, each of which could go some way alone."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, kernels
from .active_set import ActiveSet
from .gradient_record import Convolution, GradientRecord, Part, Product, Rows
from .patches import Patches
from .precision import as_it_is

__all__ = ["squares_along"]


@torch.no_grad()
@as_it_is
def squares_along(
    record: GradientRecord, active: ActiveSet, indices: Tensor, direction: Tensor
) -> Tensor:
    """The sum over examples of the squares of their gradients along a direction, a number.

    For one coordinate, and 1 in its direction, it is what :meth:`GradientRecord.squares` has.

    :param indices: sorted flat indices in the site, ``[n]``.
    :param direction: ``[n]``.
    :raises ValueError: if examples cannot be told apart.
    """
    moved = ActiveSet(indices, active.shape)
    slopes = [_slopes(part, moved, direction) for part in record.parts_of(active)]
    return torch.stack([each.square().sum() for each in slopes]).sum()


def _slopes(part: Part, moved: ActiveSet, direction: Tensor) -> Tensor:
    """The gradient of each example along a direction."""
    if isinstance(part, Product):
        x = part.x.contiguous()
        return (kernels.matmul(moved, direction.to(x), x, transposed=False) * part.g).sum(0)
    if isinstance(part, Convolution):
        patches = Patches(*part.patches)
        out = kernels.conv(moved, direction.to(part.x), part.x, patches, part.groups)
        return (out * part.g).flatten(1).sum(-1)
    if isinstance(part, Rows):
        return (autograd.rows(direction.to(part.g), moved, part.place) * part.g).sum(-1)
    return part.squares(0, 1)  # which says why not
