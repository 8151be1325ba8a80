import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_active_set import active_sets

from pyro_ssvi import ActiveSet
from pyro_ssvi.active_set import draw_distinct
from pyro_ssvi.allocation import as_they_are
from pyro_ssvi.exchange import carry, swap, top_inactive, weakest


@given(active_sets(), st.data())
def test_swap_keeps_a_sorted_set_of_k(active, data):
    n = data.draw(st.integers(0, min(len(active), active.numel() - len(active))))
    removed = torch.randperm(len(active))[:n]
    added = draw_distinct(active.numel(), n, exclude=active.indices)[torch.randperm(n)]
    move = swap(active, removed, added)

    after = ActiveSet(move.indices, active.shape)  # checks that it is a sorted set
    assert len(after) == len(active)
    expected = set(active.indices.tolist()) - set(active.indices[removed].tolist())
    assert set(move.indices.tolist()) == expected | set(added.tolist())

    kept = move.source >= 0
    assert torch.equal(active.indices[move.source[kept]], move.indices[kept])
    assert set(move.indices[~kept].tolist()) == set(added.tolist())


@given(active_sets(), st.data())
def test_carry_follows_the_coordinate_bit_by_bit(active, data):
    n = data.draw(st.integers(0, min(len(active), active.numel() - len(active))))
    added = draw_distinct(active.numel(), n, exclude=active.indices)
    move = swap(active, torch.randperm(len(active))[:n], added)
    tensor = torch.randn(len(active))
    before = active.scatter(tensor).flatten()
    before[added] = 7.0
    carry(tensor, move.source, torch.full_like(tensor, 7.0))
    assert torch.equal(tensor, before[move.indices])


def test_swap_may_change_the_number():
    active = ActiveSet(torch.tensor([0, 2, 3]), (5,))
    move = swap(active, torch.tensor([0, 1]), torch.tensor([1]))
    assert move.indices.tolist() == [1, 3]
    assert move.source.tolist() == [-1, 2]


def test_weakest():
    active = ActiveSet(torch.tensor([1, 2, 4, 5]), (6,))
    assert set(weakest(active, torch.tensor([3.0, 1.0, 2.0, 0.5]), 2).tolist()) == {1, 3}


@given(active_sets(), st.integers(1, 400), st.data())
def test_top_inactive_equals_a_full_sort(active, block_bytes, data):
    n = data.draw(st.integers(0, active.numel() - len(active)))
    scores = torch.randperm(active.numel()).float()  # no ties
    matrix = scores.reshape(active.matrix_shape)
    m = data.draw(st.integers(0, n))
    rounds = [(n, as_they_are), (m, torch.neg)]
    with patch("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes):
        (found, best), (last, _) = top_inactive(active, rounds, lambda a, b: matrix[a:b])
    inactive = (~active.mask).flatten().nonzero().squeeze(-1)
    order = inactive[scores[inactive].argsort(descending=True)]
    assert set(found.tolist()) == set(order[:n].tolist())
    assert set(last.tolist()) == set(order[len(order) - m :].tolist())
    assert torch.equal(best, scores[found])
    assert torch.equal(matrix.flatten(), scores)  # what the block gave is left alone


KINDS = {
    "distinct": lambda n: torch.randperm(n).float(),
    "ties": lambda n: (3 * torch.randn(n)).round(),
    "mostly 0": lambda n: torch.rand(n) * (torch.rand(n) < 0.1),
    "NaN": lambda n: torch.randn(n).masked_fill(torch.rand(n) < 0.01, math.nan),
    "infinite": lambda n: torch.randn(n).masked_fill(torch.rand(n) < 0.01, math.inf),
    "half": lambda n: torch.randn(n).half(),
    "rising": lambda n: torch.randn(n).sort().values,
}


exactly = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 40, 900])
@patch("pyro_ssvi.exchange.BLOCK_BYTES", 4 * 50 * 3)  # three rows
def test_leaders_of_many_blocks(kind, n):
    """Those that fall behind are dropped on the way, and none that leads."""
    active = ActiveSet.random((120, 50), 300)
    scores = KINDS[kind](6000)
    matrix, rounds = scores.view(120, 50), [(n, as_they_are), (10, torch.neg)]
    found = top_inactive(active, rounds, lambda a, b: matrix[a:b])
    for (index, best), (m, compare) in zip(found, rounds, strict=True):
        compared = compare(scores)
        expected = compared.index_fill(0, active.indices, -math.inf).topk(m).values
        exactly(best, compared[index])
        exactly(best.sort(descending=True).values, expected)
        assert len(index.unique()) == m
        assert not torch.isin(index, active.indices).any()


@pytest.mark.parametrize("block_bytes", [16, 2**20])
def test_fewer_than_n_have_a_finite_score(monkeypatch, block_bytes):
    monkeypatch.setattr("pyro_ssvi.exchange.BLOCK_BYTES", block_bytes)
    active = ActiveSet(torch.arange(9), (4, 4))
    scores = torch.full((4, 4), -math.inf)
    scores.view(-1)[9:13] = torch.arange(4.0)
    ((index, score),) = top_inactive(active, [(7, as_they_are)], lambda a, b: scores[a:b])
    assert sorted(index[score > -math.inf].tolist()) == [9, 10, 11, 12]
