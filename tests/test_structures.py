import copy
import math
import pickle
from functools import partial
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_ssvi import (
    SSVI,
    ActiveSet,
    AutoSparseDelta,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    forbid_materialise,
    load_posterior,
)
from pyro_ssvi.addition import Gradient, Random, choose_from
from pyro_ssvi.allocation import as_they_are
from pyro_ssvi.densities import Uniform
from pyro_ssvi.exchange import (
    best,
    carry,
    read_at,
    room,
    swap,
    top_inactive,
    unit_scores,
    weakest,
)
from pyro_ssvi.gradient_record import GradientRecord
from pyro_ssvi.structures import NM, Columns, Rows, Tiles, read_structure, structure_state


@st.composite
def tiled(draw):
    """An active set of tiles, of a site with two to four dimensions."""
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    grid = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    shape = [grid[0] * rows, grid[1] * cols]
    if draw(st.booleans()):
        shape = [shape[0], grid[1], cols]
    rows, cols = draw(st.sampled_from([(rows, cols), (rows, None), (None, cols)]))
    structure = Tiles(rows, cols)
    size = math.prod(structure.tile(shape))
    units = draw(st.integers(1, math.prod(shape) // size))
    return structure.random(shape, units * size)


@st.composite
def grouped(draw):
    m = draw(st.integers(2, 6))
    structure = NM(draw(st.integers(1, m - 1)), m)
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)) * m)
    return structure.random(shape, structure.count(shape, structure.n / m))


