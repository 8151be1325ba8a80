"""The fused ELBO against Pyro's own: the same numbers drawn, the same losses and steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    SubspaceModel,
    forbid_materialise,
)
from pyro_ssvi.fused_elbo import NotFusedError

# The same in every run: with others a small gradient's sign may depend on how sums are rounded.
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(20, 12, generator=generator), torch.randn(20, generator=generator)


def layers(x, y, w0, b0, w1):
    mean = F.linear(F.linear(x, w0, b0).tanh(), w1).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def weights(fn0, fn1=None):
    w0 = pyro.sample("w0", fn0.expand([10, 12]).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    w1 = pyro.sample("w1", (fn1 or dist.Normal(0.1, 2.0)).expand([1, 10]).to_event(2))
    return w0, b0, w1


def plain(x, y):
    layers(x, y, *weights(dist.Normal(0.0, 1.0)))


def hierarchical(x, y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    rows = pyro.sample("rows", dist.LogNormal(0.0, 1.0).expand([10, 1]).to_event(2))
    w0 = pyro.sample("w0", dist.Normal(mean, rows.expand(10, 12)).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(mean, scale).expand([10]).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(0.0, scale).expand([1, 10]).to_event(2))
    layers(x, y, w0, b0, w1)


def other_families(x, y):
    layers(x, y, *weights(dist.Laplace(0.0, 1.0), dist.StudentT(3.0, 0.0, 1.0)))


def learnt_prior(x, y):
    scale = pyro.param("prior_scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    layers(x, y, *weights(dist.Normal(0.0, scale)))


def with_handlers(x, y):
    with poutine.scale(scale=0.3):
        w0, b0, _ = weights(dist.Normal(0.0, 1.0))
    with poutine.mask(mask=torch.tensor(False)):
        pyro.sample("masked", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    w1 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([1, 10]).mask(True).to_event(2))
    pyro.deterministic("sum", w1.to_dense().sum())
    pyro.factor("penalty", -b0.square().sum())
    layers(x, y, w0, b0, w1)


def plates(x, y):
    with pyro.plate("in", 12, dim=-1), pyro.plate("out", 10, dim=-2):
        w0 = pyro.sample("w0", dist.Normal(0.0, 1.0))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 10]).to_event(2))
    with pyro.plate("rows", len(x)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        mean = F.linear(F.linear(x, w0).tanh(), w1).squeeze(-1) + offset
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def subsampled(x, y):
    w0, b0, w1 = weights(dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=5) as i:
        mean = F.linear(F.linear(x[i], w0, b0).tanh(), w1).squeeze(-1)
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y[i])


def simplex(x, y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(10)))
    w0, b0, w1 = weights(dist.Normal(0.0, 1.0))
    layers(x, y, w0, b0, w1.to_dense() * share)


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](12, 10)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
        self.norm = torch.nn.BatchNorm1d(10)
        self.last = PyroModule[torch.nn.Linear](10, 1)

    def forward(self, x, y=None):
        mean = self.last(self.norm(self.first(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


MODELS = {
    "plain": lambda: plain,
    "hierarchical": lambda: hierarchical,
    "other families": lambda: other_families,
    "learnt prior": lambda: learnt_prior,
    "handlers": lambda: with_handlers,
    "plates": lambda: plates,
    "subsampled": lambda: subsampled,
    "simplex": lambda: simplex,
    "module": Net,
}


class PyroTrace(Trace_ELBO):
    """A class of its own, for which nothing stands in."""


class PyroMeanField(TraceMeanField_ELBO):
    """The same."""


def train(model, loss, steps=6, create_plates=None, family=AutoSparseNormal, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model = MODELS[model]()
    guide = family(model, density=0.3, create_plates=create_plates)
    schedule = ConstantSchedule(every=3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, schedule=schedule, **kwargs)
    losses = torch.tensor([svi.step(x, y) for _ in range(steps)], dtype=torch.float64)
    others = [p.detach().clone() for _, p in pyro.get_param_store().named_parameters()]
    return svi, losses, [*guide.parameters_in_place(), *others, *guide.active_sets["w0"].indices]


def assert_trained_alike(model, loss, pyro_s, **options):
    fused, losses, state = train(model, loss(), **options)
    own, own_losses, own_state = train(model, pyro_s(), **options)
    assert fused._fused is not None
    assert own._fused is None
    torch.testing.assert_close(losses, own_losses, rtol=1e-5, atol=1e-4)
    for a, b in zip(state, own_state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("kl_weight", [1.0, 0.2])
@pytest.mark.parametrize(
    ("loss", "pyro_s"), [(Trace_ELBO, PyroTrace), (TraceMeanField_ELBO, PyroMeanField)]
)
@pytest.mark.parametrize("model", sorted(set(MODELS) - {"module"}))
def test_training_is_that_of_pyro_s_elbo(model, loss, pyro_s, kl_weight):
    assert_trained_alike(model, loss, pyro_s, kl_weight=kl_weight)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("family", [AutoSparseDelta, AutoSparseLowRankMultivariateNormal])
@pytest.mark.parametrize(
    ("loss", "pyro_s"), [(Trace_ELBO, PyroTrace), (TraceMeanField_ELBO, PyroMeanField)]
)
@pytest.mark.parametrize("model", ["hierarchical", "handlers", "plates", "simplex"])
def test_other_guides_train_as_with_pyro_s_elbo(model, loss, pyro_s, family):
    assert_trained_alike(model, loss, pyro_s, family=family, kl_weight=0.5)


class Halved(AutoSparseGuide):
    def normal(self, site, loc, scale):
        return super().normal(site, loc, scale / 2)


class Mixed(AutoSparseNormal, Halved):
    """Its own function comes after AutoSparseNormal's."""


