import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample

from pyro_ssvi import (
    SSVI,
    AutoSparseNormal,
    ConstantSchedule,
    CosineSchedule,
    NonFiniteWarning,
    SubspaceModel,
    forbid_materialise,
)
from pyro_ssvi.addition import ADDITION, Addition, Gradient
from pyro_ssvi.criteria import REMOVAL
from pyro_ssvi.gradient_record import GradientRecord

x, y = torch.randn(20, 12), torch.randn(20)


def bnn(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 10]).to_event(2))
    mean = F.linear(F.linear(x, w0, b0).tanh(), w1).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


OPTIMIZERS = {
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
    "plain SGD": lambda: pyro.optim.SGD({"lr": 1e-3}),
    "Adam": lambda: pyro.optim.Adam({"lr": 1e-2}),
    "Adam amsgrad": lambda: pyro.optim.Adam({"lr": 1e-2, "amsgrad": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 1e-2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.999}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 1e-2, "momentum": 0.9, "centered": True}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({}),
    "Rprop": lambda: pyro.optim.Rprop({"lr": 1e-2}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.99}
    ),
}


def make(density=0.3, optim="Adam", loss=None, model=bnn, schedule=None, **kwargs):
    pyro.clear_param_store()
    guide = AutoSparseNormal(model, density=density)
    schedule = schedule or ConstantSchedule(every=10_000)
    loss = loss or Trace_ELBO()
    return guide, SSVI(model, guide, OPTIMIZERS[optim](), loss, schedule=schedule, **kwargs)


def state_of(svi, param):
    own = svi.optim.optim_objs[param]
    return getattr(own, "optimizer", own).state[param]


def by_coordinate(guide, flat):
    """A flat vector as one dense tensor for each site, NaN where inactive."""
    result, start = {}, 0
    for name, active in guide.active_sets.items():
        dense = torch.full((active.numel(),), math.nan)
        dense[active.indices] = flat[start : start + len(active)].detach()
        result[name], start = dense, start + len(active)
    return result


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_parameters_and_optimizer_state_follow_their_coordinate(optim):
    guide, svi = make(optim=optim)
    for _ in range(5):
        svi.step(x, y)
    params = guide.parameters_in_place()
    sets = dict(guide.active_sets)
    before = [by_coordinate(guide, p) for p in params]
    moments = [
        {k: by_coordinate(guide, v) for k, v in state_of(svi, p).items() if is_moment(v, p)}
        for p in params
    ]
    counts = [{k: v for k, v in state_of(svi, p).items() if not is_moment(v, p)} for p in params]
    assert any(moments) or optim == "plain SGD"

    exchanged = svi.exchange(x, y, share=0.3)
    assert exchanged == {"w0": 11, "w1": 1}

    assert all(a is b for a, b in zip(params, guide.parameters_in_place(), strict=True))
    assert len(svi.optim.optim_objs) == 2
    for i, param in enumerate(params):
        assert {k: v for k, v in state_of(svi, param).items() if k in counts[i]} == counts[i]
        for vectors, first in [
            (before[i], None),
            *((m, FIRST.get((optim, k), 0.0)) for k, m in moments[i].items()),
        ]:
            key = next((k for k, m in moments[i].items() if m is vectors), None)
            now = by_coordinate(guide, param if key is None else state_of(svi, param)[key])
            for name, active in guide.active_sets.items():
                kept = sets[name].mask.flatten() & active.mask.flatten()
                new = active.mask.flatten() & ~sets[name].mask.flatten()
                assert new.sum() == exchanged.get(name, 0)
                assert torch.equal(now[name][kept], vectors[name][kept])
                if first is not None:
                    assert (now[name][new] == first).all(), key


#: What an optimizer's state starts from, where that is not 0.
FIRST = {
    ("Rprop", "step_size"): torch.tensor(1e-2),
    ("Adagrad", "sum"): torch.tensor(0.1),
    ("AdagradRMSProp", "sum"): None,
}


def is_moment(value, param):
    return isinstance(value, torch.Tensor) and value.shape == param.shape


