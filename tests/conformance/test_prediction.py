"""Predictions have the shapes that AutoNormal gives them, and are plain dense tensors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    EmpiricalMarginal,
    Importance,
    Predictive,
    Trace_ELBO,
    WeighedPredictive,
)
from pyro.infer.autoguide import init_to_value
from pyro.infer.importance import psis_diagnostic
from pyro.nn import PyroModule, PyroSample
from twins import KINDS, brute_force_loss, each, fresh, match, randomise, twins

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, SparseTensor, SubspaceModel

torch.manual_seed(0)
x, y = torch.randn(9, 4), torch.randn(9)


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("twice", 2 * w, event_dim=2)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(F.linear(x, w).sum(-1), sigma), obs=y)


def batched(x, y=None):
    """For values with leading dimensions of samples."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("twice", 2 * w, event_dim=2)
    mean = (w.sum(-2, keepdim=True) * x).sum(-1).reshape(-1, len(x)).squeeze(0)
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def shapes(samples):
    assert all(type(value) is torch.Tensor for value in samples.values())
    return {name: tuple(value.shape) for name, value in samples.items()}


def seen(kind, model):
    guide = kind(model)
    guide(x, y)
    return guide


@pytest.mark.parametrize("kind", **each(KINDS))
def test_samples(kind):
    samples = Predictive(linear, guide=seen(kind, linear), num_samples=5)(x)
    assert shapes(samples) == {
        "w": (5, 1, 3, 4),
        "sigma": (5, 1),
        "twice": (5, 1, 3, 4),
        "obs": (5, 9),
    }
    assert torch.equal(samples["twice"], 2 * samples["w"])


@pytest.mark.parametrize("kind", **each(KINDS))
def test_parallel_samples(kind):
    found = []
    for each_kind in (KINDS["AutoNormal"], kind):
        fresh()
        guide = seen(each_kind, batched)
        samples = Predictive(batched, guide=guide, num_samples=5, parallel=True)(x)
        assert samples["obs"].numel() == 45
        found.append(shapes(samples))
    assert found[1] == found[0]


@pytest.mark.parametrize("parallel", [False, True])
def test_samples_have_the_guide_s_zeros_and_moments(parallel):
    dense, sparse = twins(batched, x, y)
    randomise(dense)
    match(dense, sparse)
    pyro.clear_param_store()
    guide = AutoSparseNormal(batched, density=0.3)
    guide(x, y)
    match(dense, guide)
    pyro.clear_param_store()
    w = Predictive(batched, guide=guide, num_samples=400, parallel=parallel)(x)["w"].squeeze(1)
    mask = guide.active_sets["w"].mask
    assert (w[:, ~mask] == 0).all()
    loc, scale = dense._get_loc_and_scale("w")
    assert ((w.mean(0) - loc)[mask].abs() < 4.5 * scale[mask] / 20).all()
    assert (w.std(0)[mask] / scale[mask] - 1).abs().max() < 0.2


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("sites", [("obs",), ("w", "obs"), ("twice", "_RETURN"), ()])
def test_chosen_sites(kind, sites):
    guide = seen(kind, linear)
    samples = Predictive(linear, guide=guide, num_samples=5, return_sites=sites)(x)
    assert set(shapes(samples)) == set(sites or ("w", "sigma", "twice", "obs"))


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("parallel", [False, True])
def test_the_guide_itself(kind, parallel):
    """Samples without a model: as many as one likes, ready to be used again."""
    guide = seen(kind, linear)
    posterior = Predictive(guide, num_samples=5, parallel=parallel)(x, y)
    posterior = {name: posterior[name] for name in ("w", "sigma")}
    assert shapes(posterior)["w"] == (5, 3, 4)
    again = Predictive(linear, posterior_samples=posterior)(x)
    assert shapes(again)["obs"] == (5, 9)
    assert torch.equal(again["twice"].squeeze(1), 2 * posterior["w"])


@pytest.mark.parametrize("kind", **each(KINDS))
def test_calls_of_the_guide_as_posterior_samples(kind):
    guide = seen(kind, linear)
    with torch.no_grad():
        draws = [guide(x) for _ in range(4)]
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    assert shapes(stacked) == {"w": (4, 3, 4), "sigma": (4,)}
    assert shapes(Predictive(linear, posterior_samples=stacked)(x))["obs"] == (4, 9)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_vectorized_trace(kind):
    guide = seen(kind, batched)
    predictive = Predictive(batched, guide=guide, num_samples=5, parallel=True)
    trace = predictive.get_vectorized_trace(x)
    assert trace.nodes["obs"]["value"].numel() == 45


