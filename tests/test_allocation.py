import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_svi import bnn, by_coordinate, is_moment, make, state_of, x, y

from pyro_ssvi import (
    SSVI,
    ActiveSet,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    load_posterior,
)
from pyro_ssvi.addition import Gradient, Random, race
from pyro_ssvi.allocation import FLOOR, Room, as_they_are, check_allocation, depart, fill, largest
from pyro_ssvi.gradient_record import GradientRecord


@st.composite
def rooms(draw):
    numel = draw(st.integers(2, 40))
    initial = draw(st.integers(1, numel - 1))
    floor = Room(numel, 1, initial).floor
    return Room(numel, draw(st.integers(floor, numel - 1)), initial)


def in_rounds(propose):
    return lambda i, wanted: [propose(i, m) for m, _ in wanted]


def compete(rooms, removal, share, propose, first=1.0):
    """Those that go and those that come, of each site.

    :param first: the share that comes in a first round.
    """
    removed = depart(rooms, removal, share)
    if not removed:
        return []
    bounds = [room.addable(len(gone)) for room, gone in zip(rooms, removed, strict=True)]
    n = sum(map(len, removed))
    m = math.ceil(first * n)
    rounds = [(m, as_they_are), (n - m, as_they_are)]
    added = fill(rounds, in_rounds(propose), *zip(*bounds, strict=True))
    return list(zip(removed, added, strict=True))


@given(
    st.lists(rooms(), min_size=1, max_size=5),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 10**6),
)
def test_all_sites_together_keep_their_number_and_each_its_floor(rooms, share, first, seed):
    generator = torch.Generator().manual_seed(seed)
    removal = [torch.rand(room.k, generator=generator) for room in rooms]
    inactive = [torch.rand(room.numel - room.k, generator=generator) for room in rooms]

    def propose(i, m):
        scores, index = inactive[i].topk(m)
        return index, scores

    choices = compete(rooms, removal, share, propose, first)
    removed = sum(len(gone) for gone, _ in choices)
    assert removed == sum(len(came) for _, came in choices)
    assert removed <= math.floor(share * sum(room.k for room in rooms) + 0.5)
    for room, (gone, came), scores, gains in zip(rooms, choices, removal, inactive, strict=False):
        k = room.k - len(gone) + len(came)
        assert max(1, FLOOR * room.initial_k) <= k < room.numel
        # In each site the least go and the best come, each once.
        smallest = scores.topk(len(gone), largest=False).indices
        assert set(smallest.tolist()) == set(gone.tolist())
        best = gains.topk(len(came)).indices
        assert set(best.tolist()) == set(came.tolist())
        assert len(set(came.tolist())) == len(came)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.data(),
)
def test_rounds_choose_what_is_left(sizes, seed, data):
    """Against a search of all pools at once: first the largest, then by another score."""
    generator = torch.Generator().manual_seed(seed)
    first = [torch.rand(size, generator=generator) for size in sizes]
    second = [torch.rand(size, generator=generator) for size in sizes]
    n, m = (data.draw(st.integers(0, sum(sizes) // 2)) for _ in range(2))
    by = {"first": first, "second": second}

    def propose(i, wanted):
        ranked = [by[compare][i].topk(m) for m, compare in wanted]
        return [(index, scores) for scores, index in ranked]

    rounds = [(n, "first"), (m, "second")]
    found = fill(rounds, propose, [0] * len(sizes), sizes)
    best = torch.cat(first).topk(n).indices
    left = torch.cat(second).index_fill(0, best, -1.0).topk(m).indices
    offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
    everything = {
        int(i) + offset for part, offset in zip(found, offsets, strict=False) for i in part
    }
    assert everything == {*best.tolist(), *left.tolist()}
    assert sum(map(len, found)) == n + m


def test_a_first_round_leaves_what_sites_are_to_have():
    """Whatever the other site has: what a first round gives it is missing in the second."""
    scores = [torch.arange(9.0), torch.arange(9.0) + 10]

    def propose(i, m):
        values, index = scores[i].topk(m)
        return index, values

    for first in range(1, 7):
        rounds = [(first, as_they_are), (7 - first, as_they_are)]
        added = fill(rounds, in_rounds(propose), [5, 0], [9, 9])
        assert [sorted(each.tolist()) for each in added] == [[4, 5, 6, 7, 8], [7, 8]]


def test_fewer_than_are_to_come_is_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        fill([(3, as_they_are)], lambda *_: [(torch.arange(2), torch.ones(2))], [0], [3])


@given(st.integers(1, 30), st.integers(1, 60), st.floats(0, 1))
def test_one_site_alone_exchanges_as_it_does_per_site(k, inactive, share):
    room = Room(k + inactive + 1, k, k)
    gains = torch.rand(inactive + 1)
    choices = compete([room], [torch.rand(k)], share, lambda i, m: tuple(reversed(gains.topk(m))))
    n = sum(len(came) for _, came in choices)
    assert n == min(math.floor(share * k + 0.5), inactive, room.removable)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=4),
    st.data(),
)
def test_largest_equals_trying_all(scores, data):
    most = [data.draw(st.integers(0, len(group))) for group in scores]
    least = [data.draw(st.integers(0, cap)) for cap in most]
    n = data.draw(st.integers(sum(least), sum(most)))
    parts = [torch.tensor(group, dtype=torch.float32) for group in scores]
    places = largest(parts, n, least, most, n - sum(least))
    counts = [len(chosen) for chosen in places]
    assert sum(counts) == n
    assert all(low <= c <= high for low, c, high in zip(least, counts, most, strict=True))
    total = sum(group[i] for group, chosen in zip(scores, places, strict=True) for i in chosen)
    assert total == best_total(scores, n, least, most)


def best_total(scores, n, least, most):
    """Of all numbers taken from each group, by trying them."""
    best = {0: 0}
    for group, low, high in zip(scores, least, most, strict=True):
        ranked = sorted(group, reverse=True)
        longer: dict[int, int] = {}
        for taken, total in best.items():
            for count in range(low, high + 1):
                with_these = total + sum(ranked[:count])
                longer[taken + count] = max(with_these, longer.get(taken + count, 0))
        best = longer
    return best[n]


def test_nan_counts_as_the_largest():
    scores = [torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 2.0])]
    first, second = largest(scores, 2, [0, 0], [2, 2], 2)
    assert first.tolist() == [1]
    assert second.tolist() == [0]