def test_new_coordinates_start_at_zero_with_the_mean_scale_of_those_that_stay():
    guide, svi = make()
    for _ in range(5):
        svi.step(x, y)
    guide.scale = torch.rand_like(guide.scale) + 0.1
    old, scale = guide.active_sets["w0"], by_coordinate(guide, guide.scale)["w0"]
    svi.exchange(x, y, share=0.3)
    active = guide.active_sets["w0"]
    kept = (old.mask & active.mask).flatten()
    new = (active.mask & ~old.mask).flatten()
    assert (by_coordinate(guide, guide.loc)["w0"][new] == 0).all()
    first = by_coordinate(guide, guide.scale)["w0"][new]
    torch.testing.assert_close(first, scale[kept].mean().expand_as(first))


def test_new_scale_may_be_a_number():
    guide, svi = make(new_scale=1e-4)
    svi.step(x, y)
    old = guide.active_sets["w0"]
    svi.exchange(x, y, share=0.3)
    new = (guide.active_sets["w0"].mask & ~old.mask).flatten()
    first = by_coordinate(guide, guide.scale)["w0"][new]
    torch.testing.assert_close(first, torch.full_like(first, 1e-4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_fifty_exchanges(loss):
    schedule = ConstantSchedule(every=2, fraction=0.4, stop=102)
    guide, svi = make(loss=loss, schedule=schedule)
    svi.step(x, y)
    sizes = {name: len(active) for name, active in guide.active_sets.items()}
    seen = {name: active.mask for name, active in guide.active_sets.items()}
    exchanges = 0
    with forbid_materialise():
        for _ in range(104):
            before = guide.active_sets
            svi.step(x, y)
            exchanges += guide.active_sets is not before
            for name, active in guide.active_sets.items():
                assert len(active) == sizes[name]
                assert (active.indices.diff() > 0).all()
                seen[name] = seen[name] | active.mask
    assert exchanges == 50
    assert seen["w0"].float().mean() > 0.5  # it did go about
    for _ in range(10):
        sample = guide(x, y)
        for name, active in guide.active_sets.items():
            assert (sample[name].to_dense()[~active.mask] == 0).all()


@pytest.mark.parametrize("local_reparam", [False, True])
def test_exchange_removes_the_least_and_adds_the_most_promising(local_reparam):
    guide, svi = make(
        addition=Gradient(at="mean"), loss=TraceMeanField_ELBO(), local_reparam=local_reparam
    )
    for _ in range(20):
        svi.step(x, y)
    guide.scale_unconstrained.data.normal_()
    old = guide.active_sets
    posterior = guide.posterior()
    # The gradient of the dense twin at the mean, by plain autograd.
    leaves = {n: m.requires_grad_() for n, m in guide.median().items()}
    mean = F.linear(F.linear(x, leaves["w0"], leaves["b0"]).tanh(), leaves["w1"]).squeeze(-1)
    (-dist.Normal(mean, 0.5).log_prob(y).sum()).backward()

    exchanged = svi.exchange(x, y, share=0.3)
    for name, n in exchanged.items():
        snr = posterior[name].loc.abs() / posterior[name].scale
        removed = old[name].indices[snr.topk(n, largest=False).indices]
        promise = leaves[name].grad.abs().masked_fill(old[name].mask, -1).flatten()
        added = promise.topk(n).indices
        gone = old[name].mask & ~guide.active_sets[name].mask
        come = guide.active_sets[name].mask & ~old[name].mask
        assert set(gone.flatten().nonzero().flatten().tolist()) == set(removed.tolist())
        assert set(come.flatten().nonzero().flatten().tolist()) == set(added.tolist())


def test_the_step_s_own_gradient_feeds_the_exchange():
    """No extra pass: the numbers drawn in a step with an exchange are those of one without."""
    draws = []
    for every in (3, 10_000):
        pyro.set_rng_seed(0)
        guide, svi = make(addition="gradient", schedule=ConstantSchedule(every=every))
        for _ in range(3):
            svi.step(x, y)
        draws.append((torch.randn(3), guide.active_sets["w0"]))
    assert torch.equal(draws[0][0], draws[1][0])
    assert not draws[0][1].same(draws[1][1])


@pytest.mark.parametrize("at", ["sample", "mean"])
def test_gradients_of_several_batches(at, monkeypatch):
    passes = []
    original = SSVI._exchange

    def spy(self, share):
        active = self.guide.active_sets["w0"]
        passes.append((self.steps, len(self._record._parts[active])))
        return original(self, share)

    monkeypatch.setattr(SSVI, "_exchange", spy)
    _guide, svi = make(addition=Gradient(batches=3, at=at), schedule=ConstantSchedule(every=5))
    for _ in range(11):
        svi.step(x, y)
    assert passes == [(5, 3), (10, 3)]


def test_an_exchange_leaves_no_gradient_behind():
    guide, svi = make()
    svi.step(x, y)
    svi.exchange(x, y, share=0.3)
    for param in guide.parameters_in_place():
        assert param.grad is None or (param.grad == 0).all()


@pytest.mark.parametrize("local_reparam", [False, True])
def test_the_record_holds_the_gradient_of_the_mean(local_reparam):
    """That of a step, averaged over batches; an inactive coordinate has no variance to gain."""
    loss = TraceMeanField_ELBO()
    guide, svi = make(loss=loss, local_reparam=local_reparam, addition=Gradient(batches=2))
    svi.step(x, y)
    guide.scale_unconstrained.data.fill_(-20.0)  # a draw is the mean, or as good
    active = guide.active_sets["w0"]
    leaves = {n: m.requires_grad_() for n, m in guide.median().items()}
    mean = F.linear(F.linear(x, leaves["w0"], leaves["b0"]).tanh(), leaves["w1"]).squeeze(-1)
    (-dist.Normal(mean, 0.5).log_prob(y).sum()).backward()
    seen = []
    svi.addition = Gradient(score=lambda gradient: seen.append(gradient) or gradient)
    svi.exchange(x, y, share=0.3)
    torch.testing.assert_close(seen[0], leaves["w0"].grad, rtol=1e-3, atol=1e-3)
    assert not guide.active_sets["w0"].same(active)


@pytest.fixture
def single(monkeypatch):
    """The gradients with respect to w0 that are recorded."""
    gradients, original = [], GradientRecord.add_product

    def spy(self, active, g, x):
        if active.shape == (10, 12):
            gradients.append(g @ x.t())
        original(self, active, g, x)

    monkeypatch.setattr(GradientRecord, "add_product", spy)
    return gradients


@pytest.mark.parametrize("by_schedule", [False, True])
def test_gradients_of_samples_are_averaged(by_schedule, single):
    seen = []
    _guide, svi = make(
        addition=Gradient(batches=1, samples=4, score=lambda g: seen.append(g) or g.abs()),
        schedule=ConstantSchedule(every=2),
    )
    svi.step(x, y)
    if by_schedule:
        svi.step(x, y)
    else:
        svi.exchange(x, y, share=0.3)
    assert len(single) == 4
    assert not torch.equal(single[0], single[1])
    torch.testing.assert_close(seen[0], sum(single) / 4)


def test_gradients_of_batches_are_averaged(single):
    seen = []
    _guide, svi = make(
        addition=Gradient(batches=3, score=lambda g: seen.append(g) or g.abs()),
        schedule=ConstantSchedule(every=3),
    )
    for _ in range(3):
        svi.step(x, y)
    assert len(single) == 3
    torch.testing.assert_close(seen[0], sum(single) / 3)


def test_the_share_is_that_of_this_step():
    schedule = CosineSchedule(every=4, fraction=0.5, stop=10)
    guide, svi = make(schedule=schedule)
    for _ in range(8):
        before = guide.active_sets["w0"] if svi.steps else None
        svi.step(x, y)
    kept = (guide.active_sets["w0"].mask & before.mask).sum()
    assert 36 - kept == math.floor(36 * schedule.share(8) + 0.5)
    assert schedule.share(7) * 36 > 36 - kept + 1


def test_two_sparse_guides_both_exchange():
    pyro.clear_param_store()
    guide = AutoGuideList(bnn)
    guide.append(AutoSparseNormal(poutine.block(bnn, expose=["w0", "b0"]), density=0.3))
    guide.append(AutoSparseNormal(poutine.block(bnn, expose=["w1"]), density=0.3))
    svi = SSVI(bnn, guide, OPTIMIZERS["Adam"](), Trace_ELBO())
    svi.step(x, y)
    assert svi.exchange(x, y, share=0.4) == {"w0": 14, "w1": 1}


def test_nothing_is_recorded_in_a_normal_step(monkeypatch):
    from pyro_ssvi import gradient_record

    def fail(*args):
        raise AssertionError("a gradient of full size in a normal step")

    monkeypatch.setattr(gradient_record.GradientRecord, "add_product", fail)
    _guide, svi = make(schedule=ConstantSchedule(every=5))
    for _ in range(4):
        svi.step(x, y)
    with pytest.raises(AssertionError, match="full size"):
        svi.step(x, y)


@pytest.mark.parametrize(
    "criterion",
    [{"removal": removal} for removal in [*REMOVAL, lambda loc, scale: -scale]]
    + [{"addition": addition} for addition in [*ADDITION, lambda gradient: gradient]],
)
def test_every_criterion(criterion):
    guide, svi = make(**criterion)
    svi.step(x, y)
    before = guide.active_sets["w0"]
    svi.exchange(x, y, share=0.3)
    assert not guide.active_sets["w0"].same(before)


def test_a_site_that_the_loss_does_not_need_is_left_alone():
    def model(x, y=None):
        pyro.sample("idle", dist.Normal(0.0, 1.0).expand([4, 4]).to_event(2))
        bnn(x, y)

    _guide, svi = make(model=model)
    svi.step(x, y)
    assert set(svi.exchange(x, y, share=0.3)) == {"w0", "w1"}


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_losses(loss, num_particles):
    _guide, svi = make(loss=loss(num_particles=num_particles), optim="Adam")
    with forbid_materialise():
        first = sum(svi.step(x, y) for _ in range(10))
        for _ in range(60):
            svi.step(x, y)
        assert sum(svi.step(x, y) for _ in range(10)) < first
        svi.exchange(x, y, share=0.3)


# KL weight


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_kl_weight_scales_the_divergence_and_not_the_likelihood(loss):
    guide, svi = make(loss=loss())
    guide(x, y)
    values = []
    for weight in (0.0, 1.0, 3.0):
        svi.kl_weight = weight
        pyro.set_rng_seed(5)
        values.append(svi.evaluate_loss(x, y))
    divergence = values[1] - values[0]
    assert values[2] == pytest.approx(values[0] + 3 * divergence, rel=1e-5)
    pyro.set_rng_seed(5)
    sample = guide(x, y)
    mean = F.linear(F.linear(x, sample["w0"], sample["b0"]).tanh(), sample["w1"]).squeeze(-1)
    expected = -dist.Normal(mean, 0.5).log_prob(y).sum()
    assert values[0] == pytest.approx(expected.item(), rel=1e-5)


def test_enumerated_sites_count_to_the_likelihood():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 12]).to_event(2))
        means = F.linear(x, w)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            mean = torch.where(k == 1, means[:, 1], means[:, 0])
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    pyro.clear_param_store()
    guide = AutoSparseNormal(poutine.block(model, hide=["k"]), density=0.5)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SSVI(model, guide, OPTIMIZERS["Adam"](), loss)
    guide(x, y)
    losses = []
    for svi.kl_weight in (0.0, 0.5, 1.0):
        pyro.set_rng_seed(0)
        losses.append(svi.evaluate_loss(x, y))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-4)
    pyro.set_rng_seed(0)
    means = F.linear(x, guide(x, y)["w"].to_dense())
    parts = dist.Normal(means, 0.5).log_prob(y.unsqueeze(-1)) + torch.tensor([0.7, 0.3]).log()
    assert losses[0] == pytest.approx(-parts.logsumexp(-1).sum().item(), rel=1e-4)
    svi.step(x, y)
    assert svi.exchange(x, y, share=0.5) == {"w": 6}