@pytest.mark.parametrize("kind", **each(KINDS))
def test_median_as_a_prediction(kind):
    """The median conditions a model: the plug-in prediction."""
    guide = seen(kind, linear)
    median = guide.median(x)
    trace = poutine.trace(poutine.condition(linear, data=median)).get_trace(x)
    expected = F.linear(x, median["w"]).sum(-1)
    torch.testing.assert_close(trace.nodes["obs"]["fn"].mean, expected)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_local_latents(kind):
    """Their plate may have another size in prediction, once the guide's plates are made so."""
    data = torch.randn(20, 3)

    def model(batch, full=True):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        with pyro.plate("rows", 20, subsample=batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            mean = (z.unsqueeze(-2) * w).sum(-1)
            obs = data[batch] if full else None
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=obs)

    guide = kind(model, create_plates=lambda i, full=True: pyro.plate("rows", 20, subsample=i))
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(torch.arange(5))
    samples = Predictive(model, guide=guide, num_samples=4)(torch.arange(2, 10), full=False)
    assert shapes(samples)["obs"] == (4, 8, 3)


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](4, 3)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x, y=None):
        mean = self.norm(self.first(x)).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        return mean


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_network_in_eval_mode(kind):
    net = Net()
    svi = SSVI(net, kind(net), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    net.eval()
    before = net.norm.running_mean.clone()
    sites = ("_RETURN", "first.weight")
    samples = Predictive(net, guide=svi.guide, num_samples=6, return_sites=sites)(x[:2])
    assert shapes(samples) == {"_RETURN": (6, 2), "first.weight": (6, 1, 3, 4)}
    assert torch.equal(net.norm.running_mean, before)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_new_inputs_after_training(kind):
    guide = kind(linear)
    schedule = ConstantSchedule(every=3, fraction=0.5)
    svi = SSVI(linear, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), schedule=schedule)
    for _ in range(7):
        svi.step(x, y)
    samples = Predictive(svi.model, guide=guide, num_samples=3)(torch.randn(2, 4))
    assert shapes(samples)["obs"] == (3, 2)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_no_gradient(kind):
    guide = seen(kind, linear)
    samples = Predictive(linear, guide=guide, num_samples=3)(x)
    assert not any(value.requires_grad for value in samples.values())
    with torch.no_grad():
        value = guide(x)["w"]
        assert not F.linear(x, value).requires_grad


def test_samples_of_a_sparse_guide_are_sparse_until_they_are_stacked():
    guide = seen(KINDS["density=0.3"], linear)
    draws = [guide(x)["w"].detach() for _ in range(2)]
    assert all(isinstance(draw, SparseTensor) for draw in draws)
    assert type(torch.stack(draws)) is torch.Tensor


# Importance weights


def test_weighed_samples():
    """Their weights are the restricted model's density over the guide's."""
    guide = seen(KINDS["density=0.3"], linear)
    model = SubspaceModel(linear)
    pyro.set_rng_seed(2)
    result = WeighedPredictive(model, guide=guide, num_samples=3)(x, model_guide=model)
    assert result.log_weights.shape == (3,)
    assert shapes(result.samples)["w"] == (3, 1, 3, 4)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_importance(kind):
    guide = seen(kind, linear)
    importance = Importance(SubspaceModel(linear), guide, num_samples=20)
    pyro.set_rng_seed(2)
    importance.run(x, y)
    if kind is not KINDS["AutoNormal"]:
        pyro.set_rng_seed(2)
        expected = -torch.stack([brute_force_loss(linear, guide, x, y) for _ in range(20)])
        torch.testing.assert_close(torch.stack(importance.log_weights), expected)
    assert EmpiricalMarginal(importance, "w").mean.shape == (3, 4)
    assert 1 <= importance.get_ESS() <= 20


@pytest.mark.parametrize("kind", **each(KINDS))
def test_psis_diagnostic(kind):
    guide = seen(kind, batched)
    k = psis_diagnostic(SubspaceModel(batched), guide, x, y, num_particles=50, max_plate_nesting=1)
    assert k < 3


@pytest.mark.parametrize("kind", **each(KINDS))
def test_start_of_a_markov_chain(kind):
    median = seen(kind, linear).median()
    kernel = NUTS(linear, init_strategy=init_to_value(values=median), max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=1, disable_progbar=True)
    mcmc.run(x, y)
    assert shapes(mcmc.get_samples())["w"] == (2, 3, 4)