def test_unknown_allocation():
    with pytest.raises(ValueError, match="expected allocation to be one of"):
        check_allocation("local")


# In training


def total(guide):
    return sum(len(active) for active in guide.active_sets.values())


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.sampled_from(["gradient", "sampled_gradient", "mixed_gradient", "random"]),
    st.sampled_from(["snr_abs", "abs_mean", lambda loc, scale: torch.rand_like(loc)]),
    st.tuples(st.floats(0.05, 0.95), st.floats(0.1, 0.9)),
)
def test_sites_compete(shares, addition, removal, densities):
    guide, svi = make(
        dict(zip(("w0", "w1"), densities, strict=True)),
        addition=addition,
        removal=removal,
        allocation="global",
    )
    svi.step(x, y)
    params = guide.parameters_in_place()
    before, k = guide.active_sets, total(guide)
    for share in shares:
        was = guide.active_sets
        exchanged = svi.exchange(x, y, share=share)
        for site in guide.sites:  # making an active set checks that it is one
            active = ActiveSet(guide.active_sets[site.name].indices.clone(), site.shape)
            assert len(active) == site.k
            new = (active.mask & ~was[site.name].mask).sum()
            assert new == exchanged.get(site.name, 0)
            assert len(before[site.name]) == site.initial_k
            assert site.k >= max(1, FLOOR * site.initial_k)
            assert site.is_sparse == (len(before[site.name]) < active.numel())
        assert total(guide) == k
        svi.step(x, y)
    assert all(a is b for a, b in zip(params, guide.parameters_in_place(), strict=True))
    assert guide.summary().total.active == k


@pytest.mark.parametrize("optim", ["SGD", "Adam", "scheduled"])
def test_optimizer_state_follows_its_coordinate_past_other_sites(optim):
    guide, svi = make({"w0": 0.3, "w1": 0.9}, optim=optim, allocation="global", removal=by_width)
    for _ in range(5):
        svi.step(x, y)
    params = guide.parameters_in_place()
    vectors = [
        lambda p=p, key=key: by_coordinate(guide, p if key is None else state_of(svi, p)[key])
        for p in params
        for key in [None, *(k for k, v in state_of(svi, p).items() if is_moment(v, p))]
    ]
    sets, before = dict(guide.active_sets), [vector() for vector in vectors]
    exchanged = svi.exchange(x, y, share=0.3)
    assert len(guide.active_sets["w1"]) == 3  # the floor of 9
    assert sum(exchanged.values()) == round(0.3 * 45)
    for was, vector in zip(before, vectors, strict=True):
        now = vector()
        for name, active in guide.active_sets.items():
            kept = sets[name].mask.flatten() & active.mask.flatten()
            assert torch.equal(now[name][kept], was[name][kept])
            assert now[name][active.indices].isfinite().all()
    for param in params:
        for value in state_of(svi, param).values():
            if is_moment(value, param):
                new = by_coordinate(guide, value)["w0"][~sets["w0"].mask.flatten()]
                assert (new[~new.isnan()] == 0).all()