def test_kl_weight_as_a_function_of_the_step():
    asked = []

    def warm_up(step):
        asked.append(step)
        return min(1.0, step / 2)

    _guide, svi = make(kl_weight=warm_up)
    for _ in range(4):
        svi.step(x, y)
    assert asked == [0, 1, 2, 3]
    assert svi.steps == 4


# Other ways to train


def test_torch_style_training_of_a_pyro_module():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.hidden = PyroModule[torch.nn.Linear](12, 10)
            prior = dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2)
            self.hidden.weight = PyroSample(prior)
            self.out = torch.nn.Linear(10, 1)  # deterministic, trained beside

        def forward(self, x, y=None):
            mean = self.out(self.hidden(x).tanh()).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    with pyro.settings.context(module_local_params=True):
        net = Net()
        guide = AutoSparseNormal(net, density=0.3)
        elbo = Trace_ELBO()(SubspaceModel(net), guide)
        elbo(x, y)
        params = dict(elbo.named_parameters())
        assert {n.split(".")[-1] for n in params} >= {"loc_unconstrained", "weight", "bias"}
        optim = torch.optim.Adam(params.values(), lr=1e-2)
        before = {n: p.detach().clone() for n, p in params.items()}
        with forbid_materialise():
            for _ in range(3):
                optim.zero_grad()
                elbo(x, y).backward()
                optim.step()
        assert all((p != before[n]).any() for n, p in params.items())


