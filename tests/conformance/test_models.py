"""Whatever the model is made of, the loss is that of dense tensors limited to the active set."""

import math

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import (
    DiscreteCosineReparam,
    LocScaleReparam,
    StudentTReparam,
    TransformReparam,
)
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from twins import KINDS, brute_force_loss, each, match, randomise, twins

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, SubspaceModel

torch.manual_seed(0)
x, y = torch.randn(15, 6), torch.randn(15)
counts = torch.arange(15) % 4


def observe(mean, scale=0.5):
    with pyro.plate("data", len(mean)):
        pyro.sample("obs", dist.Normal(mean, scale), obs=y[: len(mean)])


def weights(name, shape, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale).expand(shape).to_event(len(shape)))


# Priors of priors


def half_cauchy():
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    observe(F.linear(x, weights("w", (1, 6), scale=tau)).squeeze(-1))


def gamma_precision():
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    observe(F.linear(x, weights("w", (1, 6), mean, precision.rsqrt())).squeeze(-1))


def scale_for_each_row():
    rows = pyro.sample("rows", dist.InverseGamma(3.0, 1.0).expand([4, 1]).to_event(2))
    w = pyro.sample("w", dist.Normal(0.0, rows).expand([4, 6]).to_event(2))
    observe(F.linear(x, w).sum(-1))


def horseshoe():
    tau = pyro.sample("tau", dist.HalfCauchy(0.1))
    local = pyro.sample("local", dist.HalfCauchy(1.0).expand([2, 6]).to_event(2))
    w = pyro.sample("w", dist.Normal(0.0, tau * local).to_event(2))
    observe(F.linear(x, w).sum(-1))


def regularised_horseshoe():
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 2.0))
    local = pyro.sample("local", dist.HalfCauchy(1.0).expand([1, 6]).to_event(2))
    scale = (slab * local.square() / (slab + local.square())).sqrt()
    w = pyro.sample("w", dist.Normal(0.0, scale).to_event(2))
    observe((x @ w.t()).squeeze(-1))


def other_families():
    """The last is not given by a parameter for each element."""
    a = pyro.sample("a", dist.Laplace(0.0, 0.5).expand([2, 6]).to_event(2))
    b = pyro.sample("b", dist.StudentT(3.0, 0.0, 0.5).expand([2, 6]).to_event(2))
    stretch = dist.transforms.AffineTransform(0.1, 0.5)
    fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([2, 6]), stretch)
    observe(F.linear(x, a + b + pyro.sample("c", fn.to_event(2))).sum(-1))


def chain_of_weights():
    """A sparse site that is the mean of another's prior."""
    w = weights("w", (2, 6))
    v = pyro.sample("v", dist.Normal(w, 0.3).to_event(2))
    observe(F.linear(x, v).sum(-1))


# Plates


def plate_of_rows():
    with pyro.plate("rows", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    observe(F.linear(x, w, b).sum(-1))


def plates_of_rows_and_columns():
    with pyro.plate("columns", 6, dim=-1):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, scale))
    observe(F.linear(x, w).sum(-1))


def groups():
    """Each group of data has a row of the weights."""
    with pyro.plate("groups", 4):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 6]).to_event(1))
    observe((w[counts] * x).sum(-1))


def subsampled_data():
    w = weights("w", (2, 6))
    with pyro.plate("data", 15, subsample_size=5) as i:
        pyro.sample("obs", dist.Normal(F.linear(x[i], w).sum(-1), 0.5), obs=y[i])


def subsampled_latents():
    w = weights("w", (6, 3))
    with pyro.plate("data", 15, subsample_size=5) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([5, 3]).to_event(1))
        pyro.sample("obs", dist.Normal(F.linear(z, w), 0.5).to_event(1), obs=x[i])


# Handlers


def scaled():
    with poutine.scale(scale=0.2):
        w = weights("w", (2, 6))
    observe(F.linear(x, w).sum(-1))


