import pytest

from pyro_ssvi import PerformanceWarning

# pytest's "error" comes first; whether a function has a rule is not the question here.
IGNORED = f"ignore::{PerformanceWarning.__module__}.{PerformanceWarning.__qualname__}"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "conformance":
            item.add_marker(pytest.mark.filterwarnings(IGNORED))
