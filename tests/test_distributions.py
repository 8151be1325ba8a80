"""Densities on the subspace against brute force: dense log densities times the mask."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_ssvi import ActiveSet, SparseNormal, SparseTensor, SubspacePrior, forbid_materialise
from pyro_ssvi.distributions import SubspaceMessenger, restrict


def sparse_normal(shape=(2, 3, 4), k=9, event_dim=None, extra=()):
    active = ActiveSet.random(shape, k)
    loc, scale = torch.randn(*extra, k), torch.rand(*extra, k) + 0.1
    return SparseNormal(loc.requires_grad_(), scale.requires_grad_(), active, event_dim)


def masked_sum(log_prob, active, event_dim):
    """What an elementwise log density is worth on the subspace."""
    masked = torch.where(active.mask, log_prob, 0.0)
    return masked.sum(tuple(range(-event_dim, 0))) if event_dim else masked


@pytest.mark.parametrize("event_dim", [0, 1, 2, 3])
@pytest.mark.parametrize("extra", [(), (5,), (5, 1)])
def test_log_prob_equals_the_masked_dense_one(event_dim, extra):
    q = sparse_normal(event_dim=event_dim, extra=extra)
    assert q.batch_shape == (*extra, *(2, 3, 4)[: 3 - event_dim])
    with forbid_materialise():
        value = q.rsample()
        log_prob = q.log_prob(value)
        entropy = q.entropy()
    dense = dist.Normal(q.active.scatter(q.loc), q.active.scatter(q.scale - 1) + 1)
    expected = masked_sum(dense.log_prob(value.to_dense()), q.active, event_dim)
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(q.log_prob(value.to_dense()), expected)
    torch.testing.assert_close(entropy, masked_sum(dense.entropy(), q.active, event_dim))


def test_log_prob_of_a_dense_value_off_the_subspace():
    q = sparse_normal((2, 3), 4, event_dim=1)
    value = q.sample().to_dense()
    inactive = (~q.active.mask).nonzero()[0]
    value[tuple(inactive)] = 1e-3
    log_prob = q.log_prob(value)
    assert log_prob[inactive[0]] == -math.inf
    assert log_prob[1 - inactive[0]].isfinite()


def test_samples_are_exactly_zero_where_inactive_and_right_elsewhere():
    q = sparse_normal()
    samples = q.sample((20_000,)).to_dense()
    assert samples.shape == (20_000, 2, 3, 4)
    assert (samples[:, ~q.active.mask] == 0).all()
    error = (samples[:, q.active.mask].mean(0) - q.loc) / (q.scale / 20_000**0.5)
    assert error.abs().max() < 4.5
    torch.testing.assert_close(samples[:, q.active.mask].std(0), q.scale, rtol=0.05, atol=0)
    torch.testing.assert_close(q.mean.to_dense(), q.active.scatter(q.loc))
    torch.testing.assert_close(q.stddev.to_dense() ** 2, q.variance.to_dense())


def test_rsample_is_reparameterised():
    q = sparse_normal()
    value = q.rsample()
    grads = torch.autograd.grad(value.to_dense().sum(), (q.loc, q.scale))
    noise = (value.values - q.loc) / q.scale
    torch.testing.assert_close(grads[0], torch.ones(9))
    torch.testing.assert_close(grads[1], noise.detach(), rtol=1e-4, atol=1e-5)


def test_expand():
    q = sparse_normal(event_dim=2)
    assert q.expand((2,)) is q
    wide = q.expand((5, 1, 2))
    assert isinstance(wide, SparseNormal)
    assert wide.batch_shape == (5, 1, 2)
    assert wide.event_shape == (3, 4)
    value = wide.rsample()
    assert value.shape == (5, 1, 2, 3, 4)
    assert value.values.shape == (5, 1, 9)
    assert (value.values[0] != value.values[1]).all()
    torch.testing.assert_close(
        wide.log_prob(value)[3, 0], q.log_prob(SparseTensor(value.values[3, 0], q.active))
    )
    with pytest.raises(ValueError, match="cannot be expanded"):
        q.expand((3,))


def test_bad_arguments():
    active = ActiveSet.random((2, 3), 4)
    with pytest.raises(ValueError, match=r"\[\*extra, 4\]"):
        SparseNormal(torch.zeros(3), torch.ones(3), active)
    with pytest.raises(ValueError, match="event_dim"):
        SparseNormal(torch.zeros(4), torch.ones(4), active, event_dim=3)
    with pytest.raises(ValueError, match="scale"):
        SparseNormal(torch.zeros(4), -torch.ones(4), active)


SHAPE = (2, 3, 4)
# Elementwise priors whose parameters are repeated numbers, or partly, or one for each element.
PRIORS = {
    "normal": lambda: dist.Normal(0.3, 0.7).expand(SHAPE),
    "normal by element": lambda: dist.Normal(torch.randn(SHAPE), torch.rand(SHAPE) + 0.1),
    "normal by row": lambda: dist.Normal(0.0, (torch.rand(2, 3, 1) + 0.1).expand(SHAPE)),
    "normal by column": lambda: dist.Normal(torch.randn(4).expand(SHAPE), 1.0),
    "normal by first": lambda: dist.Normal(torch.randn(2, 1, 1).expand(SHAPE), 1.0),
    "normal by middle": lambda: dist.Normal(torch.randn(3, 1).expand(SHAPE), 1.0),
    "laplace": lambda: dist.Laplace(0.3, 0.7).expand(SHAPE),
    "student": lambda: dist.StudentT(3.0, 0.3, 0.7).expand(SHAPE),
    "cauchy by row": lambda: dist.Cauchy(torch.randn(2, 3, 1).expand(SHAPE), 1.0),
    "no parameters": lambda: dist.SoftLaplace(0.3, 0.7).expand(SHAPE),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(0.3, 0.7).expand(SHAPE), [dist.transforms.AffineTransform(1.0, 2.0)]
    ),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("event_dim", [0, 1, 3])
def test_prior_covers_active_coordinates_only(name, event_dim):
    prior = PRIORS[name]()
    active = ActiveSet.random(SHAPE, 9)
    value = SparseTensor(torch.randn(9), active)
    found = SubspacePrior(prior.to_event(event_dim)).log_prob(value)
    expected = masked_sum(prior.log_prob(value.to_dense()), active, event_dim)
    torch.testing.assert_close(found, expected)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_prior_with_any_pattern_of_repeats(shape, data):
    sizes = [data.draw(st.sampled_from([1, size])) for size in shape]
    drop = data.draw(st.integers(0, len(shape) - 1))
    scale = (torch.rand(sizes[drop:]) + 0.1).requires_grad_()
    prior = dist.Normal(0.0, scale).expand(shape)
    active = ActiveSet.random(shape, data.draw(st.integers(1, math.prod(shape))))
    value = SparseTensor(torch.randn(len(active)), active)
    with forbid_materialise():
        found = SubspacePrior(prior.to_event(len(shape))).log_prob(value)
    expected = masked_sum(prior.log_prob(value.to_dense()), active, len(shape))
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, scale)
    (expected_grad,) = torch.autograd.grad(expected, scale)
    torch.testing.assert_close(grad, expected_grad)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


SCALES = {
    "expanded": lambda s: s.expand(SHAPE),
    "twice a view": lambda s: s.reshape(1, 1, 1).expand(1, 3, 1).expand(SHAPE),
    "selected": lambda s: torch.stack([s, 2 * s])[1].expand(SHAPE),
    "a view of another function": lambda s: _Reverse.apply(s).expand(SHAPE),
    "a part of a complex number": lambda s: torch.complex(s, s).real.expand(SHAPE),
    "of a sparse site": lambda s: (
        SparseTensor(s.reshape(1), ActiveSet(torch.tensor([1]), (2, 1))).to_dense()[1].expand(SHAPE)
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_gradient_of_a_prior_s_scale_through_views(name):
    scale = torch.tensor(0.7, requires_grad=True)
    active = ActiveSet.random(SHAPE, 9)
    value = SparseTensor(torch.randn(9), active)
    prior = dist.Normal(0.0, SCALES[name](scale), validate_args=False)
    found = SubspacePrior(prior.to_event(3)).log_prob(value)
    expected = masked_sum(prior.log_prob(value.to_dense()), active, 3)
    grads = [torch.autograd.grad(x, scale, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_gradient_of_an_expanded_leaf():
    leaf = torch.tensor(0.7).expand(SHAPE).requires_grad_()
    active = ActiveSet.random(SHAPE, 9)
    prior = SubspacePrior(dist.Normal(0.0, leaf).to_event(3))
    (grad,) = torch.autograd.grad(prior.log_prob(SparseTensor(torch.randn(9), active)), leaf)
    assert grad.shape == SHAPE
    assert grad.isfinite().all()


class _Shifted(dist.Normal):
    """A family with something besides its parameters."""

    def __init__(self, loc, scale, shift=0.0, validate_args=None):
        self.shift = shift
        super().__init__(loc, scale, validate_args=validate_args)

    def log_prob(self, value):
        return super().log_prob(value - self.shift)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize(
    "prior",
    [
        _Shifted(torch.zeros(SHAPE), torch.ones(SHAPE), shift=5.0),
        dist.Stable(
            *(torch.full(SHAPE, x) for x in (1.8, 0.3, 1.0, 0.0)), coords="S", validate_args=False
        ),
    ],
    ids=["subclass", "Stable"],
)
def test_a_family_is_rebuilt_only_from_what_it_is_made_of(prior):
    assert restrict(prior, ActiveSet.random(SHAPE, 9)) is None


def test_a_transposed_value_is_not_taken_for_the_site_s_own():
    active = ActiveSet(torch.tensor([0, 1, 4, 8]), (3, 3))
    q = SparseNormal(torch.randn(4), torch.rand(4) + 0.1, active)
    value = q.sample()
    assert q.log_prob(value).isfinite()
    assert q.log_prob(value.T) == -math.inf  # entry (0, 1) is active, (1, 0) is not


def test_prior_gradient_never_has_the_full_size():
    """The gradient of a hyperprior's scale must not pass through D numbers."""
    scale = torch.tensor(0.5, requires_grad=True)
    shape = (100_000, 100_000)
    active = ActiveSet.random(shape, 50)
    prior = SubspacePrior(dist.Normal(0.0, scale).expand(shape).to_event(2))
    prior.log_prob(SparseTensor(torch.randn(50), active)).backward()
    assert scale.grad is not None


