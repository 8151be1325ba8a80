"""Hostile input: bad data, extreme numbers, odd sizes. docs/hostile_input.md has the table."""

import warnings
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, NonFiniteWarning
from pyro_ssvi.criteria import REMOVAL

X = torch.linspace(-1, 1, 20 * 6).reshape(20, 6).sin()
Y = X.sum(-1).cos()


def model(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([8, 6]).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 8]).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean = F.linear(F.linear(x, w0).tanh(), w1).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def plain(x, y=None):
    """The same with a noise that is known."""
    return pyro.poutine.condition(model, {"noise": torch.tensor(0.5)})(x, y)


def make(model=model, density=0.3, lr=0.01, loss=Trace_ELBO, every=3, **kwargs):
    pyro.clear_param_store()
    guide = AutoSparseNormal(model, density=density)
    optim = pyro.optim.Adam({"lr": lr})
    return SSVI(model, guide, optim, loss(), schedule=ConstantSchedule(every=every), **kwargs)


def check(svi, sizes=None):
    """What must hold at any time."""
    for site in svi.guide.sites:
        active = svi.guide.active_sets[site.name]
        assert len(active) == site.k
        assert sizes is None or len(active) == sizes[site.name]
        assert (active.indices.diff() > 0).all()
        assert active.indices.min() >= 0
        assert active.indices.max() < active.numel()
    tensors = list(svi.guide.parameters())
    for optim in svi.optim.optim_objs.values():
        for state in optim.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(tensor.isfinite().all() for tensor in tensors)


def goes_on(svi, x=X, y=Y):
    """Training works, exchanges included."""
    for _ in range(4):
        assert abs(svi.step(x, y)) < float("inf")
    check(svi)


class Sequences(RuleBasedStateMachine):
    """Steps on good and bad batches, exchanges, saves and loads, in any order."""

    @initialize(
        density=st.sampled_from([0.15, 0.3, 0.9, 1.0]),
        every=st.integers(1, 4),
        removal=st.sampled_from(sorted(REMOVAL)),
        addition=st.sampled_from(["gradient", "sampled_gradient", "mixed_gradient", "random"]),
        loss=st.sampled_from([Trace_ELBO, TraceMeanField_ELBO]),
        seed=st.integers(0, 1000),
    )
    def begin(self, density, every, removal, addition, loss, seed):
        pyro.set_rng_seed(seed)
        self.options = {
            **{"density": density, "every": every, "loss": loss},
            **{"removal": removal, "addition": addition},
        }
        self.svi = make(**self.options)
        self.svi.step(X, Y)
        self.sizes = {name: len(a) for name, a in self.svi.guide.active_sets.items()}
        self.saved = self.svi.state_dict()

    @rule(rows=st.integers(1, 20))
    def step(self, rows):
        assert abs(self.svi.step(X[:rows], Y[:rows])) < float("inf")

    @rule(bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
    def bad_step(self, bad):
        x = X.clone()
        x[3, 2] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            # Pyro's own validation, in the steps that are its own, may be the one to object.
            with suppress(ValueError):
                self.svi.step(x, Y)

    @rule(share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    def exchange(self, share):
        self.svi.exchange(X, Y, share=share)

    @rule()
    def save(self):
        self.saved = self.svi.state_dict()

    @rule()
    def go_back(self):
        self.svi.load_state_dict(self.saved)

    @rule()
    def go_on_anew(self):
        self.svi = make(**self.options)
        self.svi.load_state_dict(self.saved)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def precision(self, dtype):
        """Of the parameters; the optimizer starts anew."""
        state = self.svi.guide.state_dict()
        self.svi = make(**self.options)
        self.svi.guide.load_state_dict(state)
        self.svi.guide.to(dtype)
        self.svi.step(X, Y)
        self.saved = self.svi.state_dict()

    @rule()
    def predict(self):
        assert Predictive(model, guide=self.svi.guide, num_samples=2)(X, Y)["obs"].shape == (2, 20)

    @invariant()
    def everything_holds(self):
        if hasattr(self, "svi"):
            check(self.svi, self.sizes)


Sequences.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestSequences = Sequences.TestCase


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_parameters_of_another_precision_than_the_model_s(loss, density):
    svi = make(density=density, loss=loss)
    svi.guide(X, Y)
    svi.guide.double()
    pyro.clear_param_store()
    goes_on(svi)
    assert svi.guide.loc.dtype == torch.float64


def test_an_exchange_by_chance_right_after_a_load(tmp_path):
    svi = make(addition="random")
    svi.step(X, Y)
    svi.save(tmp_path / "a.ckpt")
    again = make(addition="random")
    again.load(tmp_path / "a.ckpt")
    assert set(again.exchange(X, Y, share=0.5)) == {"w0", "w1"}
    goes_on(again)


def test_a_gradient_that_is_not_finite_though_the_loss_is():
    def rooted(x, y=None):
        w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([8, 6]).to_event(2))
        hidden = F.linear(x, w0)
        hidden = (hidden * 0).sqrt() if bad else hidden
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(hidden.sum(-1), 1.0), obs=y)

    bad = False
    svi = make(rooted)
    goes_on(svi)
    before, bad = svi.guide.loc_unconstrained.clone(), True
    with pytest.warns(NonFiniteWarning):
        svi.step(X, Y)
    assert torch.equal(svi.guide.loc_unconstrained, before)
    bad = False
    goes_on(svi)


