"""Autoguides with sparse support."""

from .auto_sparse_normal import AutoSparseNormal

__all__ = ["AutoSparseNormal"]
