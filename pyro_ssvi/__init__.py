"""Sparse autoguides for Pyro.

An ordinary Pyro program, with two names swapped::

    guide = AutoSparseNormal(model, density=0.05)       # was: AutoNormal(model)
    svi = SSVI(model, guide, optim, Trace_ELBO())       # was: SVI(model, guide, optim, ...)
    for x, y in batches:
        svi.step(x, y)
    Predictive(model, guide=guide, num_samples=16)(x)
"""

from . import rules as _rules  # noqa: F401  (fills the table of sparse operations)
from .active_set import ActiveSet
from .distributed import DistributedSSVI
from .distributions import SparseDelta, SparseNormal, SubspacePrior
from .ensemble import Ensemble, load_ensemble
from .errors import MaterialiseError, NonFiniteWarning, PerformanceWarning
from .guides import (
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
)
from .posterior import load_posterior
from .predictive import SparsePredictive
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
)
from .sparse_tensor import SparseTensor, dense_fallbacks, forbid_materialise
from .svi import SSVI, SubspaceModel

__version__ = "0.1.0"

__all__ = [
    "SSVI",
    "ActiveSet",
    "AutoSparseDelta",
    "AutoSparseGuide",
    "AutoSparseLowRankMultivariateNormal",
    "AutoSparseNormal",
    "ConstantSchedule",
    "CosineSchedule",
    "CyclicSchedule",
    "DistributedSSVI",
    "Ensemble",
    "InverseSqrtSchedule",
    "LinearSchedule",
    "MaterialiseError",
    "NonFiniteWarning",
    "PerformanceWarning",
    "SparseDelta",
    "SparseNormal",
    "SparsePredictive",
    "SparseTensor",
    "SubspaceModel",
    "SubspacePrior",
    "dense_fallbacks",
    "forbid_materialise",
    "load_ensemble",
    "load_posterior",
]
