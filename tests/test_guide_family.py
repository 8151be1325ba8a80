"""What every guide here has to do, each guide against its dense twin, and one of a user's own."""

import math
from itertools import permutations

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.poutine import block
from test_auto_sparse_normal import bnn, x, y, zoo
from torch.distributions import constraints, kl_divergence

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseGuide,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    SparseDelta,
    SparseNormal,
    SparsePredictive,
    SparseTensor,
    SubspaceModel,
    forbid_materialise,
    load_posterior,
)
from pyro_ssvi.active_set import ActiveSet
from pyro_ssvi.addition import Random
from pyro_ssvi.diagnostics import elbo_parts, evidence_support

FAMILY = [AutoSparseNormal, AutoSparseDelta, AutoSparseLowRankMultivariateNormal]


def make_svi(family, model=bnn, density=0.3, every=3, loss=None, lr=0.01):
    guide = family(model, density=density)
    return SSVI(
        model,
        guide,
        pyro.optim.Adam({"lr": lr}),
        Trace_ELBO() if loss is None else loss,
        schedule=ConstantSchedule(every=every),
    )


def loss_of(model, guide, *args):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return Trace_ELBO(num_particles=2).differentiable_loss(model, guide, *args)


@pytest.mark.parametrize("family", FAMILY)
def test_the_contract(family, tmp_path):
    """Shapes, gradients, exchanges, predictions, and files."""
    with forbid_materialise():
        svi = make_svi(family)
        losses = [svi.step(x, y) for _ in range(12)]
    guide = svi.guide
    assert all(map(math.isfinite, losses))
    value = guide(x, y)["w0"]
    assert isinstance(value, SparseTensor)
    assert value.shape == (8, 6)
    k = sum(len(active) for active in guide.active_sets.values())
    for name, raw in zip(guide.raw_names, guide.parameters_in_place(), strict=True):
        assert len(raw) == k
        assert raw.grad is not None, name
    for raw in guide.parameters_in_place():
        raw.grad = None
    loss_of(SubspaceModel(bnn), guide, x, y).backward()
    for raw in guide.parameters_in_place():
        assert raw.grad.abs().sum() > 0
        raw.grad.zero_()

    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    inactive = ~guide.active_sets["w0"].mask
    assert (quantiles["w0"][:, inactive] == 0).all()
    assert (quantiles["sigma"] > 0).all()
    assert (quantiles["w0"].diff(dim=0) >= 0).all()
    torch.testing.assert_close(guide.median()["w0"], quantiles["w0"][1])
    posterior = guide.posterior()
    assert posterior["w0"].mean.shape == (8, 6)
    assert guide.summary().total.active == k
    samples = SparsePredictive(bnn, guide, num_samples=4)(x)["obs"]
    assert samples.shape == Predictive(bnn, guide=guide, num_samples=4)(x)["obs"].shape

    svi.save(tmp_path / "a.ckpt")
    svi.export(tmp_path / "a.posterior")
    going_on = [svi.step(x, y) for _ in range(7)]
    pyro.clear_param_store()
    again = make_svi(family)
    again.load(tmp_path / "a.ckpt")
    assert [again.step(x, y) for _ in range(7)] == going_on
    pyro.clear_param_store()
    loaded = load_posterior(tmp_path / "a.posterior", bnn)
    assert type(loaded) is family
    loaded(x)
    for key, value in loaded.median().items():
        torch.testing.assert_close(value, quantiles[key][1])


@pytest.mark.parametrize(("family", "other"), list(permutations(FAMILY, 2)))
def test_a_state_of_another_class_is_refused(family, other):
    state = make_svi(family)
    state.step(x, y)
    state = state.state_dict()
    pyro.clear_param_store()
    svi = make_svi(other)
    with pytest.raises(ValueError, match="saved by a guide of another class"):
        svi.load_state_dict(state)
    assert svi.steps == 0
    svi.step(x, y)


# Density 1 is Pyro's own guide.