def tile_view(active, matrix):
    """The site's matrix as ``[tile, size]``."""
    (rows, cols), (n, m) = active.tile, active.matrix_shape
    tiles = matrix.reshape(n // rows, rows, m // cols, cols)
    return tiles.transpose(1, 2).reshape(-1, rows * cols)


def has_structure(active):
    if isinstance(active.structure, NM):
        per_group = active.mask.reshape(-1, active.structure.m).sum(1)
        return (per_group == active.structure.n).all()
    tiles = tile_view(active, active.mask)
    return (tiles.all(1) == tiles.any(1)).all()


@settings(deadline=None)
@given(tiled())
def test_tiles_are_whole_and_known(active):
    assert has_structure(active)
    units, values = active.units, torch.randn(len(active))
    whole = tile_view(active, active.mask).all(1)
    assert torch.equal(units.indices, whole.nonzero().squeeze(-1))
    assert units.numel() == len(whole)
    dense = tile_view(active, active.scatter(values))
    torch.testing.assert_close(active.unit_sums(values), dense.sum(1)[units.indices])
    positions = tile_view(active, torch.arange(active.numel()))
    assert torch.equal(active.unit_coordinates(units.indices), positions[units.indices])


@settings(deadline=None)
@given(tiled())
def test_values_of_a_tile_are_where_it_says(active):
    tiling = active.in_tiles(*active.tile)
    values = torch.randn(len(active))
    dense = tile_view(active, active.scatter(values))[active.units.indices]
    assert torch.equal(values[tiling.places], dense)
    i, j = (torch.arange(n) for n in tiling.shape)
    place = tiling.start[:, None, None] + tiling.stride[:, None, None] * i[:, None] + j
    assert torch.equal(place.flatten(1).long(), tiling.places)
    perm = active.units.csr_t.perm
    assert torch.equal(perm[tiling.place_t], torch.arange(len(perm)).to(perm))


@settings(deadline=None)
@given(st.one_of(tiled(), grouped()), st.floats(0, 1), st.data())
def test_an_exchange_keeps_the_structure(active, share, data):
    units = active.units
    most = min(len(units), units.numel() - len(units))
    n = round(share * most)
    removed = weakest(active, torch.randn(len(active)), n)
    record = GradientRecord()
    record.add_dense(active, torch.randn(active.shape))
    shares = [Gradient(sampled=share) for share in (0.0, 0.5, 1.0)]
    criterion = data.draw(st.sampled_from([*shares, Random()]))
    places = room(active, removed)

    def propose(rounds):
        return criterion.propose(active, rounds, record, places)

    added = choose_from(criterion, n, propose, places)
    assert len(removed.unique()) == len(added.unique()) == n
    assert not torch.isin(added, units.indices).any()
    move = swap(active, removed, added)

    after = ActiveSet(move.indices, active.shape, active.structure)  # checks order and structure
    assert len(after) == len(active)
    assert has_structure(after)
    new = move.source < 0
    assert new.sum() == move.size == n * math.prod(active.tile)
    assert torch.equal(active.indices[move.source[~new]], move.indices[~new])
    assert not torch.isin(move.indices[new], active.indices).any()
    left = active.unit_coordinates(units.indices[removed]).flatten()
    assert not torch.isin(left, move.indices).any()

    tensor = torch.randn(len(active))
    before = active.scatter(tensor).flatten()
    carry(tensor, move.source, torch.full_like(tensor, 7.0))
    assert torch.equal(tensor[~new], before[move.indices[~new]])
    assert (tensor[new] == 7.0).all()


def test_groups_take_their_largest_from_a_mixture():
    active = NM(1, 4).random((6, 8), 12)
    record = GradientRecord()
    record.add_dense(active, torch.randn(6, 8))
    removed = torch.arange(0, 12, 2)
    places = room(active, removed)

    def choose(criterion):
        propose = partial(criterion.propose, active, record=record, room=places)
        return set(choose_from(criterion, 6, propose, places).tolist())

    assert choose(Gradient(sampled=0.75)) == choose(Gradient())


@settings(deadline=None)
@given(tiled(), st.integers(1, 400), st.data())
def test_tiles_with_the_least_and_the_largest_sums(active, block_bytes, data):
    units = active.units
    n = data.draw(st.integers(0, min(len(units), units.numel() - len(units))))
    scores, values = torch.rand(active.shape), torch.rand(len(active))
    matrix = scores.reshape(active.matrix_shape)
    sums = tile_view(active, scores).sum(1)
    block = unit_scores(active, lambda a, b: matrix[a:b])
    with patch("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes):
        ((added, found),) = top_inactive(active, [(n, as_they_are)], block)
    expected = sums.index_fill(0, units.indices, -1.0).topk(n)
    assert set(added.tolist()) == set(expected.indices.tolist())
    torch.testing.assert_close(found.sort().values, expected.values.sort().values)
    own = tile_view(active, active.scatter(values)).sum(1)[units.indices]
    assert set(weakest(active, values, n).tolist()) == set(
        own.topk(n, largest=False).indices.tolist()
    )


@settings(deadline=None)
@given(grouped(), st.integers(1, 400), st.data())
def test_groups_lose_the_least_and_gain_their_own_largest(active, block_bytes, data):
    n, m = active.structure.n, active.structure.m
    groups = active.numel() // m
    count = data.draw(st.integers(0, groups * min(n, m - n)))
    values, scores = torch.rand(len(active)), torch.rand(active.shape)
    removed = weakest(active, values, count)
    # One after the other: the least of all whose group still has an inactive one to gain.
    expected, lost = set(), [0] * groups
    for place in values.argsort().tolist():
        if len(expected) < count and lost[place // n] < m - n:
            expected.add(place)
            lost[place // n] += 1
    assert set(removed.tolist()) == expected
    taken = room(active, removed)
    assert taken.tolist() == lost

    matrix = scores.reshape(active.matrix_shape)
    wanted = [(count, as_they_are)]
    with patch("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes):
        ((added, _),) = top_inactive(active, wanted, lambda a, b: matrix[a:b], taken)
    inactive = scores.flatten().index_fill(0, active.indices, -1.0).view(-1, m)
    expected = {
        group * m + place
        for group in range(groups)
        for place in inactive[group].topk(lost[group]).indices.tolist()
    }
    assert set(added.tolist()) == expected
    candidates = (~active.mask).flatten().nonzero().squeeze(-1)
    ((again, _),) = best(active, wanted, candidates, scores.flatten()[candidates], taken)
    assert set(again.tolist()) == expected


def test_a_tall_tile_is_read_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", 240)
    active = Columns().random((1000, 6), 2000)
    matrix, read = torch.rand(1000, 6), []

    def block(start, stop):
        read.append(stop - start)
        return matrix[start:stop]

    block_of_units = unit_scores(active, block)
    ((added, scores),) = top_inactive(active, [(2, as_they_are)], block_of_units)
    assert max(read) == 10
    torch.testing.assert_close(scores, matrix.sum(0)[added])


@settings(deadline=None)
@given(tiled())
def test_the_best_are_those_with_the_largest_sums(active):
    scores = torch.rand(active.shape)
    chosen = ActiveSet(active.structure.best(scores, len(active)), active.shape, active.structure)
    sums = tile_view(active, scores).sum(1)
    assert set(chosen.units.indices.tolist()) == set(sums.topk(len(active.units)).indices.tolist())


@settings(deadline=None)
@given(grouped())
def test_the_best_of_each_group(active):
    scores = torch.rand(active.shape)
    chosen = ActiveSet(active.structure.best(scores, len(active)), active.shape, active.structure)
    rest = scores.masked_fill(chosen.mask, -1.0).view(-1, active.structure.m).max(1).values
    least = scores.masked_fill(~chosen.mask, 2.0).view(-1, active.structure.m).min(1).values
    assert (least > rest).all()


def test_first_tiles_are_uniform():
    counts = torch.zeros(12)
    for _ in range(700):
        counts[Tiles(2, 3).random((6, 12), 24).units.indices] += 1
    deviation = (counts / 700 - 1 / 3) / (2 / 9 / 700) ** 0.5
    assert deviation.abs().max() < 4.5


def test_coordinates_that_are_not_of_the_structure_are_refused():
    with pytest.raises(ValueError, match="expects whole tiles of 2 x 2"):
        ActiveSet(torch.tensor([0, 1, 4]), (4, 4), Tiles(2, 2))
    with pytest.raises(ValueError, match="expects whole tiles of 2 x 2"):
        ActiveSet(torch.tensor([1, 2, 5, 6]), (4, 4), Tiles(2, 2))  # across two tiles
    with pytest.raises(ValueError, match="expects 1 active coordinates in each group of 2"):
        ActiveSet(torch.tensor([0, 1]), (2, 2), NM(1, 2))


@pytest.mark.parametrize("structure", [Tiles(2, 2), Rows(), NM(1, 2)])
def test_copies_keep_it(structure):
    active = structure.random((4, 4), structure.count((4, 4), 0.5))
    for copied in (pickle.loads(pickle.dumps(active)), copy.deepcopy(active)):
        assert copied.same(active)
        assert copied.structure == structure
    assert read_structure(structure_state(structure)) == structure
    assert read_structure(structure_state(None)) is None
    with pytest.raises(ValueError, match="unknown structure 'Rings'"):
        read_structure({"class": "Rings"})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Tiles(0, 2), "Tiles expects rows and cols >= 1, or None for all, got 0"),
        (lambda: Tiles(2, 1.5), "got 1.5"),
        (lambda: NM(2, 2), r"NM expects 1 <= n < m, got NM\(n=2, m=2\)"),
        (lambda: NM(0, 2), "NM expects 1 <= n < m, got 0"),
    ],
)
def test_bad_sizes(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# In guides

x, y = torch.randn(20, 12), torch.randint(4, (20,))
STRUCTURES = {
    "tiles": Tiles(2, 4),
    "rows": Rows(),
    "columns": Columns(),
    "groups": NM(1, 4),
    "one site": {"w0": Tiles(4, 2)},
    "each its own": {"w0": NM(1, 4), "w1": Tiles(4, 4)},
}
GUIDES = [AutoSparseNormal, AutoSparseDelta, AutoSparseLowRankMultivariateNormal]


def net(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([8, 12]).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([4, 8]).to_event(2))
    logits = F.linear(F.linear(x, w0, b0).tanh(), w1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def make(structure, kind=AutoSparseNormal, density=0.25, every=10_000, **options):
    pyro.clear_param_store()
    guide = kind(net, density=density, structure=structure)
    schedule = ConstantSchedule(every=every, fraction=0.4)
    optim = pyro.optim.Adam({"lr": 1e-2})
    loss = options.pop("loss", None) or Trace_ELBO()
    return SSVI(net, guide, optim, loss, schedule=schedule, **options)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_training_keeps_the_structure_and_the_size(structure, kind):
    svi = make(structure, kind, every=2, addition="sampled_gradient")
    svi.step(x, y)
    guide = svi.guide
    sizes = {name: len(active) for name, active in guide.active_sets.items()}
    seen = {name: active.mask for name, active in guide.active_sets.items()}
    with forbid_materialise():
        for _ in range(40):
            svi.step(x, y)
            for name, active in guide.active_sets.items():
                assert len(active) == sizes[name]
                assert active.structure is None or has_structure(active)
                seen[name] |= active.mask
        sample = guide(x, y)
    assert seen["w0"].float().mean() > 0.4
    for name, active in guide.active_sets.items():
        assert (sample[name].to_dense()[~active.mask] == 0).all()
    assert str(guide.summary())


def test_the_summary_has_structures_where_there_are_some():
    def lines(structure):
        pyro.clear_param_store()
        guide = AutoSparseNormal(net, density=0.25, structure=structure)
        guide(x, y)
        return str(guide.summary()).splitlines()

    assert "structure" not in lines(None)[0]
    for structure, written in [
        (Tiles(2, 4), "Tiles(2, 4)"),
        (Rows(), "Tiles(1, None)"),
        (NM(1, 4), "NM(1, 4)"),
    ]:
        head, _, w0, *others = lines({"w0": structure})
        assert head.endswith("structure")
        assert w0.startswith("w0")
        assert w0.endswith(written)
        assert not any(written in line for line in others)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_parameters_and_optimizer_state_follow(structure):
    svi = make(structure)
    for _ in range(5):
        svi.step(x, y)
    guide = svi.guide
    params = guide.parameters_in_place()
    state = [svi.optim.optim_objs[param].state[param]["exp_avg_sq"] for param in params]
    old, before = guide.active_sets, [tensor.detach().clone() for tensor in (*params, *state)]
    exchanged = svi.exchange(x, y, share=0.5)
    assert sum(exchanged.values()) > 5
    start = 0
    for name, active in guide.active_sets.items():
        part = slice(start, start + len(active))
        kept = torch.isin(active.indices, old[name].indices)
        assert (~kept).sum() == exchanged.get(name, 0)
        was = torch.isin(old[name].indices, active.indices)
        for tensor, past in zip((*params, *state), before, strict=True):
            assert torch.equal(tensor[part][kept], past[part][was])
        for tensor in state:
            assert (tensor[part][~kept] == 0).all()
        start = part.stop


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_exchange_is_that_of_the_summed_scores(loss):
    svi = make(Tiles(2, 4), loss=loss(), addition=Gradient(at="mean"))
    for _ in range(10):
        svi.step(x, y)
    guide = svi.guide
    guide.scale_unconstrained.data.normal_()
    old, posterior = guide.active_sets, guide.posterior()
    leaves = {name: median.requires_grad_() for name, median in guide.median().items()}
    logits = F.linear(F.linear(x, leaves["w0"], leaves["b0"]).tanh(), leaves["w1"])
    F.cross_entropy(logits, y, reduction="sum").backward()
    svi.exchange(x, y, share=0.34)
    for name in ("w0", "w1"):
        active, units = old[name], old[name].units
        n = round(0.34 * len(units))
        q = posterior[name]
        removal = active.scatter(svi.removal(q.loc, q.scale))
        removed = tile_view(active, removal).sum(1)[units.indices].topk(n, largest=False).indices
        promise = tile_view(active, leaves[name].grad.abs()).sum(1)
        added = promise.index_fill(0, units.indices, -1.0).topk(n).indices
        expected = {*units.indices.tolist()} - {*units.indices[removed].tolist()}
        found = guide.active_sets[name].units.indices
        assert set(found.tolist()) == expected | {*added.tolist()}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_resumed_bit_for_bit(structure, tmp_path):
    ends = []
    svi = make(structure, every=3, addition=Gradient(batches=2))
    for _ in range(5):
        svi.step(x, y)
    svi.save(tmp_path / "a.ckpt")
    ends.append([svi.step(x, y) for _ in range(6)])
    svi = make(structure, every=3, addition=Gradient(batches=2))
    svi.load(tmp_path / "a.ckpt")
    ends.append([svi.step(x, y) for _ in range(6)])
    assert ends[0] == ends[1]
    svi.export(tmp_path / "a.posterior")
    kept, medians = svi.guide.active_sets, svi.guide.median()
    pyro.clear_param_store()
    guide = load_posterior(tmp_path / "a.posterior", net)
    guide(x)
    for name, active in guide.active_sets.items():
        assert active.same(kept[name])
        assert active.structure == kept[name].structure
        assert torch.equal(guide.median()[name], medians[name])


def test_another_structure_is_refused():
    svi = make(Tiles(2, 4))
    svi.step(x, y)
    state = svi.state_dict()
    assert state["guide"]["_extra_state"]["version"] == 2
    message = r"site 'w0': saved with structure Tiles\(rows=2, cols=4\), this guide has NM"
    with pytest.raises(ValueError, match=message):
        make(NM(1, 4)).load_state_dict(state)
    seen = make(None)
    seen.step(x, y)
    message = r"site 'w0': saved with 24 active of \(8, 12\), structure Tiles\(rows=2, cols=4\), "
    with pytest.raises(ValueError, match=message + "this guide has 24 active .*structure None"):
        seen.load_state_dict(state)


def test_damaged_tiles_are_told():
    svi = make(Tiles(2, 4))
    svi.step(x, y)
    state = svi.guide.state_dict()
    size = len(svi.guide.active_sets["w0"])
    state["indices"][:size] = torch.arange(0, 2 * size, 2)
    with pytest.raises(RuntimeError, match="whole tiles of 2 x 4"):
        make(Tiles(2, 4)).guide.load_state_dict(state)


def test_tables_without_structures_are_as_they_were():
    svi = make(None)
    svi.step(x, y)
    table = svi.guide.get_extra_state()
    assert table["version"] == 1
    assert all("structure" not in row for row in table["sites"])


@pytest.mark.parametrize("structure", [Tiles(2, 4), NM(1, 4)])
def test_warm_start_takes_the_best_units(structure):
    svi = make(structure)
    values = {"w0": torch.randn(8, 12), "w1": torch.randn(4, 8)}
    svi.guide.warm_start(values, x, y)
    for name, value in values.items():
        active = svi.guide.active_sets[name]
        assert active.indices.equal(structure.best(value.abs(), len(active)))
        assert torch.equal(svi.guide.median()[name][active.mask], value[active.mask])


@pytest.mark.parametrize("structure", [Tiles(2, 4), NM(1, 4)])
def test_warm_start_keeps_its_own_where_the_source_has_fewer(structure):
    svi = make(structure)
    svi.guide.set_up(x, y)
    own = {name: active.indices for name, active in svi.guide.active_sets.items()}
    value = torch.zeros(8, 12)
    value[4, 5] = 1.0
    svi.guide.warm_start({"w0": value}, x, y)
    active = svi.guide.active_sets["w0"]
    assert active.mask[4, 5]
    moved = int(torch.isin(active.indices, own["w0"], invert=True).sum())
    assert moved <= math.prod(active.tile)
    torch.testing.assert_close(svi.guide.median()["w0"], value)


@pytest.mark.parametrize("density", [0.8, {"w0": 0.8, "w1": 0.8}])
def test_tiles_that_come_to_all_of_a_site(density, tmp_path):
    """Such a site is dense: it has no structure, here or in a file."""
    structure = Tiles(None, None)
    svi = make(structure, density=density)
    svi.step(x, y)
    assert all(active.is_full for active in svi.guide.active_sets.values())
    svi.save(tmp_path / "a.ckpt")
    svi.export(tmp_path / "a.posterior")
    expected = svi.step(x, y)
    pyro.clear_param_store()
    load_posterior(tmp_path / "a.posterior", net)(x)
    again = make(structure, density=density)
    again.load(tmp_path / "a.ckpt")
    assert again.step(x, y) == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"structure": Tiles(3, 4)},
            r"site 'w0' cannot have the structure Tiles\(rows=3, cols=4\): its shape \(8, 12\), a "
            "matrix of 8 x 12, cannot be cut into tiles of 3 x 4",
        ),
        ({"structure": NM(1, 5), "density": 0.2}, "has rows that cannot be cut into groups of 5"),
        (
            {"structure": NM(1, 4), "density": 0.2},
            r"site 'w0' cannot have the structure NM\(n=1, m=4\): .* has density 0.25, not 0.2",
        ),
        ({"structure": Tiles(8, 12), "density": 0.2}, "get 0 active .*: use at least 1 there"),
        ({"structure": {"w2": Rows()}}, r"names \['w2'\], but the sparse sites are \['w0', 'w1'\]"),
        ({"structure": {"b0": Rows()}}, r"names \['b0'\], but the sparse sites are"),
        ({"structure": "4x4"}, r"expected a structure such as Tiles\(4, 4\), or .* got '4x4'"),
        ({"structure": {"w0": 4}}, "got {'w0': 4}"),
    ],
)
def test_what_does_not_fit_is_told(options, match):
    with pytest.raises(ValueError, match=match):
        AutoSparseNormal(net, **{"density": 0.25, **options})(x, y)


