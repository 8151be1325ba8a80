"""The gradient of whole sites, inactive coordinates too, for the few steps that need it."""

from __future__ import annotations

from collections import defaultdict
from contextvars import ContextVar, Token

from torch import Tensor

from .active_set import ActiveSet

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
        self._factors: defaultdict[ActiveSet, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._dense: dict[ActiveSet, Tensor] = {}
        self._token: Token | None = None

    def __enter__(self) -> GradientRecord:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def add_product(self, active: ActiveSet, g: Tensor, x: Tensor) -> None:
        """Add ``g @ x.T`` with ``g [rows, b]`` and ``x [cols, b]``."""
        self._factors[active].append((g.detach(), x.detach()))

    def add_dense(self, active: ActiveSet, grad: Tensor) -> None:
        """Add a gradient ``[*batch, *shape]``, summed over ``batch``."""
        grad = grad.detach().reshape(-1, *active.matrix_shape).sum(0)
        seen = self._dense.get(active)
        self._dense[active] = grad if seen is None else seen + grad

    def __contains__(self, active: ActiveSet) -> bool:
        return active in self._factors or active in self._dense

    def block(self, active: ActiveSet, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the gradient as a matrix of ``active.matrix_shape``."""
        parts = [g[start:stop] @ x.t() for g, x in self._factors.get(active, ())]
        if active in self._dense:
            parts.append(self._dense[active][start:stop])
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
