"""What the compiled kernels are made of: vectors in registers, and tasks taken by threads.

Numba's own vectoriser keeps a running sum in memory. These functions give it a type that LLVM
keeps in registers, of any width, on any instruction set; they are called in compiled code only.
"""

# mypy: allow-untyped-defs
# (Numba finds the types of what it compiles.)

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "add_products",
    "add_scaled",
    "at",
    "axpy",
    "dot",
    "load",
    "prefetch",
    "store",
    "store_rows",
    "store_sums",
    "take",
    "zero_rows",
    "zeros",
]

_CACHE_LINE = 64


class Vector(types.Type):
    """``width`` floats that LLVM spreads over as many registers as it takes."""

    def __init__(self, dtype: types.Float, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(f"Vector({dtype}, {width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager[vector.dtype].get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.width))


def _read(context: Any, builder: Any, vector: Vector, array_type: Any, *place: Any) -> Any:
    address = _address(context, builder, array_type, *place)
    address = builder.bitcast(address, context.get_value_type(vector).as_pointer())
    return builder.load(address, align=vector.dtype.bitwidth // 8)


def _write(
    context: Any, builder: Any, vector: Vector, value: Any, array_type: Any, *place: Any
) -> None:
    address = _address(context, builder, array_type, *place)
    address = builder.bitcast(address, value.type.as_pointer())
    builder.store(value, address, align=vector.dtype.bitwidth // 8)


def _address(context: Any, builder: Any, array_type: Any, array: Any, *index: Any) -> Any:
    array = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, array, index)


def _spread(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    """A vector with the same number everywhere."""
    zero = ir.IntType(32)(0)
    first = builder.insert_element(vector(ir.Undefined), number, zero)
    lanes = ir.VectorType(zero.type, vector.count)(None)
    return builder.shuffle_vector(first, vector(ir.Undefined), lanes)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, in one rounding where the machine can."""
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


@intrinsic(prefer_literal=True)
def zeros(_, dtype, width):
    """A vector of zeros."""
    vector = Vector(dtype.dtype, width.literal_value)
    return vector(dtype, width), lambda context, *_: context.get_constant_null(vector)


@intrinsic
def load(_, like, array, i, j):
    """``array[i, j : j + width]``, with the width of ``like``."""

    def build(context, builder, signature, args):
        return _read(context, builder, like, array, *args[1:])

    return like(like, array, types.intp, types.intp), build


@intrinsic
def store(_, vector, array, i, j):
    """``array[i, j : j + width] = vector``."""

    def build(context, builder, signature, args):
        _write(context, builder, vector, args[0], array, *args[1:])

    return types.void(vector, array, types.intp, types.intp), build


@intrinsic
def prefetch(_, like, array, i, j):
    """Ask for ``array[i, j : j + width]``: hides part of the way from the outer caches."""

    def build(context, builder, signature, args):
        int32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        start = builder.bitcast(_address(context, builder, array, *args[1:]), pointer)
        for byte in range(0, like.width * like.dtype.bitwidth // 8, _CACHE_LINE):
            line = builder.gep(start, [int32(byte)])
            builder.call(function, [line, int32(0), int32(3), int32(1)])  # read, keep, data

    return types.void(like, array, types.intp, types.intp), build


@intrinsic
def axpy(_, a, x, y):
    """``a * x + y`` for a number and two vectors."""

    def build(context, builder, signature, args):
        return _multiply_add(builder, _spread(builder, args[0], args[1].type), *args[1:])

    return x(x.dtype, x, y), build


@intrinsic
def dot(_, x, y):
    """The sum of the products of two vectors: in four steps, so they can be multiply-adds."""

    def build(context, builder, signature, args):
        vector, int32 = args[0].type, ir.IntType(32)
        part = max(1, x.width // 4)
        total = ir.VectorType(vector.element, part)(None)
        for start in range(0, x.width, part):
            lanes = ir.VectorType(int32, part)(list(range(start, start + part)))
            a, b = (builder.shuffle_vector(v, vector(ir.Undefined), lanes) for v in args)
            total = _multiply_add(builder, a, b, total)
        function_type = ir.FunctionType(vector.element, [vector.element, total.type])
        name = f"llvm.vector.reduce.fadd.v{part}f{x.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [vector.element(-0.0), total], fastmath=["reassoc"])

    return x.dtype(x, y), build


# Tiles: as many vectors as fit the registers, each named by its place in a tuple. Their loops are
# unrolled here, since Numba cannot index a tuple by a number that it does not know.


@intrinsic(prefer_literal=True)
def zero_rows(_, dtype, width, count):
    """A tuple of ``count`` vectors of zeros."""
    rows = types.UniTuple(Vector(dtype.dtype, width.literal_value), count.literal_value)
    return rows(dtype, width, count), lambda context, *_: context.get_constant_null(rows)


@intrinsic(prefer_literal=True)
def add_scaled(_, totals, values, start, down, across, count, x, i, j):
    """``totals[a] + values[start + a * down + b * across] * x[i + b]``, over ``count`` b.

    Each row of ``x`` is read once, from ``j`` on, for all totals.
    """
    vector = totals.dtype

    def build(context, builder, signature, args):
        values_type, x_type = signature.args[1], signature.args[6]
        parts = cgutils.unpack_tuple(builder, args[0])
        offset = ir.IntType(64)
        for b in range(count.literal_value):
            row = builder.add(args[7], offset(b))
            column = _read(context, builder, vector, x_type, args[6], row, args[8])
            for a in range(len(parts)):
                place = a * down.literal_value + b * across.literal_value
                place = builder.add(args[2], offset(place))
                value = builder.load(_address(context, builder, values_type, args[1], place))
                value = _spread(builder, value, column.type)
                parts[a] = _multiply_add(builder, value, column, parts[a])
        return context.make_tuple(builder, signature.return_type, parts)

    intp = types.intp
    return totals(totals, values, intp, down, across, count, x, intp, intp), build


@intrinsic
def store_rows(_, totals, array, i, j):
    """``array[i + a, j : j + width] = totals[a]``."""

    def build(context, builder, signature, args):
        for a, part in enumerate(cgutils.unpack_tuple(builder, args[0])):
            row = builder.add(args[2], ir.IntType(64)(a))
            _write(context, builder, totals.dtype, part, array, args[1], row, args[3])

    return types.void(totals, array, types.intp, types.intp), build


@intrinsic(prefer_literal=True)
def add_products(_, totals, g, i, x, j, count, k):
    """``totals[a * count + b] + g[i + a] * x[j + b]``, of vectors from ``k`` on."""
    vector = totals.dtype

    def build(context, builder, signature, args):
        parts = cgutils.unpack_tuple(builder, args[0])
        across = count.literal_value

        def read(array_type, array, first, rows):
            places = [builder.add(first, ir.IntType(64)(n)) for n in range(rows)]
            return [
                _read(context, builder, vector, array_type, array, place, args[6])
                for place in places
            ]

        rows = read(g, args[1], args[2], len(parts) // across)
        columns = read(x, args[3], args[4], across)
        for n in range(len(parts)):
            parts[n] = _multiply_add(builder, rows[n // across], columns[n % across], parts[n])
        return context.make_tuple(builder, signature.return_type, parts)

    intp = types.intp
    return totals(totals, g, intp, x, intp, count, intp), build


@intrinsic(prefer_literal=True)
def store_sums(_, totals, array, start, down, count, add):
    """``array[start + a * down + b] (+)= sum(totals[a * count + b])``, added to if ``add``."""

    def build(context, builder, signature, args):
        parts = cgutils.unpack_tuple(builder, args[0])
        element = context.get_value_type(totals.dtype.dtype)
        across, offset = count.literal_value, ir.IntType(64)
        for n, total in enumerate(_sums(builder, parts, 128 // totals.dtype.dtype.bitwidth)):
            place = builder.mul(args[3], offset(n // across))
            place = builder.add(args[2], builder.add(place, offset(n % across)))
            address = _address(context, builder, array, args[1], place)
            before = builder.select(args[5], builder.load(address), element(0.0))
            builder.store(builder.fadd(before, total), address)

    intp = types.intp
    return types.void(totals, array, intp, intp, count, types.boolean), build


def _sums(builder: Any, vectors: list, group: int) -> list:
    """The sum of each vector: of ``group`` at once, the numbers in 16 bytes.

    Among these AVX shuffles at no extra cost.
    """
    mask = ir.VectorType(ir.IntType(32), vectors[0].type.count)
    starts = range(0, mask.count, group)
    even = [
        n
        for start in starts
        for first in (start, mask.count + start)
        for n in range(first, first + group, 2)
    ]
    sums = []
    while vectors:
        part, vectors = vectors[:group], vectors[group:]
        count = len(part)
        part = part + part[-1:] * (group - count)
        while len(part) > 1:  # each group of lanes: sums of neighbours in one, then in the other
            part = [
                builder.fadd(
                    builder.shuffle_vector(a, b, mask(even)),
                    builder.shuffle_vector(a, b, mask([n + 1 for n in even])),
                )
                for a, b in zip(part[::2], part[1::2], strict=True)
            ]
        total = part[0]
        lanes = ir.VectorType(ir.IntType(32), group)
        pieces = [
            builder.shuffle_vector(total, total, lanes(list(range(n, n + group)))) for n in starts
        ]
        total = functools.reduce(builder.fadd, pieces)
        sums += [builder.extract_element(total, ir.IntType(32)(n)) for n in range(count)]
    return sums


# Threads. A job is the address of int64s: the counter of tasks taken, then what the kernel needs.


@intrinsic
def take(_, counter):
    """Take the next task: ``counter[0]++``, atomically."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), build


@intrinsic
def at(_, address, dtype):
    """The pointer to a ``dtype`` that an integer stands for."""
    pointer = types.CPointer(dtype.dtype)

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, dtype), build