def test_a_batch_of_one():
    svi = make()
    for _ in range(7):
        svi.step(X[:1], Y[:1])
    goes_on(svi)


def test_an_empty_batch():
    """Pyro has no plates of size 0."""
    svi = make()
    with pytest.raises(ZeroDivisionError, match="size cannot be zero"):
        svi.step(X[:0], Y[:0])
    svi.step(X, Y)
    before = svi.guide.loc_unconstrained.clone()
    with pytest.raises(ZeroDivisionError, match="size cannot be zero"):
        svi.step(X[:0], Y[:0])
    assert torch.equal(svi.guide.loc_unconstrained, before)
    goes_on(svi)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_inputs(value):
    svi = make()
    for _ in range(7):
        svi.step(torch.full_like(X, value), Y)
    goes_on(svi)


@pytest.mark.parametrize("removal", REMOVAL)
@pytest.mark.parametrize("raw", [-100.0, 1e4])
def test_scales_at_extremes(raw, removal):
    """Standard deviations of 4e-44 and of 10 000."""
    svi = make(plain, removal=removal)
    svi.step(X, Y)
    svi.guide.scale_unconstrained.data.fill_(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        for _ in range(5):
            svi.step(X, Y)
    check(svi)
    svi.guide.scale_unconstrained.data.fill_(-4.0)
    goes_on(svi)


def test_a_scale_of_zero():
    """There is no density."""
    svi = make()
    svi.step(X, Y)
    before = svi.guide.loc_unconstrained.clone()
    svi.guide.scale_unconstrained.data.fill_(-1000.0)
    with pytest.warns(NonFiniteWarning):
        svi.step(X, Y)
    assert torch.equal(svi.guide.loc_unconstrained, before)
    with pytest.raises(ValueError, match=r"scale is not positive at sites \['w0', 'w1', 'noise'\]"):
        svi.guide(X, Y)
    svi.guide.scale_unconstrained.data.fill_(-4.0)
    goes_on(svi)


@pytest.mark.parametrize("removal", REMOVAL)
@pytest.mark.parametrize("value", [1e-45, 1e20, -1e38])
def test_locations_at_extremes(value, removal):
    svi = make(plain, removal=removal)
    svi.step(X, Y)
    svi.guide.loc_unconstrained.data[:5] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        for _ in range(5):
            svi.step(X, Y)
    check(svi)
    svi.guide.loc_unconstrained.data.clamp_(-1, 1)
    goes_on(svi)


def test_a_learning_rate_that_blows_up():
    svi = make(plain, lr=1e30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            svi.step(X, Y)
    assert any(issubclass(warning.category, NonFiniteWarning) for warning in caught)
    check(svi)


@pytest.mark.parametrize(
    ("shape", "density"), [((1, 1), 1.0), ((1, 6), 0.1), ((1, 6), 1.0), ((1, 6), 0.9)]
)
def test_one_active_coordinate_or_all(shape, density):
    def line(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
        with pyro.plate("data", len(x)):
            mean = F.linear(x[:, : shape[1]], w).squeeze(-1)
            return pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    goes_on(make(line, density, every=1))


def test_no_active_coordinate():
    with pytest.raises(ValueError, match="w1"):
        make(density={"w0": 0.3, "w1": 0.01}).step(X, Y)


def test_thousands_of_sites():
    def many(x, y=None):
        total = 0.0
        for i in range(1000):
            w = pyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([2, 6]).to_event(2))
            total = total + w.values.sum() if hasattr(w, "values") else total
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(total, 1.0), obs=y)

    svi = make(many, density=0.5, addition="random")
    for _ in range(3):
        svi.step(X, Y)
    check(svi)
    assert len(svi.guide.sites) == 1000


@pytest.mark.parametrize("name", ["w.0", "a/b", "w 0", "gewicht_ä", "0"])
def test_names_of_sites(name, tmp_path):
    def line(x, y=None):
        w = pyro.sample(name, dist.Normal(0.0, 1.0).expand([1, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(F.linear(x, w).squeeze(-1), 1.0), obs=y)

    svi = make(line)
    goes_on(svi)
    svi.save(tmp_path / "a.ckpt")
    again = make(line)
    again.load(tmp_path / "a.ckpt")
    goes_on(again)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, None].expand(-1, 3, -1)[:, 1],
        lambda x: torch.cat([x, x])[::2],
        lambda x: x.clone().requires_grad_(),
    ],
)
def test_layouts_of_data(layout):
    goes_on(make(), layout(X), Y)


