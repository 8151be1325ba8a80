"""Whole rows and columns: products with a smaller dense matrix."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceMeanField_ELBO
from test_kernels import LAYOUTS

from pyro_ssvi import (
    SSVI,
    ActiveSet,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    SparseTensor,
    autograd,
    forbid_materialise,
    kernels,
)
from pyro_ssvi.kernels import packed
from pyro_ssvi.structures import Columns, Rows, Tiles

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def whole_lines(draw):
    """An active set of whole rows or columns, of a site with two or three dimensions."""
    structure = draw(st.sampled_from([Rows(), Columns(), Tiles(2, None), Tiles(None, 3)]))
    n = draw(st.integers(1, 7)) * (structure.rows or 1)
    m = draw(st.integers(1, 7)) * (structure.cols or 1)
    shape = draw(st.sampled_from([(n, m), (n, m, 2), (n, m, 1)]))
    size = torch.Size(structure.tile(shape)).numel()
    units = draw(st.integers(1, torch.Size(shape).numel() // size))
    return structure.random(shape, units * size)


@given(whole_lines())
def test_lines_are_those_that_are_active(active):
    dim, numbers = active.lines
    matrix = active.mask.reshape(active.matrix_shape)
    assert torch.equal(matrix.all(1 - dim).nonzero().squeeze(-1), numbers)
    assert torch.equal(matrix.any(1 - dim), matrix.all(1 - dim))


@settings(deadline=None)
@given(
    active=whole_lines(),
    batch=st.sampled_from([0, 1, 5, 40]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_product_equals_dense(active, batch, dtype, transposed, layout):
    inner, outer = active.matrix_shape if transposed else active.matrix_shape[::-1]
    values = torch.randn(2 * len(active), dtype=dtype)[::2].requires_grad_()
    x, g = (LAYOUTS[layout](n, batch).to(dtype) for n in (inner, outer))
    x.requires_grad_()
    assert kernels._backend(active, x) is packed
    out = autograd.matmul(values, active, x, transposed)
    grads = torch.autograd.grad(out, (values, x), g)

    matrix = active.scatter(values.double()).reshape(active.matrix_shape)
    expected = (matrix.t() if transposed else matrix) @ x.double()
    expected_grads = torch.autograd.grad(expected, (values, x), g.double())
    close = {"atol": 16 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, expected.to(dtype), **close)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **close)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("structure", [Rows(), Columns()])
def test_gradcheck(structure, transposed):
    active = structure.random((4, 6), 12)
    values = torch.randn(12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4 if transposed else 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, x: autograd.matmul(v, active, x, transposed), (values, x)
    )


@pytest.mark.parametrize("structure", [Rows(), Columns()])
def test_what_is_inactive_is_not_read(structure):
    active = structure.random((8, 8), 16)
    dim, numbers = active.lines
    inactive = torch.ones(8, dtype=torch.bool).index_fill(0, numbers, False)
    x, values = torch.randn(8, 3), torch.randn(16)
    x[inactive] = torch.nan
    assert packed.matmul(active, values, x, dim == 0).isfinite().all()
    if dim == 0:
        assert packed.sampled(active, x, torch.randn(8, 3)).isfinite().all()
    else:
        assert packed.sampled(active, torch.randn(8, 3), x).isfinite().all()


def test_only_auto_takes_them_for_smaller_matrices():
    x = torch.randn(64, 16)

    def chosen(active):
        return kernels._backend(active, x).__name__.split(".")[-1]

    for structure in (Rows(), Columns(), Tiles(8, None), Tiles(None, 8)):
        for density in (0.125, 0.5, 1.0):
            active = structure.random((64, 64), int(density * 64 * 64))
            assert chosen(active) == "packed"
        with kernels.use("torch"):
            assert chosen(active) == "csr"
        with kernels.use("dense"):
            assert chosen(active) == "dense"
    assert chosen(Tiles(8, 8).random((64, 64), 64)) != "packed"
    assert chosen(ActiveSet.random((64, 64), 64)) != "packed"
    assert chosen(ActiveSet.random((1, 64), 16)) == "packed"  # single columns are whole ones


@pytest.mark.parametrize("structure", [Rows(), Columns()])
def test_both_sides_and_transposes(structure):
    active = structure.random((4, 6), 12)
    w = SparseTensor(torch.randn(12), active)
    dense, x, z = w.to_dense(), torch.randn(2, 3, 6), torch.randn(6, 3)
    with forbid_materialise():
        found = [F.linear(x, w), w @ z, z.t() @ w.t(), w.T @ z[:4], w @ z[:, 0]]
    expected = [F.linear(x, dense), dense @ z, z.t() @ dense.t(), dense.T @ z[:4], dense @ z[:, 0]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def net(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([8, 12]).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([4, 8]).to_event(2))
    with pyro.plate("data", len(x)):
        logits = F.linear(F.linear(x, w0).tanh(), w1)
        return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("structure", [Rows(), Columns()])
@pytest.mark.parametrize(
    ("kind", "local"),
    [
        (AutoSparseNormal, False),
        (AutoSparseNormal, True),
        (AutoSparseLowRankMultivariateNormal, False),
    ],
    ids=["independent", "local", "low-rank"],
)
def test_training_is_that_with_dense_products(structure, kind, local):
    x, y = torch.randn(20, 12), torch.randint(4, (20,))

    def losses(backend):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = kind(net, density=0.25, structure=structure)
        optim = pyro.optim.Adam({"lr": 1e-2})
        schedule = ConstantSchedule(every=3, fraction=0.5)
        loss = TraceMeanField_ELBO()
        svi = SSVI(net, guide, optim, loss, schedule=schedule, local_reparam=local)
        with kernels.use(backend), forbid_materialise():
            return torch.tensor([svi.step(x, y) for _ in range(8)])

    torch.testing.assert_close(losses("auto"), losses("dense"), rtol=1e-4, atol=1e-3)