def test_a_dense_guide_is_trained_and_never_exchanged():
    guide = AutoNormal(bnn)
    svi = SSVI(
        bnn,
        guide,
        pyro.optim.Adam({"lr": 1e-2}),
        Trace_ELBO(),
        schedule=ConstantSchedule(every=2),
        kl_weight=0.1,
    )
    # Who changes one of two names trains a dense posterior, and has to hear of it.
    with pytest.warns(UserWarning, match=r"^AutoNormal has no sparse.*AutoSparseNormal") as caught:
        svi.step(x, y)
    assert [Path(each.filename) for each in caught] == [Path(__file__)]
    for _ in range(4):
        svi.step(x, y)  # once is enough: warnings are errors here
    assert svi.guides == []


def test_a_guide_may_make_its_sparse_part_when_it_runs():
    class Late(PyroModule):
        def forward(self, *args):
            if not hasattr(self, "part"):
                self.part = AutoSparseNormal(bnn, density=0.3)
            return self.part(*args)

    svi = SSVI(bnn, Late(), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(x, y)
    assert len(svi.guides) == 1


def test_a_sparse_part_may_come_after_ssvi_is_made():
    guide = AutoGuideList(bnn)
    svi = SSVI(bnn, guide, OPTIMIZERS["Adam"](), Trace_ELBO())
    guide.append(AutoSparseNormal(bnn, density=0.3))
    svi.step(x, y)
    assert svi.exchange(x, y, share=0.4) == {"w0": 14, "w1": 1}


def test_nothing_to_exchange_in_a_guide_whose_sites_are_all_dense():
    guide, svi = make(density=1.0, schedule=ConstantSchedule(every=2))
    for _ in range(3):
        svi.step(x, y)
    assert svi.exchange(x, y, share=0.3) == {}
    assert all(active.is_full for active in guide.active_sets.values())


def test_it_learns_and_finds_the_support():
    """Five of 300 inputs matter: the exchange must find them, and the posterior their values."""
    truth = torch.zeros(300)
    truth[torch.randperm(300)[:5]] = torch.tensor([3.0, -3.0, 2.0, -2.0, 4.0])
    inputs = torch.randn(400, 300)
    outputs = inputs @ truth + 0.1 * torch.randn(400)

    def regression(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 3.0).expand([1, 300]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w).squeeze(-1), 0.1), obs=y)

    guide = AutoSparseNormal(regression, density=0.05, init_scale=0.01)
    svi = SSVI(
        regression,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        TraceMeanField_ELBO(),
        schedule=CosineSchedule(every=20, stop=600),
    )
    for _ in range(900):
        svi.step(inputs, outputs)
    found = guide.median()["w"].flatten()
    torch.testing.assert_close(found, truth, atol=0.1, rtol=0)