def masked():
    """A mask for each row of a plated site."""
    some = poutine.mask(mask=torch.tensor([True, False, True]))
    with some, pyro.plate("rows", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(1))
    observe(F.linear(x, w).sum(-1))


def conditioned():
    v = poutine.condition(weights, data={"v": torch.ones(2, 6)})("v", (2, 6))
    observe(F.linear(x, weights("w", (2, 6)) + v).sum(-1))


def hidden():
    """The guide does not see it: the model draws it anew each time."""
    with poutine.block(hide=["noise"]):
        noise = pyro.sample("noise", dist.Delta(torch.tensor(0.1)))
    observe(F.linear(x, weights("w", (1, 6))).squeeze(-1) + noise)


def decentred():
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    config = {"w": LocScaleReparam(0.0), "v": LocScaleReparam(0.5)}
    with poutine.reparam(config=config):
        w, v = weights("w", (2, 6), 0.3, tau), weights("v", (2, 6), 0.0, tau)
    observe(F.linear(x, w + v).sum(-1))


def affine():
    """The base of a transformed site is sparse, whatever the site itself is."""
    with poutine.reparam(config={"w": TransformReparam()}):
        fn = dist.TransformedDistribution(
            dist.Normal(0.0, 1.0).expand([2, 6]), dist.transforms.AffineTransform(0.1, 2.0)
        )
        w = pyro.sample("w", fn.to_event(2))
    observe(F.linear(x, w).sum(-1))


def auxiliary_gammas():
    with poutine.reparam(config={"w": StudentTReparam()}):
        w = pyro.sample("w", dist.StudentT(3.0, 0.0, 1.0).expand([2, 6]).to_event(2))
    observe(F.linear(x, w).sum(-1))


def cosines():
    """In the frequency domain elements are not independent: the site is dense beside weights."""
    with poutine.reparam(config={"drift": DiscreteCosineReparam(dim=-2)}):
        drift = weights("drift", (15, 2), scale=0.1)
    observe(F.linear(x, weights("w", (2, 6))).sum(-1) + drift.cumsum(-2).sum(-1))


def lifted():
    def parameters():
        observe(F.linear(x, pyro.param("w", torch.zeros(2, 6))).sum(-1))

    prior = {"w": dist.Normal(0.0, 1.0).expand([2, 6]).to_event(2)}
    poutine.lift(parameters, prior=prior)()


def factor_and_deterministic():
    w = weights("w", (2, 6))
    total = pyro.deterministic("total", F.linear(x, w).sum(-1))
    pyro.factor("smooth", -total.diff().square().sum())
    pyro.deterministic("copy", w, event_dim=2)
    observe(total)


# Time series


def random_walk():
    """Drifts of several series, in a plate of time and one of series."""
    with pyro.plate("series", 2, dim=-1):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("time", 15, dim=-2):
            drift = pyro.sample("drift", dist.Normal(0.0, scale))
    observe(drift.cumsum(-2).sum(-1))


def markov():
    """One row of states after another."""
    states = weights("first", (1, 3))
    transition = weights("transition", (3, 3), scale=0.5)
    means = []
    for t in pyro.markov(range(5)):
        states = states @ transition + pyro.sample(
            f"shock_{t}", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2)
        )
        means.append(states.sum())
    observe(torch.stack(means))


# Shapes and dtypes


def several_event_dims():
    kernel = weights("kernel", (2, 1, 3))
    volume = weights("volume", (2, 2, 2, 2))
    signal = F.conv1d(x.unsqueeze(1), kernel).sum((-1, -2))
    observe(signal + volume.sum())


def batch_and_event():
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3, 4, 6]).to_event(2))
    observe(torch.einsum("...oi,ni->n", w, x))