@pytest.mark.parametrize("every", [1, 2])
def test_all_coordinates_exchanged_at_every_step(every):
    svi = make(every=every)
    svi.schedule = ConstantSchedule(every=every, fraction=1.0)
    for _ in range(10):
        svi.step(X, Y)
    check(svi)


def test_a_model_that_raises_in_a_step_with_exchange():
    fails = []

    def moody(x, y=None):
        model(x, y)
        if fails:
            raise ArithmeticError("not today")

    svi = make(moody)
    for _ in range(2):
        svi.step(X, Y)
    fails.append(True)
    before = [
        tensor.clone() for tensor in svi.guide.state_dict().values() if hasattr(tensor, "dim")
    ]
    with pytest.raises(ArithmeticError):
        svi.step(X, Y)
    assert svi.steps == 2
    after = [tensor for tensor in svi.guide.state_dict().values() if hasattr(tensor, "dim")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fails.clear()
    goes_on(svi)


def test_a_failed_step_leaves_no_gradient_to_the_next():
    """It fails in the second particle, when the first has had its backward pass."""
    runs = []

    def moody(x, y=None):
        value = model(x, y)
        runs.append(1)
        if svi.steps == 2 and len(runs) == 2:
            raise KeyboardInterrupt
        return value

    svi = make(moody, loss=lambda: Trace_ELBO(num_particles=2))
    for _ in range(2):
        svi.step(X, Y)
    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        svi.step(X, Y)
    assert len(runs) == 2
    assert not any(param.grad.any() for param in svi.guide.parameters())
    goes_on(svi)


@pytest.mark.parametrize("features", [5, 7])
def test_a_model_whose_sites_change_their_shape(features):
    def wide(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, x.shape[1]]).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(F.linear(x, w).squeeze(-1), 1.0), obs=y)

    svi = make(wide)
    svi.step(X, Y)
    with pytest.raises(
        ValueError, match=r"site 'w' has shape \(1, .\) in the model, but \(1, 6\) in"
    ):
        svi.step(torch.zeros(20, features), Y)
    goes_on(svi)
