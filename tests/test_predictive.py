import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.messenger import Messenger
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ssvi import AutoSparseNormal, SparsePredictive, forbid_materialise

X = torch.randn(7, 20)


def model(x, y=None):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([30, 20]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([2, 30]).to_event(2))
    mean = pyro.deterministic("mean", F.linear(torch.tanh(F.linear(x, w)), v))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, sigma).to_event(1), obs=y)
    return mean


@pytest.fixture
def guide():
    guide = AutoSparseNormal(model, density=0.2, init_scale=0.5)
    guide(X, torch.zeros(7, 2))
    return guide


@pytest.mark.parametrize("sites", [(), ("obs",), ("mean", "_RETURN"), ("w", "sigma", "obs")])
def test_sites_and_shapes_are_those_of_predictive(guide, sites):
    expected = Predictive(model, guide=guide, num_samples=5, return_sites=sites)(X)
    found = SparsePredictive(model, guide, 5, sites)(X)
    if not sites:  # Predictive has a guide's own sites, too
        expected = {name: value for name, value in expected.items() if name in ("mean", "obs")}
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}


def test_weights_stay_sparse(guide):
    with forbid_materialise():
        SparsePredictive(model, guide, 3)(X)


def test_distribution_is_that_of_predictive(guide):
    n = 3000
    expected = Predictive(model, guide=guide, num_samples=n)(X)["mean"].squeeze()
    found = SparsePredictive(model, guide, n)(X)["mean"].squeeze()
    error = (expected.var(0) / n + found.var(0) / n).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.15, atol=0)


class ParamsComputed(Messenger):
    def __init__(self):
        super().__init__()
        self.names = []

    def _pyro_param(self, msg):
        if not msg["done"]:
            self.names.append(msg["name"])


def test_parameters_are_computed_once_a_call(guide):
    predictive = SparsePredictive(model, guide, 4, ("w",))
    with ParamsComputed() as computed:
        before = predictive(X)["w"]
    assert sorted(computed.names) == ["AutoSparseNormal.loc", "AutoSparseNormal.scale"]
    with torch.no_grad():
        guide.parameters_in_place()[0].add_(100)
    assert predictive(X)["w"].max() > before.max() + 50


def test_two_guides_whose_parameters_have_one_name():
    def two(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        return pyro.deterministic(
            "both", torch.stack([(a @ torch.ones(3)).mean(), (b @ torch.ones(3)).mean()])
        )

    with pyro.settings.context(module_local_params=True):
        guides = [
            AutoSparseNormal(pyro.poutine.block(two, hide=[name]), density=1.0)
            for name in ("b", "a")
        ]
        for guide, loc in zip(guides, (10.0, 20.0), strict=True):
            guide(X)
            with torch.no_grad():
                guide.parameters_in_place()[0].fill_(loc)

        def both(x):
            return {**guides[0](x), **guides[1](x)}

        found = SparsePredictive(two, both, 3, ("both",))(X)["both"]
        torch.testing.assert_close(found.mean(0), torch.tensor([30.0, 60.0]), rtol=0, atol=1)


def test_the_result_and_its_sites_are_of_the_same_draw(guide):
    found = SparsePredictive(model, guide, 4, ("w", "v", "mean", "_RETURN"))(X)
    for w, v, mean in zip(found["w"], found["v"], found["mean"], strict=True):
        torch.testing.assert_close(torch.tanh(X @ w[0].T) @ v[0].T, mean.reshape(7, 2))
    assert torch.equal(found["mean"].flatten(), found["_RETURN"].flatten())
    assert not found["mean"].requires_grad


@torch.no_grad()
def test_draws_that_are_kept_are_those_of_every_batch(guide):
    """Each call of SparsePredictive draws anew; a trace of the guide may be replayed."""
    predictive = SparsePredictive(model, guide, 3, ["_RETURN"])
    assert not torch.allclose(predictive(X)["_RETURN"], predictive(X)["_RETURN"])
    with forbid_materialise():
        draw = poutine.trace(guide).get_trace(X[:1])
        whole, *parts = (poutine.replay(model, trace=draw)(x) for x in (X, X[:3], X[3:]))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_dense_guide_and_nested_plates():
    def plates(y=None):
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        pyro.sample("alone", dist.Normal(0.0, 1.0))

    guide = AutoNormal(pyro.poutine.block(plates, hide=["alone"]))
    guide(torch.zeros(3, 4))
    expected = Predictive(plates, guide=guide, num_samples=6)()
    found = SparsePredictive(plates, guide, 6)()
    assert set(found) == {"obs", "alone"}
    assert all(found[name].shape == expected[name].shape for name in found)


def test_no_tensor_of_all_samples_weights_is_made():
    def wide(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([500, 400]).to_event(2))
        return pyro.sample("obs", dist.Delta(F.linear(x, w).sum(-1)).to_event(1))

    guide = AutoSparseNormal(pyro.poutine.block(wide, hide=["obs"]), density=0.02)
    x = torch.randn(3, 400)
    guide(x)

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.layout == torch.strided:
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    SparsePredictive(wide, guide, 1)(x)  # makes what is made once
    with Largest() as largest:
        SparsePredictive(wide, guide, 8)(x)
    assert 0 < largest.bytes <= 8 * 4000  # 2 % of 200 000


def test_names_and_numbers_are_checked(guide):
    with pytest.raises(ValueError, match=r"return_sites has \['nope'\]"):
        SparsePredictive(model, guide, 2, ("nope",))(X)
    with pytest.raises(ValueError, match="num_samples >= 1"):
        SparsePredictive(model, guide, 0)