def double():
    one = torch.ones((), dtype=torch.float64)
    w = pyro.sample("w", dist.Normal(0 * one, one).expand([2, 6]).to_event(2))
    with pyro.plate("data", len(x)):
        mean = F.linear(x.double(), w).sum(-1)
        pyro.sample("obs", dist.Normal(mean, 0.5 * one), obs=y.double())


# Other likelihoods and uses


def used_twice():
    w = weights("w", (6, 6))
    observe(F.linear(F.linear(x, w).tanh(), w).sum(-1))


def tied():
    """An encoder's weight is its decoder's transpose."""
    w = weights("w", (3, 6))
    pyro.sample("obs", dist.Normal(F.linear(x, w) @ w, 0.5).to_event(2), obs=x)


def factorisation():
    u, v = weights("u", (15, 2)), weights("v", (6, 2))
    pyro.sample("obs", dist.Normal(u @ v.t(), 0.5).to_event(2), obs=x)


def softmax():
    logits = F.linear(x, weights("w", (4, 6)), weights("b", (4,)))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=counts)


def poisson():
    rate = F.linear(x, weights("w", (1, 6), scale=0.3)).squeeze(-1).exp()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson(rate), obs=counts.float())


def embedding():
    table = weights("table", (4, 5))
    observe(F.embedding(counts, table).sum(-1))


def random_features():
    """A Gaussian process by random Fourier features."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    frequencies = weights("frequencies", (20, 6))
    phase = F.linear(x, frequencies) / length
    features = torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(20)
    observe(F.linear(features, weights("w", (1, 40))).squeeze(-1))


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](6, 5)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 6]).to_event(2))
        self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        self.last = PyroModule[torch.nn.Linear](5, 1)
        self.last.weight = PyroSample(
            lambda self: dist.Normal(0, self.s).expand([1, 5]).to_event(2)
        )
        self.last.s = PyroSample(dist.HalfNormal(1.0))

    def forward(self):
        observe(self.last(self.first(x).tanh()).squeeze(-1))


def functional_call():
    """A weight put in place of a torch module's parameter."""
    call = torch.func.functional_call
    observe(call(LINEAR, {"weight": weights("w", (3, 6))}, (x,)).sum(-1))


def slopes():
    """The gradient of a network by its inputs, by torch.func."""
    w = weights("w", (3, 6))
    observe(torch.func.grad(lambda inputs: F.linear(inputs, w).tanh().sum())(x).sum(-1))


def one_row_at_a_time():
    w = weights("w", (3, 6))
    observe(torch.vmap(lambda row: F.linear(row, w).tanh())(x).sum(-1))


def jacobians():
    w = weights("w", (3, 6))
    each_row = torch.vmap(torch.func.jacrev(lambda row: (w @ row).tanh()))
    observe(each_row(x).sum((-1, -2)))


def slopes_by_autograd():
    """Sparse products are differentiated once: a dense copy serves for more."""
    w = weights("w", (3, 6)).to_dense()
    inputs = x.clone().requires_grad_()
    out = F.linear(inputs, w).tanh().sum()
    observe(torch.autograd.grad(out, inputs, create_graph=True)[0].sum(-1))


def checkpointed():
    """Activations are computed again in the backward pass."""
    w = weights("w", (3, 6))
    hidden = torch.utils.checkpoint.checkpoint(F.linear, x, w, use_reentrant=False)
    observe(hidden.tanh().sum(-1))


LINEAR = torch.nn.Linear(6, 3)


