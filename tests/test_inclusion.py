import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO

from pyro_ssvi import (
    SSVI,
    ActiveSet,
    AutoSparseDelta,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    CosineSchedule,
)
from pyro_ssvi.inclusion import effects, frequency, stability

X, Y = torch.randn(20, 6), torch.randn(20)


def model(x, y=None):
    pyro.sample("tau", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 6]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(torch.tanh(x @ w.T) @ v, 1.0), obs=y)


def made(kind=AutoSparseNormal, density=0.5, **options):
    guide = kind(model, density=density, **options)
    guide(X, Y)
    return guide


# Effects


def test_memory_is_that_of_inputs_with_active_weights():
    def wide(x=None):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 10**6]).to_event(2))

    guide = AutoSparseNormal(wide, density=1e-4)
    guide()
    active = guide.active_sets["w"].indices % 10**6
    table = effects(guide, "w", num_samples=30_000)  # of all inputs, 120 GB
    assert int((table.active > 0).sum()) == len(active.unique())
    assert (table.mean[active] > 0).all()
    assert (table.low[active] < table.high[active]).all()


def test_a_number_has_no_inputs():
    def number(x=None):
        pyro.sample("shift", dist.Normal(0.0, 1.0))

    guide = AutoSparseNormal(number)
    guide()
    with pytest.raises(ValueError, match=r"real-valued sites \[\], got 'shift'"):
        effects(guide, "shift")


def test_of_one_weight_it_is_the_weight():
    guide = made(density={"v": 0.5}, init_scale=0.3)
    with torch.no_grad():
        guide.split(guide.loc_unconstrained)[2][0].copy_(torch.tensor([-2.0, 1.0]))
    table = effects(guide, "v", level=0.9)
    active = guide.active_sets["v"].indices
    assert table.order.tolist() == active.tolist()
    assert table.mean[active].tolist() == [-2, 1]
    torch.testing.assert_close(table.sd[active], torch.full((2,), 0.3))
    q = guide.quantiles([0.05, 0.95])["v"]
    torch.testing.assert_close(torch.stack([table.low, table.high]), q)
    assert table.active.sum() == 2


def test_of_several_weights_it_is_the_norm_of_the_column():
    """Against chi distributions, which norms of centred normals have."""
    guide = made(init_scale=0.3)  # locations are 0
    table = effects(guide, "w", num_samples=2000)
    count = guide.active_sets["w"].mask.sum(0)
    assert torch.equal(table.active, count)
    for n, mean, sd, low in zip(table.active, table.mean, table.sd, table.low, strict=True):
        n = int(n)
        if n == 0:
            assert mean == sd == low == 0
            continue
        expected = 0.3 * math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
        assert float(mean) == pytest.approx(expected, rel=0.05)
        assert float(sd) == pytest.approx(math.sqrt(0.09 * n - expected**2), rel=0.08)
    squares = table.mean.square() + table.sd.square()
    torch.testing.assert_close(squares, 0.09 * count, rtol=0.08, atol=0)


def test_intervals_are_the_quantiles_of_full_draws():
    guide = made(init_scale=0.3)
    with torch.no_grad():
        guide.loc_unconstrained.normal_()
    table = effects(guide, "w", level=0.8, num_samples=2000)
    w = guide.posterior()["w"].sample((4000,)).to_dense()
    norms = w.square().sum(1).sqrt()
    for found, q in ((table.low, 0.1), (table.high, 0.9)):
        torch.testing.assert_close(found, norms.quantile(q, 0), rtol=0.1, atol=0.02)


def test_correlated_coordinates_are_drawn_together():
    guide = made(AutoSparseLowRankMultivariateNormal, rank=1, density=1.0, init_scale=1.0)
    with torch.no_grad():
        guide.cov_factor_unconstrained.fill_(3.0)  # all rise and fall together
    spread = effects(guide, "w", num_samples=2000).sd
    marginals = guide.marginals(*guide.flat_parameters())
    pyro.clear_param_store()
    alone = made(density=1.0)
    alone.set_marginals(*marginals, alone.indices)
    assert (spread > 1.3 * effects(alone, "w", num_samples=2000).sd).all()


def test_a_point_has_no_spread():
    guide = made(AutoSparseDelta)
    table = effects(guide, "w")
    torch.testing.assert_close(table.mean, guide.median()["w"].square().sum(0).sqrt())
    assert table.sd.max() < 1e-6


def test_dimensions_that_count_inputs():
    def conv(x):
        pyro.sample("k", dist.Normal(0.0, 1.0).expand([3, 5, 2, 2]).to_event(4))

    guide = AutoSparseNormal(conv, density=0.3)
    guide(X)
    mask = guide.active_sets["k"].mask
    assert torch.equal(effects(guide, "k", num_samples=2).active, mask.sum((0, 2, 3)))
    assert torch.equal(effects(guide, "k", dim=0, num_samples=2).active, mask.sum((1, 2, 3)))
    assert torch.equal(effects(guide, "k", dim=3, num_samples=2).active, mask.sum((0, 1, 2)))


