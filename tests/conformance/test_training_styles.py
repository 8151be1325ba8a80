"""Every way in which Pyro's users train a guide."""

import copy
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from pyro.optim.multi import MixedMultiOptimizer, PyroMultiOptimizer
from torch.utils.data import DataLoader, TensorDataset
from twins import KINDS, each, fresh, scales

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, SubspaceModel, forbid_materialise

torch.manual_seed(0)
x = torch.randn(24, 6)
y = x.sum(-1) + torch.randn(24)
NEVER = ConstantSchedule(every=10**6)


def model(x, y=None, total=24):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    mean = F.linear(x, w).sum(-1)
    with pyro.plate("data", total, subsample=torch.arange(len(x))):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def sparse_guide(density=0.3):
    return AutoSparseNormal(model, density=density)


def steps(svi, n=5, after=lambda: None):
    losses = []
    for _ in range(n):
        losses.append(svi.step(x, y))
        after()
    return losses


def improves(losses):
    n = len(losses) // 4
    return sum(losses[-n:]) < sum(losses[:n])


# Optimizers


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.02}),
    "fused Adam": lambda: pyro.optim.Adam({"lr": 0.02, "fused": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    "amsgrad": lambda: pyro.optim.Adam({"lr": 0.02, "amsgrad": True}),
    "NAdam": lambda: pyro.optim.NAdam({"lr": 0.02}),
    "Adamax": lambda: pyro.optim.Adamax({"lr": 0.02}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.05}),
    "Adadelta": lambda: pyro.optim.Adadelta({"lr": 1.0}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01, "momentum": 0.5}),
    "Rprop": lambda: pyro.optim.Rprop({"lr": 0.01}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": 5.0}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 0.5}),
    "DCTAdam": lambda: pyro.optim.DCTAdam({"lr": 0.02}),
    "by value": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_value": 2.0}),
    "PyroOptim": lambda: pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.02}),
}


@pytest.mark.parametrize("optim", **each(OPTIMIZERS))
def test_optimizers_at_density_one(optim):
    """What works on single elements trains two flat vectors as it trains AutoNormal's tensors."""
    losses = []
    for kind, inference in (("AutoNormal", SVI), ("density=1", SSVI)):
        fresh()
        losses.append(steps(inference(model, KINDS[kind](model), optim(), Trace_ELBO())))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("optim", **each(OPTIMIZERS))
def test_optimizers_across_exchanges(optim):
    guide = sparse_guide()
    schedule = ConstantSchedule(every=3, fraction=0.4)
    svi = SSVI(model, guide, optim(), Trace_ELBO(), schedule=schedule)
    svi.step(x, y)
    before = guide.active_sets["w"]
    assert all(map(math.isfinite, steps(svi)))
    assert not guide.active_sets["w"].same(before)


def scheduler(name, **kwargs):
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, **kwargs}
    return lambda: getattr(pyro.optim, name)(copy.deepcopy(args))


SCHEDULERS = {
    "ExponentialLR": scheduler("ExponentialLR", gamma=0.5),
    "StepLR": scheduler("StepLR", step_size=2, gamma=0.5),
    "MultiStepLR": scheduler("MultiStepLR", milestones=[1, 4], gamma=0.5),
    "CosineAnnealingLR": scheduler("CosineAnnealingLR", T_max=6),
    "OneCycleLR": scheduler("OneCycleLR", max_lr=1e-2, total_steps=10),
    "LambdaLR": scheduler("LambdaLR", lr_lambda=lambda epoch: 0.9**epoch),
    "CyclicLR": scheduler("CyclicLR", base_lr=1e-4, max_lr=1e-3),
}


def rates(optim):
    return [s.optimizer.param_groups[0]["lr"] for s in optim.optim_objs.values()]


@pytest.mark.parametrize("make", **each(SCHEDULERS))
def test_learning_rate_schedulers(make):
    """They go on across an exchange, and give AutoNormal's losses at density 1."""
    losses = []
    for kind, inference in (("AutoNormal", SVI), ("density=1", SSVI)):
        fresh()
        optim = make()
        svi = inference(model, KINDS[kind](model), optim, Trace_ELBO())
        losses.append(steps(svi, after=optim.step))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    fresh()
    optim = make()
    svi = SSVI(model, sparse_guide(), optim, Trace_ELBO())
    steps(svi, 3, after=optim.step)
    before = rates(optim)
    svi.exchange(x, y, share=0.4)
    assert rates(optim) == before
    steps(svi, 1, after=optim.step)
    assert rates(optim) != before