class Layer(PyroModule):
    """A torch layer whose weights all have priors."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape = layer, shape
        to_pyro_module_(layer)
        for module in layer.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                prior = dist.Normal(0.0, 0.5).expand(param.shape).to_event(param.dim())
                setattr(module, name, PyroSample(prior))

    def forward(self):
        out = self.layer(x[:, : math.prod(self.shape)].reshape(len(x), *self.shape))
        out = out[0] if isinstance(out, tuple) else out
        observe(out.reshape(len(x), -1).sum(-1))


nn = torch.nn
LAYERS = {
    "sequential": lambda: Layer(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), (6,)),
    "lstm": lambda: Layer(nn.LSTM(2, 3, batch_first=True), (3, 2)),
    "gru": lambda: Layer(nn.GRU(2, 3, num_layers=2, batch_first=True), (3, 2)),
    "transformer": lambda: Layer(
        nn.TransformerEncoderLayer(2, 1, 4, batch_first=True, dropout=0.0), (3, 2)
    ),
    "conv2d": lambda: Layer(nn.Conv2d(1, 4, 2, padding=1), (1, 2, 3)),
    "transposed conv2d": lambda: Layer(nn.ConvTranspose2d(1, 4, 2), (1, 2, 3)),
    "layer norm": lambda: Layer(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), (6,)),
}


MODELS = {
    fn.__name__: lambda fn=fn: fn
    for fn in (
        half_cauchy,
        gamma_precision,
        scale_for_each_row,
        horseshoe,
        regularised_horseshoe,
        other_families,
        chain_of_weights,
        plate_of_rows,
        plates_of_rows_and_columns,
        groups,
        subsampled_data,
        subsampled_latents,
        scaled,
        masked,
        conditioned,
        hidden,
        decentred,
        affine,
        auxiliary_gammas,
        cosines,
        lifted,
        factor_and_deterministic,
        random_walk,
        markov,
        several_event_dims,
        batch_and_event,
        double,
        used_twice,
        tied,
        factorisation,
        softmax,
        poisson,
        embedding,
        random_features,
        functional_call,
        slopes,
        one_row_at_a_time,
        jacobians,
        slopes_by_autograd,
        checkpointed,
    )
} | {"network": Network, **LAYERS}


@pytest.mark.parametrize("model", **each(MODELS))
def test_loss_is_that_of_dense_tensors(model):
    """Pyro's ELBO in the first step, the fused one in the second, and brute force: the same."""
    model = model()
    guide = AutoSparseNormal(model, density=0.4)
    guide()
    assert any(site.is_sparse for site in guide.sites)
    randomise(guide)
    pyro.clear_param_store()
    svi = SSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    losses = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        losses.append(svi.step())
    pyro.set_rng_seed(3)
    expected = brute_force_loss(model, guide).item()
    assert losses == pytest.approx([expected] * 2, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("model", **each(MODELS))
def test_at_density_one_it_is_autonormal(model):
    model = model()
    dense, sparse = twins(model)
    randomise(dense)
    match(dense, sparse)
    losses = []
    for guide in (dense, sparse):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        losses.append(Trace_ELBO().loss(SubspaceModel(model), guide))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("model", **each(MODELS))
def test_it_trains_and_exchanges(model, loss):
    model = model()
    guide = AutoSparseNormal(model, density=0.4)
    schedule = ConstantSchedule(every=3, fraction=0.5)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss(), schedule=schedule)
    svi.step()
    before = guide.active_sets
    assert all(math.isfinite(svi.step()) for _ in range(3))
    sparse = [site.name for site in guide.sites if site.is_sparse]
    assert any(not guide.active_sets[name].same(before[name]) for name in sparse)


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 knows a transform")
@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_mixture_is_refused_as_a_prior(kind):
    """Pyro's autoguides find no transform to its support, real as it is."""

    def spike_and_slab():
        mixing = dist.Categorical(torch.tensor([0.8, 0.2]).expand(2, 6, 2))
        normals = dist.Normal(torch.zeros(2, 6, 2), torch.tensor([0.1, 2.0]).expand(2, 6, 2))
        pyro.sample("w", dist.MixtureSameFamily(mixing, normals).to_event(2))

    with pytest.raises(NotImplementedError, match="MixtureSameFamily"):
        kind(spike_and_slab)()


# Pyro's own models