@pytest.mark.parametrize("inside", [False, True])
def test_masked_prior(inside):
    mask = torch.rand(SHAPE if inside else SHAPE[:1]) < 0.5
    prior = dist.Normal(0.3, 0.7).expand(SHAPE)
    active = ActiveSet.random(SHAPE, 9)
    value = SparseTensor(torch.randn(9), active)
    masked = prior.mask(mask).to_event(2) if inside else prior.to_event(2).mask(mask)
    if inside:
        expected = masked_sum(prior.log_prob(value.to_dense()) * mask, active, 2)
    else:
        expected = masked_sum(prior.log_prob(value.to_dense()), active, 2) * mask
    torch.testing.assert_close(SubspacePrior(masked).log_prob(value), expected)


def test_prior_of_a_dense_value_is_the_prior():
    prior = dist.Normal(0.3, 0.7).expand(SHAPE).to_event(2)
    value = torch.randn(SHAPE)
    wrapped = SubspacePrior(prior)
    assert torch.equal(wrapped.log_prob(value), prior.log_prob(value))
    assert wrapped.sample((7,)).shape == (7, *SHAPE)
    assert wrapped.batch_shape == (2,)
    assert wrapped.support.event_dim == prior.support.event_dim == 2
    assert torch.equal(wrapped.mean, prior.mean)


