"""Sparse products on CPU, compiled by Numba for the machine that runs them.

*Layout.* The batch is contiguous, and a tile of it stays in vector registers while the entries
of a row pass by: an entry costs one load of ``x``, one multiply-add, and no store. Left to Numba's
own vectoriser the running sum is kept in memory, at half the speed.

*Threads.* The kernels run on torch's own OpenMP threads. Numba's ``prange`` would bring a second
pool: two OpenMP pools on the same cores wait for each other (a 40 us step took 15 ms), its
"omp" layer ends a forked process, its "workqueue" layer ends one that calls from two threads.
Python threads are safe, but start in 50 us rather than 3. ``GOMP_parallel`` is exported by GNU's,
LLVM's and Intel's OpenMP; without it (Windows), and in a forked child, kernels run on one thread.

Code is compiled when first needed, for each dtype and width of tile, and kept on disk.
"""

# mypy: allow-untyped-defs
# (Numba finds the types of what it compiles.)

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor
from torch.nn import functional as F

from ..active_set import CSR, ActiveSet
from .numba_vectors import at, axpy, dot, load, prefetch, store, take, zeros

__all__ = [
    "DTYPES",
    "LONG",
    "batch_inner",
    "check",
    "compiled",
    "launch",
    "matmul",
    "num_threads",
    "panel",
    "sampled",
]

DTYPES = {torch.float32: types.float32, torch.float64: types.float64}

_SERIAL_FLOPS = 400_000  # on one thread this takes as long as waking the others
_AHEAD = 8  # entries between a prefetch and its use
_MATMUL_BYTES = 256  # of a tile: 8 AVX registers hold its sum, 8 can load
_SAMPLED_BYTES = 512
_SHARE = 8  # tasks for each thread: one that is held up leaves more to the others
LONG = 128  # batch for each thread above which it is divided rather than the rows
_INT32 = types.int32
_Job = ctypes.c_int64 * 16

logger = logging.getLogger(__name__)


def _openmp() -> Any:
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        logger.info("torch's OpenMP library was not found: sparse kernels use one thread")
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


_parallel = _openmp()


def _after_fork() -> None:
    global _parallel
    _parallel = None  # a forked child has none of the pool's threads, and would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Kernels. A task is one block of rows, and one tile or range of tiles of the batch.


def compiled(body: Any) -> Any:
    """Compile a kernel: a function of the address of its job, see :func:`launch`."""
    kernel = cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")(body)
    if not kernel.cache_hits:
        name = body.__qualname__.split(".")[0].strip("_")
        logger.info("compiled %s for this machine, once", name)
    return kernel


@njit(error_model="numpy")
def panel(x, j, zero, width):
    """One tile of each row, side by side: more than twice as fast to read, at a batch of 8192.

    Rows that lie a multiple of a page apart compete for a few sets of the cache.
    """
    panel = np.empty((len(x), width), x.dtype)
    for i in range(len(x)):
        store(load(zero, x, i, j), panel, i, 0)
    return panel


