"""Sparse convolutions on CPU, without the columns of patches.

An entry of the kernel multiplies one shifted plane of the input. Images are laid out so that a run
of the output, of one row and all images, meets a contiguous run of the input, wherever the entry's
tap points: then the product with a plane is like that of :mod:`numba_cpu` with a row, and a tile of
the run stays in registers while the entries of an output channel pass by.

*Layout.* ``[channel, phase, row, image, column]``, zero-padded, with the columns ``phase``,
``phase + stride``, .. side by side. A run goes on over the padding between images; what it gives
there is cut off. Narrow images would be mostly padding: theirs is ``[.., row, column, image]``.
"""

# mypy: allow-untyped-defs
# (Numba finds the types of what it compiles.)

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from numba import carray, types
from torch import Tensor

from ..active_set import CSR, ActiveSet
from ..patches import Patches
from .numba_cpu import DTYPES, compiled, launch, num_threads
from .numba_vectors import at, axpy, dot, load, prefetch, store, take, zeros

__all__ = ["conv", "conv_input", "conv_sampled"]

_NARROW = 16  # columns below which images lie innermost
_TILE_BYTES = 256
_SAMPLED_BYTES = 512
_TASKS = 8  # for each thread: one that is held up leaves more to the others
_AHEAD = 8  # entries between a prefetch and its use
_INT32 = types.int32


