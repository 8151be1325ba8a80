"""The warnings and errors that are ours."""

__all__ = ["MaterialiseError", "NonFiniteWarning", "PerformanceWarning"]


class PerformanceWarning(UserWarning):
    """A sparse value was made dense: right, but as slow and as large as a dense guide."""


class NonFiniteWarning(UserWarning):
    """An exchange was skipped, because what it would be decided by is not finite."""


class MaterialiseError(RuntimeError):
    """A sparse value would have been made dense inside :func:`forbid_materialise`."""
