import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ssvi import SSVI, ActiveSet, AutoSparseNormal, ConstantSchedule
from pyro_ssvi.addition import (
    Addition,
    Gradient,
    Random,
    addition_criterion,
    choose_from,
    race,
)
from pyro_ssvi.gradient_record import GradientRecord


def choose(criterion, active, n, record):
    return choose_from(criterion, n, lambda rounds: criterion.propose(active, rounds, record))


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
    added = choose(Gradient(), active, 4, record)
    assert set(added.tolist()) == set(score.topk(4).indices.tolist())


def test_a_callable_scores_the_gradient(setting):
    active, record, gradient = setting
    added = choose(addition_criterion(lambda gradient: -gradient), active, 4, record)
    score = (-gradient).masked_fill(active.mask, -float("inf")).flatten()
    assert set(added.tolist()) == set(score.topk(4).indices.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite(setting, bad):
    active, record, _ = setting
    record.add_dense(active, torch.full((6, 5), bad))
    with pytest.raises(FloatingPointError, match="not finite"):
        choose(Gradient(), active, 4, record)


def test_random_is_uniform_over_the_inactive():
    active = ActiveSet(torch.tensor([1, 3]), (2, 4))
    counts = torch.zeros(8)
    for _ in range(3000):
        counts[choose(Random(), active, 2, GradientRecord())] += 1
    assert (counts[[1, 3]] == 0).all()
    deviation = (counts[[0, 2, 4, 5, 6, 7]] / 3000 - 1 / 3) / (2 / 9 / 3000) ** 0.5
    assert deviation.abs().max() < 4.5


@pytest.mark.parametrize("score", [lambda g: g.sum(), lambda g: g > 0, lambda g: g.flatten()])
def test_scores_of_another_shape_or_dtype(setting, score):
    active, record, _ = setting
    with pytest.raises(ValueError, match="expected floats of shape"):
        choose(Gradient(score=score), active, 3, record)


@pytest.mark.parametrize("spec", [["gradient"], Gradient, None])
def test_what_is_no_criterion(spec):
    with pytest.raises(ValueError, match="unknown addition criterion"):
        addition_criterion(spec)


def test_names_and_bad_input():
    assert addition_criterion("gradient") == Gradient()
    assert addition_criterion("sampled_gradient") == Gradient(sampled=1.0)
    assert addition_criterion("mixed_gradient") == Gradient(sampled=0.75)
    assert addition_criterion("random") == Random()
    assert addition_criterion(Gradient(batches=3)).batches == 3
    with pytest.raises(ValueError, match=r"'momentum'.*'gradient', 'mixed_gradient', 'random'"):
        addition_criterion("momentum")
    with pytest.raises(ValueError, match="batches >= 1"):
        Gradient(batches=0)
    with pytest.raises(ValueError, match="sampled in"):
        Gradient(sampled=1.5)
    with pytest.raises(ValueError, match="samples >= 1"):
        Gradient(samples=1.5)
    with pytest.raises(ValueError, match="draws no samples"):
        Gradient(at="mean", samples=2)
    with pytest.raises(ValueError, match="at='sample'"):
        Gradient(at="mode")


def test_sampled_is_in_proportion_to_the_score():
    active = ActiveSet(torch.tensor([1]), (2, 3))
    gradient = torch.tensor([[1.0, 9.0, -2.0], [0.0, 3.0, -4.0]])
    record = GradientRecord()
    record.add_dense(active, gradient)
    n, counts = 4000, torch.zeros(6)
    for _ in range(n):
        counts[choose(Gradient(sampled=1.0), active, 1, record)] += 1
    p = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 4.0]) / 10
    deviation = (counts / n - p) / (p * (1 - p) / n).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4.5


def test_sampled_is_without_replacement_and_by_blocks(setting, monkeypatch):
    active, record, _ = setting
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", 40)  # two rows
    for _ in range(50):
        added = choose(Gradient(sampled=1.0), active, 10, record)
        assert len(added.unique()) == 10
        assert not torch.isin(added, active.indices).any()


@pytest.mark.parametrize("block_bytes", [40, 2**20])
def test_a_share_is_sampled_and_the_rest_are_the_largest(setting, monkeypatch, block_bytes):
    active, record, gradient = setting
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes)
    score = gradient.abs().masked_fill(active.mask, -1).flatten()
    largest = set(score.topk(4).indices.tolist())
    others = set()
    for _ in range(60):
        added = choose(Gradient(sampled=0.5), active, 7, record)  # 3 are drawn
        assert len(added.unique()) == 7
        assert not torch.isin(added, active.indices).any()
        assert largest <= set(added.tolist())
        others |= set(added.tolist()) - largest
    assert len(others) > 8  # of 14


