import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from test_posterior import Regression, model, trained
from training_to_resume import X, Y, make

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    CyclicSchedule,
    Ensemble,
    SparsePredictive,
    load_ensemble,
    load_posterior,
)
from pyro_ssvi.ensemble import FILES
from pyro_ssvi.nn import bayesianize


def plain_model(x, y=None):
    """Without parameters of its own."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = pyro.deterministic("mean", F.linear(x, w).tanh() @ v)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def cycles(model=plain_model, members=3, **options):
    """A training with an ensemble, and the posterior at each member's time."""
    schedule = CyclicSchedule(explore=10, cycle=10, every=4)
    svi = trained(model, steps=0, schedule=schedule, **options)
    ensemble, exported = Ensemble(model), []
    for _ in range(10 + 10 * members):
        svi.step(X, Y)
        if schedule.ends_cycle(svi.steps):
            ensemble.add(svi)
            exported.append((svi.guide.active_sets, svi.guide.loc.detach().clone()))
    return svi, ensemble, exported


def test_members_are_the_posteriors_at_the_ends_of_cycles():
    svi, ensemble, exported = cycles()
    assert len(ensemble) == 3
    for _ in range(5):
        svi.step(X, Y)
    for member, (sets, loc) in zip(ensemble.members, exported, strict=True):
        assert torch.equal(member.loc, loc)
        assert torch.equal(member.active_sets["w"].indices, sets["w"].indices)
    first, _, last = (sets["w"].indices for sets, _ in exported)
    assert not torch.equal(first, last)
    sizes = [
        tensor.numel() for tensor in ensemble.state_dict().values() if hasattr(tensor, "numel")
    ]
    assert max(sizes) == 36 + 10 + 1  # nothing of the size of a site


def test_predictions_are_those_of_the_members_in_equal_parts():
    _, ensemble, _ = cycles()
    with torch.no_grad():
        for i, member in enumerate(ensemble.members):  # tell them apart
            member.loc_unconstrained.add_(i)
    members = [
        SparsePredictive(plain_model, member.forward, 100, ["mean"])(X)["mean"]
        for member in ensemble.members
    ]
    mixture = SparsePredictive(plain_model, ensemble, 300, ["mean"])(X)["mean"]
    for part, own in zip(mixture.split(100), members, strict=True):
        error = ((part.var(0) + own.var(0)) / 100).sqrt()
        assert ((part.mean(0) - own.mean(0)).abs() < 5 * error).all()
    between = torch.stack([own.mean(0) for own in members]).std(0)
    assert between.max() > 10 * error.max()  # members differ, or this would show nothing


def test_as_a_guide_it_draws_members_at_random():
    _, ensemble, _ = cycles()
    ensemble(X)
    pyro.set_rng_seed(3)
    with torch.no_grad():
        for i, member in enumerate(ensemble.members):  # tell them apart
            member.loc_unconstrained.fill_(i)
            member.scale_unconstrained.fill_(-20.0)
    drawn = torch.stack([ensemble(X)["v"].mean() for _ in range(90)]).round()
    counts = torch.stack([(drawn == i).sum() for i in range(3)])
    assert counts.sum() == 90
    assert (counts - 30).abs().max() < 5 * math.sqrt(90 * 2 / 9)
    draws = Predictive(plain_model, guide=ensemble, num_samples=6)(X)
    assert draws["obs"].shape == (6, len(X))


def test_emptied_weights_of_a_network_are_no_parameters_of_the_model():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(torch.nn.Linear(12, 1), prior=0.5)

        def forward(self, x, y=None):
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    svi = trained(Linear(), steps=2)
    ensemble = Ensemble(svi.model.model)
    ensemble.add(svi)
    draws = Predictive(svi.model.model, guide=ensemble, num_samples=3)(X)
    assert draws["obs"].shape == (3, len(X))


@pytest.mark.parametrize("kind", [AutoSparseDelta, AutoSparseLowRankMultivariateNormal])
def test_members_are_guides_of_the_same_kind(kind, tmp_path):
    svi, ensemble, _ = cycles(guide=kind(plain_model, density=0.3))
    ensemble.save(tmp_path / "a.ensemble")
    loaded = load_ensemble(tmp_path / "a.ensemble", plain_model)
    for each in (ensemble, loaded):
        assert all(type(member) is kind for member in each.members)
        assert SparsePredictive(plain_model, each, 3)(X)["obs"].shape == (3, len(X))
    for raw, last in zip(
        svi.guide.parameters_in_place(), loaded.members[-1].parameters_in_place(), strict=True
    ):
        torch.testing.assert_close(raw, last)


