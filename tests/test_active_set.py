import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ssvi import ActiveSet
from pyro_ssvi.active_set import draw_distinct

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def active_sets(draw):
    shape = draw(shapes)
    numel = int(torch.Size(shape).numel())
    return ActiveSet.random(shape, draw(st.integers(1, numel)))


@given(active_sets())
def test_is_a_sorted_set_of_positions(active):
    assert (active.indices.diff() > 0).all()
    assert active.mask.shape == active.shape
    assert torch.equal(active.mask.flatten().nonzero().squeeze(-1), active.indices)
    assert active.density == len(active) / active.numel()
    assert active.is_full == bool(active.mask.all())


@given(active_sets(), st.lists(st.integers(1, 3), max_size=2))
def test_gather_undoes_scatter(active, batch):
    values = torch.randn(*batch, len(active))
    dense = active.scatter(values)
    assert dense.shape == (*batch, *active.shape)
    assert (dense[..., ~active.mask] == 0).all()
    assert torch.equal(active.gather(dense), values)


@given(active_sets())
def test_matrix_views_hold_the_same_entries(active):
    values = torch.arange(1.0, len(active) + 1)
    matrix = active.scatter(values).reshape(active.matrix_shape)
    for csr, expected in ((active.csr, matrix), (active.csr_t, matrix.t())):
        ordered = values if csr.perm is None else values[csr.perm]
        row = torch.repeat_interleave(torch.arange(csr.shape[0]), csr.crow.diff())
        found = torch.zeros(csr.shape).index_put((row, csr.col), ordered)
        assert torch.equal(found, expected)


@given(active_sets(), st.data())
def test_batch_index(active, data):
    dims = data.draw(st.integers(0, len(active.shape)))
    batch = active.shape[:dims]
    position = torch.arange(batch.numel()).reshape(*batch, *(1 for _ in active.shape[dims:]))
    expected = active.gather(position.expand(active.shape).contiguous())
    assert torch.equal(active.batch_index(dims), expected)


def test_full_makes_no_indices_until_asked():
    active = ActiveSet.full((100_000, 100_000))
    assert active.is_full
    assert len(active) == active.numel() == 10**10
    assert active.density == 1.0
    small = ActiveSet.full((2, 3))
    assert torch.equal(small.indices, torch.arange(6))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([1, 0]), "sorted, unique"),
        (torch.tensor([1, 1]), "sorted, unique"),
        (torch.tensor([0, 6]), "sorted, unique"),
        (torch.tensor([-1, 2]), "sorted, unique"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.tensor([[0, 1]]), "1-d"),
        (torch.tensor([], dtype=torch.int64), "1 to 6"),
    ],
)
def test_refuses_what_is_not_a_set(indices, message):
    with pytest.raises(ValueError, match=message):
        ActiveSet(indices, (2, 3))


def test_copies_and_pickles_without_caches():
    active = ActiveSet.random((5, 4), 7)
    assert active.csr.col.shape == (7,)
    for twin in (copy.deepcopy(active), pickle.loads(pickle.dumps(active))):
        assert twin.same(active)
        assert "csr" not in twin.__dict__
    assert not active.same(ActiveSet.full((5, 4)))


@given(st.integers(1, 60), st.data())
def test_draw_distinct(n, data):
    k = data.draw(st.integers(0, n))
    exclude = draw_distinct(n, data.draw(st.integers(0, n - k)))
    drawn = draw_distinct(n, k, exclude)
    assert len(drawn) == k
    assert (drawn.diff() > 0).all()
    assert not torch.isin(drawn, exclude).any()
    assert ((drawn >= 0) & (drawn < n)).all()


@pytest.mark.parametrize(("n", "k"), [(20, 2), (20, 15)])
def test_draw_distinct_is_uniform(n, k):
    counts = torch.zeros(n)
    rounds = 4000
    for _ in range(rounds):
        counts[draw_distinct(n, k)] += 1
    share = k / n
    deviation = (counts / rounds - share) / (share * (1 - share) / rounds) ** 0.5
    assert deviation.abs().max() < 4.5


def test_draw_distinct_refuses_too_many():
    with pytest.raises(ValueError, match="cannot draw 3"):
        draw_distinct(4, 3, exclude=torch.tensor([0, 1]))


def test_it_is_freed_with_its_last_use():
    """An exchange makes new ones: memory must not wait for the garbage collector."""
    active = ActiveSet(torch.tensor([1, 4]), (2, 3))
    assert active.units.csr is not None
    assert active.csr_t is not None
    alive = weakref.ref(active)
    del active
    assert alive() is None
