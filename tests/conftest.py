import pyro
import pytest
import torch

from pyro_ssvi import dense_fallbacks

# The tests' tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state():
    """Every test starts from the same seed, with an empty store and nothing counted."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    dense_fallbacks.clear()
