"""Products on CPU with a matrix whose active entries are whole tiles.

What bounds the product of single entries is that each multiply-add loads its own ``x`` from the
second-level cache. Here a load serves all rows of a tile, whose sums are in registers together; in
the transposed product all its columns, and in the gradient of the values both. Of a large tile the
kernels take parts that fit the registers.

Code is compiled when first needed, for each dtype, width, and shape of these parts.
"""

# mypy: allow-untyped-defs
# (Numba finds the types of what it compiles.)

from __future__ import annotations

import functools
from typing import Any

import torch
from numba import carray, types
from torch import Tensor
from torch.nn import functional as F

from ..active_set import ActiveSet
from ..tiling import Tiling
from .numba_cpu import DTYPES, LONG, batch_inner, check, compiled, launch, num_threads, panel
from .numba_vectors import (
    add_products,
    add_scaled,
    at,
    load,
    prefetch,
    store,
    store_rows,
    store_sums,
    take,
    zero_rows,
    zeros,
)

__all__ = ["matmul", "sampled"]

_SUMS_BYTES = 256  # of a product: 8 AVX registers hold its sums
_ROWS, _COLS = 4, 8  # of the part of a tile that a product takes, at most
_VECTOR_BYTES = 32
_SUMS = 8  # of a gradient: each has an AVX register
_CHUNK = 256  # of the batch, that a gradient reads before it goes to the next tile
_TASKS = 4  # for each thread: one that is held up leaves more to the others
_AHEAD = 4  # tiles between a prefetch and its use
_SOON = 2  # the same, where a tile takes longer: in a gradient
_INT32 = types.int32