@pytest.mark.parametrize("name", ["normal", "normal by row", "normal by element", "laplace"])
@pytest.mark.parametrize("event_dim", [0, 2, 3])
def test_kl_covers_active_coordinates_only(name, event_dim):
    q = sparse_normal(SHAPE, 9, event_dim)
    prior = PRIORS[name]()
    with forbid_materialise():
        kl = kl_divergence(q, SubspacePrior(prior.to_event(event_dim)))
    dense = dist.Normal(q.active.scatter(q.loc), q.active.scatter(q.scale - 1) + 1)
    expected = masked_sum(kl_divergence(dense, prior), q.active, event_dim)
    torch.testing.assert_close(kl, expected)


def test_kl_without_closed_form_is_left_to_monte_carlo():
    q = sparse_normal(SHAPE, 9)
    for prior in (PRIORS["student"](), PRIORS["transformed"](), PRIORS["normal"]().mask(False)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, SubspacePrior(prior.to_event(3)))


def test_kl_of_dense_guides_is_the_prior_s():
    prior = dist.Normal(0.3, 0.7).expand((3,)).to_event(1)
    q = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    delta = dist.Delta(torch.zeros(3), event_dim=1)
    for guide in (q, delta):
        expected = kl_divergence(guide, prior)
        torch.testing.assert_close(kl_divergence(guide, SubspacePrior(prior)), expected)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("hyperprior", [False, True])