def test_those_sampled_beside_the_largest_are_in_proportion_to_the_score():
    active = ActiveSet(torch.tensor([1]), (2, 3))
    record = GradientRecord()
    record.add_dense(active, torch.tensor([[1.0, 9.0, -2.0], [0.0, 3.0, -4.0]]))
    n, counts = 4000, torch.zeros(6)
    for _ in range(n):
        counts[choose(Gradient(sampled=0.5), active, 2, record)] += 1
    assert counts[5] == n
    p = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0]) / 6
    deviation = (counts[:5] / n - p) / (p * (1 - p) / n).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4.5


def test_one_coordinate_alone_is_the_largest(setting):
    active, record, _ = setting
    for _ in range(20):
        added = choose(Gradient(sampled=0.5), active, 1, record)
        assert added.equal(choose(Gradient(), active, 1, record))


@pytest.mark.parametrize("sampled", [0.5, 1.0])
def test_sampled_where_the_gradient_is_not_finite_or_0(setting, sampled):
    active, record, _ = setting
    assert len(choose(Gradient(sampled=sampled, score=torch.zeros_like), active, 4, record)) == 4
    record.add_dense(active, torch.full((6, 5), float("nan")))
    with pytest.raises(FloatingPointError, match="not finite"):
        choose(Gradient(sampled=sampled), active, 4, record)


class Last(Addition):
    """The last inactive coordinates, whatever the gradients."""

    def scores(self, active, start, stop, record):
        cols = active.units.matrix_shape[1]
        return torch.arange(start * cols, stop * cols).view(-1, cols).float()


class OneARow(Last):
    def scores(self, active, start, stop, record):
        return super().scores(active, start, stop, record)[:, :1]


class AllRows(Last):
    def scores(self, active, start, stop, record):
        return super().scores(active, 0, active.units.matrix_shape[0], record)


class Whole(Last):
    def scores(self, active, start, stop, record):
        return super().scores(active, start, stop, record).long()


@pytest.mark.parametrize("kind", [OneARow, AllRows, Whole])
def test_scores_of_one_s_own_of_another_shape_or_dtype(setting, kind, monkeypatch):
    active, record, _ = setting
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", 40)  # two rows
    with pytest.raises(ValueError, match=r"expected floats of shape \(2, 5\)"):
        choose(kind(), active, 3, record)


@pytest.mark.parametrize("batches", [0, 1])
def test_a_criterion_of_one_s_own(batches):
    """With gradients or without."""

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 6]).to_event(2))
        pyro.sample("obs", dist.Normal((w @ torch.ones(6)).sum(), 1.0), obs=torch.tensor(1.0))

    addition = Last()
    addition.batches = batches
    guide = AutoSparseNormal(model, density=0.25)
    schedule = ConstantSchedule(every=1, fraction=0.5, stop=2)
    options = {"addition": addition, "schedule": schedule}
    svi = SSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO(), **options)
    guide()
    before = guide.active_sets["w"]
    svi.step()
    added = set(guide.active_sets["w"].indices.tolist()) - set(before.indices.tolist())
    inactive = (~before.mask).flatten().nonzero().squeeze(-1)
    assert added == set(inactive[-3:].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_race_in_any_precision(dtype):
    speeds = race(torch.full((10**6,), 10.0, dtype=dtype))
    assert speeds.isfinite().all()
    assert speeds.unique().numel() > 10**5


@pytest.mark.parametrize("flushed", [False, True])
def test_a_race_among_zeros_has_no_favourites(flushed):
    torch.manual_seed(0)
    scores = torch.zeros(10_000)
    scores[-10:] = 1e-6
    torch.set_flush_denormal(flushed)
    try:
        speeds = race(scores)
    finally:
        torch.set_flush_denormal(False)
    assert (speeds > 0).all()
    first = speeds.topk(1000).indices
    assert set(range(9990, 10_000)) <= set(first.tolist())
    assert 400 < (first < 5000).sum() < 600  # 6 standard deviations of 15
    excluded = torch.full((3,), -torch.inf)
    assert (race(excluded) == -torch.inf).all()
    assert race(torch.tensor([torch.nan])).isnan()