@pytest.mark.parametrize("option", [{"allocation": "global"}, {"addition": "evidence"}])
def test_what_exchanges_single_coordinates_refuses_a_structure(option):
    with pytest.raises(ValueError, match="exchange single coordinates: leave out structure="):
        make(Tiles(2, 4), **option)


def test_with_a_policy():
    guide = AutoSparseNormal(net, density=Uniform(0.25), structure=Tiles(2, 4))
    guide(x, y)
    assert len(guide.active_sets["w0"].units) == 3


def test_filters_of_a_convolution():
    def model(images, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 6, 3, 3]).to_event(4))
        mean = F.conv2d(images, w).mean((1, 2, 3))
        with pyro.plate("data", len(images)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    images, y = torch.randn(5, 6, 8, 8), torch.randn(5)
    guide = AutoSparseNormal(model, density=0.25, structure=Tiles(1, 9))
    optim = pyro.optim.Adam({"lr": 1e-2})
    svi = SSVI(model, guide, optim, Trace_ELBO(), schedule=ConstantSchedule(every=2))
    with forbid_materialise():
        for _ in range(5):
            svi.step(images, y)
    filters = guide.active_sets["w"].mask.flatten(2)
    assert (filters.all(-1) == filters.any(-1)).all()
    assert filters.any(-1).sum() == 6


def test_candidates_of_tiles_are_read_in_any_order(monkeypatch):
    """As several processes do with proposed tiles."""
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", 40)
    active = Tiles(2, 3).random((6, 9), 18)
    matrix = torch.randn(6, 9)
    units = torch.tensor([7, 0, 4])
    places, order = active.unit_coordinates(units).flatten().sort()
    read = read_at(active, places, lambda a, b: matrix[a:b])
    found = torch.empty(18).scatter_(0, order, read).view(3, 6)
    assert torch.equal(found, tile_view(active, matrix)[units])