# Bad input


class FirstColumns(Addition):
    """Add as far to the left as there is room."""

    def scores(self, active, start, stop, record):
        columns = -torch.arange(active.units.matrix_shape[1], dtype=torch.float32)
        return columns.repeat(stop - start, 1)


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize("allocation", ["per_site", "global"])
def test_addition_of_your_own(batches, allocation):
    """With and without a gradient, which it need not look at."""
    kind = type("Own", (FirstColumns,), {"batches": batches})
    guide, svi = make(0.3, addition=kind(), allocation=allocation, removal=lambda loc, _: loc)
    svi.step(x, y)
    before = guide.active_sets["w0"].mask
    n = svi.exchange(x, y, share=0.5)["w0"]
    free = ~before
    new = guide.active_sets["w0"].mask & free
    assert new.sum() == n > 0
    last = int(new.any(0).nonzero().max())
    assert torch.equal(new[:, :last], free[:, :last])
    svi.schedule = ConstantSchedule(every=1)
    svi.step(x, y)


def test_an_exchange_that_fails_leaves_no_gradients():
    calls = []

    def model(x, y=None):
        calls.append(1)
        if len(calls) == fails:
            raise OSError("cannot read")
        return bnn(x, y)

    fails = 0
    _, svi = make(model=model, addition=Gradient(samples=2))
    svi.step(x, y)
    fails = len(calls) + 2
    with pytest.raises(OSError, match="cannot read"):
        svi.exchange(x, y, share=0.3)
    assert len(calls) == fails
    assert svi.state_dict()["record"] == []


