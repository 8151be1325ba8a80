import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import biject_to, kl_divergence

from pyro_ssvi import (
    SSVI,
    AutoSparseNormal,
    ConstantSchedule,
    SparseTensor,
    SubspaceModel,
    forbid_materialise,
)

x, y = torch.randn(20, 6), torch.randn(20)


def bnn(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([8, 6]).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 8]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    mean = F.linear(F.linear(x, w0, b0).tanh(), w1).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def zoo(x):
    """Every kind of support, plates and event dimensions."""
    pyro.sample("real", dist.Normal(0.5, 2.0))
    pyro.sample("matrix", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
    pyro.sample("positive", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    pyro.sample("interval", dist.Beta(2.0, 3.0).expand([2, 2]).to_event(2))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    pyro.sample("mvn", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pyro.plate("groups", 3, dim=-2):
        pyro.sample("weight", dist.Laplace(0.0, 1.0).expand([3, 1, 5]).to_event(1))
        with pyro.plate("data", x.shape[-1], dim=-1):
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("bounded", dist.Uniform(-1.0, 2.0))
            pyro.sample("obs", dist.Normal(local, 1.0), obs=x)


def randomise(guide):
    for param in guide.parameters():
        param.data.copy_(torch.randn_like(param) * 0.3 - 0.2)


def copy_parameters(source: AutoNormal, target: AutoSparseNormal):
    """Where every site is dense, the flat vectors are AutoNormal's, one after the other."""
    names = list(target.active_sets)
    params = dict(source.named_parameters())
    for mine, theirs in (("loc_unconstrained", "locs"), ("scale_unconstrained", "scales")):
        flat = torch.cat([params[f"{theirs}.{n}_unconstrained"].flatten() for n in names])
        getattr(target, mine).data.copy_(flat)


@pytest.mark.parametrize(("model", "args"), [(bnn, (x, y)), (zoo, (torch.randn(3, 7),))])
def test_density_one_is_autonormal(model, args):
    """Same parameters, same noise: the same loss and gradients, constrained sites included."""
    dense, sparse = AutoNormal(model), AutoSparseNormal(model, density=1.0)
    dense(*args)
    sparse(*args)
    randomise(dense)
    copy_parameters(dense, sparse)

    losses = []
    for guide, wrap in ((dense, lambda m: m), (sparse, SubspaceModel)):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = Trace_ELBO(num_particles=2).differentiable_loss(wrap(model), guide, *args)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    grads = dict(dense.named_parameters())
    for mine, theirs in (("loc_unconstrained", "locs"), ("scale_unconstrained", "scales")):
        expected = [grads[f"{theirs}.{n}_unconstrained"].grad for n in sparse.active_sets]
        expected = torch.cat([grad.flatten() for grad in expected])
        found = getattr(sparse, mine).grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_density_one_trains_as_autonormal_does():
    losses = []
    for make, svi in (
        (AutoNormal, SVI),
        (lambda model: AutoSparseNormal(model, density=1.0, init_scale=0.1), SSVI),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = svi(bnn, make(bnn), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step(x, y) for _ in range(20)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))


def real_sites(x, y=None):
    w = pyro.sample("w", dist.Normal(0.2, 0.7).expand([4, 6]).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 2.0).expand([4]).to_event(1))
    mean = F.linear(x, w, b).sum(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_mean_field_loss_is_the_closed_form(density):
    guide = AutoSparseNormal(real_sites, density=density)
    guide(x, y)
    randomise(guide)
    pyro.set_rng_seed(3)
    with forbid_materialise():
        loss = TraceMeanField_ELBO().differentiable_loss(SubspaceModel(real_sites), guide, x, y)
    pyro.set_rng_seed(3)
    with torch.no_grad():
        sample = guide(x, y)
    mean = F.linear(x, sample["w"].to_dense(), sample["b"]).sum(-1)
    expected = -dist.Normal(mean, 1.0).log_prob(y).sum()
    priors = {"w": dist.Normal(0.2, 0.7), "b": dist.Normal(0.0, 2.0)}
    start = 0
    for name, active in guide.active_sets.items():
        loc, scale = (v[start : start + len(active)] for v in (guide.loc, guide.scale))
        expected = expected + kl_divergence(dist.Normal(loc, scale), priors[name]).sum()
        start += len(active)
    torch.testing.assert_close(loss, expected)


def test_mean_field_loss_is_autonormal_s_in_expectation():
    """AutoNormal's is Monte Carlo even on real sites."""
    dense, sparse = AutoNormal(real_sites), AutoSparseNormal(real_sites, density=1.0)
    dense(x, y)
    sparse(x, y)
    randomise(dense)
    copy_parameters(dense, sparse)
    means, errors = [], []
    for guide in (dense, sparse):
        pyro.clear_param_store()
        svi = SSVI(real_sites, guide, pyro.optim.Adam({}), TraceMeanField_ELBO())
        losses = torch.tensor([svi.evaluate_loss(x, y) for _ in range(1500)])
        means.append(losses.mean())
        errors.append(losses.std() / 1500**0.5)
    assert abs(means[0] - means[1]) < 4.5 * (errors[0] ** 2 + errors[1] ** 2).sqrt()


def test_mean_field_loss_has_the_jacobian():
    """The optimum is known: guide = posterior = prior has loss 0 and gradient 0 on average."""

    def model():
        pyro.sample("z", dist.LogNormal(1.0, 1.0))

    guide = AutoSparseNormal(model, density=1.0)
    guide()
    guide.loc_unconstrained.data.fill_(1.0)
    guide.scale = torch.ones(1)
    loss = TraceMeanField_ELBO(num_particles=1000, vectorize_particles=True)
    value = loss.differentiable_loss(SubspaceModel(model), guide)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(0.0), atol=1e-5, rtol=0)
    assert guide.loc_unconstrained.grad.abs() < 0.15  # without the Jacobian it would be 1


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_which_sites_are_sparse_by_default():
    guide = AutoSparseNormal(zoo, density=0.3)
    guide(torch.randn(3, 7))
    sparse = {name for name, active in guide.active_sets.items() if not active.is_full}
    assert sparse == {"matrix", "weight", "local"}
    assert len(guide.active_sets["matrix"]) == 4  # 0.3 * 12, rounded


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_density_by_name_and_by_callable():
    guide = AutoSparseNormal(bnn, density={"w0": 0.25, "b0": 0.5})
    guide(x, y)
    assert {n: len(a) for n, a in guide.active_sets.items()} == {
        "w0": 12,
        "b0": 4,
        "w1": 8,
        "sigma": 1,
    }
    pyro.clear_param_store()
    asked = {}

    def density(name, shape):
        asked[name] = tuple(shape)
        return 0.5 if name == "w0" else 1.0

    guide = AutoSparseNormal(bnn, density=density)
    guide(x, y)
    assert asked == {"w0": (8, 6), "w1": (1, 8)}
    assert len(guide.active_sets["w0"]) == 24


def test_samples_are_sparse_and_the_model_runs_on_them():
    guide = AutoSparseNormal(bnn, density=0.25)
    with forbid_materialise():
        sample = guide(x, y)
        poutine.replay(bnn, poutine.trace(guide).get_trace(x, y))(x, y)
    w0 = sample["w0"]
    assert isinstance(w0, SparseTensor)
    assert w0.shape == (8, 6)
    assert (w0.to_dense()[~guide.active_sets["w0"].mask] == 0).all()
    assert not isinstance(sample["b0"], SparseTensor)


def test_median_and_quantiles_are_dense_and_zero_where_inactive():
    guide = AutoSparseNormal(bnn, density=0.25, init_loc_fn=init_to_sample)
    guide(x, y)
    reference = AutoNormal(bnn, init_loc_fn=init_to_value(values=guide.median()), init_scale=0.01)
    reference(x, y)
    for name, median in guide.median().items():
        torch.testing.assert_close(median, reference.median()[name])
    q = [0.05, 0.5, 0.95]
    for name, values in guide.quantiles(q).items():
        assert values.shape == (3, *guide.median()[name].shape)
        mask = guide.active_sets[name].mask
        expected = reference.quantiles(q)[name]
        torch.testing.assert_close(values[:, mask], expected[:, mask])
        assert (values[:, ~mask] == 0).all()


def test_predictive():
    guide = AutoSparseNormal(bnn, density=0.25)
    guide(x, y)
    samples = Predictive(bnn, guide=guide, num_samples=5)(x)
    assert samples["obs"].shape == (5, 20)
    assert type(samples["w0"]) is torch.Tensor
    assert samples["w0"].flatten(0, -3).shape == (5, 8, 6)
    assert (samples["w0"][..., ~guide.active_sets["w0"].mask] == 0).all()
    samples = Predictive(bnn, guide=guide, num_samples=5, return_sites=["w0"])(x)
    assert set(samples) == {"w0"}


def test_local_latents_of_a_subsampled_plate_are_dense_beside_sparse_weights():
    data = torch.randn(50, 6)

    def model(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 4]).to_event(2))
        with pyro.plate("data", 50, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([10, 4]).to_event(1))
            pyro.sample("obs", dist.Normal(F.linear(z, w), 1.0).to_event(1), obs=data[index])

    guide = AutoSparseNormal(model, density=0.25)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with forbid_materialise():
        for _ in range(3):
            svi.step(None)
    assert guide.active_sets["z"].is_full
    assert guide.median()["z"].shape == (50, 4)
    assert len(guide.active_sets["w"]) == 6
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"'z' cannot be sparse: .*subsampled plate 'data'"):
        AutoSparseNormal(model, density={"z": 0.5})(None)


