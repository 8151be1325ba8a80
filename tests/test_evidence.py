import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_svi import bnn, make, x, y

from pyro_ssvi import SSVI, ActiveSet, AutoSparseDelta, AutoSparseNormal, ConstantSchedule
from pyro_ssvi.addition import Evidence
from pyro_ssvi.diagnostics import evidence_support
from pyro_ssvi.evidence import addition_gain, laplace, removal_gain, removal_loss
from pyro_ssvi.gradient_record import GradientRecord, Prior
from pyro_ssvi.joint_step import squares_along
from pyro_ssvi.patches import Patches

gradients = st.floats(-30, 30)
curvatures = st.floats(0, 1e3)
scales = st.floats(1e-3, 10)


def tensors(*numbers, dtype=torch.float64):
    return [torch.tensor(number, dtype=dtype) for number in numbers]


# The formulas


@given(gradients, curvatures, scales)
def test_gain_is_the_log_evidence_by_quadrature(gradient, curvature, prior_scale):
    g, h, t = tensors(gradient, curvature, prior_scale)
    mu, s = laplace(g, h, t)
    theta = mu + s * torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    prior = torch.distributions.Normal(torch.zeros_like(t), t)
    joint = prior.log_prob(theta) + g * theta - h * theta.square() / 2
    evidence = torch.logsumexp(joint, 0) + (theta[1] - theta[0]).log()
    assert float(addition_gain(g, h, t)) == pytest.approx(float(evidence), rel=1e-6, abs=1e-6)
    # And the posterior, which is normal, is that of laplace().
    weights = (joint - evidence).exp() * (theta[1] - theta[0])
    assert float((weights * theta).sum()) == pytest.approx(float(mu), rel=1e-6, abs=1e-9)
    variance = (weights * (theta - mu).square()).sum()
    assert float(variance.sqrt()) == pytest.approx(float(s), rel=1e-6)


@given(gradients, curvatures, scales)
def test_adding_and_then_removing_gives_0(gradient, curvature, prior_scale):
    g, h, t = tensors(gradient, curvature, prior_scale)
    gain = addition_gain(g, h, t)
    both = gain + removal_gain(*laplace(g, h, t), t)
    assert float(both) == pytest.approx(0, abs=1e-9 * (1 + abs(float(gain))))
    assert removal_loss(*laplace(g, h, t), t) == -removal_gain(*laplace(g, h, t), t)


@pytest.mark.parametrize("prior_scale", [1e-4, 1.0, 1e3])
def test_float32_agrees_with_float64(prior_scale):
    g, h = 10 ** torch.linspace(-3, 5, 50).double(), 10 ** torch.linspace(5, -3, 50).double()
    t = torch.tensor(prior_scale, dtype=torch.float64)
    both = torch.float64, torch.float32
    exact, rounded = ([addition_gain(*(v.to(d) for v in (g, h, t)))] for d in both)
    torch.testing.assert_close(rounded[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    exact, rounded = (laplace(*(v.to(d) for v in (g, h, t))) for d in both)
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-5, atol=0)


def log_evidence(X, Y, active, noise, t):
    """Of a linear regression with normal weights at these columns."""
    columns = X[:, active]
    covariance = noise**2 * torch.eye(len(X), dtype=X.dtype) + t**2 * columns @ columns.t()
    zero = torch.zeros(len(X), dtype=X.dtype)
    return float(dist.MultivariateNormal(zero, covariance).log_prob(Y))


def test_linear_regression_with_and_without_each_coordinate():
    """By brute force; columns are orthogonal, so that each weight has a parabola of its own."""
    noise, t = 0.5, 0.7
    X = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64)).Q * torch.rand(5).double() * 4
    Y = X @ torch.tensor([1.0, 0.0, 0.3, -0.8, 0.05], dtype=torch.float64)
    Y = Y + noise * torch.randn(12, dtype=torch.float64)
    g, h = X.t() @ Y / noise**2, X.square().sum(0) / noise**2
    t_tensor = torch.tensor(t, dtype=torch.float64)
    gains = addition_gain(g, h, t_tensor)
    losses = removal_loss(*laplace(g, h, t_tensor), t_tensor)
    for active in ([], [1], [0, 2, 4], [0, 1, 2, 3, 4]):
        before = log_evidence(X, Y, active, noise, t)
        for j in range(5):
            other = [i for i in active if i != j] if j in active else [*active, j]
            change = log_evidence(X, Y, other, noise, t) - before
            expected = -losses[j] if j in active else gains[j]
            assert change == pytest.approx(float(expected), rel=1e-8)