@pytest.mark.parametrize(("model", "args"), [(bnn, (x, y)), (zoo, (torch.randn(3, 7),))])
def test_delta_at_density_one_is_autodelta(model, args):
    dense = AutoDelta(model)
    dense(*args)
    values = {name: value.detach() + 0.01 for name, value in dense(*args).items()}
    values.pop("cholesky", None)
    values.pop("simplex", None)
    for name, value in values.items():
        setattr(dense, name, value)
    sparse = AutoSparseDelta(model, density=1.0, init_loc_fn=init_to_value(values=dense.median()))
    sparse(*args)
    expected = loss_of(model, dense, *args)
    found = loss_of(SubspaceModel(model), sparse, *args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        TraceMeanField_ELBO().differentiable_loss(SubspaceModel(model), sparse, *args),
        expected,
        rtol=1e-5,
        atol=1e-4,
    )


def low_rank_twins(model, args, rank=3):
    dense = AutoLowRankMultivariateNormal(model, rank=rank)
    sparse = AutoSparseLowRankMultivariateNormal(model, density=1.0, rank=rank)
    dense(*args)
    pyro.clear_param_store()
    sparse(*args)
    pairs = [("loc", "loc"), ("scale_unconstrained",) * 2, ("cov_factor", "cov_factor")]
    for theirs, mine in pairs:
        target = sparse.get_parameter(mine if "scale" in mine else f"{mine}_unconstrained")
        value = torch.randn_like(target) * 0.3
        target.data.copy_(value)
        source = dense.scale_unconstrained if "scale" in theirs else getattr(dense, theirs)
        source.data.copy_(value)
    return dense, sparse


@pytest.mark.parametrize(("model", "args"), [(bnn, (x, y)), (zoo, (torch.randn(3, 7),))])
def test_low_rank_at_density_one_is_autolowrank(model, args):
    """Same parameters, same noise: the same loss and gradients, constrained sites included."""
    dense, sparse = low_rank_twins(model, args)
    expected = loss_of(model, dense, *args)
    expected.backward()
    found = loss_of(SubspaceModel(model), sparse, *args)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for theirs, mine in [("loc", "loc"), ("cov_factor", "cov_factor")]:
        torch.testing.assert_close(
            sparse.get_parameter(f"{mine}_unconstrained").grad,
            getattr(dense, theirs).grad,
            rtol=1e-3,
            atol=1e-3,
        )


def test_low_rank_marginals_are_those_of_its_draws():
    guide = AutoSparseLowRankMultivariateNormal(bnn, density=0.4, rank=2, init_scale=0.5)
    guide(x, y)
    covariance = guide.joint(*guide.flat_parameters()).covariance_matrix
    _, scale = guide.marginals(*guide.flat_parameters())
    torch.testing.assert_close(covariance.diagonal(), scale.square())
    torch.testing.assert_close(scale, torch.full_like(scale, 0.5))
    draws = torch.stack([guide(x, y)["w0"].values for _ in range(4000)])
    q = guide.posterior()["w0"]
    torch.testing.assert_close(draws.std(0), q.scale, rtol=0.1, atol=0.0)
    n = len(q.scale)
    torch.testing.assert_close(draws.T.cov(), covariance[:n, :n], rtol=0.0, atol=0.03)


def correlated(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, x.shape[1]]).to_event(2))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(F.linear(x, w).squeeze(-1), 0.5), obs=y)