def test_unknown_criteria_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'snr2'.*abs_mean.*snr_exp_abs"):
        make(removal="snr2")
    with pytest.raises(ValueError, match=r"'momentum'.*'gradient', .*'random'"):
        make(addition="momentum")


def test_criterion_of_the_wrong_shape():
    _guide, svi = make(removal=lambda loc, scale: loc.mean())
    svi.step(x, y)
    with pytest.raises(ValueError, match=r"gave scores \(\) for site 'w0', expected \(36,\)"):
        svi.exchange(x, y, share=0.3)


def test_more_batches_than_steps_between_exchanges():
    with pytest.raises(ValueError, match=r"averages over 5 batches.*every 3 steps"):
        make(addition=Gradient(batches=5), schedule=ConstantSchedule(every=3))


@pytest.mark.parametrize("new_scale", [-1.0, 0.0, math.inf, math.nan])
def test_new_scale(new_scale):
    with pytest.raises(ValueError, match="new_scale='mean' or a float > 0"):
        make(new_scale=new_scale)


@pytest.mark.parametrize("share", [2.0, -0.1, math.nan])
def test_share(share):
    _guide, svi = make()
    svi.step(x, y)
    with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
        svi.exchange(x, y, share=share)


def test_schedule():
    with pytest.raises(
        ValueError, match=r"expected a schedule such as CosineSchedule\(\), got 100"
    ):
        make(schedule=100)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_kl_weight(weight):
    with pytest.raises(ValueError, match="kl_weight >= 0"):
        make(kl_weight=weight)
    _guide, svi = make(kl_weight=lambda step: weight)
    with pytest.raises(ValueError, match="kl_weight >= 0"):
        svi.step(x, y)


def test_a_guide_whose_parts_cannot_be_found():
    guide = poutine.scale(AutoSparseNormal(bnn), scale=0.5)
    with pytest.raises(ValueError, match="which is not a module"):
        SSVI(bnn, guide, OPTIMIZERS["Adam"](), Trace_ELBO())


def test_gradient_at_the_mean_of_vectorised_particles():
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
    with pytest.raises(ValueError, match="without vectorize_particles"):
        make(loss=loss, addition=Gradient(at="mean"))


def test_jit_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = JitTrace_ELBO()
    with pytest.raises(ValueError, match="use Trace_ELBO"):
        make(loss=loss)


def test_exchange_before_data():
    _guide, svi = make(addition="random")
    with pytest.raises(RuntimeError, match="before it has seen data"):
        svi.exchange(x, y, share=0.3)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_exchange(bad):
    guide, svi = make()
    for _ in range(3):
        svi.step(x, y)
    sets = guide.active_sets
    loc = guide.loc.detach().clone()
    broken = x.clone()
    broken[0, 0] = bad
    message = "exchange after step 3 skipped: site 'w0': its gradient is not finite"
    with pyro.validation_enabled(False), pytest.warns(NonFiniteWarning, match=message):
        assert svi.exchange(broken, y, share=0.3) == {}
    assert guide.active_sets is sets
    assert torch.equal(guide.loc, loc)
    assert svi.exchange(x, y, share=0.3)["w0"] == 11


def test_removal_scores_that_are_not_finite_skip_the_exchange():
    _guide, svi = make(removal=lambda loc, scale: loc * math.nan)
    svi.step(x, y)
    with pytest.warns(NonFiniteWarning, match="removal scores of site 'w0' are not finite"):
        assert svi.exchange(x, y, share=0.3) == {}


