"""The warnings and errors that are ours."""

from __future__ import annotations

import sys
import warnings

__all__ = ["MaterialiseError", "NonFiniteWarning", "PerformanceWarning", "warn_caller"]

# Packages that call this one on behalf of a user.
_NOT_THE_USER_S = {"pyro", "pyro_ssvi", "torch"}


class PerformanceWarning(UserWarning):
    """A sparse value was made dense: right, but as slow and as large as a dense guide."""


class NonFiniteWarning(UserWarning):
    """An exchange was skipped, because what it would be decided by is not finite."""


class MaterialiseError(RuntimeError):
    """A sparse value would have been made dense inside :func:`forbid_materialise`."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line that led here."""
    level, frame = 2, sys._getframe(1)  # whoever called this function
    while frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER_S and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
