"""Autoguides with sparse support."""

from .auto_sparse_delta import AutoSparseDelta
from .auto_sparse_guide import AutoSparseGuide
from .auto_sparse_low_rank import AutoSparseLowRankMultivariateNormal
from .auto_sparse_normal import AutoSparseNormal

__all__ = [
    "AutoSparseDelta",
    "AutoSparseGuide",
    "AutoSparseLowRankMultivariateNormal",
    "AutoSparseNormal",
]
