"""What torch's functions do with a sparse value: one rule for each family of spellings.

A rule has its function's own signature, so keywords bind as in torch. Rules serve a site that
is a matrix, and products one that is a vector; whatever else they are asked, they return
``NotImplemented`` and the dense fall-back answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .patches import Patches
from .sparse_tensor import SparseTensor, implements

__all__: list[str] = []


def _is_matrix(x: Any) -> TypeGuard[SparseTensor]:
    return isinstance(x, SparseTensor) and x.dim() == 2 and x.values.dim() == 1


def _is_vector(x: Any) -> TypeGuard[SparseTensor]:
    return isinstance(x, SparseTensor) and x.dim() == x.values.dim() == 1


def _columns(x: Tensor) -> Tensor:
    """``[*, m]`` as ``[m, b]``."""
    return x.reshape(-1, x.shape[-1]).t()


def _product(weight: SparseTensor, x: Tensor) -> Tensor:
    """``weight @ x``, or a draw of it under local reparameterisation."""

    def product(values: Tensor, x: Tensor, record: bool) -> Tensor:
        return autograd.matmul(values, weight.active, x, weight.transposed, record)

    return _drawn(weight, x, product)


def _dot(x: Tensor, vector: SparseTensor) -> Any:
    """``x @ vector`` for ``x [*, m]``."""
    if not _can_multiply(x, vector) or x.dim() == 0 or x.shape[-1] != vector.shape[0]:
        return NotImplemented

    def product(values: Tensor, x: Tensor, record: bool) -> Tensor:
        return autograd.mv(values, vector.active, x, record)

    return _drawn(vector, x.reshape(-1, x.shape[-1]), product).reshape(x.shape[:-1])


def _drawn(
    weight: SparseTensor, x: Tensor, linear: Callable[[Tensor, Tensor, bool], Tensor]
) -> Tensor:
    q = weight.posterior
    if q is None:
        return linear(weight.values, x, True)
    mean = linear(q.loc, x, True)
    # Not recorded: an inactive coordinate's variance is 0, its gradient that of its mean.
    variance = linear(q.scale.square(), x.square(), False)
    # Where no active coordinate meets an input that is not 0, sqrt() has no gradient.
    tiny = torch.finfo(variance.dtype).tiny
    return torch.addcmul(mean, variance.clamp(min=tiny).sqrt(), torch.randn_like(mean))


def _can_multiply(x: Any, weight: SparseTensor) -> bool:
    return (
        isinstance(x, Tensor)
        and not isinstance(x, SparseTensor)
        and x.dtype == weight.dtype
        and x.layout == torch.strided
    )


@implements(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight) or not _can_multiply(input, weight):
        return NotImplemented
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    out = _product(weight, _columns(input))
    if bias is not None and _may_add(bias, out):
        out, bias = out.add_(bias.unsqueeze(-1)), None  # nobody else has seen it
    out = out.t().reshape(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _may_add(bias: Tensor, out: Tensor) -> bool:
    return not isinstance(bias, SparseTensor) and bias.dim() == 1 and bias.dtype == out.dtype


@implements(Tensor.matmul, Tensor.__matmul__, torch.matmul)
def matmul(input: Tensor, other: Tensor) -> Any:
    if _is_matrix(other):
        # x @ W, with W's transpose as a linear layer's weight.
        return linear(input, transpose(other, 0, 1))
    if _is_vector(other):
        return _dot(input, other)
    if _is_vector(input) and isinstance(other, Tensor) and other.dim() >= 1:
        return _dot(other.mT if other.dim() > 1 else other, input)
    if _is_matrix(input) and _can_multiply(other, input) and 1 <= other.dim() <= 2:
        if other.shape[0] != input.shape[1]:
            return NotImplemented
        columns = other if other.dim() == 2 else other.unsqueeze(-1)
        out = _product(input, columns)
        return out if other.dim() == 2 else out.squeeze(-1)
    return NotImplemented


@implements(Tensor.__rmatmul__)
def rmatmul(self: Tensor, other: Tensor) -> Any:
    return matmul(other, self)


@implements(Tensor.mm, torch.mm)
def mm(input: Tensor, mat2: Tensor) -> Any:
    return matmul(input, mat2) if input.dim() == mat2.dim() == 2 else NotImplemented


@implements(Tensor.mv, torch.mv)
def mv(input: Tensor, vec: Tensor) -> Any:
    return matmul(input, vec) if (input.dim(), vec.dim()) == (2, 1) else NotImplemented


@implements(Tensor.dot, torch.dot)
def dot(input: Tensor, tensor: Tensor) -> Any:
    return matmul(input, tensor) if input.dim() == tensor.dim() == 1 else NotImplemented


@implements(Tensor.transpose, torch.transpose)
def transpose(input: Any, dim0: int, dim1: int) -> Any:
    if not _is_matrix(input) or {dim0, dim1} not in ({0, 1}, {-1, -2}, {0, -1}, {1, -2}):
        return NotImplemented
    out = SparseTensor(input.values, input.active, not input.transposed)
    out.posterior = input.posterior
    return out


@implements(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def t(input: Any) -> Any:
    return transpose(input, 0, 1)


@implements(F.conv2d)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    return _convolve(input, weight, bias, stride, padding, dilation, groups, dims=2)


@implements(F.conv1d)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    return _convolve(input, weight, bias, stride, padding, dilation, groups, dims=1)


def _pair(x: Any, dims: int, height: int) -> tuple[int, int]:
    """What torch takes for ``dims`` dimensions, as one for height and one for width."""
    each = (x,) if isinstance(x, int) else tuple(x)
    each = each * dims if len(each) == 1 else each
    return each if dims == 2 else (height, *each)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    dims: int,
) -> Any:
    if not isinstance(weight, SparseTensor) or not _can_multiply(input, weight):
        return NotImplemented
    if weight.transposed or weight.values.dim() != 1 or not input.dim() == weight.dim() == dims + 2:
        return NotImplemented
    if input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return NotImplemented
    kernel = _pair(tuple(weight.shape[2:]), dims, 1)
    dilation, stride = _pair(dilation, dims, 1), _pair(stride, dims, 1)
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if padding == "same":
        if stride != (1, 1):
            return NotImplemented
        before, after = tuple(r // 2 for r in reach), tuple(r - r // 2 for r in reach)
    else:
        before = after = (0, 0) if padding == "valid" else _pair(padding, dims, 0)
    sides = (before[1], after[1], before[0], after[0])
    images = input if dims == 2 else input.unsqueeze(2)
    if kernel == (1, 1) and not any(sides):
        # The pixels that are passed over need not come along.
        images, stride = images[:, :, :: stride[0], :: stride[1]], (1, 1)
    patches = Patches(kernel, stride, sides, dilation)
    if min(patches.out_size((images.shape[2], images.shape[3]))) < 1:
        return NotImplemented

    def convolution(values: Tensor, x: Tensor, record: bool) -> Tensor:
        return autograd.conv(values, weight.active, x, patches, groups, record)

    out = _drawn(weight, images, convolution)
    out = out if dims == 2 else out.squeeze(2)
    return out if bias is None else out + bias.reshape(-1, *(1 for _ in range(dims)))


@implements(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not _is_matrix(weight) or weight.transposed:
        return NotImplemented
    if input.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    frozen = padding_idx
    if frozen is not None and frozen < 0:
        frozen += weight.shape[0]
    out = autograd.rows(weight.values, weight.active, input.reshape(-1), frozen)
    return out.reshape(*input.shape, weight.shape[1])


@implements(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def detach(input: Any) -> Any:
    return input._like(input.values.detach())


@implements(Tensor.clone, torch.clone)
def clone(input: Any, *, memory_format: Any = None) -> Any:
    return input._like(input.values.clone())


@implements(Tensor.contiguous)
def contiguous(input: Any, memory_format: Any = None) -> Any:
    return input


@implements(Tensor.to)
def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, SparseTensor) or any(isinstance(a, SparseTensor) for a in args[:1]):
        return NotImplemented
    return input._like(input.values.to(*args, **kwargs))


@implements(torch.stack)
def stack(tensors: Any, dim: int = 0, *, out: Tensor | None = None) -> Any:
    # Predictive stacks its samples: their usual shape is asked for, and it is dense.
    if out is not None:
        return NotImplemented
    return torch.stack([x.to_dense() if isinstance(x, SparseTensor) else x for x in tensors], dim)
