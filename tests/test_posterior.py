import copy
import inspect
import io
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn
from torch.distributions import transform_to
from training_to_resume import X, Y, make

from pyro_ssvi import (
    SSVI,
    AutoSparseNormal,
    Ensemble,
    SparsePredictive,
    forbid_materialise,
    load_posterior,
)
from pyro_ssvi.nn import SparseNetwork, bayesianize
from pyro_ssvi.posterior import FILES
from pyro_ssvi.structures import NM, Columns


def model(x, y=None):
    """Sparse, dense and constrained sites, and a parameter."""
    bias = pyro.param("bias", torch.tensor(0.5), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = F.linear(x, w).tanh() @ v + bias
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def trained(model=model, steps=30, **options):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    svi = make(model, **options)
    for _ in range(steps):
        svi.step(X, Y)
    return svi


def draws(model, guide):
    pyro.set_rng_seed(1)
    return SparsePredictive(model, guide, num_samples=5)(X)["obs"]


def test_predicts_as_the_guide_that_was_exported(tmp_path):
    svi = trained()
    expected, random = draws(model, svi.guide), torch.get_rng_state()
    bias = pyro.param("bias").detach()
    svi.export(tmp_path / "a.posterior")
    assert torch.equal(torch.get_rng_state(), random)
    assert bias != 0.5
    assert svi.guide.active_sets["w"].density == 0.3

    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", model)
    torch.testing.assert_close(draws(model, guide), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pyro.param("bias"), bias)
    own = svi.guide.active_sets
    assert all(torch.equal(a.indices, own[n].indices) for n, a in guide.active_sets.items())
    again = Predictive(model, guide=guide, num_samples=3)(X[:4])["obs"]
    assert again.shape == (3, 4)


def test_it_can_be_trained_further(tmp_path):
    svi = trained()
    svi.export(tmp_path / "a.posterior")
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", model)
    loc = guide.loc.detach().clone()
    SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(X, Y)
    assert not torch.equal(guide.loc, loc)


def make_net():
    layers = nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1)
    return bayesianize(nn.Sequential(*layers), prior=0.5)


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def test_a_module_gets_its_parameters_and_running_statistics(tmp_path):
    regression = Regression()
    svi = trained(regression)
    svi.export(tmp_path / "a.posterior")
    regression.eval()
    expected = draws(regression, svi.guide)

    pyro.clear_param_store()
    fresh = Regression()
    guide = load_posterior(tmp_path / "a.posterior", fresh)
    fresh.eval()
    torch.testing.assert_close(draws(fresh, guide), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_a_network_that_is_no_part_of_the_model(tmp_path, known):
    """Its running statistics would be lost, and predictions be of another network."""
    net = make_net()

    def regression(x, y=None):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    svi = trained(regression, steps=1)
    if known:
        svi.model.add_module("net", net)
    with pytest.raises(ValueError, match=r"'net\$\$\$1.weight'.*torch.nn.Module.*self.net = "):
        svi.export(tmp_path / "a.posterior")


def wide(x, y=None):
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([300, 12]).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(0.0, 1.0).expand([300, 300]).to_event(2))
    mean = F.linear(F.linear(x, w1).relu(), w2).mean(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize(("dtype", "times"), [(None, 12), (torch.bfloat16, 18)])
def test_size(tmp_path, dtype, times):
    svi = trained(wide, steps=1, density=0.05)
    svi.export(tmp_path / "sparse", dtype)
    pyro.clear_param_store()
    dense = AutoNormal(wide)
    dense(X, Y)
    torch.save(dense.state_dict(), tmp_path / "dense")
    sizes = [(tmp_path / name).stat().st_size for name in ("dense", "sparse")]
    assert sizes[0] >= times * sizes[1]


def test_in_less_precision(tmp_path):
    svi = trained()
    svi.export(tmp_path / "a.posterior", dtype=torch.bfloat16)
    loc, scale = svi.guide.loc.detach(), svi.guide.scale.detach()
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", model)
    assert guide.loc.dtype == torch.float32
    torch.testing.assert_close(guide.loc.detach(), loc, rtol=2**-8, atol=0)
    torch.testing.assert_close(guide.scale.detach(), scale, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["loc", "scale"])
def test_numbers_that_a_dtype_cannot_hold(tmp_path, name):
    svi = trained()
    with torch.no_grad():
        if name == "loc":
            svi.guide.loc_unconstrained[0] = 1e6
        else:
            svi.guide.scale_unconstrained[0] = -30.0
    with pytest.raises(ValueError, match=r"float16 cannot hold .* of sites \['w'\]"):
        svi.export(tmp_path / "a.posterior", dtype=torch.float16)
    assert not (tmp_path / "a.posterior").exists()
    svi.export(tmp_path / "a.posterior", dtype=torch.bfloat16)


def test_another_guide(tmp_path):
    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(pyro.poutine.block(model, expose=["w"])))
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["w"])))
    svi = trained(guide=guide)
    with pytest.raises(ValueError, match=r"'AutoSparseNormal'.*, got AutoGuideList"):
        svi.export(tmp_path / "a.posterior")


