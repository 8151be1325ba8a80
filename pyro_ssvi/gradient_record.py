"""The gradient of whole sites, inactive coordinates too, for the few steps that need it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar, Token

import torch
from torch import Tensor

from .active_set import ActiveSet
from .patches import Patches

__all__ = ["GradientRecord", "recording"]

_CURRENT: ContextVar[GradientRecord | None] = ContextVar("gradient_record", default=None)


def recording() -> GradientRecord | None:
    """The record that is open now, if any.

    Read in a forward pass and handed to its backward pass, which may run in another thread.
    """
    return _CURRENT.get()


class GradientRecord:
    """Collects the loss's gradient with respect to every coordinate of each sparse value.

    A product ``W @ x`` has the gradient ``g @ x.T``: the record keeps the two factors, of the
    size of the layer's activations, and multiplies them out only block by block of rows as an
    exchange reads them. Gradients add up over uses of a value and over backward passes::

        with GradientRecord() as record:
            loss.backward()
        record.block(active, 0, 10)
    """

    def __init__(self) -> None:
        self._parts: defaultdict[ActiveSet, list[Callable[[int, int], Tensor]]]
        self._parts = defaultdict(list)
        self._token: Token | None = None

    def __enter__(self) -> GradientRecord:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def add_product(self, active: ActiveSet, g: Tensor, x: Tensor) -> None:
        """Add ``g @ x.T`` with ``g [rows, b]`` and ``x [cols, b]``."""
        g, x = g.detach(), x.detach()
        self._parts[active].append(lambda start, stop: g[start:stop] @ x.t())

    def add_convolution(
        self, active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int
    ) -> None:
        """Add the gradient of a convolution's kernel.

        :param g: ``[b, n, out_h, out_w]``.
        :param x: ``[b, c, h, w]``.
        """
        g, x = g.detach(), x.detach()

        def block(start: int, stop: int) -> Tensor:
            # The output channels of the block, in as many groups as they come from.
            per_group = active.shape[0] // groups
            parts = []
            while start < stop:
                group = start // per_group
                end = min(stop, (group + 1) * per_group)
                images = x.chunk(groups, 1)[group]
                parts.append(patches.kernel_gradient(images, g[:, start:end]).flatten(1))
                start = end
            return torch.cat(parts)

        self._parts[active].append(block)

    def add_rows(self, active: ActiveSet, index: Tensor, g: Tensor) -> None:
        """Add each row of ``g [b, cols]`` to the row of the site that ``index [b]`` names."""
        index, g = index.detach(), g.detach()

        def block(start: int, stop: int) -> Tensor:
            # One row more, for the indices outside of the block.
            place = (index - start).where((index >= start) & (index < stop), stop - start)
            return g.new_zeros(stop - start + 1, g.shape[1]).index_add_(0, place, g)[:-1]

        self._parts[active].append(block)

    def add_dense(self, active: ActiveSet, grad: Tensor) -> None:
        """Add a gradient ``[*batch, *shape]``, summed over ``batch``."""
        total = grad.detach().reshape(-1, *active.matrix_shape).sum(0)
        self._parts[active].append(lambda start, stop: total[start:stop])

    def __contains__(self, active: ActiveSet) -> bool:
        return active in self._parts

    def block(self, active: ActiveSet, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the gradient as a matrix of ``active.matrix_shape``."""
        first, *others = self._parts[active]
        total = first(start, stop)
        for part in others:
            total = total + part(start, stop)
        return total
