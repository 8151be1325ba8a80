import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import LAYOUTS

from pyro_ssvi import ActiveSet, autograd, kernels
from pyro_ssvi.structures import NM, Columns, Rows, Tiles

numba_tiles = pytest.importorskip("pyro_ssvi.kernels.numba_tiles", exc_type=ModuleNotFoundError)
numba_cpu = pytest.importorskip("pyro_ssvi.kernels.numba_cpu", exc_type=ModuleNotFoundError)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(structure, shape, density=0.3):
    size = torch.Size(structure.tile(shape)).numel()
    least = size / torch.Size(shape).numel()
    return structure.random(shape, structure.count(shape, max(density, least)))


def assert_equals_dense(active, x, g):
    values = torch.randn(len(active), dtype=x.dtype)
    matrix = active.scatter(values).reshape(active.matrix_shape)
    close = {"atol": 1e-3, "rtol": 1e-4} if x.dtype == torch.float32 else {}
    found = numba_tiles.matmul(active, values, x, False)
    torch.testing.assert_close(found, matrix @ x, **close)
    found = numba_tiles.matmul(active, values, g, True)
    torch.testing.assert_close(found, matrix.t() @ g, **close)
    gradient = numba_tiles.sampled(active, g, x)
    expected = active.gather((g @ x.t()).reshape(active.shape))
    torch.testing.assert_close(gradient, expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flops", [0, 10**12], ids=["threads", "serial"])
@pytest.mark.parametrize(
    "tile", [(4, 4), (8, 8), (4, 1), (1, 4), (16, 1), (2, 3), (5, 7), (1, 9), (None, 1), (1, None)]
)
def test_equals_dense(tile, dtype, flops, monkeypatch):
    monkeypatch.setattr(numba_cpu, "_SERIAL_FLOPS", flops)
    rows, cols = (n or 1 for n in tile)
    active = random(Tiles(*tile), (rows * 16, cols * 24))
    n, m = active.matrix_shape
    for batch in (1, 7, 128, 200):
        x, g = (torch.randn(size, batch, dtype=dtype) for size in (m, n))
        assert_equals_dense(active, x, g)


def test_a_large_batch():
    active = random(Tiles(4, 4), (16, 16))
    for batch in (300, 3001):  # which is divided, and in more than one chunk
        assert_equals_dense(active, torch.randn(16, batch), torch.randn(16, batch))


def test_panels():
    active = random(Tiles(4, 4), (400, 80))
    assert len(active) > 16 * 80
    assert_equals_dense(active, torch.randn(80, 128), torch.randn(400, 128))


@settings(deadline=None, max_examples=40)
@given(
    structure=st.sampled_from([Tiles(4, 4), Tiles(2, 3), Tiles(6, 1), Rows(), Columns()]),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    density=st.floats(0, 1),
    batch=st.integers(1, 150),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_any_shape_and_layout_equals_dense(structure, grid, density, batch, layout):
    shape = grid[0] * (structure.rows or 1), grid[1] * (structure.cols or 1)
    x, g = (LAYOUTS[layout](n, batch) for n in reversed(shape))
    assert_equals_dense(random(structure, shape, density), x, g)


def test_a_site_of_more_dimensions():
    active = random(Tiles(2, 9), (8, 4, 3, 3))
    assert_equals_dense(active, torch.randn(36, 16), torch.randn(8, 16))


def test_empty_rows_give_zero():
    active = ActiveSet(torch.tensor([18, 19, 26, 27]), (4, 8), Tiles(2, 2))
    x = torch.full((8, 8), torch.nan)
    x[[2, 3]] = 1.0
    found = numba_tiles.matmul(active, torch.ones(4), x, False)
    expected = torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None].expand(4, 8)
    torch.testing.assert_close(found, expected)


def test_empty_batch():
    active = random(Tiles(2, 2), (4, 8))
    g, x = torch.ones(4, 0), torch.ones(8, 0)
    assert numba_tiles.matmul(active, torch.ones(len(active)), x, False).shape == (4, 0)
    assert numba_tiles.sampled(active, g, x).equal(torch.zeros(len(active)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_go_where_they_should(bad):
    active = random(Tiles(2, 2), (20, 10))
    values, x, g = torch.randn(len(active)), torch.randn(10, 37), torch.randn(20, 37)
    x[4, 20] = bad
    g[7, -1] = bad
    matrix = active.scatter(values)
    reads = active.mask[:, 4]
    product = numba_tiles.matmul(active, values, x, False)
    assert product[:, 20].isfinite().equal(~reads)
    torch.testing.assert_close(product[reads, 20], matrix[reads, 4] * bad, equal_nan=True)
    assert product.isfinite().sum() == product.numel() - reads.sum()
    row, col = active.indices // 10, active.indices % 10
    gradient = numba_tiles.sampled(active, g, x)
    assert gradient.isfinite().equal((row != 7) & (col != 4))


def test_what_does_not_fit_is_refused():
    active = random(Tiles(2, 2), (20, 10))
    values, x = torch.randn(len(active)), torch.randn(10, 8)
    with pytest.raises(AssertionError):
        numba_tiles.matmul(active, values, x[1:], False)
    with pytest.raises(AssertionError):
        numba_tiles.matmul(active, values.double(), x, False)
    with pytest.raises(AssertionError):
        numba_tiles.sampled(active, torch.randn(20, 7), x)


@pytest.mark.parametrize("backend", list(kernels.BACKENDS))
@pytest.mark.parametrize("structure", [Tiles(2, 3), NM(1, 3)])
def test_gradcheck(backend, structure):
    active = random(structure, (4, 6), 1 / 3)
    values = torch.randn(len(active), dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    with kernels.use(backend):
        assert torch.autograd.gradcheck(lambda v, x: autograd.matmul(v, active, x), (values, x))


def test_tiles_have_kernels_of_their_own():
    x = torch.randn(64, 16)

    def chosen(structure, density):
        return kernels._backend(random(structure, (64, 64), density), x).__name__.split(".")[-1]

    assert chosen(Tiles(4, 4), 0.1) == "numba_tiles"
    assert chosen(Tiles(1, 1), 0.1) == "numba_cpu"
    assert chosen(NM(1, 8), 0.125) == "numba_cpu"
    assert chosen(Tiles(4, 4), 0.9) == "dense"
    with kernels.use("torch"):
        assert chosen(Tiles(4, 4), 0.1) == "csr"