def by_width(loc, scale):
    """Whatever is in a small site goes first."""
    return torch.rand_like(loc) + len(loc)


def test_a_site_at_its_floor_goes_on_exchanging():
    def score(gradient):
        return gradient.abs() + 1 if gradient.shape[-1] == 12 else gradient.abs().clamp(max=0.5)

    guide, svi = make({"w0": 0.3, "w1": 0.4}, allocation="global", removal=by_width, addition=score)
    for _ in range(4):
        svi.exchange(x, y, share=0.2)
    assert len(guide.active_sets["w1"]) == 1
    seen = set()
    for _ in range(20):
        svi.step(x, y)
        svi.exchange(x, y, share=0.2)
        assert len(guide.active_sets["w1"]) >= 1
        seen |= set(guide.active_sets["w1"].indices.tolist())
    assert len(seen) > 1


def test_the_least_go_and_the_best_come_over_all_sites():
    guide, svi = make({"w0": 0.3, "w1": 0.5}, allocation="global")
    for _ in range(10):
        svi.step(x, y)
    posterior, was = guide.posterior(), guide.active_sets
    ratio = {name: (posterior[name].loc / posterior[name].scale).abs() for name in ("w0", "w1")}
    n = 8
    bound = torch.cat(list(ratio.values())).sort().values[n - 1]
    svi.exchange(x, y, share=n / 41)
    for name, scores in ratio.items():
        gone = was[name].mask & ~guide.active_sets[name].mask
        assert set(gone.flatten().nonzero().flatten().tolist()) == set(
            was[name].indices[scores <= bound].tolist()
        )


def test_random_addition_is_uniform_over_all_sites():
    active = [ActiveSet(torch.tensor([0, 3]), (2, 5)), ActiveSet(torch.tensor([1]), (3, 1))]
    counts = torch.zeros(13)
    for _ in range(1500):
        proposals = [
            Random().propose(a, [(min(4, a.numel() - len(a)), as_they_are)], None)[0]
            for a in active
        ]
        chosen = largest([s for _, s in proposals], 4, [0, 0], [8, 2], 4)
        for offset, (indices, _), places in zip((0, 10), proposals, chosen, strict=True):
            counts[indices[places] + offset] += 1
    inactive = torch.ones(13, dtype=torch.bool)
    inactive[[0, 3, 11]] = False
    assert (counts[~inactive] == 0).all()
    deviation = (counts[inactive] / 1500 - 0.4) / (0.24 / 1500) ** 0.5
    assert deviation.abs().max() < 4.5


def test_sampled_gradient_is_in_proportion_over_all_sites():
    """The first to be drawn, of two sites with known gradients."""
    gradients = [torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[0.0], [4.0]])]
    active = [ActiveSet(torch.tensor([0]), g.shape) for g in gradients]
    record = GradientRecord()
    for a, g in zip(active, gradients, strict=True):
        record.add_dense(a, g)
    counts = torch.zeros(6)
    criterion = Gradient(sampled=1.0)
    for _ in range(1500):
        proposals = [criterion.propose(a, [(1, race)], record)[0] for a in active]
        chosen = largest([s for _, s in proposals], 1, [0, 0], [1, 1], 1)
        for offset, (indices, _), places in zip((0, 4), proposals, chosen, strict=True):
            counts[indices[places] + offset] += 1
    p = torch.tensor([0.0, 1, 2, 1, 0, 4]) / 8
    assert ((counts / 1500 - p).abs() <= 4.5 * (p * (1 - p) / 1500).sqrt()).all()


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_fused_step_keeps_up(loss):
    """After an exchange that changes the sites' sizes, its loss is that of Pyro's own ELBO."""
    guide, svi = make({"w0": 0.3, "w1": 0.9}, loss=loss(), allocation="global", removal=by_width)
    for _ in range(3):
        svi.step(x, y)
    svi.exchange(x, y, share=0.3)
    assert svi._may_fuse
    pyro.set_rng_seed(1)
    fused = svi.loss_and_grads(svi.model, guide, x, y)
    pyro.set_rng_seed(1)
    assert svi.evaluate_loss(x, y) == pytest.approx(fused, rel=1e-5)


def moved():
    """A guide whose sites have other numbers than at first."""
    guide, svi = make({"w0": 0.3, "w1": 0.9}, allocation="global", removal=by_width)
    svi.step(x, y)
    svi.exchange(x, y, share=0.3)
    assert [site.k for site in guide.sites] == [42, 10, 3]
    return guide, svi