def test_a_guide_that_has_not_seen_data(tmp_path):
    with pytest.raises(RuntimeError, match="before it has seen data"):
        trained(steps=0).export(tmp_path / "a.posterior")


def test_a_site_without_elements(tmp_path):
    def empty(x, y=None):
        pyro.sample("none", dist.Normal(0.0, 1.0).expand([0, 3]).to_event(2))
        return model(x, y)

    trained(empty, steps=2).export(tmp_path / "a.posterior")
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", empty)
    assert guide(X)["none"].shape == (0, 3)


def test_a_checkpoint_is_none(tmp_path):
    trained().save(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"is not a pyro_ssvi posterior: .* is for svi.load\(\)"):
        load_posterior(tmp_path / "a.ckpt", model)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "a.posterior"
    trained().export(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum differs"):
        load_posterior(path, model)


def test_no_code_runs(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    FILES.write(tmp_path / "a.posterior", {"version": 1, "code": Code()})
    with pytest.raises(ValueError, match="cannot be read"):
        load_posterior(tmp_path / "a.posterior", model)


def test_another_model(tmp_path):
    trained().export(tmp_path / "a.posterior")
    pyro.clear_param_store()

    def other(x, y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([10, 13]).to_event(2))
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
        pyro.sample("sigma", dist.LogNormal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"another model: site 'w': saved with 36 active of \(10, 12"
    ):
        load_posterior(tmp_path / "a.posterior", other)(X)


@pytest.mark.parametrize("structure", [None, {"w": Columns()}])
def test_a_model_with_other_sites(tmp_path, structure):
    """The message is of the file: who loads it never set a density, nor a structure."""
    guide = AutoSparseNormal(model, density={"w": 0.3, "v": 0.5}, structure=structure)
    trained(guide=guide).export(tmp_path / "a.posterior")
    pyro.clear_param_store()

    def other(x, y=None):
        pyro.sample("u", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))

    sites = r"saved with the sites \['w', 'v', 'sigma'\], the model has \['u'\]"
    with pytest.raises(ValueError, match=f"of another model: {sites}"):
        load_posterior(tmp_path / "a.posterior", other)(X)


@pytest.mark.parametrize("dtype", ["float16", float])
def test_what_is_no_dtype(tmp_path, dtype):
    svi = trained(steps=2)
    with pytest.raises(ValueError, match=f"expected a dtype such as torch.bfloat16, got {dtype!r}"):
        svi.export(tmp_path / "a.posterior", dtype=dtype)
    assert not list(tmp_path.iterdir())


# A plain network


@pytest.mark.parametrize("part", ["model", "sites", "loc", "store"])
def test_a_file_without_a_part(tmp_path, part):
    path = tmp_path / "a.posterior"
    trained().export(path)
    state = FILES.read(path)
    del state[part]
    FILES.write(path, state)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=f"cannot be loaded: it has no '{part}'"):
        load_posterior(path, model)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("scale", lambda v: v * 0, r"scale is not positive at sites \['w', 'v', 'sigma'\]"),
        ("scale", lambda v: -v, "scale is not positive"),
        ("scale", lambda v: v * math.nan, "scale is not positive"),
        ("scale", lambda v: v[1:], "expected a tensor scale_unconstrained"),
        ("scale", lambda v: None, "is a NoneType, expected Tensor"),
        ("loc", lambda v: v + math.inf, "loc is not finite"),
        ("loc", lambda v: v.unsqueeze(-1), "parameters are damaged"),
        ("indices", lambda v: v.flip(0), "indices of site 'w' are damaged"),
        ("indices", lambda v: v + 0.7, "expects a 1-d int64 tensor"),
        ("indices", lambda v: v - 200, "indices of site 'w' are damaged"),
        ("dtype", lambda v: "int32", "dtypes are"),
        ("dtype", lambda v: "save", "cannot be loaded"),
        ("guide", lambda v: "AutoNormal", "unknown guide 'AutoNormal': upgrade"),
        ("guide", lambda v: "AutoSparseDelta", "saved by a guide of another class"),
        ("guide", lambda v: "AutoSparseLowRankMultivariateNormal", "has no 'cov_factor'"),
        ("store", lambda v: {"bias": {**v["bias"], "value": 1.0}}, "is a float, expected Tensor"),
        ("store", lambda v: {"bias": {**v["bias"], "constraint": 1}}, "constraint of .*'bias' is"),
    ],
)
def test_numbers_that_are_no_posterior(tmp_path, key, change, match):
    path = tmp_path / "a.posterior"
    trained(steps=2).export(path)
    state = FILES.read(path)
    FILES.write(path, {**state, key: change(state[key])})
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=match) as error:
        load_posterior(path, model)
    assert str(path) in str(error.value)
    assert not list(pyro.get_param_store())