def test_a_function_from_behind_is_heard():
    assert train("plain", Trace_ELBO(), family=Mixed)[0]._fused is None


@pytest.mark.parametrize("addition", ["gradient", "evidence"])
def test_exchanges_within_autocast_are_those_without(addition):
    torch.manual_seed(0)
    x, y = torch.randn(64, 20), torch.randn(64)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 20]).to_event(2))
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(F.linear(x, w)[:, 0], 0.1), obs=y)

    added = []
    for enabled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSparseNormal(model, density=0.5)
        optim = pyro.optim.Adam({"lr": 1e-3})
        svi = SSVI(model, guide, optim, Trace_ELBO(), addition=addition)
        for _ in range(3):
            svi.step(x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            svi.exchange(x, y, share=0.3)
        added.append(guide.active_sets["w"].indices)
    assert torch.equal(*added)


@pytest.mark.parametrize("family", [AutoSparseNormal, AutoSparseLowRankMultivariateNormal])
def test_autocast_is_for_dense_products(family):
    _, losses, _ = train("plain", Trace_ELBO(), family=family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, cast, _ = train("plain", Trace_ELBO(), family=family)
    assert fused._fused is not None
    torch.testing.assert_close(cast, losses, rtol=0.05, atol=0)


class Exponential(AutoSparseNormal):
    scale_constraint = dist.constraints.positive


class Halved(Exponential):
    """Another posterior."""

    def site_posterior(self, site, loc, scale):
        return super().site_posterior(site, loc, scale / 2)


@pytest.mark.parametrize("family", [Exponential, Halved])
def test_a_guide_of_the_user_s_trains_as_with_pyro_s_elbo(family):
    """In the fused step, if nothing but a constant is its own."""
    svi, losses, state = train("plain", Trace_ELBO(), family=family)
    _, own_losses, own_state = train("plain", PyroTrace(), family=family)
    assert (svi._fused is None) == (family is Halved)
    torch.testing.assert_close(losses, own_losses, rtol=1e-5, atol=1e-4)
    for a, b in zip(state, own_state, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_plates_made_by_the_guide_choose_the_model_s_rows():
    def create_plates(x, y):
        return pyro.plate("data", len(x), subsample_size=5)

    _, losses, _ = train("subsampled", Trace_ELBO(), create_plates=create_plates)
    _, own, _ = train("subsampled", PyroTrace(), create_plates=create_plates)
    torch.testing.assert_close(losses, own, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", ["plain", "hierarchical"])
def test_local_reparameterisation(model):
    results = []
    for loss in (TraceMeanField_ELBO(), PyroMeanField()):
        svi, losses, _ = train(model, loss, local_reparam=True)
        results.append(losses)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    assert (svi._fused is None) == isinstance(loss, PyroMeanField)


def test_a_module_with_parameters_and_running_statistics():
    models = []
    for loss in (Trace_ELBO(), PyroTrace()):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model = Net()
        guide = AutoSparseNormal(model, density=0.3)
        svi = SSVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss)
        for _ in range(5):
            svi.step(x, y)
        models.append(model.state_dict())
    assert models[0]["norm.num_batches_tracked"] == 6  # the first is the guide's set-up
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(models[0]["last.weight"], Net().last.weight)


def test_it_is_sparse_and_asks_nothing_of_the_sites():
    with forbid_materialise():
        svi, _, _ = train("plain", Trace_ELBO())
    guide = svi.guide
    guide.forward = None  # not called any more
    svi.step(x, y)


def test_handlers_around_a_step_are_heard():
    losses = []
    for scale in (1.0, 2.0):
        svi, _, _ = train("plain", Trace_ELBO())
        with poutine.scale(scale=scale):
            losses.append(svi.step(x, y))
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(num_particles=2), PyroTrace(), Trace_ELBO(retain_graph=True)]
)
def test_losses_that_it_does_not_serve(loss):
    svi, _, _ = train("plain", loss, steps=2)
    assert svi._fused is None
    assert not svi._may_fuse


def test_a_site_that_appears_later_is_pyro_s_business():
    sites = []

    def model(x, y):
        plain(x, y)
        for name in sites:
            pyro.sample(name, dist.Normal(0.0, 1.0))

    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step(x, y)
    assert svi._fused is not None
    sites.append("late")
    with pytest.raises(NotFusedError):
        svi._fused(model, (x, y), {})
    with pytest.warns(UserWarning, match="Found vars in model but not guide: {'late'}"):
        svi.step(x, y)


def test_a_model_that_is_wrapped_already():
    losses = []
    for model in (plain, SubspaceModel(plain)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoSparseNormal(plain, density=0.3)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        with forbid_materialise():
            losses.append([svi.step(x, y) for _ in range(3)])
    assert losses[0] == losses[1]


def test_bad_data_gets_pyro_s_message():
    svi, _, _ = train("plain", Trace_ELBO())
    with pytest.raises(ValueError, match="at site 'obs'"):
        svi.step(x, torch.zeros(7))


@pytest.mark.parametrize(
    ("late_x", "late_y", "message"),
    [
        (x, y[:, None], "invalid log_prob shape"),  # would be 20x20 densities
        (x, y.expand(3, 20), "invalid log_prob shape"),
    ],
)
def test_shapes_are_checked_in_every_step(late_x, late_y, message):
    svi, _, _ = train("plain", Trace_ELBO())
    before = svi.guide.median()
    with pytest.raises(ValueError, match=message):
        svi.step(late_x, late_y)
    for name, value in svi.guide.median().items():
        assert torch.equal(value, before[name])


def test_a_prior_that_changes_its_shape_is_pyro_s_business():
    width = [10]

    def model(x, y):
        w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([width[0], 12]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w0).sum(-1), 1.0), obs=y)

    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    assert svi._fused is not None
    width[0] = 9
    with pytest.raises(ValueError, match=r"'w0' has shape \(9, 12\) in the model"):
        svi.step(x, y)