@pytest.mark.parametrize("draws", [1, 3, 5])
def test_draws_that_cannot_be_shared_out(draws):
    _, ensemble, _ = cycles()
    taken = torch.zeros(3)
    for _ in range(60):
        counts = torch.zeros(3)
        for forward in ensemble.in_turns(draws):
            counts[list(ensemble.members).index(forward.__self__)] += 1
        assert counts.sum() == draws
        assert counts.max() - counts.min() <= 1
        taken += counts
    assert (taken / 60 / draws - 1 / 3).abs().max() < 0.25


def test_training_is_not_touched():
    """Neither what is trained, nor the parameter store, nor a checkpoint."""
    svi, ensemble, _ = cycles()
    store = set(pyro.get_param_store())
    twin = svi.state_dict()
    SparsePredictive(plain_model, ensemble, 6)(X)
    assert set(pyro.get_param_store()) == store
    after = svi.state_dict()
    assert after["store"].keys() == twin["store"].keys()
    for name, value in twin["guide"].items():
        assert name == "_extra_state" or torch.equal(value, after["guide"][name])


@pytest.mark.parametrize("model", [model, Regression])
def test_a_member_has_the_models_own_parameters(model, tmp_path):
    """Parameters in the store, and a normalisation layer's, with its running statistics."""
    pyro.set_rng_seed(0)
    model = model() if isinstance(model, type) else model
    schedule = CyclicSchedule(explore=0, cycle=10, every=4)
    svi = trained(model, steps=0, schedule=schedule)
    ensemble, paths = Ensemble(model), []
    for _ in range(20):
        svi.step(X, Y)
        if schedule.ends_cycle(svi.steps):
            ensemble.add(svi)
            paths.append(tmp_path / f"{svi.steps}.posterior")
            svi.export(paths[-1])
    for _ in range(3):
        svi.step(X, Y)
    if isinstance(model, torch.nn.Module):
        model.eval()
    own = {name: value.clone() for name, value in pyro.get_param_store().items()}
    pyro.set_rng_seed(1)
    predictive = SparsePredictive(model, ensemble, 8, ["_RETURN"])
    predictive(X)  # the first draw runs the model, and what it draws may be counted
    pyro.set_rng_seed(1)
    found = predictive(X)["_RETURN"]
    assert all(torch.equal(value, own[name]) for name, value in pyro.get_param_store().items())
    with pytest.raises(ValueError, match="use SparsePredictive"):
        ensemble(X)

    pyro.set_rng_seed(1)
    torch.randperm(2)
    for path, part in zip(paths, found.split(4), strict=True):
        pyro.clear_param_store()
        random = torch.get_rng_state()
        guide = load_posterior(path, model)
        guide(X)
        torch.set_rng_state(random)
        expected = SparsePredictive(model, guide, 4, ["_RETURN"])(X)["_RETURN"]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