def test_table():
    guide = made()
    table = effects(guide, "w", names=["age", "<sex>", "bmi", "bp", "s1", "s2"], num_samples=10)
    lines = str(table).splitlines()
    assert lines[0].split() == ["input", "active", "mean", "sd", "95", "%", "interval"]
    assert lines[-1].split()[-1] == "12"
    assert len(lines) == 2 + len(table.order) + 2
    assert lines[2].split()[0] == table.names[table.order[0]]
    assert "&lt;sex&gt;" in table._repr_html_() or table.active[1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "x"}, r"real-valued sites \['w', 'v'\], got 'x'"),
        ({"site": "tau"}, r"real-valued sites \['w', 'v'\], got 'tau'"),
        ({"site": "w", "names": ["a"]}, "expected 6 names, one for each input, got 1"),
        ({"site": "w", "level": 95}, "level between 0 and 1, got 95"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        effects(made(), **arguments)


def test_the_inputs_of_a_sparse_regression_are_found():
    """Ten of a hundred inputs count, by known coefficients."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(100)
    place = torch.randperm(100, generator=generator)[:10]
    truth[place] = torch.linspace(0.5, 1.5, 10) * torch.tensor([1.0, -1.0]).repeat(5)
    x = torch.randn(300, 100, generator=generator)
    y = x @ truth + 0.5 * torch.randn(300, generator=generator)

    def regression(x, y):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([100]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ beta, 0.5), obs=y)

    guide = AutoSparseNormal(regression, density={"beta": 0.15})
    schedule = CosineSchedule(every=10, stop=150)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = SSVI(regression, guide, optim, Trace_ELBO(), schedule=schedule)
    history = []
    for _ in range(300):
        svi.step(x, y)
        if schedule.due(svi.steps):
            history.append(guide.active_sets)
    table = effects(guide, "beta")
    assert set(table.order[:10].tolist()) == set(place.tolist())
    covered = (table.low <= truth) & (truth <= table.high)
    assert covered[place].sum() >= 8
    assert (table.sd[place] < 0.1).all()
    always = frequency(history[-3:], "beta")
    assert (always.to_dense()[place] == 1).all()
    (row,) = stability(history[-3:]).rows
    assert row.always >= 10
    (whole,) = stability(history).rows
    assert 0.15 < whole.coverage <= 1
    assert row.stability > 0.5


# Inclusion


@settings(max_examples=40, deadline=None)
@given(
    masks=st.integers(2, 5).flatmap(
        lambda times: st.lists(
            st.lists(st.booleans(), min_size=12, max_size=12).filter(
                lambda bits: 0 < sum(bits) < 12
            ),
            min_size=times,
            max_size=times,
        )
    )
)
def test_frequencies_and_stability_are_those_of_dense_masks(masks):
    masks = torch.tensor(masks).reshape(-1, 3, 4)
    history = [{"w": ActiveSet(m.flatten().nonzero().squeeze(-1), (3, 4))} for m in masks]
    p = masks.double().mean(0)
    share = frequency(history, "w")
    torch.testing.assert_close(share.to_dense().double(), p, rtol=1e-6, atol=0)
    assert len(share.values) == int(masks.any(0).sum())
    (row,) = stability(history).rows
    assert row.ever == int(masks.any(0).sum())
    assert row.coverage == row.ever / 12
    assert row.always == int(masks.all(0).sum())
    mean = p.mean()
    n = len(masks)
    expected = 1 - (n / (n - 1) * p * (1 - p)).mean() / (mean * (1 - mean))
    assert row.stability == pytest.approx(float(expected), abs=1e-5)
    assert row.stability <= 1 + 1e-9


def test_stability_of_equal_and_of_random_sets():
    one = {"w": ActiveSet.random((50, 40), 200)}
    assert stability([one, one, one]).rows[0].stability == pytest.approx(1)
    several = [{"w": ActiveSet.random((50, 40), 200)} for _ in range(20)]
    assert stability(several).rows[0].stability == pytest.approx(0, abs=0.02)


def test_dense_sites_are_left_out_and_the_table_reads_well():
    guide = made()
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    history = [guide.active_sets]
    svi.exchange(X, Y, share=0.25)
    history.append(guide.active_sets)
    table = stability(history)
    assert [row.site for row in table.rows] == ["w"]
    (row,) = table.rows
    assert (row.active, row.ever, row.always) == (12, 15, 9)
    assert str(table).splitlines()[0].split("  ")[-2:] == ["in all 2", "stability"]
    assert table._repr_html_().count("<tr>") == 2


def test_histories_that_are_too_short():
    with pytest.raises(ValueError, match="two times or more, got 1"):
        stability([made().active_sets])
    with pytest.raises(ValueError, match="history is empty"):
        frequency([], "w")
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"unknown site 'x'; the history has \['tau', 'w', 'v'\]"):
        frequency([made().active_sets], "x")