@pytest.mark.parametrize("kind", **each(KINDS))
def test_sparse_gaussian_process(kind):
    """Its inducing points are a real-valued matrix, with a prior if one likes."""
    pyro.set_rng_seed(0)
    kernel = gp.kernels.RBF(2)
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    likelihood = gp.likelihoods.Gaussian()
    inputs = x[:, :2]
    process = gp.models.VariationalSparseGP(
        inputs, y, kernel, inputs[:4].clone(), likelihood, jitter=1e-4
    )
    process.Xu = PyroSample(dist.Normal(inputs[:4], 0.5).to_event(2))
    guide = kind(poutine.block(process.model, hide=["u"]))
    svi = SSVI(process.model, _Beside(guide, process), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert guide.median()["Xu"].shape == (4, 2)


class _Beside(PyroModule):
    """A guide beside a normal one for the process's inducing values."""

    def __init__(self, guide, process):
        super().__init__()
        self.guide = guide
        self.process = [process]

    def forward(self):
        self.guide()
        loc = pyro.param("u_loc", torch.zeros(4))
        pyro.sample("u", dist.MultivariateNormal(loc, scale_tril=0.1 * torch.eye(4)))


class Forecast(ForecastingModel):
    """Regression on covariates by sparse weights, with a local level."""

    def model(self, zero_data, covariates):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 0.1).expand([2]).to_event(1))
        mean = (covariates.unsqueeze(-2) * w).sum(-1) + drift.cumsum(-2)
        self.predict(dist.Normal(0.0, scale).to_event(1), mean)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_forecasting_model(kind):
    covariates = torch.randn(14, 4)
    data = covariates[:10] @ torch.randn(4, 2)
    model = Forecast()
    guide = kind(model)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(data, covariates[:10]) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert guide.median()["drift"].shape == (10, 2)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_forecaster(kind):
    """Pyro's own training and forecast, with a guide of one's own."""
    covariates = torch.randn(14, 4)
    data = covariates[:10] @ torch.randn(4, 2)
    model = Forecast()
    forecaster = Forecaster(
        model, data, covariates[:10], guide=kind(model), num_steps=5, log_every=0
    )
    forecast = forecaster(data, covariates, num_samples=3)
    assert forecast.shape == (3, 4, 2)


def partly_observed(x, mask):
    w = weights("w", (6, 6), scale=0.3)
    rows, columns = pyro.plate("rows", 15, dim=-2), pyro.plate("columns", 6, dim=-1)
    with rows, columns:
        return pyro.sample("obs", dist.Normal(F.linear(x, w), 0.5), obs=x, obs_mask=mask)


def test_missing_data_are_dense():
    """They are no weights, to be 0 for the most part; unless one names them."""
    mask = x > 0
    guide = AutoSparseNormal(partly_observed, density=0.3)
    svi = SSVI(partly_observed, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, mask) for _ in range(20)]
    assert losses[-1] < losses[0]
    sparse = {site.name: site.is_sparse for site in guide.sites}
    assert sparse == {"w": True, "obs_unobserved": False}
    drawn = poutine.trace(guide).get_trace(x, mask)
    found = poutine.replay(partly_observed, trace=drawn)(x, mask)
    assert torch.equal(found[mask], x[mask])
    assert (found[~mask] != 0).all()
    pyro.clear_param_store()
    guide = AutoSparseNormal(partly_observed, density={"obs_unobserved": 0.3})
    guide(x, mask)
    assert not guide.active_sets["obs_unobserved"].is_full


def unit_rows():
    w = weights("w", (4, 6))
    observe(F.linear(x, w / w.norm(dim=-1, keepdim=True)).sum(-1))


def test_a_row_of_zeros_has_no_direction():
    """What divides by a norm, as weight_norm does, needs an active coordinate in every row."""
    guide = AutoSparseNormal(unit_rows, density=0.1)
    svi = SSVI(unit_rows, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"parameter loc .* to satisfy the constraint Real"):
        svi.step()