@pytest.mark.parametrize("seen", [False, True])
def test_loads_into_a_guide_whose_sites_have_other_numbers(seen, tmp_path):
    guide, svi = moved()
    path = tmp_path / "training.ckpt"
    svi.save(path)
    svi.export(tmp_path / "net.posterior")
    state, expected = guide.state_dict(), guide.median()
    for load in ("checkpoint", "state dict"):
        other, training = make({"w0": 0.3, "w1": 0.9}, allocation="global")
        if seen:
            training.step(x, y)
            assert [site.k for site in other.sites] == [36, 10, 9]
        if load == "checkpoint":
            training.load(path)
        else:
            other.load_state_dict(state)
        assert [site.k for site in other.sites] == [42, 10, 3]
        assert [site.initial_k for site in other.sites] == [36, 10, 9]
        for name, value in other.median().items():
            assert torch.equal(value, expected[name])
        training.step(x, y)
        training.exchange(x, y, share=0.3)
        assert total(other) == 55
    pyro.clear_param_store()
    loaded = load_posterior(tmp_path / "net.posterior", bnn)
    loaded(x, y)
    assert [site.k for site in loaded.sites] == [42, 10, 3]
    for name, value in loaded.median().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("seen", [False, True])
def test_another_density_is_refused_even_where_the_total_is_the_same(seen):
    state = moved()[0].state_dict()
    guide, _ = make({"w0": 42 / 120, "w1": 0.3})
    if seen:
        guide(x, y)
    with pytest.raises(
        RuntimeError, match=r"saved with 36 active of \(10, 12\), this guide has 42"
    ):
        guide.load_state_dict(state)


def test_a_table_that_lost_coordinates():
    state = moved()[0].state_dict()
    state["_extra_state"]["sites"][0]["initial_k"] = 35
    with pytest.raises(RuntimeError, match="damaged"):
        make({"w0": 0.3, "w1": 0.9})[0].load_state_dict(state)


def test_unneeded_sites_take_no_part():
    def model(x, y=None):
        pyro.sample("unused", dist.Normal(0.0, 1.0).expand([6, 6]).to_event(2))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 12]).to_event(2))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
        mean = F.linear(F.linear(x, w).tanh(), v).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    guide, svi = make(0.5, model=model, allocation="global")
    svi.step(x, y)
    assert "unused" not in svi.exchange(x, y, share=0.5)
    assert len(guide.active_sets["unused"]) == 18


@pytest.mark.filterwarnings("ignore:exchange after step")
def test_scores_that_are_not_finite_change_nothing():
    guide, svi = make({"w0": 0.3, "w1": 0.5}, allocation="global", addition=lambda g: g * math.nan)
    svi.step(x, y)
    before = guide.indices.clone()
    assert svi.exchange(x, y, share=0.3) == {}
    assert torch.equal(guide.indices, before)


@pytest.mark.parametrize("allocation", ["per_site", "global"])
def test_an_error_of_a_criterion_names_its_site_and_is_kept(allocation):
    def score(gradient):
        return torch.tensor(json.loads("{"))

    _, svi = make(allocation=allocation, addition=score)
    svi.step(x, y)
    with pytest.raises(ValueError, match=r"^site 'w0': Expecting property name") as caught:
        svi.exchange(x, y, share=0.3)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_parameter_store_of_a_guide_whose_sites_competed_is_refused():
    moved()
    guide = AutoSparseNormal(bnn, density={"w0": 0.3, "w1": 0.9})
    with pytest.raises(ValueError, match="of another guide"):
        guide(x, y)


def test_rows_of_covariances_follow_past_other_sites():
    pyro.clear_param_store()
    guide = AutoSparseLowRankMultivariateNormal(bnn, density={"w0": 0.3, "w1": 0.9}, rank=3)
    svi = SSVI(bnn, guide, pyro.optim.Adam({}), Trace_ELBO(), removal=by_width, allocation="global")
    svi.step(x, y)
    sets = dict(guide.active_sets)
    before = [by_coordinate(guide, column) for column in guide.cov_factor.T]
    svi.exchange(x, y, share=0.3)
    assert [site.k for site in guide.sites] == [42, 10, 3]
    for was, column in zip(before, guide.cov_factor.T, strict=True):
        now = by_coordinate(guide, column)
        for name, active in guide.active_sets.items():
            kept = sets[name].mask.flatten() & active.mask.flatten()
            assert torch.equal(now[name][kept], was[name][kept])
            new = active.mask.flatten() & ~sets[name].mask.flatten()
            assert (now[name][new] == 0).all()
    svi.step(x, y)
