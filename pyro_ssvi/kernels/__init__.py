"""Products with a sparse matrix: the one place that knows how they are computed.

A back end is a module with two functions of plain tensors (no autograd):

``matmul(active, values, x, transposed)``
    the site's matrix W ``[n, m]`` with ``values`` at its active entries, times ``x [m, b]``;
    its transpose times ``x [n, b]`` if ``transposed``;
``sampled(active, g, x)``
    the gradient of ``values``: ``g[i] @ x[j]`` for each active entry ``(i, j)``.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..active_set import ActiveSet
from . import csr, dense

__all__ = ["matmul", "sampled", "use"]

_BACKENDS: dict[str, ModuleType] = {"torch": csr, "dense": dense}
_choice = "auto"


class use:
    """Choose the back end: ``"torch"`` (CSR), ``"dense"``, or ``"auto"``.

    Takes effect at once; as a context manager, until the block ends::

        kernels.use("dense")
        with kernels.use("torch"):
            svi.step(x, y)

    :raises ValueError: if there is no such back end.
    """

    def __init__(self, name: str) -> None:
        global _choice
        if name != "auto" and name not in _BACKENDS:
            raise ValueError(
                f"unknown kernel back end {name!r}; expected one of {['auto', *_BACKENDS]}"
            )
        self._before, _choice = _choice, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        global _choice
        _choice = self._before


def _backend(active: ActiveSet) -> ModuleType:
    if _choice != "auto":
        return _BACKENDS[_choice]
    # torch's CSR product runs at a fifth of the dense one's rate.
    return csr if active.density < 0.2 else dense


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """The sparse matrix, or its transpose, times a dense one.

    :param values: ``[K]``.
    :param x: ``[m, b]``, or ``[n, b]`` if ``transposed``.
    :return: ``[n, b]``, or ``[m, b]`` if ``transposed``.
    """
    return _backend(active).matmul(active, values, x, transposed)


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    """``(g @ x.T)`` at the active entries only.

    :param g: ``[n, b]``.
    :param x: ``[m, b]``.
    :return: ``[K]``.
    """
    return _backend(active).sampled(active, g, x)