def test_reduce_on_plateau():
    optim = scheduler("ReduceLROnPlateau", patience=0, factor=0.1)()
    svi = SSVI(model, sparse_guide(), optim, Trace_ELBO())
    svi.step(x, y)
    for _ in range(3):
        optim.step(1.0)
    assert rates(optim) == pytest.approx([1e-5, 1e-5])


def test_learning_rates_by_name():
    """The names are those of the two vectors."""
    names = []

    def args(name):
        names.append(name)
        return {"lr": 0.0 if name.endswith("scale") else 0.1}

    guide = sparse_guide()
    svi = SSVI(model, guide, pyro.optim.Adam(args), Trace_ELBO(), schedule=NEVER)
    guide(x, y)
    loc = guide.loc.detach().clone()
    steps(svi)
    assert sorted(names) == ["AutoSparseNormal.loc", "AutoSparseNormal.scale"]
    torch.testing.assert_close(scales(guide), torch.full_like(loc, 0.01))
    assert (guide.loc != loc).all()


@pytest.mark.parametrize("kind", **each(KINDS))
def test_gradient_clipping_by_norm(kind):
    """Of a whole parameter: of one site in AutoNormal, of all sites here."""
    guide = kind(model)
    guide(x, y)
    before = [param.detach().clone() for param in guide.parameters()]
    optim = pyro.optim.SGD({"lr": 1.0}, {"clip_norm": 0.1})
    SVI(SubspaceModel(model), guide, optim, Trace_ELBO()).step(x, y)
    for param, old in zip(guide.parameters(), before, strict=True):
        assert (param - old).norm() <= 0.1 + 1e-5


@pytest.mark.parametrize("make", [SVI, SSVI])
@pytest.mark.parametrize(
    "optim",
    [
        torch.optim.Adam([torch.zeros(1)]),
        PyroMultiOptimizer(pyro.optim.Adam({"lr": 0.1})),
        {"lr": 0.1},
    ],
    ids=["torch", "multi", "dict"],
)
def test_other_optimizers_are_refused(make, optim):
    with pytest.raises(ValueError, match=r"instance of pyro\.optim\.PyroOptim"):
        make(model, sparse_guide(), optim, Trace_ELBO())


def test_multi_optimizers_in_a_loop_of_one_s_own():
    guide, restricted = sparse_guide(), SubspaceModel(model)
    guide(x, y)
    params = dict(guide.named_parameters())
    first = PyroMultiOptimizer(pyro.optim.Adam({"lr": 0.05}))
    second = PyroMultiOptimizer(pyro.optim.SGD({"lr": 1e-3}))
    optim = MixedMultiOptimizer([(["loc"], first), (["scale"], second)])
    losses = []
    for _ in range(80):
        loss = Trace_ELBO().differentiable_loss(restricted, guide, x, y)
        values = {name.removesuffix("_unconstrained"): p for name, p in params.items()}
        optim.step(loss, values)
        losses.append(loss.item())
    assert improves(losses)


# SVI, and loops of one's own


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_plain_svi(loss):
    """Without exchanges it is SSVI, to the last bit of the fused ELBO."""
    losses, medians = [], []
    for make in (
        lambda guide, optim: SVI(SubspaceModel(model), guide, optim, loss()),
        lambda guide, optim: SSVI(model, guide, optim, loss(), schedule=NEVER),
    ):
        fresh()
        guide = sparse_guide()
        with forbid_materialise():
            losses.append(steps(make(guide, pyro.optim.Adam({"lr": 0.02})), 20))
        medians.append(guide.median()["w"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*medians, rtol=1e-3, atol=1e-4)


def test_plain_svi_without_the_wrapper_charges_the_zeros():
    """The difference is the prior's density at 0, once for each inactive coordinate."""
    guide = sparse_guide()
    guide(x, y)
    losses = []
    for wrapped in (model, SubspaceModel(model)):
        pyro.set_rng_seed(4)
        losses.append(Trace_ELBO().loss(wrapped, guide, x, y))
    inactive = 18 - len(guide.active_sets["w"])
    expected = 0.5 * math.log(2 * math.pi) * inactive
    assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-4)