@functools.cache
def _matmul_kernel(dtype: types.Float, width: int) -> Any:
    @compiled
    def kernel(job):
        n, m, k, b = job[1], job[2], job[3], job[4]
        row_blocks, batch_blocks, pack = job[5], job[6], job[7]
        crow, col = carray(at(job[8], _INT32), n + 1), carray(at(job[9], _INT32), k)
        values, x = carray(at(job[10], dtype), k), carray(at(job[12], dtype), (m, job[13]))
        y = carray(at(job[14], dtype), (n, b))
        zero = zeros(dtype, width)
        task = take(job)
        while task < row_blocks * batch_blocks:
            tile, block = task // row_blocks, task % row_blocks
            j = min(tile * width, b - width)  # the last tile may repeat some columns
            source, start = (panel(x, j, zero, width), 0) if pack else (x, j)
            for i in range(n * block // row_blocks, n * (block + 1) // row_blocks):
                total = zero
                for e in range(crow[i], crow[i + 1]):
                    prefetch(zero, source, col[min(e + _AHEAD, k - 1)], start)
                    total = axpy(values[e], load(zero, source, col[e], start), total)
                store(total, y, i, j)
            task = take(job)

    return kernel


@functools.cache
def _sampled_kernel(dtype: types.Float, width: int) -> Any:
    @compiled
    def kernel(job):
        n, m, k, b = job[1], job[2], job[3], job[4]
        row_blocks, batch_blocks, pack = job[5], job[6], job[7]
        crow, col = carray(at(job[8], _INT32), n + 1), carray(at(job[9], _INT32), k)
        g, x = carray(at(job[10], dtype), (n, job[11])), carray(at(job[12], dtype), (m, job[13]))
        out = carray(at(job[14], dtype), (batch_blocks, k))
        zero = zeros(dtype, width)
        tiles = b // width
        task = take(job)
        while task < row_blocks * batch_blocks:
            part, block = task // row_blocks, task % row_blocks
            first = tiles * part // batch_blocks
            for tile in range(first, tiles * (part + 1) // batch_blocks):
                j = tile * width
                source, start = (panel(x, j, zero, width), 0) if pack else (x, j)
                for i in range(n * block // row_blocks, n * (block + 1) // row_blocks):
                    row = load(zero, g, i, j)
                    for e in range(crow[i], crow[i + 1]):
                        prefetch(zero, source, col[min(e + _AHEAD, k - 1)], start)
                        total = dot(row, load(zero, source, col[e], start))
                        out[part, e] = total if tile == first else total + out[part, e]
            task = take(job)

    return kernel


# Launching.


def num_threads(work: int) -> int:
    """How many threads so many operations are worth."""
    return 1 if _parallel is None or work < _SERIAL_FLOPS else torch.get_num_threads()


def _run(
    kernel: Any, csr: CSR, a: Tensor, x: Tensor, out: Tensor, threads: int, *plan: int
) -> None:
    sizes = (*csr.shape, len(csr.col), x.shape[1], *plan)
    launch(kernel, threads, *sizes, csr.crow, csr.col, a, a.stride(0), x, x.stride(0), out)


def launch(kernel: Any, threads: int, *arguments: int | Tensor) -> None:
    """Run a kernel on so many threads; of a tensor, it gets the address."""
    numbers = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    job = _Job(0, *numbers)
    if threads > 1:
        _parallel(kernel.address, job, threads, 0)
    else:
        kernel.ctypes(job)


def batch_inner(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def check(
    csr: CSR, x: Tensor, x_shape: tuple[int, ...], a: Tensor, a_shape: tuple[int, ...]
) -> None:
    """Compiled code reads whatever it is pointed at: what does not fit must not get that far."""
    crow, col = csr.crow, csr.col
    assert (x.shape, a.shape) == (x_shape, a_shape)
    assert x.dtype in DTYPES
    assert (a.dtype, crow.dtype, col.dtype) == (x.dtype, torch.int32, torch.int32)
    assert all(t.device.type == "cpu" for t in (x, a, crow, col))
    assert crow.stride(0) == col.stride(0) == 1


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    csr = active.csr_t if transposed else active.csr
    n, m = csr.shape
    k, b = len(csr.col), x.shape[1]
    check(csr, x, (m, b), values, (k,))
    if not k * b:
        return x.new_zeros(n, b)
    width = min(_MATMUL_BYTES // x.itemsize, 1 << (b.bit_length() - 1))
    threads = num_threads(2 * k * b)
    long = b > LONG * threads
    plan = (1 if long else _SHARE * threads, -(-b // width), long)
    if csr.perm is not None:
        values = values.index_select(0, csr.perm)  # once, rather than in every tile
    values, x, out = values.contiguous(), batch_inner(x), x.new_empty(n, b)
    _run(_matmul_kernel(DTYPES[x.dtype], width), csr, values, x, out, threads, *plan)
    return out


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    csr = active.csr
    n, m = csr.shape
    k, b = len(csr.col), x.shape[1]
    check(csr, x, (m, b), g, (n, b))
    if not k * b:
        return x.new_zeros(k)
    g, x = batch_inner(g), batch_inner(x)
    width = min(_SAMPLED_BYTES // x.itemsize, 1 << (b - 1).bit_length())
    rest = b % width
    if rest:
        pad = (0, width - rest)
        end = sampled(active, F.pad(g[:, -rest:], pad), F.pad(x[:, -rest:], pad))
        return end if rest == b else end + sampled(active, g[:, :-rest], x[:, :-rest])
    threads = num_threads(2 * k * b)
    long = b > LONG * threads
    plan = (1, threads, long) if long else (_SHARE * threads, 1, long)
    out = x.new_empty(plan[1], k)
    _run(_sampled_kernel(DTYPES[x.dtype], width), csr, g, x, out, threads, *plan)
    return out.sum(0) if long else out[0]