# What they are computed from


def test_squares_of_the_examples_gradients():
    shape = (6, 4, 3, 3)
    g, images = torch.randn(5, 6, 7, 7), torch.randn(5, 4, 7, 7)
    patches = Patches((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    active = ActiveSet.random(shape, 20)
    record, one_by_one = GradientRecord(), torch.zeros(6, 36)
    record.add_convolution(active, g, images, patches, 1)
    for i in range(5):
        single = GradientRecord()
        single.add_convolution(active, g[i : i + 1], images[i : i + 1], patches, 1)
        one_by_one += single.block(active, 0, 6).square()
    torch.testing.assert_close(record.squares(active, 0, 6), one_by_one)
    torch.testing.assert_close(record.squares(active, 2, 5), one_by_one[2:5])

    active = ActiveSet.random((6, 4), 5)
    rows, cols = torch.randn(6, 8), torch.randn(4, 8)
    record.add_product(active, rows, cols)
    index, looked_up = torch.tensor([1, 1, 4]), torch.randn(3, 4)
    record.add_rows(active, index, looked_up)
    expected = torch.einsum("rb,cb->rcb", rows, cols).square().sum(-1)
    expected.index_add_(0, index, looked_up.square())
    torch.testing.assert_close(record.squares(active, 1, 5), expected[1:5])


@pytest.mark.parametrize("kind", ["product", "convolution", "grouped", "rows"])
def test_squares_along_a_direction(kind):
    """Of the sum of each example's gradient times the direction."""
    one_by_one = []
    record = GradientRecord()
    if kind == "product":
        active = ActiveSet.random((6, 4), 5)
        parts = [(torch.randn(6, 1), torch.randn(4, 1)) for _ in range(8)]
        record.add_product(active, *(torch.cat(each, 1) for each in zip(*parts, strict=True)))
        one_by_one = [g @ v.t() for g, v in parts]
    elif kind == "rows":
        active = ActiveSet.random((6, 4), 5)
        index, g = torch.tensor([1, 4, 1]), torch.randn(3, 4)
        record.add_rows(active, index, g)
        one_by_one = [
            torch.zeros(6, 4).index_add_(0, index[i : i + 1], g[i : i + 1]) for i in range(3)
        ]
    else:
        groups = 2 if kind == "grouped" else 1
        active = ActiveSet.random((6, 4 // groups, 3, 3), 10)
        g, images = torch.randn(5, 6, 7, 7), torch.randn(5, 4, 7, 7)
        patches = Patches((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
        record.add_convolution(active, g, images, patches, groups)
        for i in range(5):
            single = GradientRecord()
            single.add_convolution(active, g[i : i + 1], images[i : i + 1], patches, groups)
            one_by_one.append(single.block(active, 0, 6))
    indices = torch.tensor([0, 5, 6, 18, 23])
    direction = torch.randn(5)
    expected = sum((each.flatten()[indices] @ direction).square() for each in one_by_one)
    torch.testing.assert_close(squares_along(record, active, indices, direction), expected)
    single = squares_along(record, active, indices[1:2], torch.ones(1))
    torch.testing.assert_close(single, record.squares(active, 0, 6).flatten()[5])


def linear(x, y=None, how="plate", prior=None):
    prior = prior or dist.Normal(0.0, 0.8)
    w = pyro.sample("w", prior.expand([2, 6]).to_event(2))
    factor = {"plate": 1.0, "scale": N / len(x), "mean": 1 / len(x)}[how]
    size = N if how == "plate" else len(x)
    with pyro.plate("data", size, subsample_size=len(x)), poutine.scale(scale=factor):
        pyro.sample("obs", dist.Normal(F.linear(x, w), 0.5).to_event(1), obs=y)


def all_scaled(x, y=None):
    """Everything divided by the number of data."""
    with poutine.scale(scale=1 / N):
        linear(x, y, "scale")


N = 24
DATA_X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1)).double()
DATA_Y = torch.randn(N, 2, generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("local_reparam", [False, True])
@pytest.mark.parametrize(
    ("model", "weight"), [(linear, 1.0), (all_scaled, 1.0), (linear, 0.25), (all_scaled, 0.25)]
)
def test_gradient_and_curvature_are_those_of_all_data(model, weight, local_reparam):
    """Over the batches of one epoch, they are the sums over all data: of the gradients, and of
    their squares; 1 / weight times, as the likelihood then is."""
    pyro.clear_param_store()
    guide = AutoSparseNormal(model, density=0.5, init_scale=1e-12)
    svi = SSVI(
        model,
        guide,
        pyro.optim.SGD({"lr": 0.0}),
        TraceMeanField_ELBO() if local_reparam else Trace_ELBO(),
        schedule=ConstantSchedule(every=6),
        addition=Evidence(batches=6),
        kl_weight=weight,
        local_reparam=local_reparam,
    )
    seen = {}

    def look(share, optim=None):
        active = guide.active_sets["w"]
        everywhere = torch.arange(12)
        sums = svi.addition.read(active, everywhere, svi._record)
        seen["parabola"] = svi.addition.parabola(active, sums, svi._record)
        seen["first"] = svi.addition.first_values(active, everywhere, sums, svi._record)
        return {}

    svi._exchange = look
    batches = torch.randperm(N).split([5, 5, 4, 4, 3, 3])
    for rows in batches:
        svi.step(DATA_X[rows], DATA_Y[rows])
    value = guide.median()["w"]
    residual = (DATA_Y - DATA_X @ value.t()) / 0.25
    each = torch.einsum("bi,bj->bij", residual, DATA_X).flatten(1)
    # Batches are of different sizes: each stands for all data, and they count alike.
    stands_for = [N / len(rows) for rows in batches]
    g = sum(s * each[rows].sum(0) for s, rows in zip(stands_for, batches, strict=True)) / 6
    squares = sum(
        (s * each[rows]).square().sum(0) for s, rows in zip(stands_for, batches, strict=True)
    )
    s = sum(stands_for) / 6
    h = squares / 6 / s
    assert ((h / each.square().sum(0)).log().abs() < 0.5).all()
    noise = squares / 36 * (1 - 6 * weight / s)
    gradient, curvature = (weight * part for part in seen["parabola"])
    torch.testing.assert_close(curvature, h)
    torch.testing.assert_close(
        gradient, g.sign() * (g.square() - noise).clamp(min=0).sqrt(), rtol=1e-6, atol=1e-6
    )
    loc, scale = laplace(*seen["parabola"], torch.tensor(0.8))
    torch.testing.assert_close(seen["first"][1], scale)
    # Together they go as far as is best along their direction.
    along = sum(
        (s * each[rows] @ loc).square().sum() for s, rows in zip(stands_for, batches, strict=True)
    )
    resistance = along / 6 / s / weight + (loc / 0.8).square().sum()
    share = (seen["parabola"][0] @ loc / resistance).clamp(max=1)
    assert share < 0.9
    torch.testing.assert_close(seen["first"][0], share * loc)


@pytest.mark.usefixtures("double")
def test_one_batch_of_all_data_has_no_noise():
    criterion, active = Evidence(1), ActiveSet(torch.tensor([0]), (2, 6))
    record = GradientRecord()
    rows, cols = torch.randn(2, N), torch.randn(6, N)
    record.add_product(active, rows, cols)
    record.priors[active] = Prior(torch.ones(1).expand(2, 6), 1.0)
    record.scales = [1.0]
    sums = criterion.read(active, torch.arange(12), record)
    gradient, curvature = criterion.parabola(active, sums, record)
    torch.testing.assert_close(gradient, -(rows @ cols.t()).flatten())
    torch.testing.assert_close(curvature, (rows.square() @ cols.t().square()).flatten())


@pytest.mark.usefixtures("double")
def test_noise_of_batches_is_taken_out():
    """The mean over many batches of the squared gradient is that of all data, not more."""
    record, active = GradientRecord(), ActiveSet(torch.tensor([0]), (2, 6))
    each = torch.randn(N, 2, 1) * torch.randn(N, 1, 6) + 0.2
    prior = Prior(torch.ones(1).expand(2, 6), 1.0)
    squares, raw = [], []
    for _ in range(2000):
        record = GradientRecord()
        record.priors[active], record.scales = prior, [N / 4]
        rows = torch.randperm(N)[:4]
        sums = torch.stack([(N / 4 * each[rows]).sum(0), (N / 4 * each[rows]).square().sum(0)])
        g, _ = Evidence(1).parabola(active, sums, record)
        squares.append(g.square())
        raw.append(sums[0].square())
    truth = each.sum(0).square()
    bias = torch.stack(squares).mean(0) - truth
    usual = torch.stack(raw).mean(0) - truth
    assert (usual > 0).all()
    assert bias.abs().mean() < 0.45 * usual.mean()  # what is left: no square is below 0


# In training


def evidence_svi(model=bnn, density=0.3, **kwargs):
    options = {"removal": "evidence", "addition": Evidence(batches=3)}
    guide, svi = make(density, model=model, schedule=ConstantSchedule(every=4), **options | kwargs)
    return guide, svi


@pytest.mark.parametrize("allocation", ["per_site", "global"])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_training(allocation, loss):
    guide, svi = evidence_svi(loss=loss(), allocation=allocation)
    guide(x, y)
    k = sum(map(len, guide.active_sets.values()))
    before = guide.active_sets
    losses = [svi.step(x, y) for _ in range(13)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(map(len, guide.active_sets.values())) == k
    assert any(not guide.active_sets[name].same(before[name]) for name in ("w0", "w1"))


def test_new_coordinates_start_at_the_posterior_of_their_parabola(monkeypatch):
    guide, svi = evidence_svi()
    svi.step(x, y)
    moves = {}
    exchange = guide.exchange
    monkeypatch.setattr(guide, "exchange", lambda m, s: moves.update(m) or exchange(m, s))
    svi.exchange(x, y, share=0.3)
    assert set(moves) == {"w0", "w1"}
    for name, move in moves.items():
        q = guide.posterior()[name]
        new = move.source < 0
        loc, scale = move.first
        assert loc.abs().max() > 0
        torch.testing.assert_close(q.loc[new], loc)
        torch.testing.assert_close(q.scale[new], scale)


def test_those_without_which_the_evidence_would_grow_most_are_removed():
    guide, svi = evidence_svi(addition="random")
    for _ in range(3):
        svi.step(x, y)
    was, q = guide.active_sets["w0"], guide.posterior()["w0"]
    gains = removal_gain(q.loc, q.scale, torch.tensor(1.0))
    svi.exchange(x, y, share=0.25)
    gone = (was.mask & ~guide.active_sets["w0"].mask).flatten().nonzero().flatten()
    assert set(gone.tolist()) == set(was.indices[gains.topk(9).indices].tolist())


def hierarchical(x, y=None):
    """A scale for each input, drawn."""
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros(12), 1.0).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, tau).expand([4, 12]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.linear(F.linear(x, w).tanh(), v)[:, 0], 0.5), obs=y)


def test_prior_scales_may_be_drawn_and_differ():
    _, svi = evidence_svi(hierarchical, removal="snr")
    svi.step(x, y)
    seen, move = {}, svi._move

    def look(active, choice, record):
        seen[active] = record.priors[active].scale
        if active.shape == (4, 12):
            rows = torch.arange(12, 36)
            sums = svi.addition.read(active, rows, record)
            gains = svi.addition.scores(active, 1, 3, record).flatten()
            torch.testing.assert_close(svi.addition.scores_at(active, rows, sums, record), gains)
        return move(active, choice, record)

    svi._move = look
    svi.exchange(x, y, share=0.3)
    scale = seen[next(active for active in seen if active.shape == (4, 12))]
    assert scale.shape == (4, 12)
    assert len(scale[0].unique()) == 12
    assert not scale.requires_grad


def with_prior(prior):
    def model(x, y=None):
        w = pyro.sample("w", prior.expand([1, 12]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w)[:, 0], 0.5), obs=y)

    return model


@pytest.mark.parametrize("prior", [dist.StudentT(3.0), dist.Normal(0.1, 1.0), dist.Laplace(0.0, 1)])
@pytest.mark.parametrize("criteria", [{"removal": "snr"}, {"addition": "random"}])
def test_priors_that_are_not_normal_around_0_are_named(prior, criteria):
    _, svi = evidence_svi(with_prior(prior), **criteria)
    with pytest.raises(ValueError, match=r"normal prior around 0, but that of site 'w'"):
        svi.exchange(x, y, share=0.3)


def test_likelihoods_that_are_multiplied_by_different_numbers():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 12]).to_event(2))
        mean = F.linear(x, w)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("one", dist.Normal(mean, 0.5), obs=y)
            with poutine.scale(scale=2.0):
                pyro.sample("two", dist.Normal(mean, 0.5), obs=y)

    _, svi = evidence_svi(model)
    with pytest.raises(ValueError, match=r"'one' is multiplied by 1 and that of 'two' by 2"):
        svi.exchange(x, y, share=0.3)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_dense_uses_are_named():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 12]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)

    _, svi = evidence_svi(model)
    with pytest.raises(ValueError, match=r"site 'w': it was used as a dense tensor"):
        svi.exchange(x, y, share=0.3)