@functools.cache
def _conv_kernel(dtype: types.Float, width: int) -> Any:
    @compiled
    def kernel(job):
        n, k, rows, run, row_stride, blocks = job[1], job[2], job[3], job[4], job[5], job[6]
        num_table, size = job[7], job[8]
        crow, col = carray(at(job[9], _INT32), n + 1), carray(at(job[10], _INT32), k)
        table = carray(at(job[11], _INT32), num_table)
        values, x = carray(at(job[12], dtype), k), carray(at(job[13], dtype), (1, size))
        y = carray(at(job[14], dtype), (n, rows * run))
        zero = zeros(dtype, width)
        tiles = (run + width - 1) // width
        task = take(job)
        while task < rows * tiles * blocks:
            place, block = task // blocks, task % blocks
            row, tile = place // tiles, place % tiles
            j = min(tile * width, run - width)  # the last tile may repeat some columns
            start = row * row_stride + j
            for i in range(n * block // blocks, n * (block + 1) // blocks):
                total = zero
                for e in range(crow[i], crow[i + 1]):
                    prefetch(zero, x, 0, start + table[col[min(e + _AHEAD, k - 1)]])
                    total = axpy(values[e], load(zero, x, 0, start + table[col[e]]), total)
                store(total, y, i, row * run + j)
            task = take(job)

    return kernel


@functools.cache
def _sampled_kernel(dtype: types.Float, width: int) -> Any:
    @compiled
    def kernel(job):
        n, k, rows, run, row_stride, blocks = job[1], job[2], job[3], job[4], job[5], job[6]
        num_table, size = job[7], job[8]
        crow, col = carray(at(job[9], _INT32), n + 1), carray(at(job[10], _INT32), k)
        table = carray(at(job[11], _INT32), num_table)
        g, x = carray(at(job[12], dtype), (n, rows * run)), carray(at(job[13], dtype), (1, size))
        out = carray(at(job[14], dtype), (blocks, k))
        zero = zeros(dtype, width)
        tiles = run // width
        task = take(job)
        while task < blocks:
            first = rows * tiles * task // blocks
            for place in range(first, rows * tiles * (task + 1) // blocks):
                row, j = place // tiles, place % tiles * width
                start = row * row_stride + j
                for i in range(n):
                    part = load(zero, g, i, row * run + j)
                    for e in range(crow[i], crow[i + 1]):
                        prefetch(zero, x, 0, start + table[col[min(e + _AHEAD, k - 1)]])
                        total = dot(part, load(zero, x, 0, start + table[col[e]]))
                        out[task, e] = total if place == first else total + out[task, e]
            task = take(job)

    return kernel


class _Planes(NamedTuple):
    """Images in the layout that the kernels read, and the distances between their numbers."""

    data: Tensor  # flat
    channel: int
    phase: int
    row: int
    column: int
    width: int  # columns of a phase


def _planes(x: Tensor, padding: tuple[int, int, int, int], stride: int, narrow: bool) -> _Planes:
    """Lay images ``[b, c, h, w]`` out.

    :param padding: left, right, top, bottom.
    """
    b, c, h, w = x.shape
    left, right, top, bottom = padding
    height, width = top + h + bottom, -(-(left + w + right) // stride)
    row = b * width
    size = c * stride * height * row
    # A run may read on over the last row's end.
    data = x.new_zeros(size + row + _SAMPLED_BYTES)
    shape = (c, stride, height, width, b) if narrow else (c, stride, height, b, width)
    planes = data[:size].view(shape)[:, :, top : top + h]
    images = x.permute(1, 2, 3, 0) if narrow else x.permute(1, 2, 0, 3)
    dim = 2 if narrow else 3  # of the columns in images
    for phase in range(stride):
        first = (phase - left) % stride  # of the image's columns that belong to this phase
        if first < w:
            part = images[(slice(None),) * dim + (slice(first, None, stride),)]
            start = (first + left) // stride
            planes[:, phase].narrow(dim, start, part.shape[dim]).copy_(part)
    return _Planes(data, stride * height * row, height * row, row, b if narrow else 1, width)


def _runs(x: Tensor, width: int, narrow: bool, length: int) -> Tensor:
    """Lay a result ``[b, n, h, w]`` out as the kernels write it: ``[n, h, length]``."""
    b, n, h, w = x.shape
    runs = x.new_zeros(n, h, length)
    if narrow:
        runs[..., : w * b].unflatten(-1, (w, b)).copy_(x.permute(1, 2, 3, 0))
    else:
        runs[..., : b * width].unflatten(-1, (b, width))[..., :w].copy_(x.permute(1, 2, 0, 3))
    return runs


def _images(runs: Tensor, b: int, w: int, narrow: bool) -> Tensor:
    """A result ``[n, h, run]`` as images ``[b, n, h, w]``, not contiguous."""
    if narrow:
        return runs.unflatten(-1, (w, b)).permute(3, 0, 1, 2)
    return runs.unflatten(-1, (b, -1))[..., :w].permute(2, 0, 1, 3)


def _table(planes: _Planes, channels: int, taps: list[int]) -> Tensor:
    """Where each channel's plane, shifted by each tap, starts: int32 ``[channels * taps]``."""
    assert planes.data.numel() < 2**31
    device = planes.data.device
    starts = torch.arange(channels, device=device) * planes.channel
    table = starts.unsqueeze(-1) + torch.tensor(taps, device=device)
    return table.flatten().to(torch.int32)


def _convolve(
    csr: CSR, values: Tensor, planes: _Planes, table: Tensor, rows: int, run: int, row_stride: int
) -> Tensor:
    """The product of a matrix with shifted planes: ``[n, rows, run]``."""
    n, k, dtype = csr.shape[0], len(csr.col), values.dtype
    _check(csr, values, planes.data, table)
    out = values.new_empty(n, rows, run)
    width = min(_TILE_BYTES // values.itemsize, 1 << (run.bit_length() - 1))
    threads = num_threads(2 * k * rows * run)
    places = rows * -(-run // width)
    blocks = max(1, min(n, _TASKS * threads // places))
    if csr.perm is not None:
        values = values.index_select(0, csr.perm)
    kernel = _conv_kernel(DTYPES[dtype], width)
    sizes = (n, k, rows, run, row_stride, blocks, len(table), planes.data.numel())
    launch(kernel, threads, *sizes, csr.crow, csr.col, table, values, planes.data, out)
    return out


def _check(csr: CSR, values: Tensor, data: Tensor, table: Tensor) -> None:
    # Compiled code reads whatever it is pointed at: what does not fit must not get that far.
    assert csr.perm is not None or values.shape == csr.col.shape
    assert values.dtype == data.dtype
    assert values.dtype in DTYPES
    assert len(table) == csr.shape[1]
    assert all(t.device.type == "cpu" for t in (values, data, csr.col))


def _layout(patches: Patches, shape: tuple[int, ...]) -> tuple[int, int, bool]:
    height, width = patches.out_size((shape[2], shape[3]))
    return height, width, width < _NARROW


def _forward_taps(patches: Patches, planes: _Planes) -> list[int]:
    (kh, kw), (_, stride), (dh, dw) = patches.kernel, patches.stride, patches.dilation
    columns = [divmod(j * dw, stride) for j in range(kw)]
    return [
        i * dh * planes.row + phase * planes.phase + column * planes.column
        for i in range(kh)
        for column, phase in columns
    ]


def conv(active: ActiveSet, values: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    matrix = active.block_diagonal(groups)
    height, width, narrow = _layout(patches, x.shape)
    b, c = x.shape[:2]
    planes = _planes(x, patches.padding, patches.stride[1], narrow)
    table = _table(planes, c, _forward_taps(patches, planes))
    run = b * (width if narrow else planes.width)
    if not run * len(values):
        return x.new_zeros(b, active.shape[0], height, width)
    row_stride = patches.stride[0] * planes.row
    out = _convolve(matrix.csr, values.contiguous(), planes, table, height, run, row_stride)
    return _images(out, b, width, narrow).contiguous()


def conv_sampled(active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int) -> Tensor:
    csr = active.block_diagonal(groups).csr
    height, width, narrow = _layout(patches, x.shape)
    b, c = x.shape[:2]
    k = len(csr.col)
    planes = _planes(x, patches.padding, patches.stride[1], narrow)
    table = _table(planes, c, _forward_taps(patches, planes))
    run = b * (width if narrow else planes.width)
    if not run * k:
        return x.new_zeros(k)
    tile = min(_SAMPLED_BYTES // x.itemsize, 1 << (run - 1).bit_length())
    run = -(-run // tile) * tile  # zeros at the end of g: what x has there does not count
    runs = _runs(g, planes.width, narrow, run)
    threads = num_threads(2 * k * height * run)
    blocks = min(threads, height * run // tile)
    out = x.new_empty(blocks, k)
    _check(csr, out[0], planes.data, table)
    sizes = (active.shape[0], k, height, run, patches.stride[0] * planes.row, blocks)
    kernel = _sampled_kernel(DTYPES[x.dtype], tile)
    places = (csr.crow, csr.col, table, runs, planes.data, out)
    launch(kernel, threads, *sizes, len(table), planes.data.numel(), *places)
    return out.sum(0)


def conv_input(
    active: ActiveSet,
    values: Tensor,
    g: Tensor,
    patches: Patches,
    groups: int,
    shape: tuple[int, ...],
) -> Tensor:
    matrix = active.block_diagonal(groups)
    b, _, *size = shape
    (kh, kw), (sh, sw), (dh, dw) = patches.kernel, patches.stride, patches.dilation
    left, _, top, _ = patches.padding
    n, height, width = g.shape[1:]
    rows = _reach(size[0], height, kh, sh, dh, top)
    columns = _reach(size[1], width, kw, sw, dw, left)
    narrow = size[1] < _NARROW * sw
    padding = (columns.before, columns.after, rows.before, rows.after)
    planes = _planes(g, padding, 1, narrow)
    grad = g.new_zeros(shape)
    for r, row_taps in enumerate(rows.taps):
        for q, column_taps in enumerate(columns.taps):
            target = grad[:, :, r::sh, q::sw]
            taps = [0] * (kh * kw)
            used = [False] * (kh * kw)
            for i, down in row_taps.items():
                for j, right in column_taps.items():
                    taps[i * kw + j] = down * planes.row + right * planes.column
                    used[i * kw + j] = True
            if not (any(used) and target.numel() and len(values)):
                continue
            csr = matrix.by_channel(kh * kw, tuple(used))
            table = _table(planes, n, taps)
            run = b * (target.shape[3] if narrow else planes.width)
            out = _convolve(csr, values, planes, table, target.shape[2], run, planes.row)
            target.copy_(_images(out, b, target.shape[3], narrow))
    return grad


class _Reach(NamedTuple):
    """Along one dimension: which places of the result a place of the input takes part in."""

    taps: list[dict[int, int]]  # for each phase of the input, tap -> shift in the padded result
    before: int  # padding
    after: int


def _reach(size: int, out: int, kernel: int, stride: int, dilation: int, padding: int) -> _Reach:
    # Place stride * r + phase of the input takes part, by tap i, in place r + shift.
    shifts = [
        {
            i: (phase + padding - i * dilation) // stride
            for i in range(kernel)
            if (phase + padding - i * dilation) % stride == 0
        }
        for phase in range(stride)
    ]
    every = [shift for phase in shifts for shift in phase.values()]
    before = max(0, -min(every))
    after = max(0, -(-size // stride) - 1 + max(every) - (out - 1))
    taps = [{i: shift + before for i, shift in phase.items()} for phase in shifts]
    return _Reach(taps, before, after)
