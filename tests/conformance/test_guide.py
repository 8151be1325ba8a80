"""What AutoNormal does, AutoSparseNormal does: sites, supports, plates, copies, refusals."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroSample
from torch.distributions import biject_to, constraints
from twins import KINDS, each, fresh, match, randomise, scales, twins

from pyro_ssvi import SSVI, AutoSparseNormal, SparseTensor, SubspaceModel

x, y = torch.randn(12, 4), torch.randn(12)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(0.3, 2.0).expand([3, 4]).to_event(2))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = torch.nn.functional.linear(x, w).sum(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def both(model, guide, *args, loss=Trace_ELBO, seed=3):
    """One estimate of a guide's loss, with the priors limited where values are sparse."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return loss().loss(SubspaceModel(model), guide, *args)


PRIORS = {
    "scalar": lambda: dist.Normal(0.5, 2.0),
    "vector": lambda: dist.Normal(torch.arange(3.0), 2.0).to_event(1),
    "matrix": lambda: dist.Normal(0.0, 1.0).expand([4, 5]).to_event(2),
    "tensor": lambda: dist.Normal(0.0, 1.0).expand([2, 3, 2, 2]).to_event(4),
    "heavy tails": lambda: dist.StudentT(4.0, 0.0, 1.0).expand([4, 5]).to_event(2),
    "positive": lambda: dist.Gamma(2.0, 3.0).expand([4, 3]).to_event(2),
    "interval": lambda: dist.Uniform(-1.0, 2.0).expand([4]).to_event(1),
    "unit": lambda: dist.Beta(2.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "simplices": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "correlated": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5),
    "correlation": lambda: dist.LKJCholesky(3, 1.0),
    "bounded below": lambda: dist.Pareto(1.0, 3.0),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    ),
}


@pytest.mark.parametrize("prior", **each(PRIORS))
def test_supports(prior):
    """Shapes, supports, medians and quantiles are AutoNormal's, whatever the prior."""

    def model():
        pyro.sample("z", prior())

    dense, sparse = twins(model)
    randomise(dense)
    match(dense, sparse)
    support, shape = prior().support, prior().shape()
    assert sparse()["z"].shape == dense()["z"].shape == shape
    assert support.check(sparse()["z"]).all()
    torch.testing.assert_close(sparse.median()["z"], dense.median()["z"])
    q = [0.1, 0.5, 0.8]
    torch.testing.assert_close(sparse.quantiles(q)["z"], dense.quantiles(q)["z"])
    assert sparse.quantiles(q)["z"].shape == (3, *shape)
    assert sparse.quantiles(torch.tensor(q))["z"].shape == (3, *shape)
    losses = [both(model, guide) for guide in (dense, sparse)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_sphere_is_refused(kind):
    def model():
        pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])))

    with pytest.raises(ValueError, match="cannot handle spherical sample site 'z'"):
        kind(model)()


@pytest.mark.parametrize("kind", **each(KINDS))
def test_improper_priors(kind):
    """They cannot be sampled, so they need values to start from."""
    value = {"w": torch.ones(4, 3), "s": torch.tensor(2.0)}

    def model():
        w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), (4, 3)))
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("obs", dist.Normal((w @ torch.ones(3)).sum(), s), obs=torch.tensor(1.0))

    guide = kind(model, init_loc_fn=init_to_value(values=value))
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert guide.median()["w"].shape == (4, 3)


def generated():
    return init_to_value(values={"w": torch.full((3, 4), 0.5), "sigma": torch.tensor(2.0)})


INITS = {
    "feasible": init_to_feasible,
    "mean": init_to_mean,
    "median": init_to_median,
    "median of 5": init_to_median(num_samples=5),
    "sample": init_to_sample,
    "uniform": init_to_uniform,
    "uniform in 0.1": init_to_uniform(radius=0.1),
    "value": generated(),
    "value for one site": init_to_value(values={"sigma": torch.tensor(3.0)}),
    "generated": init_to_generated(generate=generated),
    "user's": lambda site: torch.full(site["fn"].shape(), 0.7),
}


@pytest.mark.parametrize("init", **each(INITS))
def test_first_values(init):
    """At density 1, the same seed gives the same start."""
    dense, sparse = twins(regression, x, y, init_loc_fn=init)
    for name, median in dense.median().items():
        torch.testing.assert_close(sparse.median()[name], median)