class Interval(AutoSparseNormal):
    scale_constraint = dist.constraints.interval(0.001, 0.1)


def test_a_guide_with_a_constraint_of_its_own(tmp_path):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = Interval(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X, Y)
    svi.export(tmp_path / "a.posterior")
    ensemble = Ensemble(model)
    ensemble.add(svi)
    pyro.clear_param_store()
    loaded = load_posterior(tmp_path / "a.posterior", model)
    for each in (loaded, ensemble.members[0]):
        torch.testing.assert_close(each.scale, guide.scale)


def test_a_parameter_of_another_constraint(tmp_path):
    """Its unconstrained value would be another one."""
    trained(steps=2).export(tmp_path / "a.posterior")
    pyro.clear_param_store()
    bias = pyro.param("bias", torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"of parameter 'bias': saved as GreaterThan.*it is Real"):
        load_posterior(tmp_path / "a.posterior", model)
    assert pyro.param("bias") is bias
    assert bias == 0.5


class Own(type(dist.constraints.positive)):
    pass


transform_to.register(Own)(lambda constraint: dist.transforms.ExpTransform())


def test_a_parameter_with_a_constraint_of_the_user(tmp_path):
    def own(x, y=None):
        pyro.param("p", torch.tensor(2.0), constraint=Own(0.0))
        return model(x, y)

    trained(own, steps=2).export(tmp_path / "a.posterior")
    value = pyro.param("p").detach()
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="'p' has a constraint of your own: run the model once"):
        load_posterior(tmp_path / "a.posterior", own)
    assert not list(pyro.get_param_store())
    own(X)
    load_posterior(tmp_path / "a.posterior", own)
    assert torch.equal(pyro.param("p"), value)


def test_a_file_beside_a_trained_guide(tmp_path):
    svi = trained(steps=2)
    svi.export(tmp_path / "a.posterior")
    loc = svi.guide.loc.detach().clone()
    with pytest.raises(ValueError, match=r"(?s)a.posterior cannot be loaded: .*store holds"):
        load_posterior(tmp_path / "a.posterior", model)
    assert torch.equal(svi.guide.loc, loc)


def test_another_module_is_left_as_it_is(tmp_path):
    trained(Regression()).export(tmp_path / "a.posterior")
    pyro.clear_param_store()
    other = Regression()
    other.register_buffer("more", torch.zeros(2))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"another model: 'more': saved as None, here it is \(2,"):
        load_posterior(tmp_path / "a.posterior", other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_network_with_mean_weights():
    regression = Regression()
    svi = trained(regression)
    regression.eval()
    median = svi.guide.median()
    plain = regression.net.with_weights(median)
    expected = pyro.poutine.condition(regression.net, median)(X)
    assert torch.equal(plain(X), expected)
    assert isinstance(plain, nn.Sequential)
    assert plain[0].weight.count_nonzero() == len(svi.guide.active_sets["net.0.weight"])

    buffer = io.BytesIO()
    torch.save(plain.state_dict(), buffer)
    fresh = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1))
    fresh.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert torch.equal(fresh.eval()(X), expected)
    exported = torch.export.export(plain, (X,)).module()
    torch.testing.assert_close(exported(X), expected)


def test_weights_that_do_not_fit():
    net = make_net()
    with pytest.raises(ValueError, match=r"shapes for \['net.0.weight', 'net.0.bias', 'net.3.wei"):
        net.with_weights({"net.3.bias": torch.zeros(1)})


# A network with sparse weights