def test_two_sites_of_one_name_are_pyro_s_business():
    twice = []

    def model(x, y):
        plain(x, y)
        for _ in twice:
            with pyro.plate("more", len(x)):
                pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    twice.append(True)
    with pytest.raises(RuntimeError, match="Multiple sample sites named 'obs'"):
        svi.step(x, y)


def test_settings_of_the_loss_and_the_guide_may_change():
    calls = []
    svi, _, _ = train("plain", Trace_ELBO())
    assert svi._fused is not None
    svi.guide.register_forward_hook(lambda *args: calls.append(1))
    svi.step(x, y)
    assert calls

    svi, _, _ = train("plain", Trace_ELBO())
    svi._elbo.num_particles = 3
    svi.step(x, y)
    assert svi._fused is None


def test_another_guide_is_trained_once_it_is_there():
    svi, _, _ = train("plain", Trace_ELBO())
    with pyro.settings.context(module_local_params=True):
        other = AutoSparseNormal(plain, density=0.3)
        other(x, y)
        svi.guide = other
        before = other.median()["w0"]
        svi.step(x, y)
        assert not torch.equal(other.median()["w0"], before)


def test_a_frozen_guide():
    guide = AutoSparseNormal(plain, density=0.3)
    svi = SSVI(plain, guide, pyro.optim.SGD({"lr": 1e-4}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    guide.requires_grad_(False)
    before = guide.median()["w0"]
    assert svi.step(x, y) != 0
    assert torch.equal(guide.median()["w0"], before)


def test_a_model_that_it_cannot_serve_runs_once_a_step():
    """The trial of the second step leaves neither draws nor running statistics behind."""
    results = []
    for loss in (Trace_ELBO(), PyroTrace()):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        norm = torch.nn.BatchNorm1d(12)

        def model(x, y, norm=norm):
            plain(norm(x), y)
            pyro.sample("of its own", dist.Normal(0.0, 1.0))  # not in the guide

        guide = AutoSparseNormal(poutine.block(model, hide=["of its own"]), density=0.3)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        with pytest.warns(UserWarning, match="Found vars in model but not guide"):
            losses = [svi.step(x, y) for _ in range(4)]
        assert not svi._may_fuse
        results.append((losses, int(norm.num_batches_tracked)))
    assert results[0] == results[1]