@pytest.mark.parametrize("init_scale", [0.03, 0.5])
def test_first_scales(init_scale):
    dense, sparse = twins(regression, x, y, init_scale=init_scale)
    expected = torch.cat([dense._get_loc_and_scale(n)[1].flatten() for n in ("w", "sigma")])
    torch.testing.assert_close(scales(sparse), expected)
    torch.testing.assert_close(scales(sparse), torch.full((13,), init_scale))


def test_a_scale_constraint_of_the_user_s():
    """AutoNormal takes it from the class, and so it is here."""

    class Exponential(AutoSparseNormal):
        scale_constraint = constraints.positive

    guide = Exponential(regression, density=0.3)
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x, y)
    torch.testing.assert_close(guide.scale, guide.scale_unconstrained.exp())
    assert svi.exchange(x, y, share=0.5) == {"w": 2}
    assert (guide.scale > 0).all()


# Sites


@pytest.mark.parametrize("kind", **each(KINDS))
def test_names_with_dots(kind):
    def model():
        pyro.sample("net.first.weight", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        pyro.sample("net.bias", dist.Normal(0.0, 1.0))

    guide = kind(model)
    assert set(guide()) == set(guide.median()) == {"net.first.weight", "net.bias"}
    assert SSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step() == pytest.approx(0, abs=99)


def test_names_that_collide_in_autonormal():
    """Sites are rows of a table here, not attributes of modules."""

    def model():
        for name in ("a", "a.b", "train", "loc", "scale", "indices"):
            pyro.sample(name, dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))

    guide = AutoSparseNormal(model, density=0.5)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    assert list(guide.median()) == ["a", "a.b", "train", "loc", "scale", "indices"]
    with pytest.raises(AttributeError):
        AutoNormal(model)()


@pytest.mark.parametrize("kind", **each(KINDS))
def test_discrete_sites_are_for_others(kind):
    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
        mean = torch.nn.functional.linear(x, w).sum(-1) + k
        pyro.sample("count", dist.Poisson(mean.exp()).to_event(1), obs=torch.ones(len(x)))

    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        kind(model)(x)
    pyro.clear_param_store()
    assert set(kind(poutine.block(model, hide=["k"]))(x)) == {"w"}


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize(
    "select", [{"hide": ["sigma"]}, {"expose": ["w"]}, {"hide_fn": lambda s: s["name"] == "sigma"}]
)
def test_blocked_sites(kind, select):
    guide = kind(poutine.block(regression, **select))
    assert set(guide(x, y)) == {"w"}
    assert set(guide.median()) == {"w"}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_observed_and_conditioned_sites_are_no_latents(kind):
    model = poutine.condition(regression, data={"sigma": torch.tensor(2.0)})
    assert set(kind(model)(x, y)) == {"w"}
    pyro.clear_param_store()
    assert set(kind(regression)(x)) == {"w", "sigma", "obs"}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_factor_and_deterministic_are_no_latents(kind):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        total = pyro.deterministic("total", w.sum())
        pyro.factor("penalty", -total.square())

    assert set(kind(model)()) == {"w"}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_site_without_elements(kind):
    def model():
        pyro.sample("none", dist.Normal(0.0, 1.0).expand([0, 4]).to_event(2))
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))

    guide = kind(model)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    assert guide.median()["none"].shape == (0, 4)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_sequential_plates_are_refused(kind):
    def model():
        for i in pyro.plate("rows", 3):
            pyro.sample(f"w{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential"):
        kind(model)()


@pytest.mark.parametrize("kind", **each(KINDS))
def test_arguments_by_keyword(kind):
    guide = kind(regression)
    assert set(guide(x, y=y)) == set(guide(y=y, x=x)) == {"w", "sigma"}
    w, sigma = guide.call(x, y)[::-1]  # in the order of their names
    assert (w.shape, sigma.shape) == ((3, 4), ())


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_module_with_priors_in_place_of_its_parameters(kind):
    net = PyroModule[torch.nn.Linear](4, 3)
    net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    guide = kind(net)
    assert set(guide(x)) == {"weight"}
    assert not any(name.startswith("bias") for name, _ in guide.named_parameters())