def test_low_rank_at_the_exact_posterior_has_the_evidence_for_its_loss():
    """Linear regression with correlated inputs: then every draw gives the log evidence."""
    inputs = torch.randn(60, 1) + 0.3 * torch.randn(60, 6)
    labels = inputs[:, :2].sum(-1) + 0.5 * torch.randn(60)
    family = AutoSparseLowRankMultivariateNormal
    guide = family(correlated, density=2 / 3, rank=4)
    svi = SSVI(correlated, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    svi.step(inputs, labels)
    part = inputs[:, guide.active_sets["w"].indices]
    exact = (torch.eye(4) + part.T @ part / 0.25).inverse()
    values, vectors = torch.linalg.eigh(exact)
    variance = values[0] / 2
    factor = vectors * (values / variance - 1).sqrt()
    loc = exact @ part.T @ labels / 0.25
    raw = guide._raw((loc, variance.sqrt().expand(4), factor))
    for parameter, value in zip(guide.parameters_in_place(), raw, strict=True):
        parameter.data.copy_(value)
    joint = guide.joint(*guide.flat_parameters())
    torch.testing.assert_close(joint.covariance_matrix, exact, rtol=1e-3, atol=1e-5)
    marginal = torch.eye(60) * 0.25 + part @ part.T
    evidence = dist.MultivariateNormal(torch.zeros(60), marginal).log_prob(labels)
    for _ in range(5):
        assert svi.step(inputs, labels) == pytest.approx(-evidence.item(), abs=1e-2)
    assert svi._fused is not None
    assert svi.evaluate_loss(inputs, labels) == pytest.approx(-evidence.item(), abs=1e-2)


def test_low_rank_does_better_than_the_best_independent_normals_on_correlated_inputs():
    """Both divergences from the exact posterior are in closed form."""
    inputs = torch.randn(60, 1) + 0.3 * torch.randn(60, 6)
    labels = inputs[:, :2].sum(-1) + 0.5 * torch.randn(60)
    family = AutoSparseLowRankMultivariateNormal
    # At a constant learning rate the noise of the draws costs as much as correlations bring.
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.994, "clip_norm": math.inf})
    schedule = ConstantSchedule(every=10**6)
    guide = family(correlated, density=2 / 3)
    svi = SSVI(correlated, guide, optim, Trace_ELBO(), schedule=schedule)
    for _ in range(600):
        svi.step(inputs, labels)
    part = inputs[:, guide.active_sets["w"].indices]
    precision = torch.eye(4) + part.T @ part / 0.25
    mean = torch.linalg.solve(precision, part.T @ labels / 0.25)
    exact = dist.MultivariateNormal(mean, precision_matrix=precision)
    best = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    joint = guide.joint(*guide.flat_parameters())
    found = dist.MultivariateNormal(joint.loc, joint.covariance_matrix)
    assert kl_divergence(found, exact) < 0.7 * best


# Exchanges