def test_create_plates():
    data = torch.randn(50, 6)

    def model(index):
        with pyro.plate("data", 50, subsample=index) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(index), 6]).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=data[i])

    guide = AutoSparseNormal(
        model, create_plates=lambda index: pyro.plate("data", 50, subsample=index)
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(torch.arange(5))
    before = guide.median()["z"].clone()
    svi.step(torch.tensor([7, 9]))
    changed = (guide.median()["z"] != before).any(-1)
    # Adam's momentum moves the first batch on, nothing else moves.
    assert set(changed.nonzero().flatten().tolist()) == {0, 1, 2, 3, 4, 7, 9}


def test_auto_guide_list():
    guide = AutoGuideList(bnn)
    guide.append(AutoSparseNormal(poutine.block(bnn, expose=["w0", "w1"]), density=0.25))
    guide.append(AutoDelta(poutine.block(bnn, hide=["w0", "w1"])))
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.guides == [guide[0]]
    with forbid_materialise():
        for _ in range(3):
            svi.step(x, y)
    assert svi.exchange(x, y, share=0.3) == {"w0": 4, "w1": 1}
    assert set(guide.median(x, y)) == {"w0", "b0", "w1", "sigma"}


@pytest.mark.parametrize(
    "init", [init_to_mean, init_to_median, init_to_median(num_samples=5), init_to_uniform]
)
def test_pyro_s_init_functions_draw_only_active_coordinates(init):
    drawn = []

    def model():
        w = pyro.sample("w", dist.Normal(3.0, 0.1).expand([200, 200]).to_event(2))
        pyro.sample("obs", dist.Normal(F.linear(torch.ones(200), w).sum(), 1.0), obs=torch.ones(()))

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not isinstance(out, SparseTensor):
                drawn.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    guide = AutoSparseNormal(model, density=0.001, init_loc_fn=init)
    with Watch():
        guide()
    assert max(drawn) < 4000 < 40_000
    if init is not init_to_uniform:
        assert (guide.loc - 3.0).abs().max() < 1.0


def test_a_user_s_init_function_sees_the_whole_site():
    value = torch.randn(8, 6)

    def init(site):
        return value if site["name"] == "w0" else torch.ones(site["fn"].shape())

    guide = AutoSparseNormal(bnn, density=0.25, init_loc_fn=init)
    guide(x, y)
    mask = guide.active_sets["w0"].mask
    assert torch.equal(guide.median()["w0"], value * mask)
    assert torch.equal(guide.median()["b0"], torch.ones(8))


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_reparameterised_sites_are_sparse():
    def model(x):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau).expand([4, 6]).to_event(2))
        pyro.sample("obs", dist.Normal(F.linear(x, w).sum(-1), 1.0).to_event(1), obs=y)

    model = poutine.reparam(model, config={"w": LocScaleReparam(0.0)})
    guide = AutoSparseNormal(model, density=0.25)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    assert len(guide.active_sets["w_decentered"]) == 6
    assert svi.exchange(x, share=0.3) == {"w_decentered": 2}


