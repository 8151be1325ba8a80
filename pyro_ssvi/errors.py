"""The warnings and errors that are ours."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["MaterialiseError", "NonFiniteWarning", "PerformanceWarning", "warn_caller"]


class PerformanceWarning(UserWarning):
    """A sparse value was made dense: right, but as slow and as large as a dense guide."""


class NonFiniteWarning(UserWarning):
    """An exchange was skipped, because what it would be decided by is not finite."""


class MaterialiseError(RuntimeError):
    """A sparse value would have been made dense inside :func:`forbid_materialise`."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of this package that led here."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyro_ssvi."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