def test_a_network_with_sparse_mean_weights():
    regression = Regression()
    svi = trained(regression)
    regression.eval()
    expected = regression.net.with_weights(svi.guide.median())(X)
    sparse = regression.net.with_sparse_weights(svi.guide).eval()
    with forbid_materialise():
        torch.testing.assert_close(sparse(X), expected)
    active = [len(svi.guide.active_sets[f"net.{i}.weight"]) for i in (0, 3)]
    assert active[0] < 240
    assert len(sparse.values) == len(sparse.indices) == sum(active)  # float32 and int32
    assert sparse.module[0].weight.numel() == 0
    svi.step(X, Y)
    torch.testing.assert_close(sparse(X), expected)  # it is a copy


def plain_network():
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1))


def reloaded(sparse):
    buffer = io.BytesIO()
    torch.save(sparse.state_dict(), buffer)
    buffer.seek(0)
    fresh = SparseNetwork(plain_network())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh.eval()


def test_a_sparse_network_needs_no_model_to_be_loaded():
    regression = Regression()
    svi = trained(regression)
    sparse = regression.net.with_sparse_weights(svi.guide).eval()
    fresh = reloaded(sparse)
    assert torch.equal(fresh(X), sparse(X))
    twin = copy.deepcopy(fresh).double()
    torch.testing.assert_close(twin(X.double()).float(), sparse(X), rtol=1e-4, atol=1e-5)
    whole = SparseNetwork(plain_network()).eval()  # none of its weights are sparse
    assert torch.equal(whole(X), whole.module(X))


def test_a_sparse_network_keeps_structures():
    """Whole columns have products of their own."""
    regression = Regression()
    guide = AutoSparseNormal(
        regression, density=0.5, structure={"net.0.weight": Columns(), "net.3.weight": NM(1, 2)}
    )
    guide(X, Y)
    sparse = regression.net.with_sparse_weights(guide).eval()
    fresh = reloaded(sparse)
    assert torch.equal(fresh(X), sparse(X))
    structures = [active.structure for active in fresh._active.values()]
    assert structures == [Columns(), NM(1, 2)]


def test_a_sparse_network_with_convolutions_an_embedding_and_a_shared_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 8)
            self.conv = nn.Conv1d(1, 4, 3)
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
            self.second.weight = self.first.weight

        def forward(self, i):
            hidden = self.conv(self.table(i).unsqueeze(1)).flatten(1)
            return self.second(self.first(hidden).relu())

    net = bayesianize(Net(), 1.0)

    def model(i):
        pyro.sample("obs", dist.Delta(net(i)).to_event(2))

    i = torch.arange(6)
    guide = AutoSparseNormal(pyro.poutine.block(model, hide=["obs"]), density=0.25)
    guide(i)
    with torch.no_grad():
        guide.loc_unconstrained.normal_()
    sparse = net.with_sparse_weights(guide)
    assert list(sparse.table) == ["table.weight", "conv.weight", "first.weight"]
    with forbid_materialise():
        torch.testing.assert_close(sparse(i), net.with_weights(guide.median())(i))


def test_a_sparse_network_with_constrained_weights():
    def prior(name, shape):
        family = dist.LogNormal if name == "bias" else dist.Normal
        return family(0.0, 1.0).expand(shape).to_event(len(shape))

    net = bayesianize(nn.Linear(12, 3), prior)
    guide = AutoSparseNormal(net, density=0.25)
    guide(X)
    sparse = net.with_sparse_weights(guide)
    assert (sparse.module.bias > 0).all()
    torch.testing.assert_close(sparse(X), net.with_weights(guide.median())(X))


def test_a_guide_without_the_networks_weights():
    guide = trained().guide
    with pytest.raises(ValueError, match=r"shapes for \['net.0.weight', 'net.0.bias'"):
        make_net().with_sparse_weights(guide)


@pytest.mark.skipif(
    "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters,
    reason="torch is too old",
)
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    regression = Regression()
    svi = trained(regression)
    plain = regression.net.with_weights(svi.guide.median()).eval()
    path = tmp_path / "net.onnx"
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(plain, (X,), path, dynamo=True, dynamic_shapes=({0: batch},))
    exported = onnx.load(path)
    onnx.checker.check_model(exported)
    (name,) = (each.name for each in exported.graph.input)
    (found,) = ReferenceEvaluator(exported).run(None, {name: X[:3].numpy()})
    torch.testing.assert_close(torch.as_tensor(found), plain(X[:3]), rtol=1e-4, atol=1e-5)
