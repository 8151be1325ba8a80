import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule
from pyro_ssvi.diagnostics import class_calibration_error, elbo_parts, overlap, uncertainty

torch.manual_seed(0)
X, Y = torch.randn(20, 6), torch.randn(20)


def model(x, y=None):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([3, 6]).to_event(2))
    with pyro.plate("data", 100, subsample_size=len(x)):
        loc = (x @ w.T).sum(-1)
        pyro.sample("obs", dist.Normal(loc, 1 + tau), obs=y)


@pytest.mark.parametrize("density", [None, 0.3])
def test_parts_add_up_to_the_elbo(density):
    guide = AutoNormal(model) if density is None else AutoSparseNormal(model, density=density)
    optim = pyro.optim.Adam({"lr": 1e-2})
    svi = (SVI if density is None else SSVI)(model, guide, optim, TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(X, Y)
    pyro.set_rng_seed(1)
    loss = svi.evaluate_loss(X, Y)
    pyro.set_rng_seed(1)
    parts = elbo_parts(model, guide, X, Y)
    assert list(parts.kl) == ["tau", "w"]
    assert parts.elbo == pytest.approx(-loss, rel=1e-5)


def test_kl_is_that_of_the_closed_form_over_active_coordinates():
    guide = AutoSparseNormal(model, density=0.3, init_scale=0.1)
    guide(X, Y)
    k = 5  # of 18
    expected = k * (math.log(2 / 0.1) + (0.1 / 2) ** 2 / 2 - 0.5)
    assert elbo_parts(model, guide, X, Y).kl["w"] == pytest.approx(expected, rel=1e-5)


def test_likelihood_is_scaled_and_averaged():
    guide = AutoSparseNormal(model, density=0.3)
    guide(X, Y)
    pyro.set_rng_seed(0)
    one = [elbo_parts(model, guide, X, Y).log_likelihood for _ in range(3)]
    pyro.set_rng_seed(0)
    three = elbo_parts(model, guide, X, Y, num_particles=3)
    assert three.log_likelihood == pytest.approx(sum(one) / 3, rel=1e-5)
    with poutine.scale(scale=10.0):
        assert elbo_parts(model, guide, X, Y).log_likelihood < 5 * max(one)


def test_parts_leave_no_gradient_and_change_nothing():
    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(X, Y)
    before = {
        name: value.clone() for name, value in guide.state_dict().items() if "extra" not in name
    }
    elbo_parts(model, guide, X, Y)
    assert all(torch.equal(value, guide.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None or not p.grad.any() for p in guide.parameters())


def test_uncertainty_of_samples_that_agree_and_of_samples_that_do_not():
    agree = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    differ = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    total, epistemic = uncertainty(torch.cat([agree, differ], 1))
    torch.testing.assert_close(total, torch.full((2,), math.log(2)))
    torch.testing.assert_close(epistemic, torch.tensor([0.0, math.log(2)]))


def test_class_calibration_error_of_calibrated_and_of_shifted_probabilities():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator, dtype=torch.float64)
    labels = torch.bernoulli(p, generator=generator).long()

    def error(q):
        return float(class_calibration_error(torch.stack([1 - q, q], 1), labels))

    assert error(p) < 3e-3  # without debiasing too: there are many
    # q = p / 2 is off by q: the mean of q^2 = p^2 / 4 is 1/12.
    assert error(p / 2) == pytest.approx(math.sqrt(1 / 12), rel=1e-2)


def test_class_calibration_error_is_debiased():
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(300):
        p = torch.rand(150, generator=generator, dtype=torch.float64)
        labels = torch.bernoulli(p, generator=generator).long()
        squares.append(class_calibration_error(torch.stack([1 - p, p], 1), labels) ** 2)
    biased = 1 / 6 / 10  # E p (1 - p) over a bin's 10
    assert sum(squares) / 300 < biased / 3  # and not 0, since negative estimates are cut off


def test_overlap_counts_what_stayed():
    guide = AutoSparseNormal(model, density=0.5)
    svi = SSVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 1e-2}),
        Trace_ELBO(),
        schedule=ConstantSchedule(every=1000),
    )
    svi.step(X, Y)
    before = guide.active_sets
    assert overlap(before, guide.active_sets) == {"tau": 1.0, "w": 1.0}
    moved = svi.exchange(X, Y, share=1 / 3)["w"]
    assert moved == 3
    assert overlap(before, guide.active_sets) == {"tau": 1.0, "w": 6 / 12}
