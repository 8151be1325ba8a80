"""Products with a sparse matrix: the one place that knows how they are computed.

A back end is a module with two functions of plain tensors (no autograd):

``matmul(active, values, x, transposed)``
    the site's matrix W ``[n, m]`` with ``values`` at its active entries, times ``x [m, b]``;
    its transpose times ``x [n, b]`` if ``transposed``;
``sampled(active, g, x)``
    the gradient of ``values``: ``g[i] @ x[j]`` for each active entry ``(i, j)``.

Convolutions have back ends of the same names, modules with three functions: ``conv``,
``conv_input`` and ``conv_sampled``, with the signatures of those here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from ..active_set import ActiveSet
from ..patches import Patches

__all__ = [
    "BACKENDS",
    "CONVOLUTIONS",
    "TILES",
    "conv",
    "conv_input",
    "conv_sampled",
    "matmul",
    "sampled",
    "use",
]

#: Name of each back end, and its module.
BACKENDS = {"numba": "numba_cpu", "torch": "csr", "dense": "dense"}
CONVOLUTIONS = {"numba": "numba_conv", "torch": "im2col", "dense": "dense"}
#: The same for active sets of whole tiles, where there are kernels that gain by them.
TILES = {"numba": "numba_tiles"}

logger = logging.getLogger(__name__)
_choice = "auto"


class use:
    """Choose the back end: ``"numba"``, ``"torch"`` (CSR), ``"dense"``, or ``"auto"``.

    Takes effect at once; as a context manager, until the block ends::

        kernels.use("dense")
        with kernels.use("torch"):
            svi.step(x, y)

    :raises ValueError: if there is no such back end.
    :raises ModuleNotFoundError: for ``"numba"``, if it is not installed.
    """

    def __init__(self, name: str) -> None:
        global _choice
        if name != "auto" and name not in BACKENDS:
            raise ValueError(
                f"unknown kernel back end {name!r}; expected one of {['auto', *BACKENDS]}"
            )
        if name != "auto":
            _module(BACKENDS[name])
        self._before, _choice = _choice, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        global _choice
        _choice = self._before


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


@functools.cache
def _has_numba() -> bool:
    found = importlib.util.find_spec("numba") is not None
    if not found:
        logger.info(
            "numba is not installed: sparse products on CPU are slower; it is in pyro-ssvi[cpu]"
        )
    return found


def _backend(active: ActiveSet, x: Tensor) -> ModuleType:
    if _choice == "auto" and active.lines is not None:
        # Measured at 5 % of 1200x1200 and 4000x4000, float32, one core with AVX-512, all three
        # products: 1.4 to 1.7 times as fast as by tiles at a batch of 128, 12 times as CSR at 4.
        return _module("packed")
    tiled = active.tile != (1, 1)
    name = _product(active, x, tiled) if _choice == "auto" else _choice
    return _module(TILES[name] if tiled and name in TILES else BACKENDS[name])


def _product(active: ActiveSet, x: Tensor, tiled: bool) -> str:
    # Measured at batch 128, float32, 2 cores with AVX2, matrices of 400x784 to 4000x4000:
    # dense products run at 130 GFLOP/s, Numba's at 30 to 50, torch's CSR at 10 to 20.
    on_cpu, usual = x.device.type == "cpu", x.dtype in (torch.float32, torch.float64)
    fast = on_cpu and usual and _has_numba()
    # Of whole tiles, with one thread, a scatter and a dense product are slower up to 0.7.
    most = (0.7 if tiled else 0.3) if fast else 0.12
    if active.density > most or (on_cpu and not usual):
        return "dense"
    # Under 8 columns a vector of the batch has nothing to work on.
    return "numba" if fast and x.shape[1] >= 8 else "torch"


def _convolution(active: ActiveSet, x: Tensor) -> ModuleType:
    name = _choice
    if name == "auto":
        # Measured on the layers of a ResNet-18 for 32x32 images, batch 32, float32, 2 cores with
        # AVX2: all three passes together are as fast as dense ones at a density of 0.25 with
        # Numba, and at 0.03 with columns of patches and torch's CSR.
        on_cpu, usual = x.device.type == "cpu", x.dtype in (torch.float32, torch.float64)
        fast = on_cpu and usual and _has_numba()
        dense = active.density > (0.25 if fast else 0.03) or (on_cpu and not usual)
        name = "dense" if dense else "numba" if fast else "torch"
    return _module(CONVOLUTIONS[name])


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """The sparse matrix, or its transpose, times a dense one.

    :param values: ``[K]``.
    :param x: ``[m, b]``, or ``[n, b]`` if ``transposed``.
    :return: ``[n, b]``, or ``[m, b]`` if ``transposed``.
    """
    return _backend(active, x).matmul(active, values, x, transposed)


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    """``(g @ x.T)`` at the active entries only.

    :param g: ``[n, b]``.
    :param x: ``[m, b]``.
    :return: ``[K]``.
    """
    return _backend(active, x).sampled(active, g, x)


def conv(active: ActiveSet, values: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    """A two-dimensional convolution with a sparse kernel.

    :param active: of a site ``[n, c / groups, kh, kw]``.
    :param values: ``[K]``.
    :param x: ``[b, c, h, w]``.
    :return: ``[b, n, out_h, out_w]``.
    """
    return _convolution(active, x).conv(active, values, x, patches, groups)


def conv_input(
    active: ActiveSet,
    values: Tensor,
    g: Tensor,
    patches: Patches,
    groups: int,
    shape: tuple[int, ...],
) -> Tensor:
    """The gradient of a convolution's input.

    :param g: ``[b, n, out_h, out_w]``.
    :param shape: of the input.
    :return: ``[b, c, h, w]``.
    """
    return _convolution(active, g).conv_input(active, values, g, patches, groups, shape)


def conv_sampled(active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    """The gradient of a convolution's kernel, at the active entries only.

    :param g: ``[b, n, out_h, out_w]``.
    :param x: ``[b, c, h, w]``.
    :return: ``[K]``.
    """
    return _convolution(active, x).conv_sampled(active, g, x, patches, groups)
