"""What the compiled kernels are made of: vectors in registers, and tasks taken by threads.

Numba's own vectoriser keeps a running sum in memory. These functions give it a type that LLVM
keeps in registers, of any width, on any instruction set; they are called in compiled code only.
"""

# mypy: allow-untyped-defs
# (Numba finds the types of what it compiles.)

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = ["at", "axpy", "dot", "load", "prefetch", "store", "take", "zeros"]

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


def _address(context: Any, builder: Any, array_type: Any, array: Any, *index: Any) -> Any:
    array = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, array, index)


@intrinsic(prefer_literal=True)
def zeros(_, dtype, width):
    """A vector of zeros."""
    vector = Vector(dtype.dtype, width.literal_value)
    return vector(dtype, width), lambda context, *_: context.get_constant_null(vector)


@intrinsic
def load(_, like, array, i, j):
    """``array[i, j : j + width]``, with the width of ``like``."""

    def build(context, builder, signature, args):
        address = _address(context, builder, array, *args[1:])
        address = builder.bitcast(address, args[0].type.as_pointer())
        return builder.load(address, align=like.dtype.bitwidth // 8)

    return like(like, array, types.intp, types.intp), build


@intrinsic
def store(_, vector, array, i, j):
    """``array[i, j : j + width] = vector``."""

    def build(context, builder, signature, args):
        address = _address(context, builder, array, *args[1:])
        address = builder.bitcast(address, args[0].type.as_pointer())
        builder.store(args[0], address, align=vector.dtype.bitwidth // 8)

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
        vector, zero = args[1].type, ir.IntType(32)(0)
        a = builder.insert_element(vector(ir.Undefined), args[0], zero)
        lanes = ir.VectorType(zero.type, x.width)(None)
        a = builder.shuffle_vector(a, vector(ir.Undefined), lanes)
        product = builder.fmul(a, args[1], flags=["contract"])
        return builder.fadd(product, args[2], flags=["contract"])

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
            total = builder.fadd(builder.fmul(a, b, flags=["contract"]), total, flags=["contract"])
        function_type = ir.FunctionType(vector.element, [vector.element, total.type])
        name = f"llvm.vector.reduce.fadd.v{part}f{x.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [vector.element(-0.0), total], fastmath=["reassoc"])

    return x.dtype(x, y), build


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