@pytest.mark.filterwarnings("ignore:Encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", [Trace_ELBO(), Trace_ELBO(num_particles=2)])
@pytest.mark.parametrize("step", [4, 5])
def test_a_step_on_bad_data_changes_nothing(bad, loss, step):
    guide, svi = make(loss=loss, schedule=ConstantSchedule(every=5))
    for _ in range(step - 1):
        svi.step(x, y)
    sets = guide.active_sets
    before = [p.detach().clone() for p in guide.parameters()]
    moments = state_of(svi, guide.loc_unconstrained)["exp_avg"].clone()
    broken = x.clone()
    broken[0, 0] = bad
    message = f"step {step} skipped: its loss or gradient is not finite"
    with pyro.validation_enabled(False), pytest.warns(NonFiniteWarning, match=message):
        svi.step(broken, y)
    assert guide.active_sets is sets
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert torch.equal(state_of(svi, guide.loc_unconstrained)["exp_avg"], moments)
    assert svi.steps == step
    for _ in range(5):
        svi.step(x, y)
    assert guide.active_sets is not sets
    assert all(p.isfinite().all() for p in guide.parameters())


# Local reparameterisation


def test_local_reparameterisation_has_the_moments_of_sampled_weights():
    """A product's draws against the closed form of its mean and variance."""
    inputs = torch.randn(3, 12)

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
        out = (F.linear(x, w), x @ w.T, (w @ x.T).T)
        pyro.factor("unused", out[0].sum() * 0.0)
        outs.append(torch.stack(out))

    outs = []
    guide, svi = make(model=model, loss=TraceMeanField_ELBO(), local_reparam=True)
    guide(inputs)
    guide.loc_unconstrained.data.normal_()
    guide.scale_unconstrained.data.normal_()
    outs.clear()
    with forbid_materialise():
        for _ in range(2000):
            svi.evaluate_loss(inputs)
    draws = torch.stack(outs)
    q = guide.posterior()["w"]
    mean = F.linear(inputs, q.mean.to_dense())
    variance = F.linear(inputs**2, q.variance.to_dense())
    for spelling in range(3):
        found = draws[:, spelling]
        drawn = variance > 0
        error = (found.mean(0) - mean) / (variance / 2000).sqrt()
        assert error[drawn].abs().max() < 4.5
        torch.testing.assert_close(found.var(0)[drawn], variance[drawn], rtol=0.15, atol=0)
        # Unlike with one draw of the weights, inputs and uses are independent.
        first, second = ((found[:, i, :] - mean[i])[:, drawn[i]] for i in (0, 1))
        correlation = (first * second).mean(0) / (first.std(0) * second.std(0))
        assert correlation.abs().max() < 0.1
    assert not torch.equal(draws[:, 0], draws[:, 1])


def test_local_reparameterisation_varies_less_and_agrees_on_average():
    gradients = {}
    for local in (False, True):
        pyro.set_rng_seed(0)
        guide, svi = make(loss=TraceMeanField_ELBO(), local_reparam=local)
        guide(x, y)
        guide.loc_unconstrained.data.copy_(torch.linspace(-1, 1, len(guide.loc)))
        draws = []
        for _ in range(200):
            svi.loss_and_grads(svi.model, guide, x, y)
            draws.append(torch.cat([p.grad for p in guide.parameters_in_place()]))
            guide.zero_grad()
        gradients[local] = torch.stack(draws)
    error = (gradients[True].var(0) / 200 + gradients[False].var(0) / 200).sqrt()
    difference = gradients[True].mean(0) - gradients[False].mean(0)
    assert (difference.abs() <= 4.8 * error + 1e-6).all()
    assert (error > 0).sum() > 20
    assert gradients[True].var(0).mean() < gradients[False].var(0).mean()


def test_local_reparameterisation_learns_and_exchanges():
    schedule = ConstantSchedule(every=10)
    guide, svi = make(loss=TraceMeanField_ELBO(), local_reparam=True, schedule=schedule)
    with forbid_materialise():
        first = sum(svi.step(x, y) for _ in range(10))
        for _ in range(60):
            svi.step(x, y)
        assert sum(svi.step(x, y) for _ in range(10)) < first
    assert guide.loc.isfinite().all()
    # Prediction draws weights: nothing of the training's way of drawing stays behind.
    assert guide(x, y)["w0"].posterior is None


def test_local_reparameterisation_survives_units_without_input():
    guide, svi = make(loss=TraceMeanField_ELBO(), local_reparam=True)
    svi.step(torch.zeros_like(x), y)
    assert all(p.isfinite().all() for p in guide.parameters())


def test_local_reparameterisation_needs_a_closed_form():
    with pytest.raises(ValueError, match="use TraceMeanField_ELBO, got Trace_ELBO"):
        make(local_reparam=True)
