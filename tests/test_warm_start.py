import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
)
from pyro_ssvi.nn import bayesianize

torch.manual_seed(0)
X, Y = torch.randn(30, 12), torch.randn(30)


@pytest.fixture(autouse=True)
def local_params():
    with pyro.settings.context(module_local_params=True):
        yield


def model(x, y=None):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([5, 12]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(torch.tanh(x @ w.T) @ v, tau), obs=y)


def fitted(kind):
    pyro.set_rng_seed(0)
    guide = kind(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(50):
        svi.step(X, Y)
    return guide


def test_full_density_takes_over_a_dense_posterior():
    dense = fitted(AutoNormal)
    guide = AutoSparseNormal(model, density=1.0)
    guide.warm_start(dense, X, Y)
    q = [0.1, 0.5, 0.9]
    for name, values in dense.quantiles(q).items():
        torch.testing.assert_close(guide.quantiles(q)[name], values)


def test_active_become_the_largest_in_standard_deviations():
    dense = fitted(AutoNormal)
    guide = AutoSparseNormal(model, density=0.25)
    guide.warm_start(dense, X, Y)
    snr = (dense.locs.w.abs() / dense.scales.w).detach().flatten()
    expected = snr.argsort(descending=True)[:15].sort().values
    active = guide.active_sets["w"]
    assert torch.equal(active.indices, expected)
    q = guide.posterior()["w"]
    torch.testing.assert_close(q.loc, dense.locs.w.detach().flatten()[expected])
    torch.testing.assert_close(q.scale, dense.scales.w.detach().flatten()[expected])


def test_from_a_map_estimate_scales_stay():
    delta = fitted(AutoDelta)
    guide = AutoSparseNormal(model, density=0.25, init_scale=0.02)
    guide.warm_start(delta, X, Y)
    median = guide.median()
    torch.testing.assert_close(median["tau"], delta.median()["tau"].detach())
    w = delta.median()["w"].detach()
    kept = median["w"] != 0
    assert int(kept.sum()) == 15
    assert torch.equal(median["w"][kept], w[kept])
    assert w[kept].abs().min() >= w[~kept].abs().max()
    torch.testing.assert_close(guide.scale.detach(), torch.full_like(guide.scale, 0.02))


def test_from_a_trained_network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    before = net(X).detach()
    bayesian = bayesianize(net, 1.0)

    def model(x, y=None):
        mean = bayesian(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    guide = AutoSparseNormal(model, density=1.0)
    guide.warm_start({f"net.{key}": weights[key] for key in bayesian.shapes}, X, Y)
    after = pyro.poutine.condition(bayesian, guide.median())(X)
    torch.testing.assert_close(after, before)


def mean_loss(svi):
    return sum(svi.evaluate_loss(X, Y) for _ in range(20)) / 20


def test_training_goes_on_from_there():
    dense = fitted(AutoNormal)
    guide = AutoSparseNormal(model, density=0.5)
    guide.warm_start(dense, X, Y)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    first = mean_loss(svi)
    for _ in range(100):
        svi.step(X, Y)
    svi.exchange(X, Y, share=0.3)
    cold = AutoSparseNormal(model, density=0.5)
    cold(X, Y)
    start = SSVI(model, cold, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert first < mean_loss(start)
    assert mean_loss(svi) < first


def sparse(kind=AutoSparseNormal, density=0.25, steps=60, **options):
    """A trained sparse guide; after its last exchange it has coordinates at exactly 0."""
    pyro.set_rng_seed(0)
    guide = kind(model, density=density, **options)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(X, Y)
    svi.exchange(X, Y, share=0.2)
    return guide


KINDS = [AutoSparseNormal, AutoSparseDelta, AutoSparseLowRankMultivariateNormal]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_guide_gives_its_active_set_locations_and_scales(kind):
    source = sparse(kind)
    assert int((source.median()["w"] != 0).sum()) == 12  # of 15: three are new
    pyro.set_rng_seed(7)
    guide = AutoSparseNormal(model, density=0.25, init_scale=0.02)
    guide.warm_start(source, X, Y)
    for name, active in source.active_sets.items():
        assert torch.equal(guide.active_sets[name].indices, active.indices)
        torch.testing.assert_close(guide.median()[name], source.median()[name])
    loc, scale = source.marginals(*source.flat_parameters())
    expected = scale if kind is not AutoSparseDelta else torch.full_like(loc, 0.02)
    torch.testing.assert_close(guide.scale, expected)


def test_a_denser_guide_keeps_the_sources_function_and_its_own_coordinates():
    source = sparse()
    pyro.set_rng_seed(7)
    guide = AutoSparseNormal(model, density=0.5, init_scale=0.02)
    guide(X, Y)
    own = guide.active_sets["w"]
    guide.warm_start(source)
    theirs, active = source.active_sets["w"], guide.active_sets["w"]
    carried = torch.isin(active.indices, theirs.indices)
    assert int(carried.sum()) == len(theirs) == 15
    assert len(active) == 30
    assert torch.isin(active.indices[~carried], own.indices).all()
    torch.testing.assert_close(guide.median()["w"], source.median()["w"])
    q = guide.posterior()["w"]
    torch.testing.assert_close(q.scale[carried], source.posterior()["w"].scale)
    torch.testing.assert_close(q.scale[~carried], torch.full((15,), 0.02))


def test_a_sparser_guide_takes_the_surest():
    source = sparse()
    guide = AutoSparseNormal(model, density=0.1)
    guide.warm_start(source, X, Y)
    q = source.posterior()["w"]
    best = (q.loc.abs() / q.scale).argsort(descending=True)[:6]
    expected = source.active_sets["w"].indices[best].sort().values
    assert torch.equal(guide.active_sets["w"].indices, expected)


@pytest.mark.parametrize("density", [0.25, 0.4, 1.0])
def test_a_network_with_exact_zeros_gives_its_weights(density):
    """As pruning or RigL leave it."""
    torch.manual_seed(2)
    w = torch.zeros(60)
    nonzero = torch.randperm(60)[:11].sort().values
    w[nonzero] = torch.randn(11)
    w[nonzero[0]] = 1e-30  # not 0
    w = w.reshape(5, 12)
    guide = AutoSparseNormal(model, density=density)
    guide.warm_start({"w": w}, X, Y)
    assert torch.equal(guide.median()["w"], w)
    active = guide.active_sets["w"].indices
    assert torch.isin(nonzero, active).all()
    rest = active[~torch.isin(active, nonzero)]
    assert len(active) == round(density * 60)
    if density == 0.4:  # spread over the rows, and not the first zeros there are
        assert len((rest // 12).unique()) >= 3


def test_training_goes_on_from_a_sparse_guide():
    source = sparse(steps=150)
    guide = AutoSparseNormal(model, density=0.5)
    guide.warm_start(source, X, Y)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    first = mean_loss(svi)
    for _ in range(100):
        svi.step(X, Y)
    svi.exchange(X, Y, share=0.3)
    assert mean_loss(svi) < first


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"w": torch.zeros(5, 11)}, r"site 'w' has shape \(5, 12\).*\(5, 11\)"),
        ({"w": torch.ones(5, 12), "x": torch.zeros(1)}, r"the source has \['x'\]"),
        (AutoNormal(model), "AutoNormal to start from has not seen data"),
        (AutoSparseDelta(model), "AutoSparseDelta to start from has not seen data"),
    ],
)
def test_what_does_not_fit_changes_nothing(source, message):
    guide = AutoSparseNormal(model, density=0.25)
    guide(X, Y)
    before = guide.median()
    with pytest.raises(ValueError, match=message):
        guide.warm_start(source)
    for name, value in guide.median().items():
        assert torch.equal(value, before[name])