def test_dtypes_may_mix():
    def model():
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0).expand([4, 3]).to_event(2))
        zero = torch.tensor(0.0, dtype=torch.float64)
        b = pyro.sample("b", dist.Normal(zero, 1.0).expand([4, 3]).to_event(2))
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        pyro.factor("loss", -(F.linear(torch.ones(3, dtype=b.dtype), b) ** 2).sum())

    guide = AutoSparseNormal(model, density=0.5)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step()
    assert guide.median()["a"].dtype == torch.float32
    assert guide.median()["b"].dtype == torch.float64


def test_state_dict_carries_the_active_sets():
    guide = AutoSparseNormal(bnn, density=0.25)
    guide(x, y)
    randomise(guide)
    state, medians = copy.deepcopy(guide.state_dict()), guide.median()
    tensors = {"loc_unconstrained", "scale_unconstrained", "indices"}
    assert set(state) == {*tensors, "_extra_state"}
    pyro.clear_param_store()
    other = AutoSparseNormal(bnn, density=0.25)
    other(x, y)
    held = other(x, y)["w0"]
    before = held.to_dense().clone()
    assert not other.active_sets["w0"].same(guide.active_sets["w0"])
    other.load_state_dict(state)
    assert other.active_sets["w0"].same(guide.active_sets["w0"])
    for name, median in other.median().items():
        assert torch.equal(median, medians[name])
    assert torch.equal(held.to_dense(), before)  # a sample keeps the set it was drawn on


