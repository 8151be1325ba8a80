"""Losses against closed forms, and against dense tensors limited to the active coordinates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    SVI,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch.distributions import kl_divergence
from twins import KINDS, brute_force_loss, each, randomise

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, SubspaceModel

PRIOR, NOISE = 1.5, 0.7
NEVER = ConstantSchedule(every=10**6)
VECTORISED = {"vectorize_particles": True, "max_plate_nesting": 1}

torch.manual_seed(0)
correlated = torch.randn(15, 6) + torch.randn(15, 1)
orthogonal = torch.linalg.qr(torch.randn(15, 6)).Q * torch.arange(1.0, 7.0)
y = correlated @ torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -2.0]) + 0.3 * torch.randn(15)


def regression(x, y=None):
    """Linear and Gaussian; with the weights as they come, or with a particle dimension."""
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([1, 6]).to_event(2))
    mean = F.linear(x, w).squeeze(-1) if w.dim() == 2 else (w * x.unsqueeze(-2)).sum((-1, -2))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)


def guide_for(x, density=0.5, model=regression):
    guide = AutoSparseNormal(model, density=density)
    guide(x, y)
    pyro.clear_param_store()
    return guide


def columns(guide, x):
    return x[:, guide.active_sets["w"].indices]


def posterior_given(x):
    """Precision, mean and log evidence of the regression on these columns."""
    precision = x.t() @ x / NOISE**2 + torch.eye(x.shape[1]) / PRIOR**2
    mean = torch.linalg.solve(precision, x.t() @ y / NOISE**2)
    covariance = NOISE**2 * torch.eye(len(y)) + PRIOR**2 * x @ x.t()
    evidence = dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y)
    return precision, mean, evidence.item()


def expected_loss(loc, scale, x):
    """The negative ELBO of independent normals, in closed form."""
    fit = (y - x @ loc).square().sum() + (scale.square() * x.square().sum(0)).sum()
    likelihood = -0.5 * fit / NOISE**2 - len(y) * math.log(NOISE * (2 * math.pi) ** 0.5)
    return kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, PRIOR)).sum() - likelihood


EXACT = {
    "Trace": Trace_ELBO(),
    "Trace, particles": Trace_ELBO(num_particles=3),
    "Trace, vectorised": Trace_ELBO(num_particles=3, **VECTORISED),
    "TraceGraph": TraceGraph_ELBO(),
    "TraceGraph, particles": TraceGraph_ELBO(num_particles=3),
    "TraceGraph, vectorised": TraceGraph_ELBO(num_particles=3, **VECTORISED),
    "Renyi": RenyiELBO(alpha=0.5, num_particles=3),
    "Renyi, vectorised": RenyiELBO(alpha=2.0, num_particles=3, **VECTORISED),
    "importance weighted": RenyiELBO(num_particles=3),
    "wake-sleep": ReweightedWakeSleep(num_particles=3, vectorize_particles=False),
    "wake-sleep, vectorised": ReweightedWakeSleep(num_particles=3, **VECTORISED),
}


@pytest.mark.parametrize("loss", **each(EXACT))
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_at_the_posterior_every_draw_gives_the_evidence(loss, density):
    """With orthogonal columns the guide can be the posterior of the active coordinates."""
    guide = guide_for(orthogonal, density)
    precision, mean, evidence = posterior_given(columns(guide, orthogonal))
    guide.loc, guide.scale = mean, precision.diagonal().rsqrt()
    svi = SSVI(regression, guide, pyro.optim.Adam({}), loss, addition="random")
    found = svi.evaluate_loss(orthogonal, y)
    found = found[0] if isinstance(found, tuple) else found
    assert found == pytest.approx(-evidence, abs=1e-3)


UNBIASED = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
}


@pytest.mark.parametrize("loss", **each(UNBIASED))
def test_loss_and_gradient_are_the_closed_form_on_average(loss):
    guide = guide_for(correlated)
    randomise(guide)
    svi = SVI(
        SubspaceModel(regression), guide, pyro.optim.Adam({}), loss(num_particles=200, **VECTORISED)
    )
    estimates = []
    for _ in range(20):
        guide.zero_grad()
        value = svi.loss_and_grads(svi.model, guide, correlated, y)
        grads = [param.grad for param in guide.parameters()]
        estimates.append(torch.cat([torch.tensor([value]), *grads]))
    estimates = torch.stack(estimates)
    guide.zero_grad()
    expected = expected_loss(guide.loc, guide.scale, columns(guide, correlated))
    expected.backward()
    expected = torch.cat([expected.detach().reshape(1), *(p.grad for p in guide.parameters())])
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() < 4.5 * error + 1e-4).all()


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_training_finds_the_best_independent_normals(loss):
    """The mean of the posterior, and the reciprocal of the diagonal of its precision."""
    guide = guide_for(correlated)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99, "betas": (0.9, 0.99)})
    svi = SSVI(regression, guide, optim, loss(), schedule=NEVER)
    for _ in range(350):
        svi.step(correlated, y)
    precision, mean, _ = posterior_given(columns(guide, correlated))
    std = precision.diagonal().rsqrt()
    assert ((guide.loc - mean).abs() < 0.3 * std).all()
    torch.testing.assert_close(guide.scale.detach(), std, rtol=0.1, atol=0)


# Draw by draw, against dense tensors


def log_weights(guide, n, *args, model=regression):
    pyro.set_rng_seed(5)
    return -torch.stack([brute_force_loss(model, guide, *args) for _ in range(n)])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
def test_renyi(alpha):
    guide = guide_for(correlated)
    randomise(guide)
    power = (1 - alpha) * log_weights(guide, 4, correlated, y)
    expected = -(power.logsumexp(0) - math.log(4)) / (1 - alpha)
    pyro.set_rng_seed(5)
    svi = SSVI(regression, guide, pyro.optim.Adam({}), RenyiELBO(alpha=alpha, num_particles=4))
    assert svi.evaluate_loss(correlated, y) == pytest.approx(expected.item(), rel=1e-5)


def test_wake_sleep():
    """Wake-theta is the importance-weighted bound, wake-phi the cross entropy by its weights."""
    guide = guide_for(correlated)
    randomise(guide)
    weights = log_weights(guide, 4, correlated, y)
    pyro.set_rng_seed(5)
    q = [poutine.trace(guide).get_trace(correlated, y).log_prob_sum() for _ in range(4)]
    pyro.set_rng_seed(5)
    loss = ReweightedWakeSleep(num_particles=4, vectorize_particles=False)
    svi = SSVI(regression, guide, pyro.optim.Adam({}), loss, addition="random")
    wake_theta, wake_phi = svi.evaluate_loss(correlated, y)
    assert wake_theta == pytest.approx(math.log(4) - weights.logsumexp(0).item(), rel=1e-5)
    expected = -(weights.softmax(0) * torch.stack(q)).sum()
    assert wake_phi == pytest.approx(expected.item(), rel=1e-4)


def test_wake_sleep_trains():
    guide = guide_for(correlated)
    optim = pyro.optim.Adam({"lr": 0.05})
    loss = ReweightedWakeSleep(num_particles=5, **VECTORISED)
    svi = SSVI(regression, guide, optim, loss, addition="random", schedule=NEVER)
    losses = [svi.step(correlated, y)[0] for _ in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert svi.exchange(correlated, y, share=0.4) == {"w": 1}


def test_a_sleep_phase_is_refused():
    """Its draws from the prior have density 0 under a sparse guide."""
    loss = ReweightedWakeSleep(num_particles=2, insomnia=0.5)
    for guide in (AutoNormal(regression), AutoSparseNormal(regression, density=1.0)):
        SSVI(regression, guide, pyro.optim.Adam({}), loss)
    with pytest.raises(ValueError, match=r"use insomnia=1.0"):
        SSVI(regression, AutoSparseNormal(regression), pyro.optim.Adam({}), loss)


def test_wake_sleep_has_no_gradient_to_exchange_by():
    """Without a word, no coordinate would ever be exchanged."""
    with pytest.raises(ValueError, match="use addition='random'"):
        SSVI(
            regression,
            AutoSparseNormal(regression),
            pyro.optim.Adam({}),
            ReweightedWakeSleep(num_particles=2),
        )


@pytest.mark.parametrize("kind", **each(KINDS))
def test_tail_adaptive(kind):
    """Its loss is always reported as infinite, and yet it trains."""
    guide = kind(regression)
    loss = TraceTailAdaptive_ELBO(num_particles=5, **VECTORISED)
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    svi.step(correlated, y)
    first = Trace_ELBO(num_particles=20, **VECTORISED).loss(svi.model, guide, correlated, y)
    for _ in range(40):
        assert svi.step(correlated, y) == math.inf
    last = Trace_ELBO(num_particles=20, **VECTORISED).loss(svi.model, guide, correlated, y)
    assert last < first


def plated(x, y=None):
    """Weights in plates, with or without a dimension of particles."""
    with pyro.plate("columns", 4, dim=-1):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, scale))
    with pyro.plate("others", 3, dim=-1):
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    total = w.sum((-1, -2), keepdim=True) + v.sum(-1).sum(-1, keepdim=True)
    pyro.factor("fit", -(total - 1).square().reshape(total.shape if total.dim() > 2 else ()))


@pytest.mark.parametrize("loss", **each(UNBIASED))
def test_vectorised_particles_beside_plates(loss):
    guide = guide_for(correlated, 0.4, plated)
    randomise(guide)
    model = SubspaceModel(plated)
    one = torch.tensor([loss().loss(model, guide, correlated) for _ in range(80)])
    many = loss(num_particles=3000, vectorize_particles=True, max_plate_nesting=2)
    found = many.loss(model, guide, correlated)
    error = one.std() * (1 / 80 + 1 / 3000) ** 0.5
    assert abs(one.mean() - found) < 4.5 * error


# Enumeration


def mixture(x, y=None):
    """Which of two weights makes a number is summed out, for all of them and for each."""
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([2, 6]).to_event(2))
    flip = pyro.sample("flip", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    means = F.linear(x, w)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.6), infer={"enumerate": "parallel"})
        mean = torch.where(k == flip, means[:, 0], means[:, 1])
        return pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_sites_enumerated_in_the_model(density):
    guide = guide_for(correlated, density, poutine.block(mixture, hide=["flip", "k"]))
    randomise(guide)
    svi = SSVI(mixture, guide, pyro.optim.Adam({}), TraceEnum_ELBO(max_plate_nesting=1))
    pyro.set_rng_seed(5)
    found = svi.evaluate_loss(correlated, y)

    pyro.set_rng_seed(5)
    w, active = guide(correlated, y)["w"] + 0, guide.active_sets["w"]
    q = guide.posterior()["w"]
    log_q = dist.Normal(active.scatter(guide.loc), active.scatter(guide.scale - 1) + 1).log_prob(w)
    divergence = (log_q - dist.Normal(0.0, PRIOR).log_prob(w))[active.mask].sum()
    parts = []
    for flip, log_p in ((0.0, math.log(0.7)), (1.0, math.log(0.3))):
        same = dist.Bernoulli(0.6).log_prob(torch.tensor(flip))
        other = dist.Bernoulli(0.6).log_prob(torch.tensor(1 - flip))
        each_k = dist.Normal(correlated @ w.t(), NOISE).log_prob(y.unsqueeze(-1))
        each_k = each_k + torch.stack([same, other])
        parts.append(log_p + each_k.logsumexp(-1).sum())
    expected = divergence - torch.stack(parts).logsumexp(0)
    assert q.event_shape == (2, 6)
    assert found == pytest.approx(expected.item(), rel=1e-5)


class Beside(PyroModule):
    """A sparse guide, beside one of a discrete site."""

    def __init__(self, model, infer):
        super().__init__()
        self.weights = AutoSparseNormal(poutine.block(model, hide=["flip"]), density=0.5)
        self.logit = torch.nn.Parameter(torch.tensor(0.3))
        self.infer = infer

    def forward(self, x, y=None):
        self.weights(x, y)
        pyro.sample("flip", dist.Bernoulli(logits=self.logit), infer=self.infer)


def which(x, y=None):
    """All numbers are made from one of two weights."""
    w = pyro.sample("w", dist.Normal(0.0, PRIOR).expand([2, 6]).to_event(2))
    flip = pyro.sample("flip", dist.Bernoulli(0.3))
    sums = F.linear(x, w).sum(0)
    mean = torch.where(flip == 1, sums[0], sums[1])
    pyro.sample("obs", dist.Normal(mean, NOISE), obs=y.sum())


def test_sites_enumerated_in_the_guide():
    """In parallel and one after the other: the same sum, and that by hand."""
    losses = []
    for how in ("parallel", "sequential"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = Beside(which, {"enumerate": how})
        loss = TraceEnum_ELBO(max_plate_nesting=0)
        svi = SSVI(which, guide, pyro.optim.SGD({"lr": 0.0}), loss)
        svi.step(correlated, y)
        pyro.set_rng_seed(5)
        losses.append(svi.step(correlated, y))
    terms = []
    for flip in (0.0, 1.0):
        model = poutine.condition(which, data={"flip": torch.tensor(flip)})
        pyro.set_rng_seed(5)
        log_q = dist.Bernoulli(logits=svi.guide.logit).log_prob(torch.tensor(flip))
        term = brute_force_loss(model, svi.guide.weights, correlated, y) + log_q
        terms.append((log_q.exp() * term).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(sum(terms), rel=1e-5)


def test_discrete_sites_by_score_function():
    """TraceGraph_ELBO takes what is drawn and not enumerated."""
    guide = Beside(which, {})
    svi = SSVI(which, guide, pyro.optim.Adam({"lr": 0.02}), TraceGraph_ELBO(), schedule=NEVER)
    losses = [svi.step(correlated, y) for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert svi.exchange(correlated, y, share=0.5) == {"w": 3}


def test_tensor_monte_carlo():
    """A discrete site is drawn several times beside one draw of the weights."""
    guide = guide_for(correlated, 0.5, poutine.block(mixture, hide=["flip", "k"]))
    model = config_enumerate(mixture, default="parallel", num_samples=4)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceTMC_ELBO(max_plate_nesting=1))
    losses = [svi.step(correlated, y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


# Losses that are no ELBO


def test_a_function_as_loss():
    """As SVI takes it: what it gives is differentiated."""
    losses = []
    for loss in (Trace_ELBO(), Trace_ELBO().differentiable_loss):
        guide = AutoSparseNormal(regression, density=0.5)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
        losses.append([svi.step(correlated, y) for _ in range(5)])
        assert svi.exchange(correlated, y, share=0.4) == {"w": 1}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_function_that_leaves_gradients():
    def loss_and_grads(model, guide, *args):
        loss = Trace_ELBO().differentiable_loss(model, guide, *args)
        (2 * loss).backward()
        return loss

    guide = AutoSparseNormal(regression, density=0.5)
    loss = Trace_ELBO().loss
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = SSVI(regression, guide, optim, loss, loss_and_grads=loss_and_grads)
    losses = [svi.step(correlated, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("kind", **each(KINDS))
def test_maximum_mean_discrepancy(kind):
    """Compares draws of the guide with draws of the prior, and sees the zeros as they are."""
    guide = kind(regression)
    loss = Trace_MMD(kernel=RBF(6), num_particles=8, **VECTORISED)
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    losses = [svi.step(correlated, y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("kind", **each(KINDS))
def test_energy_distance(kind):
    guide = kind(regression)
    guide(correlated, y)
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), EnergyDistance(num_particles=4))
    if kind is KINDS["density=0.3"]:
        with pytest.raises(RuntimeError, match="register_hook would change a copy"):
            svi.step(correlated, y)
    else:
        assert math.isfinite(svi.step(correlated, y))
