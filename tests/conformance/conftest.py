import pytest

from pyro_ssvi import PerformanceWarning

# pytest's "error" comes first. Whether a function has a rule is not the question here, and dense
# twins are trained as sparse guides are.
IGNORED = (
    f"ignore::{PerformanceWarning.__module__}.{PerformanceWarning.__qualname__}",
    "ignore:.* has no sparse part:UserWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "conformance":
            for each in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(each))
