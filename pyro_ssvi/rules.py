"""What torch's functions do with a sparse value: one rule for each family of spellings.

A rule has its function's own signature, so keywords bind as in torch. Rules serve a site that
is a matrix; whatever else they are asked, they return ``NotImplemented`` and the dense
fall-back answers.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .sparse_tensor import SparseTensor, implements

__all__: list[str] = []


def _is_matrix(x: Any) -> TypeGuard[SparseTensor]:
    return isinstance(x, SparseTensor) and x.dim() == 2 and x.values.dim() == 1


def _columns(x: Tensor) -> Tensor:
    """``[*, m]`` as ``[m, b]``."""
    return x.reshape(-1, x.shape[-1]).t()


def _product(weight: SparseTensor, x: Tensor) -> Tensor:
    """``weight @ x``, or a draw of it under local reparameterisation."""
    active, transposed, q = weight.active, weight.transposed, weight.posterior
    if q is None:
        return autograd.matmul(weight.values, active, x, transposed)
    mean = autograd.matmul(q.loc, active, x, transposed)
    # Not recorded: an inactive coordinate's variance is 0, its gradient that of its mean.
    variance = autograd.matmul(q.scale.square(), active, x.square(), transposed, record=False)
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
    out = _product(weight, _columns(input)).t().reshape(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


@implements(Tensor.matmul, Tensor.__matmul__, torch.matmul)
def matmul(input: Tensor, other: Tensor) -> Any:
    if _is_matrix(other):
        # x @ W, with W's transpose as a linear layer's weight.
        return linear(input, transpose(other, 0, 1))
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
