import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ssvi import SSVI, AutoSparseNormal
from pyro_ssvi.densities import ErdosRenyiKernel, Uniform

LENET = {
    "conv1": torch.Size([6, 1, 5, 5]),
    "conv2": torch.Size([16, 6, 5, 5]),
    "fc1": torch.Size([120, 400]),
    "fc2": torch.Size([84, 120]),
    "fc3": torch.Size([10, 84]),
}


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([40, 30]).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([40]).to_event(1))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([2, 40]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand([3, 3]).to_event(2))
    loc = torch.relu(x @ w.T + b) @ v.T
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(loc, sigma[0, 0]).to_event(1), obs=y)


def test_erdos_renyi_kernel_is_in_proportion_to_sizes_over_product():
    densities = ErdosRenyiKernel(0.2).allocate(LENET)
    # The factor is 0.2 * 61470 / 867 = 14.2 at first: 241 of conv1's 150, and 1333 of fc3's 840.
    sizes = {name: sum(shape) for name, shape in LENET.items()}
    numel = {name: math.prod(shape) for name, shape in LENET.items()}
    full = [name for name in LENET if densities[name] == 1]
    rest = [name for name in LENET if densities[name] < 1]
    assert full == ["conv1", "fc3"]
    factors = [densities[name] * numel[name] / sizes[name] for name in rest]
    assert factors == pytest.approx([factors[0]] * len(rest))
    assert sum(densities[n] * numel[n] for n in LENET) == pytest.approx(0.2 * sum(numel.values()))


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=2, max_size=4), min_size=1, max_size=8),
    st.floats(1e-3, 1.0),
)
def test_erdos_renyi_kernel_meets_the_density_over_all_sites(shapes, density):
    named = {str(i): torch.Size(shape) for i, shape in enumerate(shapes)}
    densities = ErdosRenyiKernel(density).allocate(named)
    assert list(sorted(densities)) == sorted(named)
    assert all(0 < value <= 1 for value in densities.values())
    numel = {name: math.prod(shape) for name, shape in named.items()}
    active = sum(densities[name] * numel[name] for name in named)
    assert active == pytest.approx(density * sum(numel.values()), rel=1e-6)


def test_first_site_can_be_dense():
    assert Uniform(0.1, first_dense=True).allocate(LENET) == {
        "conv1": 1.0,
        "conv2": 0.1,
        "fc1": 0.1,
        "fc2": 0.1,
        "fc3": 0.1,
    }
    assert set(Uniform(0.1).allocate(LENET).values()) == {0.1}


@pytest.mark.parametrize("policy", [Uniform, ErdosRenyiKernel])
@pytest.mark.parametrize("density", [0, 1.5, -0.1, float("nan"), "0.1", None])
def test_density_must_be_a_share(policy, density):
    with pytest.raises(ValueError, match=r"density in \(0, 1\]"):
        policy(density)


def test_guide_allocates_by_policy_among_the_sites_that_can_be_sparse():
    guide = AutoSparseNormal(model, density=ErdosRenyiKernel(0.2))
    guide(torch.randn(5, 30), torch.randn(5, 2))
    k = {name: len(active) for name, active in guide.active_sets.items()}
    # 0.2 * 1280 = 256; v would get 0.2 * 1280 * 42 / 112 = 96 > 80: dense, w the remaining 176.
    assert k == {"w": 176, "b": 40, "v": 80, "sigma": 9}


def test_a_policy_that_says_what_a_number_says_gives_the_same_run():
    x, y = torch.randn(5, 30), torch.randn(5, 2)
    losses = []
    for density in (0.1, Uniform(0.1)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSparseNormal(model, density=density)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        losses.append([svi.step(x, y) for _ in range(3)])
    assert losses[0] == losses[1]


def test_sites_that_a_policy_leaves_out_are_dense():
    class OnlyW:
        def allocate(self, shapes):
            assert shapes == {"w": torch.Size([40, 30]), "v": torch.Size([2, 40])}
            return {"w": 0.5}

    guide = AutoSparseNormal(model, density=OnlyW())
    guide(torch.randn(5, 30), torch.randn(5, 2))
    assert len(guide.active_sets["w"]) == 600
    assert len(guide.active_sets["v"]) == 80


def test_a_policys_mistake_names_the_site():
    class TooMuch:
        def allocate(self, shapes):
            return dict.fromkeys(shapes, 2.0)

    guide = AutoSparseNormal(model, density=TooMuch())
    with pytest.raises(ValueError, match=r"density of site 'w' in \(0, 1\], got 2.0"):
        guide(torch.randn(5, 30), torch.randn(5, 2))


def test_guide_with_a_policy_loads_and_goes_on(tmp_path):
    x, y = torch.randn(5, 30), torch.randn(5, 2)

    def make():
        pyro.clear_param_store()
        guide = AutoSparseNormal(model, density=ErdosRenyiKernel(0.2))
        optim = pyro.optim.Adam({"lr": 0.01})
        return guide, SSVI(model, guide, optim, pyro.infer.Trace_ELBO())

    guide, svi = make()
    svi.step(x, y)
    svi.save(tmp_path / "file")
    expected = svi.step(x, y)
    again, svi = make()
    svi.load(tmp_path / "file")
    assert svi.step(x, y) == expected
    assert again.active_sets["w"].same(guide.active_sets["w"])