def test_to_double():
    guide = AutoSparseNormal(real_sites, density=0.25)
    guide(x, y)
    pyro.clear_param_store()
    guide.double()
    assert guide.loc.dtype == torch.float64
    assert guide.indices.dtype == torch.int64


def test_summary_of_a_site_without_elements():
    def model():
        pyro.sample("empty", dist.Normal(0.0, 1.0).expand([0]).to_event(1))
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 5]).to_event(2))

    guide = AutoSparseNormal(model, density=0.5)
    guide()
    assert guide.summary().total.density == 0.5
    assert "0.00%" in str(guide.summary())


def test_summary_is_a_table():
    guide = AutoSparseNormal(bnn, density=0.25)
    guide(x, y)
    summary = guide.summary()
    rows = {row.site: row for row in summary.rows}
    assert rows["w0"].active == 12
    assert rows["w0"].bytes == 12 * (4 + 4 + 8)
    assert rows["w0"].autonormal_bytes == 48 * 8
    assert rows["b0"].bytes == rows["b0"].autonormal_bytes == 64
    assert summary.total.active == 12 + 8 + 2 + 1
    assert "8 x 6" in str(summary)
    assert "25.00%" in str(summary)
    html = summary._repr_html_()
    assert html.count("<tr>") == 1 + len(summary.rows) + 1
    assert "<td>8 x 6</td>" in html


# Bad input: one clear error each, before any work is lost.


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.5, float("nan"), "0.1", True, {"w0": 2.0}])
def test_density_outside_the_unit_interval(density):
    with pytest.raises(ValueError, match=r"expected a density.* in \(0, 1\], got"):
        AutoSparseNormal(bnn, density=density)


def test_density_from_a_callable_is_checked_too():
    with pytest.raises(ValueError, match=r"density of site 'w0' in \(0, 1\], got 0"):
        AutoSparseNormal(bnn, density=lambda name, shape: 0)(x, y)


def test_mapping_with_an_unknown_site():
    guide = AutoSparseNormal(bnn, density={"w7": 0.5, "w0": 0.5})
    for _ in range(2):  # the second call must not find a half-made guide
        with pytest.raises(ValueError, match=r"\['w7'\].*\['w0', 'b0', 'w1', 'sigma'\]"):
            guide(x, y)


def test_site_that_would_get_nothing():
    with pytest.raises(ValueError, match=r"'w1' of shape \(1, 8\) would get 0 .*at least 0.125"):
        AutoSparseNormal(bnn, density=0.05)(x, y)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("interval", "Beta.*not a distribution of independent real numbers"),
        ("simplex", "Dirichlet"),
        ("mvn", "MultivariateNormal"),
    ],
)
def test_sparsity_of_a_site_that_cannot_have_it(name, why):
    with pytest.raises(ValueError, match=f"site '{name}' cannot be sparse: .*{why}"):
        AutoSparseNormal(zoo, density={name: 0.5})(torch.randn(3, 7))


def test_sparsity_of_a_discrete_site():
    def model():
        pyro.sample("k", dist.Bernoulli(0.5).expand([4, 4]).to_event(2))

    with pytest.raises(ValueError, match="site 'k' cannot be sparse: it is discrete"):
        AutoSparseNormal(model, density={"k": 0.5})()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1])
def test_init_scale(scale):
    with pytest.raises(ValueError, match="init_scale > 0"):
        AutoSparseNormal(bnn, init_scale=scale)


def test_use_before_data():
    guide = AutoSparseNormal(bnn)
    for use in (
        guide.median,
        guide.summary,
        guide.posterior,
        lambda: guide.quantiles([0.5]),
        lambda: guide.active_sets,
    ):
        with pytest.raises(RuntimeError, match="before it has seen data"):
            use()