@functools.cache
def _pack_kernel(dtype: types.Float, rows: int, cols: int, transposed: bool) -> Any:
    size = rows * cols

    @compiled
    def pack_tiles(job):
        units, blocks = job[1], job[2]
        start, stride = carray(at(job[3], _INT32), units), carray(at(job[4], _INT32), units)
        place_t = carray(at(job[5], _INT32), units)
        values = carray(at(job[6], dtype), (1, units * size))
        packed = carray(at(job[7], dtype), (1, units * size))
        zero = zeros(dtype, cols)
        block = take(job)
        while block < blocks:
            for e in range(units * block // blocks, units * (block + 1) // blocks):
                place = size * (place_t[e] if transposed else e)
                for i in range(rows):
                    row = load(zero, values, 0, start[e] + i * stride[e])
                    store(row, packed, 0, place + i * cols)
            block = take(job)

    return pack_tiles


@functools.cache
def _matmul_kernel(dtype: types.Float, width: int, rows: int, cols: int, transposed: bool) -> Any:
    size = rows * cols
    down, across = (1, rows) if transposed else (cols, 1)  # where values of a tile lie

    @compiled
    def matmul_tiles(job):
        n, m, units, b = job[1], job[2], job[3], job[4]
        row_blocks, batch_blocks, pack = job[5], job[6], job[7]
        crow, col = carray(at(job[8], _INT32), n + 1), carray(at(job[9], _INT32), units)
        values = carray(at(job[10], dtype), units * size)
        x, y = carray(at(job[11], dtype), (m, job[12])), carray(at(job[13], dtype), (n * rows, b))
        zero = zeros(dtype, width)
        task = take(job)
        while task < row_blocks * batch_blocks:
            tile, block = task // row_blocks, task % row_blocks
            j = min(tile * width, b - width)  # the last tile may repeat some columns
            source, start = (panel(x, j, zero, width), 0) if pack else (x, j)
            for i in range(n * block // row_blocks, n * (block + 1) // row_blocks):
                totals = zero_rows(dtype, width, rows)
                for e in range(crow[i], crow[i + 1]):
                    row, later = col[e] * cols, col[min(e + _AHEAD, units - 1)] * cols
                    for each in range(cols):
                        prefetch(zero, source, later + each, start)
                    totals = add_scaled(
                        totals, values, e * size, down, across, cols, source, row, start
                    )
                store_rows(totals, y, i * rows, j)
            task = take(job)

    return matmul_tiles


@functools.cache
def _sampled_kernel(dtype: types.Float, width: int, rows: int, cols: int) -> Any:
    size = rows * cols

    @compiled
    def sampled_tiles(job):
        n, m, units, b = job[1], job[2], job[3], job[4]
        row_blocks, batch_blocks = job[5], job[6]
        crow, col = carray(at(job[7], _INT32), n + 1), carray(at(job[8], _INT32), units)
        first, stride = carray(at(job[9], _INT32), units), carray(at(job[10], _INT32), units)
        g = carray(at(job[11], dtype), (n * rows, job[12]))
        x = carray(at(job[13], dtype), (m, job[14]))
        out = carray(at(job[15], dtype), (batch_blocks, units * size))
        zero = zeros(dtype, width)
        task = take(job)
        while task < row_blocks * batch_blocks:
            part, block = task // row_blocks, task % row_blocks
            begin = b // width * part // batch_blocks * width
            end = b // width * (part + 1) // batch_blocks * width
            for chunk in range(begin, end, _CHUNK):
                stop = min(chunk + _CHUNK, end)
                for i in range(n * block // row_blocks, n * (block + 1) // row_blocks):
                    for e in range(crow[i], crow[i + 1]):
                        totals = zero_rows(dtype, width, size)
                        row, later = col[e] * cols, col[min(e + _SOON, units - 1)] * cols
                        for j in range(chunk, stop, width):
                            for each in range(cols):
                                prefetch(zero, x, later + each, j)
                            totals = add_products(totals, g, i * rows, x, row, cols, j)
                        store_sums(totals, out[part], first[e], stride[e], cols, chunk > begin)
            task = take(job)

    return sampled_tiles


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    (n, m), (height, width) = active.matrix_shape, active.tile
    if transposed:
        (n, m), (height, width) = (m, n), (width, height)
    rows, cols = _divisor(height, _ROWS), _divisor(width, _COLS)
    tiling = active.in_tiles(*((cols, rows) if transposed else (rows, cols)))
    csr = tiling.units.csr_t if transposed else tiling.units.csr
    k, b = len(active), x.shape[1]
    check(csr, x, (m, b), values, (k,))
    if not k * b:
        return x.new_zeros(n, b)
    tile = min(_SUMS_BYTES // (rows + rows % 2) // x.itemsize, 1 << (b.bit_length() - 1))
    threads = num_threads(2 * k * b)
    batch_blocks = -(-b // tile)
    row_blocks = -(-_TASKS * threads // batch_blocks)
    pack = k > 16 * m * row_blocks  # a row of x is read often enough
    values = _packed(tiling, values.contiguous(), transposed, threads)
    x, out = batch_inner(x), x.new_empty(n, b)
    sizes = (n // rows, m, len(csr.col), b, row_blocks, batch_blocks, pack)
    kernel = _matmul_kernel(DTYPES[x.dtype], tile, rows, cols, transposed)
    launch(kernel, threads, *sizes, csr.crow, csr.col, values, x, x.stride(0), out)
    return out


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    n, m = active.matrix_shape
    k, b = len(active), x.shape[1]
    rows, cols = _part(*active.tile)
    tiling = active.in_tiles(rows, cols)
    csr = tiling.units.csr
    check(csr, x, (m, b), g, (n, b))
    if not k * b:
        return x.new_zeros(k)
    width = _VECTOR_BYTES // x.itemsize
    if b % width:
        g, x = (F.pad(each, (0, width - b % width)) for each in (g, x))
    g, x = batch_inner(g), batch_inner(x)
    threads = num_threads(2 * k * b)
    row_blocks, batch_blocks = (1, threads) if b > LONG * threads else (_TASKS * threads, 1)
    out = x.new_empty(batch_blocks, k)
    sizes = (n // rows, m, len(csr.col), x.shape[1], row_blocks, batch_blocks)
    places = (csr.crow, csr.col, tiling.start, tiling.stride)
    kernel = _sampled_kernel(DTYPES[x.dtype], width, rows, cols)
    launch(kernel, threads, *sizes, *places, g, g.stride(0), x, x.stride(0), out)
    return out.sum(0) if batch_blocks > 1 else out[0]


def _packed(tiling: Tiling, values: Tensor, transposed: bool, threads: int) -> Tensor:
    """The values, one tile after the other: once, rather than for every part of the batch."""
    packed = torch.empty_like(values)
    kernel = _pack_kernel(DTYPES[values.dtype], *tiling.shape, transposed)
    places = tiling.start, tiling.stride, tiling.place_t if transposed else 0
    launch(kernel, threads, len(tiling.units), _TASKS * threads, *places, values, packed)
    return packed


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def _part(rows: int, cols: int) -> tuple[int, int]:
    """The part of a tile for whose entries the gradient needs the fewest loads each."""
    parts = [
        (r, c)
        for c in range(1, _SUMS + 1)
        for r in range(1, _SUMS // c + 1)
        if rows % r == 0 and cols % c == 0
    ]
    return min(parts, key=lambda part: sum(part) / (part[0] * part[1]))
