"""torch's own CSR products: MKL on CPU, cuSPARSE on CUDA."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..active_set import CSR, ActiveSet

__all__ = ["matmul", "sampled"]

_GATHERED_BYTES = 64 * 2**20

with warnings.catch_warnings():
    # torch says once a process that CSR is in beta: have it said here, to no one.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1), check_invariants=False)


def _tensor(csr: CSR, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(
        csr.crow, csr.col, values, size=csr.shape, check_invariants=False
    )


def matmul(active: ActiveSet, values: Tensor, x: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return _tensor(active.csr_t, values[active.csr_t.perm]) @ x
    return _tensor(active.csr, values) @ x


def sampled(active: ActiveSet, g: Tensor, x: Tensor) -> Tensor:
    csr = active.csr
    if g.is_cuda or torch.backends.mkl.is_available():
        zeros = _tensor(csr, g.new_zeros(len(csr.col)))
        return torch.sparse.sampled_addmm(zeros, g, x.t(), beta=0.0).values()
    # Without MKL torch has no such product on CPU: gather both sides, a few entries at a time.
    row = torch.repeat_interleave(torch.arange(csr.shape[0], device=g.device), csr.crow.diff())
    step = max(1, _GATHERED_BYTES // (g.element_size() * max(g.shape[1], 1)))
    parts = zip(row.split(step), csr.col.split(step), strict=True)
    return torch.cat([(g[i] * x[j]).sum(-1) for i, j in parts])