def test_unsuitable_losses_weights_and_guides():
    with pytest.raises(ValueError, match="one particle"):
        evidence_svi(loss=Trace_ELBO(num_particles=2))
    with pytest.raises(ValueError, match="batches >= 1"):
        Evidence(batches=0)
    _, svi = evidence_svi(kl_weight=0.0)
    with pytest.raises(ValueError, match=r"needs a KL weight > 0"):
        svi.exchange(x, y)
    pyro.clear_param_store()
    points = AutoSparseDelta(bnn, density=0.3)
    optim = pyro.optim.Adam({})
    with pytest.raises(ValueError, match="AutoSparseDelta has none"):
        SSVI(bnn, points, optim, Trace_ELBO(), removal="evidence")
    svi = SSVI(bnn, points, optim, Trace_ELBO(), addition="evidence")
    svi.exchange(x, y, share=0.3)
    svi.step(x, y)


def test_it_finds_the_support_of_a_regression():
    pyro.set_rng_seed(0)
    X = torch.randn(400, 60)
    truth = torch.zeros(1, 60)
    truth[0, torch.randperm(60)[:6]] = torch.tensor([1.0, -1, 1, -1, 1, -1])
    Y = F.linear(X, truth)[:, 0] + 0.3 * torch.randn(400)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 60]).to_event(2))
        with pyro.plate("data", 400, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w)[:, 0], 0.3), obs=y)

    guide, svi = make(
        0.1,
        model=model,
        schedule=ConstantSchedule(every=20, stop=200),
        removal="evidence",
        addition=Evidence(batches=5),
    )
    for _ in range(300):
        rows = torch.randperm(400)[:100]
        svi.step(X[rows], Y[rows])
    assert torch.equal(guide.active_sets["w"].mask, truth != 0)


def test_support_counts_what_the_data_pay_for():
    """All of a regression's true features and next to no others; and nothing changes."""
    X = torch.randn(500, 40)
    Y = X[:, :4].sum(-1) + 0.3 * torch.randn(500)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 40]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w)[:, 0], 0.3), obs=y)

    guide, svi = make(
        0.25, model=model, schedule=ConstantSchedule(every=10, stop=100), optim="Adam"
    )
    svi.step(X, Y)
    (before,) = evidence_support(svi, [(X, Y)]).values()
    assert (before.numel, before.active, before.kept) == (40, 10, 0)
    missing = 4 - int(guide.active_sets["w"].mask[0, :4].sum())
    assert missing <= before.promising <= missing + 2
    for _ in range(500):
        svi.step(X, Y)
    state = {name: part.clone() for name, part in guide.named_parameters()}
    indices, draws = guide.indices.clone(), torch.get_rng_state()
    (after,) = evidence_support(svi, [(X, Y)]).values()
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(guide.indices, indices)
    assert all(torch.equal(part, state[name]) for name, part in guide.named_parameters())
    assert 4 <= after.kept <= 6
    assert after.promising <= 2
    assert after.density == (after.kept + after.promising) / 40