@pytest.mark.parametrize("plated", [False, True])
def test_loss_equals_brute_force(loss, hyperprior, plated):
    """Whole losses, with a learnt scale of the weights and with weights in a plate."""
    q = sparse_normal((3, 4), 5, event_dim=1 if plated else 2)
    log_tau = torch.tensor(-0.4, requires_grad=True)

    def model():
        tau = 1.0
        if hyperprior:
            tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        if plated:
            with pyro.plate("rows", 3):
                w = pyro.sample("w", dist.Normal(0.0, tau).expand([3, 4]).to_event(1))
        else:
            w = pyro.sample("w", dist.Normal(0.0, tau).expand([3, 4]).to_event(2))
        pyro.sample("obs", dist.Normal((w @ torch.ones(4)).sum(), 1.0), obs=torch.tensor(1.0))

    def guide():
        if hyperprior:
            pyro.sample("tau", dist.Delta(log_tau.exp()))
        if plated:
            with pyro.plate("rows", 3):
                pyro.sample("w", q)
        else:
            pyro.sample("w", q)

    leaves = [q.loc, q.scale] + [log_tau] * hyperprior
    with forbid_materialise():
        pyro.set_rng_seed(1)
        found = loss().differentiable_loss(SubspaceMessenger()(model), guide)
    grads = torch.autograd.grad(found, leaves)

    pyro.set_rng_seed(1)
    w = q.rsample().to_dense()
    tau = log_tau.exp() if hyperprior else torch.tensor(1.0)
    posterior = dist.Normal(q.active.scatter(q.loc), q.active.scatter(q.scale - 1) + 1)
    prior = dist.Normal(torch.zeros(3, 4), tau)
    if loss is TraceMeanField_ELBO:
        divergence = kl_divergence(posterior, prior)
    else:
        divergence = posterior.log_prob(w) - prior.log_prob(w)
    expected = torch.where(q.active.mask, divergence, 0.0).sum()
    expected = expected - dist.Normal(w.sum(), 1.0).log_prob(torch.tensor(1.0))
    if hyperprior:
        expected = expected - dist.LogNormal(0.0, 1.0).log_prob(tau)
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_a_hyperprior_is_not_pulled_down_by_the_zeros():
    """With D - K zeros under the prior, the scale that fits would be sqrt(density) too small."""
    active = ActiveSet.random((40, 40), 80)
    value = SparseTensor(torch.randn(80) * 2.0, active)
    log_scale = torch.tensor(0.0, requires_grad=True)
    optim = torch.optim.LBFGS([log_scale])

    def closure():
        optim.zero_grad()
        prior = dist.Normal(0.0, log_scale.exp()).expand((40, 40)).to_event(2)
        loss = -SubspacePrior(prior).log_prob(value)
        loss.backward()
        return loss

    optim.step(closure)
    torch.testing.assert_close(log_scale.exp(), value.values.square().mean().sqrt())