def test_delta_removes_the_smallest_and_adds_the_largest_gradients():
    """RigL, by brute force."""
    guide = AutoSparseDelta(bnn, density=0.25)
    svi = SSVI(bnn, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), addition="gradient")
    svi.step(x, y)
    before = guide.active_sets["w0"]
    dense = {name: value.requires_grad_() for name, value in guide.median().items()}
    pyro.poutine.trace(pyro.poutine.condition(bnn, dense)).get_trace(x, y).log_prob_sum().backward()
    gradient = dense["w0"].grad.flatten().abs()
    gradient[before.indices] = -1.0
    weights = dense["w0"].detach().flatten()[before.indices].abs()
    svi.exchange(x, y, share=0.5)
    after = set(guide.active_sets["w0"].indices.tolist())
    stays = before.indices[weights.topk(6).indices].tolist()
    assert after == {*stays, *gradient.topk(6).indices.tolist()}
    new = torch.isin(guide.active_sets["w0"].indices, before.indices).logical_not()
    assert (guide.posterior()["w0"].v[new] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_exchange_carries_every_parameter_and_its_moments(data):
    family = data.draw(st.sampled_from(FAMILY))
    pyro.clear_param_store()
    pyro.set_rng_seed(data.draw(st.integers(0, 9)))
    svi = make_svi(family, density={"w0": 0.25}, every=10**6)
    for _ in range(2):
        svi.step(x, y)
    guide = svi.guide
    active = guide.active_sets["w0"]
    n = data.draw(st.integers(1, len(active)))
    gone = torch.randperm(len(active))[:n]
    free = torch.tensor(sorted(set(range(48)) - set(active.indices.tolist())))
    came = free[torch.randperm(len(free))[:n]]
    moments = [
        svi.optim.optim_objs[raw].state[raw]["exp_avg"] for raw in guide.parameters_in_place()
    ]
    tensors = [*guide.parameters_in_place(), *moments]
    rows = [dict(zip(active.indices.tolist(), t.detach().clone(), strict=False)) for t in tensors]
    rest = [t[len(active) :].detach().clone() for t in tensors]
    svi.addition = _Fixed(came)
    svi.removal = lambda loc, scale: _first(gone, len(loc))
    svi._exchange(n / len(active))
    after = guide.active_sets["w0"].indices
    assert (after.diff() > 0).all()
    assert len(after) == len(active)
    added = set(came.tolist())
    for tensor, row, other in zip(tensors, rows, rest, strict=True):
        for place, index in enumerate(after.tolist()):
            if index not in added:
                torch.testing.assert_close(tensor[place], row[index])
        torch.testing.assert_close(tensor[len(active) :], other)
    for moment in moments:
        assert all((moment[after.tolist().index(index)] == 0).all() for index in added)
    loc, scale = guide.marginals(*guide.flat_parameters())
    new = torch.isin(after, came)
    assert (loc[: len(after)][new] == 0).all()
    if family is AutoSparseLowRankMultivariateNormal:
        assert (guide.cov_factor[: len(after)][new] == 0).all()
    if 0 < n < len(active) and family is not AutoSparseDelta:
        stays = scale[: len(after)][~new].mean()
        torch.testing.assert_close(scale[: len(after)][new], stays.expand(n), rtol=1e-4, atol=1e-6)


class _Fixed(Random):
    """An addition that is told what to add."""

    def __init__(self, came):
        object.__setattr__(self, "came", came)

    def propose(self, active, rounds, record, room=None):
        return [(self.came, torch.zeros(m)) for m, _ in rounds]


def _first(gone, k):
    scores = torch.ones(k)
    scores[gone] = 0.0
    return scores


# What cannot work says so.


def test_local_reparameterisation_needs_independent_weights():
    for family in (AutoSparseDelta, AutoSparseLowRankMultivariateNormal):
        with pytest.raises(ValueError, match="use AutoSparseNormal"):
            SSVI(bnn, family(bnn), pyro.optim.Adam({}), TraceMeanField_ELBO(), local_reparam=True)


def test_low_rank_refuses_local_sites():
    def local(x):
        with pyro.plate("data", 20, subsample_size=5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' is local to the subsampled plate 'data'"):
        AutoSparseLowRankMultivariateNormal(local)(x)


@pytest.mark.filterwarnings("ignore:.*has no rule for these sparse arguments")
def test_low_rank_with_vectorised_particles():
    """Shapes are those of independent normals, and losses those of particles one by one."""
    args = torch.randn(3, 7)
    values = []
    for family in (AutoSparseNormal, AutoSparseLowRankMultivariateNormal):
        pyro.clear_param_store()
        guide = family(zoo, density=0.5)
        guide(args)
        with pyro.plate("particles", 5, dim=-3):
            values.append(guide(args))
    assert {k: v.shape for k, v in values[1].items()} == {k: v.shape for k, v in values[0].items()}
    losses = [
        Trace_ELBO(3000 if vectorised else 300, 2, vectorize_particles=vectorised).loss(
            SubspaceModel(zoo), guide, args
        )
        for vectorised in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2.0)


@pytest.mark.parametrize("family", FAMILY)
def test_the_parts_of_the_elbo_are_its_parts(family):
    svi = make_svi(family)
    svi.step(x, y)
    parts = elbo_parts(bnn, svi.guide, x, y, num_particles=100)
    loss = sum(svi.evaluate_loss(x, y) for _ in range(100)) / 100
    assert parts.elbo == pytest.approx(-loss, abs=3.0)


def test_a_point_has_no_support_by_evidence():
    svi = make_svi(AutoSparseDelta)
    svi.step(x, y)
    with pytest.raises(ValueError, match="AutoSparseDelta has none"):
        evidence_support(svi, [(x, y)])


@pytest.mark.parametrize("family", FAMILY)
def test_a_loaded_posterior_may_compete(family, tmp_path):
    make = make_svi(family)
    make.step(x, y)
    make.export(tmp_path / "a.posterior")
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", bnn)
    optim = pyro.optim.Adam({})
    svi = SSVI(bnn, guide, optim, Trace_ELBO(), allocation="global")
    svi.step(x, y)
    assert svi.exchange(x, y, share=0.5)


def test_a_subclass_with_a_posterior_of_its_own_is_not_exported(tmp_path):
    class Wider(AutoSparseNormal):
        def site_posterior(self, site, loc, scale):
            return self.normal(site, loc, 2 * scale)

    svi = make_svi(Wider)
    svi.step(x, y)
    with pytest.raises(ValueError, match=r"got Wider: use svi\.save"):
        svi.export(tmp_path / "a.posterior")


@pytest.mark.parametrize("rank", [0, 2.0, -1])
def test_low_rank_refuses_a_rank(rank):
    with pytest.raises(ValueError, match="rank > 0"):
        AutoSparseLowRankMultivariateNormal(bnn, rank=rank)


def test_low_rank_refuses_a_state_of_another_rank():
    guide = AutoSparseLowRankMultivariateNormal(bnn, density=0.3, rank=2)
    guide(x, y)
    state = guide.state_dict()
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match="this guide has rank 3"):
        AutoSparseLowRankMultivariateNormal(bnn, density=0.3, rank=3).load_state_dict(state)
    pyro.clear_param_store()
    other = AutoSparseLowRankMultivariateNormal(bnn, density=0.3)
    other.load_state_dict(state)
    assert other.rank == 2


def test_low_rank_in_a_list_beside_another():
    guide = AutoGuideList(bnn)
    hidden = ["b0", "sigma"]
    guide.append(AutoSparseLowRankMultivariateNormal(block(bnn, hide=hidden), density=0.3, rank=2))
    guide.append(AutoNormal(block(bnn, expose=hidden)))
    svi = SSVI(bnn, guide, pyro.optim.Adam({}), Trace_ELBO(), schedule=ConstantSchedule(every=2))
    svi.step(x, y)
    before = guide[0].active_sets["w0"]
    for _ in range(3):
        svi.step(x, y)
    assert not guide[0].active_sets["w0"].same(before)
    assert set(guide(x, y)) >= {"w0", "w1", "b0", "sigma"}


@pytest.mark.parametrize("family", FAMILY)
def test_warm_start_from_autonormal(family):
    dense = AutoNormal(bnn, init_scale=0.05)
    svi = SVI(bnn, dense, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(x, y)
    guide = family(bnn, density=0.3)
    guide.warm_start(dense, x, y)
    active = guide.active_sets["w0"]
    torch.testing.assert_close(
        active.gather(guide.median()["w0"]), active.gather(dense.median()["w0"])
    )
    if family is not AutoSparseDelta:
        _, theirs = dense._get_loc_and_scale("w0")
        torch.testing.assert_close(guide.posterior()["w0"].scale, active.gather(theirs))


# A sparse point


def test_sparse_delta():
    active = ActiveSet(torch.tensor([1, 4, 5]), (2, 3))
    v = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    point = SparseDelta(v, active)
    assert point.rsample().to_dense().tolist() == [[0.0, 1.0, 0.0], [0.0, -2.0, 0.0]]
    assert point.log_prob(point.rsample()) == 0
    assert point.log_prob(torch.zeros(2, 3)) == -torch.inf
    assert point.log_prob(point.rsample().to_dense()) == 0
    assert point.variance.to_dense().abs().sum() == 0
    rows = SparseDelta(v, active, event_dim=1)
    assert rows.batch_shape == (2,)
    assert rows.log_prob(rows.rsample()).tolist() == [0.0, 0.0]
    wide = rows.expand([4, 2])
    assert wide.rsample().shape == (4, 2, 3)
    point.rsample().to_dense().sum().backward()
    assert v.grad.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="SparseDelta expects v"):
        SparseDelta(v[:2], active)


# A guide of one's own


class SparseLaplace(SparseNormal):
    """Independent Laplace distributions at the active coordinates."""

    def rsample(self, sample_shape=()):
        laplace = dist.Laplace(self.loc, self.scale, validate_args=False)
        return SparseTensor(laplace.rsample(sample_shape), self.active)

    def _log_prob(self, values):
        log_prob = dist.Laplace(self.loc, self.scale, validate_args=False).log_prob(values)
        return SparseTensor(log_prob, self.active).to_dense().sum((-1, -2))


class AutoSparseLaplace(AutoSparseGuide):
    """Heavier tails than a normal."""

    first_scale = 0.05

    @property
    def parameter_constraints(self):
        return {"loc": constraints.real, "b": constraints.positive}

    def from_marginals(self, loc, scale):
        return loc, scale / 2**0.5

    def marginals(self, loc, b):
        return loc, b * 2**0.5

    def site_posterior(self, site, loc, b):
        if site.is_sparse:
            return SparseLaplace(loc, b, self.active_sets[site.name], validate_args=False)
        loc, b = self.dense(site, loc), self.dense(site, b)
        laplace = dist.Laplace(loc, b, validate_args=False).to_event(site.event_dim)
        if site.transform is None:
            return laplace
        return dist.TransformedDistribution(laplace, [site.transform.with_cache()])


def test_a_guide_of_one_s_own(tmp_path):
    svi = make_svi(AutoSparseLaplace, lr=0.03)
    losses = [svi.step(x, y)]
    first = svi.guide.active_sets["w0"]
    losses += [svi.step(x, y) for _ in range(149)]
    assert not svi.guide.active_sets["w0"].same(first)
    assert sum(losses[-30:]) < sum(losses[:30])
    guide = svi.guide
    draws = torch.stack([guide(x, y)["w0"].values for _ in range(3000)])
    loc, scale = guide.split(*guide.marginals(*guide.flat_parameters()))[0]
    torch.testing.assert_close(draws.mean(0), loc, rtol=0.0, atol=0.1 * scale.max().item())
    torch.testing.assert_close(draws.std(0), scale, rtol=0.15, atol=0.0)
    svi.save(tmp_path / "a.ckpt")
    going_on = [svi.step(x, y) for _ in range(5)]
    pyro.clear_param_store()
    again = make_svi(AutoSparseLaplace, lr=0.03)
    again.load(tmp_path / "a.ckpt")
    assert [again.step(x, y) for _ in range(5)] == going_on
    with pytest.raises(ValueError, match=r"use svi\.save"):
        svi.export(tmp_path / "a.posterior")


class AutoSparseCauchy(AutoSparseLaplace):
    """Marginals without a variance, and without a mean."""

    def marginals(self, loc, b):
        return loc * math.nan, b * math.inf

    def site_posterior(self, site, loc, b):
        return self.normal(site, loc, b)  # which distribution it is does not matter here


def test_a_family_without_variances_is_loaded():
    state = make_svi(AutoSparseCauchy)
    state.step(x, y)
    state = state.state_dict()
    pyro.clear_param_store()
    svi = make_svi(AutoSparseCauchy)
    svi.load_state_dict(state)
    assert torch.equal(svi.guide.loc_unconstrained, state["guide"]["loc_unconstrained"])
    raw = state["guide"]["b_unconstrained"]
    state["guide"]["b_unconstrained"] = torch.full_like(raw, math.inf)
    with pytest.raises(ValueError, match="loc is not finite or scale is not positive"):
        svi.load_state_dict(state)


class AutoSparseCounted(AutoSparseNormal):
    """A buffer that is there from the first call on."""

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        self.register_buffer("rows", torch.tensor(len(args[0])))


def test_a_buffer_that_the_first_call_registers():
    """A load before it would be undone by it."""
    state = make_svi(AutoSparseCounted)
    state.step(x, y)
    state.guide.rows += 1
    state = state.state_dict()
    pyro.clear_param_store()
    svi = make_svi(AutoSparseCounted)
    with pytest.raises(RuntimeError, match=r"\['rows'\]. What a guide registers .* call guide\("):
        svi.guide.load_state_dict(state["guide"])
    with pytest.raises(ValueError, match="'rows' is not here: make it before you load"):
        svi.load_state_dict(state)
    svi.guide(x, y)
    svi.load_state_dict(state)
    svi.step(x, y)
    assert svi.guide.rows == len(x) + 1