# Plates


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("event", [0, 1, 2])
def test_plates(kind, event):
    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            fn = dist.Normal(0.0, 1.0).expand([2] * event).to_event(event)
            w = pyro.sample("w", fn)
            total = w.sum(list(range(-event, 0))) if event else w
            pyro.sample("obs", dist.Normal(total, 1.0), obs=torch.ones(3, 4))

    guide = kind(model)
    shape = (3, 4, *[2] * event)
    assert guide()["w"].shape == guide.median()["w"].shape == shape
    assert guide.quantiles([0.2, 0.8])["w"].shape == (2, *shape)
    for loss in (Trace_ELBO, TraceMeanField_ELBO):
        assert both(model, guide, loss=loss) < 1000


DATA = torch.randn(20, 3)


def local_latents(create=None):
    with pyro.plate("data", 20, subsample_size=6) as i:
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(i), 3]).to_event(1))
        pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=DATA[i])


@pytest.mark.parametrize("kind", **each(KINDS))
def test_subsampled_sites_have_parameters_for_all_data(kind):
    guide = kind(local_latents)
    assert guide()["z"].shape == (6, 3)
    assert guide.median()["z"].shape == (20, 3)
    assert guide.median()["scale"].shape == (20,)
    assert guide.quantiles([0.5])["z"].shape == (1, 20, 3)
    assert not isinstance(guide()["z"], SparseTensor)


def test_subsampled_losses_are_autonormal_s():
    dense, sparse = twins(local_latents)
    randomise(dense)
    match(dense, sparse)
    losses = [both(local_latents, guide) for guide in (dense, sparse)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_only_drawn_rows_get_a_gradient(kind):
    guide = kind(local_latents)
    guide()
    pyro.clear_param_store()
    Trace_ELBO().differentiable_loss(SubspaceModel(local_latents), guide).backward()
    for param in guide.parameters():
        assert 0 < (param.grad != 0).float().mean() <= 0.3 + 1e-6


@pytest.mark.parametrize("kind", **each(KINDS))
def test_two_subsampled_plates(kind):
    def model():
        rows = pyro.plate("rows", 10, subsample_size=4, dim=-2)
        columns = pyro.plate("columns", 8, subsample_size=3, dim=-1)
        with rows as i:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns as j:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            c = pyro.sample("c", dist.Normal(a + b, 1.0))
            pyro.sample("obs", dist.Normal(c, 1.0), obs=(i[:, None] + j).float())

    guide = kind(model)
    assert guide()["c"].shape == (4, 3)
    shapes = {name: tuple(value.shape) for name, value in guide.median().items()}
    assert shapes == {"a": (10, 1), "b": (8,), "c": (10, 8)}
    assert torch.isfinite(torch.tensor(both(model, guide)))


@pytest.mark.parametrize("kind", **each(KINDS))
def test_created_plates_may_be_several(kind):
    seen = []

    def model(i, j):
        rows = pyro.plate("rows", 10, subsample=i, dim=-2)
        columns = pyro.plate("columns", 8, subsample=j, dim=-1)
        with rows as i, columns as j:
            seen.append((i.tolist(), j.tolist()))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def create_plates(i, j):
        return [
            pyro.plate("rows", 10, subsample=i, dim=-2),
            pyro.plate("columns", 8, subsample=j, dim=-1),
        ]

    guide = kind(model, create_plates=create_plates)
    svi = SVI(SubspaceModel(model), guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(torch.arange(4), torch.arange(3))
    seen.clear()
    svi.step(torch.tensor([5, 1]), torch.tensor([7]))
    assert seen == [([5, 1], [7])]
    assert guide.median()["z"].shape == (10, 8)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_masks_and_scales(loss):
    """In the model and, where AutoNormal does so, for both sides of the divergence."""

    def model():
        some = poutine.mask(mask=torch.tensor([True, False, True]))
        with poutine.scale(scale=0.2), pyro.plate("rows", 3), some:
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(1))
            pyro.sample("obs", dist.Normal(w.sum(-1), 1.0), obs=torch.ones(3))

    dense, sparse = twins(model)
    randomise(dense)
    match(dense, sparse)
    estimates = []
    for guide in (dense, sparse):
        estimates.append(torch.tensor([both(model, guide, loss=loss, seed=s) for s in range(50)]))
    error = (estimates[0].var() / 50 + estimates[1].var() / 50).sqrt()
    assert abs(estimates[0].mean() - estimates[1].mean()) < 4.5 * error + 1e-4


# Parts of a list


@pytest.mark.parametrize("kind", **each(KINDS))
def test_parts_of_a_list(kind):
    guide = AutoGuideList(regression)
    guide.append(kind(poutine.block(regression, expose=["w"])))
    guide.append(AutoDelta(poutine.block(regression, hide=["w"])))
    assert set(guide(x, y)) == {"w", "sigma"}
    assert isinstance(guide[0], AutoNormal | AutoSparseNormal)
    assert guide.median(x, y)["w"].shape == (3, 4)
    assert set(guide[0].quantiles([0.5])) == {"w"}
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_list_of_sparse_guides_of_two_densities():
    """They share a class, but neither parameters nor exchanges."""

    def model():
        for name in ("a", "b"):
            w = pyro.sample(name, dist.Normal(0.0, 1.0).expand([5, 4]).to_event(2))
            pyro.factor(f"{name}'s", -(w @ torch.ones(4) - 1).square().sum())

    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["b"]), density=0.5))
    guide.append(AutoSparseNormal(poutine.block(model, hide=["a"]), density=0.2))
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step()
    assert [len(p.active_sets[n]) for p, n in zip(guide, "ab", strict=True)] == [10, 4]
    assert svi.exchange(share=0.5) == {"a": 5, "b": 2}
    assert set(guide.quantiles([0.5])) == {"a", "b"}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_functions_in_a_list(kind):
    def sigma(x, y=None):
        loc = pyro.param("sigma_loc", torch.tensor(0.0))
        return {"sigma": pyro.sample("sigma", dist.LogNormal(loc, 0.1))}

    guide = AutoGuideList(regression)
    guide.append(kind(poutine.block(regression, hide=["sigma"])))
    guide.append(sigma)
    svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x, y)
    assert pyro.param("sigma_loc") != 0