def torch_style(kind=KINDS["density=0.3"]):
    guide = kind(model)
    elbo = Trace_ELBO()(SubspaceModel(model), guide)
    elbo(x, y)  # makes the parameters
    return guide, elbo


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_torch_optimizer(kind, local):
    with pyro.settings.context(module_local_params=local):
        _, elbo = torch_style(kind)
        optim = torch.optim.Adam(elbo.parameters(), lr=0.1)
        losses = []
        for _ in range(50):
            optim.zero_grad()
            loss = elbo(x, y)
            loss.backward()
            optim.step()
            losses.append(loss.item())
        assert improves(losses)
        assert bool(pyro.get_param_store()) != local


def test_parameter_groups():
    guide, elbo = torch_style()
    groups = [
        {"params": [guide.loc_unconstrained], "lr": 0.1},
        {"params": [guide.scale_unconstrained], "lr": 0.0},
    ]
    optim = torch.optim.Adam(groups)
    before = [p.detach().clone() for p in guide.parameters()]
    elbo(x, y).backward()
    optim.step()
    moved = [bool((p != old).any()) for p, old in zip(guide.parameters(), before, strict=True)]
    assert moved == [True, False]


def test_a_closure():
    """LBFGS asks for the loss several times: with the same draws it is deterministic."""
    _, elbo = torch_style()
    optim = torch.optim.LBFGS(elbo.parameters(), max_iter=10)

    def closure():
        optim.zero_grad()
        pyro.set_rng_seed(0)
        loss = elbo(x, y)
        loss.backward()
        return loss

    first = closure().item()
    optim.step(closure)
    assert closure() < first


def test_gradient_accumulation():
    """Two halves, each scaled to all data, have twice the gradient of the whole."""
    guide, elbo = torch_style()
    grads = []
    for parts in ([(x, y)], [(x[:12], y[:12]), (x[12:], y[12:])]):
        guide.zero_grad()
        for part in parts:
            pyro.set_rng_seed(2)
            (elbo(*part) / len(parts)).backward()
        grads.append(torch.cat([param.grad for param in guide.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_torch_s_own_clipping():
    guide, elbo = torch_style()
    elbo(x, y).backward()
    norm = torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
    assert norm > 1
    total = torch.cat([param.grad for param in guide.parameters()]).norm()
    assert total == pytest.approx(1.0, rel=1e-4)


def test_an_exchange_between_steps_of_a_torch_optimizer():
    """SSVI serves for the exchange alone: the optimizer's moments follow their coordinates."""
    guide, elbo = torch_style()
    optim = torch.optim.Adam(elbo.parameters(), lr=0.01)
    svi = SSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    loc, scale = guide.parameters_in_place()

    def moments():
        """By coordinate of ``w``; the first of the guide's sites."""
        active = guide.active_sets["w"]
        values = optim.state[loc]["exp_avg"][: len(active)].tolist()
        return dict(zip(active.indices.tolist(), values, strict=True))

    for i in range(9):
        optim.zero_grad()
        elbo(x, y).backward()
        optim.step()
        if i % 3 == 2:
            before = moments()
            assert svi.exchange(x, y, share=0.4, optim=optim) == {"w": 2}
            after = moments()
            assert len(after.keys() & before.keys()) == 3
            assert after == {index: before.get(index, 0.0) for index in after}
    assert guide.parameters_in_place() == (loc, scale)


def test_minibatches():
    """A plate of the full size scales the likelihood."""
    guide = sparse_guide()
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), schedule=NEVER)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    losses = [sum(svi.step(*batch) for batch in loader) for _ in range(20)]
    assert improves(losses)
    batches = []
    for batch in loader:
        pyro.set_rng_seed(1)
        batches.append(svi.evaluate_loss(*batch))
    pyro.set_rng_seed(1)
    assert sum(batches) / 3 == pytest.approx(svi.evaluate_loss(x, y), rel=1e-4)


def test_evaluation_changes_nothing():
    guide = sparse_guide()
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    svi.step(x, y)
    before = copy.deepcopy(dict(guide.named_parameters()))
    assert math.isfinite(svi.evaluate_loss(x, y=y))
    assert svi.steps == 1
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_arguments_by_keyword():
    losses = []
    for args, kwargs in (((x, y), {}), ((x,), {"y": y}), ((), {"x": x, "y": y})):
        fresh()
        svi = SSVI(model, sparse_guide(), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        losses.append([svi.step(*args, **kwargs) for _ in range(3)])
        svi.exchange(*args, **kwargs)
    assert losses[0] == losses[1] == losses[2]


def test_two_phases():
    """The same guide goes on under another optimizer, loss and schedule."""
    guide = sparse_guide()
    steps(SSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), 20)
    medians = guide.median()
    optim = pyro.optim.SGD({"lr": 0.0})
    svi = SSVI(model, guide, optim, TraceMeanField_ELBO(), schedule=ConstantSchedule(every=5))
    steps(svi, 4)
    assert all(torch.equal(guide.median()[name], medians[name]) for name in medians)


def test_from_a_dense_guide():
    """A trained AutoNormal's medians are where the sparse guide starts."""
    dense = AutoNormal(model)
    steps(SVI(model, dense, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), 20)
    guide = AutoSparseNormal(model, density=0.5, init_loc_fn=init_to_value(values=dense.median()))
    guide(x, y)
    mask = guide.active_sets["w"].mask
    torch.testing.assert_close(guide.median()["w"][mask], dense.median()["w"][mask])
    torch.testing.assert_close(guide.median()["sigma"], dense.median()["sigma"])


# The parameter store


@pytest.mark.parametrize("kind", **each(KINDS))
@pytest.mark.parametrize("local", [False, True])
def test_where_parameters_live(kind, local):
    """In the store or in their modules: the same training."""
    with pyro.settings.context(module_local_params=local):
        fresh()
        guide = kind(model)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), schedule=NEVER)
        losses = steps(svi)
        names = set(pyro.get_param_store())
    assert names == (set() if local else {f"{type(guide).__name__}.{n}" for n in own(guide)})
    fresh()
    svi = SSVI(model, kind(model), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), schedule=NEVER)
    assert losses == steps(svi)