def test_an_error_in_a_prediction_gives_the_model_its_own_back():
    regression = Regression()
    svi = trained(regression, steps=2)
    ensemble = Ensemble(regression)
    ensemble.add(svi)
    svi.step(X, Y)
    own = {name: value.clone() for name, value in regression.state_dict().items()}
    with pytest.raises(TypeError):
        SparsePredictive(regression, ensemble, 4)(X, Y, "one too many")
    assert all(torch.equal(value, own[name]) for name, value in regression.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    _, ensemble, _ = cycles()
    path = tmp_path / "a.ensemble"
    ensemble.save(path, dtype)
    predictive = SparsePredictive(plain_model, ensemble, 6, ["mean"])
    predictive(X)
    pyro.set_rng_seed(1)
    expected = predictive(X)["mean"]
    loaded = load_ensemble(path, plain_model)  # beside the trained guide
    predictive = SparsePredictive(plain_model, loaded, 6, ["mean"])
    predictive(X)
    pyro.set_rng_seed(1)
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(predictive(X)["mean"], expected, rtol=tolerance, atol=tolerance)


def test_training_and_ensemble_go_on_after_a_restart(tmp_path):
    svi, ensemble, _ = cycles()
    SparsePredictive(plain_model, ensemble, 3)(X)
    svi.save(tmp_path / "a.ckpt")
    ensemble.save(tmp_path / "a.ensemble")
    for _ in range(10):
        svi.step(X, Y)
    ensemble.add(svi)
    expected = ensemble.members[3].loc.clone()

    pyro.clear_param_store()
    svi = make(plain_model, schedule=svi.schedule)
    svi.load(tmp_path / "a.ckpt")
    ensemble = load_ensemble(tmp_path / "a.ensemble", plain_model)
    for _ in range(10):
        svi.step(X, Y)
    ensemble.add(svi)
    assert torch.equal(ensemble.members[3].loc, expected)
    assert SparsePredictive(plain_model, ensemble, 4)(X)["obs"].shape == (4, len(X))


def test_what_is_refused(tmp_path):
    svi, ensemble, _ = cycles()
    with pytest.raises(ValueError, match="no members yet"):
        Ensemble(plain_model)(X)
    with pytest.raises(ValueError, match="no members yet"):
        SparsePredictive(plain_model, Ensemble(plain_model), 3)(X)
    svi.export(tmp_path / "a.posterior")
    with pytest.raises(ValueError, match=r"not a pyro_ssvi ensemble.*written by ensemble.save"):
        load_ensemble(tmp_path / "a.posterior", plain_model)
    FILES.write(tmp_path / "newer", {"version": 2, "members": []})
    with pytest.raises(ValueError, match="newer pyro_ssvi"):
        load_ensemble(tmp_path / "newer", plain_model)
    pyro.clear_param_store()
    guide = AutoGuideList(plain_model)
    guide.append(AutoSparseNormal(pyro.poutine.block(plain_model, expose=["w"])))
    guide.append(AutoSparseNormal(pyro.poutine.block(plain_model, hide=["w"])))
    svi = SSVI(plain_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X, Y)
    with pytest.raises(ValueError, match=r"AutoSparseNormal.*got AutoGuideList"):
        ensemble.add(svi)


def test_a_damaged_file_and_another_module(tmp_path):
    FILES.write(tmp_path / "damaged", {"version": 1})
    with pytest.raises(ValueError, match="cannot be loaded: it has no 'members'"):
        load_ensemble(tmp_path / "damaged", plain_model)
    svi = trained(Regression(), steps=2)
    ensemble = Ensemble(svi.model.model)
    ensemble.add(svi)
    ensemble.save(tmp_path / "a.ensemble")
    other = Regression()
    other.register_buffer("more", torch.zeros(2))
    with pytest.raises(ValueError, match="another model: 'more': saved as None"):
        load_ensemble(tmp_path / "a.ensemble", other)


def test_a_damaged_member(tmp_path):
    _, ensemble, _ = cycles(members=2)
    path = tmp_path / "a.ensemble"
    ensemble.save(path)
    first, second = FILES.read(path)["members"]
    for key, change, match in (
        ("scale", lambda v: -v, "(?s)member 1 of .*a.ensemble cannot .*scale is not positive"),
        (
            "indices",
            lambda v: v.flip(0),
            "(?s)member 1 of .*a.ensemble cannot .*indices of site 'w'",
        ),
        ("guide", lambda v: "AutoNormal", "member 1 of .*unknown guide 'AutoNormal'"),
        ("loc", lambda v: 1, r"cannot be loaded: \['members'\]\[1\]\['loc'\] is a int"),
    ):
        broken = {**second, key: change(second[key])}
        FILES.write(path, {"version": 1, "members": [first, broken]})
        with pytest.raises(ValueError, match=match):
            load_ensemble(path, plain_model)


def test_parameters_that_only_members_have_do_not_stay(tmp_path):
    svi = trained(model, steps=2)
    ensemble = Ensemble(model)
    ensemble.add(svi)
    ensemble.save(tmp_path / "a.ensemble")
    pyro.clear_param_store()
    loaded = load_ensemble(tmp_path / "a.ensemble", model)
    bias = SparsePredictive(lambda x: pyro.param("bias"), loaded, 2, ["_RETURN"])(X)["_RETURN"]
    assert torch.equal(bias, ensemble._own[0]["store"]["bias"]["value"].exp().expand(2))
    assert not list(pyro.get_param_store())


def test_members_of_two_ensembles_may_be_called():
    """Which puts their parameters into the parameter store."""
    for _ in range(2):
        _, ensemble, _ = cycles(members=1)
        assert SparsePredictive(plain_model, ensemble.members[0], 2)(X)["obs"].shape == (2, len(X))
    _, other, _ = cycles(members=1)
    for each in (ensemble, other):
        assert SparsePredictive(plain_model, each.members[0], 2)(X)["obs"].shape == (2, len(X))