def test_stale_parameter_store_is_refused():
    """The store knows no active sets: silently, values would land on other coordinates."""
    AutoSparseNormal(bnn, density=0.25)(x, y)
    guide = AutoSparseNormal(bnn, density=0.25)
    with pytest.raises(ValueError, match=r"pyro.clear_param_store\(\)"):
        guide(x, y)
    pyro.clear_param_store()
    guide(x, y)


def test_a_copy_does_not_take_the_original_s_values():
    guide = AutoSparseNormal(bnn, density=0.3)
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    other = copy.deepcopy(guide)
    svi.exchange(x, y, share=0.5)
    loc = other.loc_unconstrained.detach().clone()
    for _ in range(2):  # the store is asked at every call
        with pytest.raises(ValueError, match=r"clear_param_store\(\) before you make or copy"):
            other(x, y)
    assert torch.equal(other.loc_unconstrained, loc)
    guide(x, y)
    pyro.clear_param_store()
    other(x, y)


def test_a_store_of_another_time_is_refused():
    guide = AutoSparseNormal(bnn, density=0.3)
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    snapshot = copy.deepcopy(pyro.get_param_store().get_state())
    svi.exchange(x, y, share=0.5)
    pyro.get_param_store().set_state(snapshot)
    with pytest.raises(ValueError, match="cannot say which coordinates"):
        svi.step(x, y)


def test_copies_may_go_their_own_ways_with_parameters_in_their_modules():
    with pyro.settings.context(module_local_params=True):
        guide = AutoSparseNormal(bnn, density=0.3)
        svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.step(x, y)
        other = copy.deepcopy(guide)
        before = other.median()["w0"]
        for _ in range(3):
            svi.step(x, y)
        svi.exchange(x, y, share=0.5)
        assert torch.equal(other.median()["w0"], before)
        other(x, y)
        assert not torch.equal(guide.median()["w0"], before)


def test_active_sets_do_not_change_by_a_load():
    guide = AutoSparseNormal(bnn, density={"w0": 0.25})
    guide(x, y)
    active = guide.active_sets["w0"]
    before = active.indices.clone()
    guide.load_state_dict({**guide.state_dict(), "indices": torch.arange(12)})
    assert torch.equal(active.indices, before)
    assert torch.equal(guide.active_sets["w0"].indices, torch.arange(12))


def test_active_sets_of_a_copy_follow_its_own_buffer():
    guide = AutoSparseNormal(bnn, density={"w0": 0.25})
    guide(x, y)
    guide.load_state_dict(guide.state_dict())  # this buffer has changed once
    assert len(guide.active_sets["w0"]) == 12
    other = copy.deepcopy(guide)
    pyro.clear_param_store()
    other.load_state_dict({**guide.state_dict(), "indices": torch.arange(12)})
    assert torch.equal(other.active_sets["w0"].indices, torch.arange(12))


def test_model_without_latents():
    with pytest.raises(RuntimeError, match="no latent variables"):
        AutoSparseNormal(lambda: None)()


def test_transform_cache_gives_the_exact_density():
    guide = AutoSparseNormal(zoo, density=1.0)
    data = torch.randn(3, 7)
    guide(data)
    trace = poutine.trace(guide).get_trace(data)
    trace.compute_log_prob()
    node = trace.nodes["simplex"]
    unconstrained = biject_to(dist.constraints.simplex).inv(node["value"])
    posterior = guide.posterior()["simplex"].base_dist
    jacobian = biject_to(dist.constraints.simplex).log_abs_det_jacobian(
        unconstrained, node["value"]
    )
    expected = posterior.log_prob(unconstrained) - jacobian
    torch.testing.assert_close(node["log_prob"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["loc", "scale"])
def test_parameters_gone_bad_are_named(name):
    guide = AutoSparseNormal(bnn, density=0.25)
    guide(x, y)
    getattr(guide, f"{name}_unconstrained").data[3] = float("nan")
    with pytest.raises(ValueError, match=r"at sites \['w0'\]"):
        guide(x, y)
    with pyro.validation_enabled(False):
        guide(x, y)


def test_inference_mode_between_steps_and_before():
    guide = AutoSparseNormal(bnn, density=0.25)
    with torch.inference_mode():
        guide(x, y)
    schedule = ConstantSchedule(every=1)
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), schedule=schedule)
    for _ in range(3):
        svi.step(x, y)
        with torch.inference_mode():
            poutine.replay(bnn, poutine.trace(guide).get_trace(x, y))(x, y)
            guide.median()