OTHERS = [
    AutoDelta,
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoStructured,
]


def with_bias(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    mean = torch.nn.functional.linear(x, w, b).sum(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("other", OTHERS)
def test_other_autoguides_in_a_list(other):
    """Weights sparse, and all else as rich as one likes."""
    guide = AutoGuideList(with_bias)
    guide.append(AutoSparseNormal(poutine.block(with_bias, expose=["w"]), density=0.5))
    guide.append(other(poutine.block(with_bias, hide=["w"])))
    svi = SSVI(with_bias, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(x, y)
    assert svi.exchange(x, y, share=0.5) == {"w": 3}
    assert set(guide(x, y)) == {"w", "b"}


def test_an_easy_guide():
    """It may have a sparse guide as a part, as any module may."""

    class Easy(EasyGuide):
        def __init__(self, model):
            super().__init__(model)
            self.weights = AutoSparseNormal(poutine.block(model, expose=["w"]), density=0.5)

        def guide(self, x, y=None):
            self.weights(x, y)
            self.map_estimate("b")

    svi = SSVI(with_bias, Easy(with_bias), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(x, y)
    assert svi.exchange(x, y, share=0.5) == {"w": 3}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_plates_of_a_list(kind):
    """Parts take the list's plates, so that all see the same rows."""
    guide = AutoGuideList(local_latents)
    guide.append(kind(poutine.block(local_latents, hide=["scale"])))
    guide.append(kind(poutine.block(local_latents, hide=["z"])))
    pyro.clear_param_store()
    trace = poutine.trace(guide).get_trace()
    assert sum(name == "data" for name in trace.nodes) == 1
    assert trace.nodes["z"]["cond_indep_stack"] == trace.nodes["scale"]["cond_indep_stack"]


# Pyro's views of a guide


@pytest.mark.parametrize("kind", **each(KINDS))
def test_relations_of_a_guide(kind):
    """What render_model() draws."""
    guide = kind(regression)
    guide(x, y)
    relations = get_model_relations(guide, (x, y))
    assert {"w", "sigma"} <= set(relations["sample_sample"])
    assert len(relations["param_constraint"]) == len(list(guide.parameters()))


@pytest.mark.parametrize("kind", **each(KINDS))
def test_shapes_of_a_trace(kind):
    trace = poutine.trace(kind(regression)).get_trace(x, y)
    trace.compute_log_prob()
    lines = trace.format_shapes().splitlines()
    assert any(line.split()[-5:] == ["w", "dist", "|", "3", "4"] for line in lines)


# Copies


def dumped(guide):
    return pickle.loads(pickle.dumps(guide))


def saved(guide):
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("way", [dumped, saved, copy.deepcopy])
@pytest.mark.parametrize("trained", [True, False])
def test_copies(kind, way, trained):
    model = (lambda x, y=None: regression(x, y)) if trained else regression
    guide = kind(model)
    guide(x, y)
    if trained:  # the model itself is a lambda, and cannot be pickled
        SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x, y)
    other = way(guide)
    pyro.clear_param_store()
    for name, median in guide.median().items():
        assert torch.equal(other.median()[name], median)
    pyro.set_rng_seed(1)
    expected = guide(x, y)["w"] + 0
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    assert torch.equal(other(x, y)["w"] + 0, expected)
    for param in other.parameters():
        param.data.add_(1.0)
    assert not torch.equal(other.median()["w"], guide.median()["w"])


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("way", [dumped, saved, copy.deepcopy])
def test_copies_of_a_list(kind, way):
    guide = AutoGuideList(regression)
    guide.append(kind(poutine.block(regression, expose=["w"])))
    guide.append(AutoDelta(poutine.block(regression, hide=["w"])))
    guide(x, y)
    other = way(guide)
    pyro.clear_param_store()
    for name, median in guide.median(x, y).items():
        pyro.clear_param_store()
        assert torch.equal(other.median(x, y)[name], median)
    pyro.clear_param_store()
    assert set(other(x, y)) == {"w", "sigma"}


@pytest.mark.parametrize("kind", [KINDS["density=1"], KINDS["density=0.3"]])
def test_a_copy_leaves_the_original_its_model(kind):
    guide = kind(regression)
    guide(x, y)
    dumped(guide)
    assert guide.model(x, y).shape == (12,)


def test_a_copy_from_before_the_first_call():
    other = dumped(AutoSparseNormal(regression, density=0.3))
    assert set(other(x, y)) == {"w", "sigma"}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_state_dict(kind):
    guide = kind(regression)
    guide(x, y)
    state = {name: copy.deepcopy(value) for name, value in guide.state_dict().items()}
    medians = guide.median()
    randomise(guide)
    guide.load_state_dict(state)
    for name, median in medians.items():
        assert torch.equal(guide.median()[name], median)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_conversion_to_double(kind):
    guide = kind(regression)
    guide(x, y)
    pyro.clear_param_store()
    guide.double()
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_frozen_parameters(kind):
    guide = kind(regression)
    guide(x, y)
    guide.requires_grad_(False)
    assert not any(value.requires_grad for value in guide(x, y).values())


@pytest.mark.parametrize("kind", **each(KINDS))
def test_nothing_has_a_gradient_outside_training(kind):
    guide = kind(regression)
    guide(x, y)
    summaries = [guide.median(), guide.quantiles([0.5])]
    assert not any(value.requires_grad for values in summaries for value in values.values())
    with torch.no_grad():
        assert not any(value.requires_grad for value in guide(x, y).values())


def test_unconstrained_values_are_where_autonormal_has_them():
    """A constrained site's parameters mean the same in both guides."""
    dense, sparse = twins(regression, x, y)
    loc, scale = dense._get_loc_and_scale("sigma")
    base = sparse.posterior()["sigma"].base_dist
    torch.testing.assert_close(base.mean, loc)
    torch.testing.assert_close(base.stddev, scale)
    expected = biject_to(constraints.positive)(loc)
    torch.testing.assert_close(sparse.median()["sigma"], expected)


def test_a_seed_decides_everything():
    runs = []
    for _ in range(2):
        fresh(7)
        guide = AutoSparseNormal(regression, density=0.3)
        svi = SSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(x, y) for _ in range(5)]
        svi.exchange(x, y, share=0.5)
        runs.append((losses, guide.median()["w"]))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
