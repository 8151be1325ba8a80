import pytest
import torch

from pyro_ssvi import ActiveSet
from pyro_ssvi.addition import Gradient, Random, addition_criterion
from pyro_ssvi.gradient_record import GradientRecord


@pytest.fixture
def setting():
    active = ActiveSet.random((6, 5), 12)
    record = GradientRecord()
    g, x = torch.randn(6, 3), torch.randn(5, 3)
    record.add_product(active, g, x)
    return active, record, g @ x.t()


def test_gradient_takes_the_largest_inactive(setting):
    active, record, gradient = setting
    score = gradient.abs().masked_fill(active.mask, -1).flatten()
    added = Gradient().choose(active, 4, record)
    assert set(added.tolist()) == set(score.topk(4).indices.tolist())


def test_a_callable_scores_the_gradient(setting):
    active, record, gradient = setting
    added = addition_criterion(lambda gradient: -gradient).choose(active, 4, record)
    score = (-gradient).masked_fill(active.mask, -float("inf")).flatten()
    assert set(added.tolist()) == set(score.topk(4).indices.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite(setting, bad):
    active, record, _ = setting
    record.add_dense(active, torch.full((6, 5), bad))
    with pytest.raises(FloatingPointError, match="not finite"):
        Gradient().choose(active, 4, record)


def test_random_is_uniform_over_the_inactive():
    active = ActiveSet(torch.tensor([1, 3]), (2, 4))
    counts = torch.zeros(8)
    for _ in range(3000):
        counts[Random().choose(active, 2, GradientRecord())] += 1
    assert (counts[[1, 3]] == 0).all()
    deviation = (counts[[0, 2, 4, 5, 6, 7]] / 3000 - 1 / 3) / (2 / 9 / 3000) ** 0.5
    assert deviation.abs().max() < 4.5


@pytest.mark.parametrize("score", [lambda g: g.sum(), lambda g: g > 0, lambda g: g.flatten()])
def test_scores_of_another_shape_or_dtype(setting, score):
    active, record, _ = setting
    with pytest.raises(ValueError, match="expected floats of shape"):
        Gradient(score=score).choose(active, 3, record)


@pytest.mark.parametrize("spec", [["gradient"], Gradient, None])
def test_what_is_no_criterion(spec):
    with pytest.raises(ValueError, match="unknown addition criterion"):
        addition_criterion(spec)


def test_names_and_bad_input():
    assert addition_criterion("gradient") == Gradient()
    assert addition_criterion("random") == Random()
    assert addition_criterion(Gradient(batches=3)).batches == 3
    with pytest.raises(ValueError, match=r"'momentum'.*'gradient', 'random'"):
        addition_criterion("momentum")
    with pytest.raises(ValueError, match="batches >= 1"):
        Gradient(batches=0)
    with pytest.raises(ValueError, match="samples >= 1"):
        Gradient(samples=1.5)
    with pytest.raises(ValueError, match="draws no samples"):
        Gradient(at="mean", samples=2)
    with pytest.raises(ValueError, match="at='sample'"):
        Gradient(at="mode")