def own(guide):
    return {name.removesuffix("_unconstrained") for name, _ in guide.named_parameters()}


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_store_cleared_in_training(kind):
    """The guide's own parameters come back to it, with the optimizer's state."""
    runs = []
    for clears in (False, True):
        fresh()
        guide = kind(model)
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), schedule=NEVER)
        runs.append(steps(svi, after=pyro.clear_param_store if clears else lambda: None))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", **each(KINDS))
def test_a_store_saved_and_loaded(kind, tmp_path):
    """It does not know which coordinates are active: refused, but where all are, and always are."""
    guide = kind(model)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    steps(svi)
    median = guide.median()["w"]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    other = kind(model)
    if kind is KINDS["AutoNormal"]:
        other(x, y)
        assert torch.equal(other.median()["w"], median)
    else:
        with pytest.raises(ValueError, match=r"svi\.load\(path\) or guide\.load_state_dict"):
            other(x, y)


@pytest.mark.parametrize("kind", **each(KINDS))
def test_optimizer_state_saved_and_loaded(kind, tmp_path):
    """Guide and optimizer of a run that goes on elsewhere."""
    guide, optim = kind(model), pyro.optim.Adam({"lr": 0.02})
    svi = SSVI(model, guide, optim, Trace_ELBO(), schedule=NEVER)
    steps(svi)
    state = copy.deepcopy(guide.state_dict())
    optim.save(tmp_path / "optim")
    pyro.set_rng_seed(9)
    expected = steps(svi, 3)

    fresh()
    guide, optim = kind(model), pyro.optim.Adam({"lr": 0.02})
    guide(x, y)
    pyro.clear_param_store()
    guide.load_state_dict(state)
    optim.load(tmp_path / "optim")
    svi = SSVI(model, guide, optim, Trace_ELBO(), schedule=NEVER)
    pyro.set_rng_seed(9)
    assert steps(svi, 3) == pytest.approx(expected, rel=1e-5)


def test_two_guides_in_one_store():
    """Pyro names parameters by class: within modules of their own they do not meet."""
    guides = []
    for name in ("first", "second"):
        outer = PyroModule(name)
        outer.guide = sparse_guide()
        outer.guide(x, y)
        guides.append(outer.guide)
    assert len(pyro.get_param_store()) == 4
    for guide in guides:
        svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        steps(svi, 2)
        svi.exchange(x, y, share=0.4)
    assert not torch.equal(guides[0].loc, guides[1].loc)


def test_a_model_s_own_parameters_are_trained_beside():
    """Whether pyro.param statements or parameters of a module."""

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](6, 3)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))

        def forward(self, x, y=None):
            slope = pyro.param("slope", torch.tensor(1.0))
            mean = slope * self.layer(x).sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    net = Net()
    svi = SSVI(net, AutoSparseNormal(net, density=0.3), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    bias = net.layer.bias.detach().clone()
    svi.step(x, y)
    assert pyro.param("slope") != 1
    assert (net.layer.bias != bias).any()
