import concurrent.futures
import multiprocessing
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import LAYOUTS

from pyro_ssvi import ActiveSet

numba_cpu = pytest.importorskip("pyro_ssvi.kernels.numba_cpu", exc_type=ModuleNotFoundError)

BATCHES = [1, 7, 32, 128, 1000]
DTYPES = list(numba_cpu.DTYPES)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(rows=300, cols=200, k=3000, batch=128, dtype=torch.float32):
    active = ActiveSet.random((rows, cols), k)
    values = torch.randn(k, dtype=dtype)
    return active, values, torch.randn(cols, batch, dtype=dtype)


def assert_equals_dense(active, values, x, g):
    matrix = active.scatter(values)
    close = {"atol": 1e-3, "rtol": 1e-4} if x.dtype == torch.float32 else {}
    product = numba_cpu.matmul(active, values, x, False)
    torch.testing.assert_close(product, matrix @ x, **close)
    product_t = numba_cpu.matmul(active, values, g, True)
    torch.testing.assert_close(product_t, matrix.t() @ g, **close)
    gradient = numba_cpu.sampled(active, g, x)
    torch.testing.assert_close(gradient, active.gather(g @ x.t()), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("flops", [0, 10**12], ids=["threads", "serial"])
def test_equals_dense(dtype, batch, flops, monkeypatch):
    monkeypatch.setattr(numba_cpu, "_SERIAL_FLOPS", flops)
    active, values, x = problem(batch=batch, dtype=dtype)
    assert_equals_dense(active, values, x, torch.randn(300, batch, dtype=dtype))


@settings(deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    share=st.floats(0, 1),
    batch=st.integers(1, 150),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_any_shape_and_layout_equals_dense(rows, cols, share, batch, layout):
    active, values, _ = problem(rows, cols, max(1, int(share * rows * cols)))
    make = LAYOUTS[layout]
    assert_equals_dense(active, values, make(cols, batch), make(rows, batch))


def test_empty_rows_give_zero():
    active = ActiveSet(torch.tensor([5, 7]), (4, 4))
    x = torch.full((4, 8), torch.nan)
    x[[1, 3]] = 1.0
    found = numba_cpu.matmul(active, torch.ones(2), x, False)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 0.0, 0.0])[:, None].expand(4, 8))


def test_empty_batch():
    active = ActiveSet.random((3, 5), 4)
    g, x = torch.ones(3, 0), torch.ones(5, 0)
    assert numba_cpu.matmul(active, torch.ones(4), x, False).shape == (3, 0)
    assert numba_cpu.sampled(active, g, x).equal(torch.zeros(4))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_go_where_they_should(batch, bad):
    active, values, x = problem(20, 10, 100, batch)
    x[4, batch // 2] = bad
    g = torch.randn(20, batch)
    g[7, -1] = bad
    matrix, product = active.scatter(values), numba_cpu.matmul(active, values, x, False)
    reads = matrix[:, 4] != 0
    assert product[:, batch // 2].isfinite().equal(~reads)
    torch.testing.assert_close(product[reads, batch // 2], matrix[reads, 4] * bad, equal_nan=True)
    assert product.isfinite().sum() == product.numel() - reads.sum()
    row, col = active.indices // 10, active.indices % 10
    gradient = numba_cpu.sampled(active, g, x)
    assert gradient.isfinite().equal((row != 7) & (col != 4))


def test_what_does_not_fit_is_refused():
    active, values, x = problem()
    with pytest.raises(AssertionError):
        numba_cpu.matmul(active, values, x[1:], False)
    with pytest.raises(AssertionError):
        numba_cpu.matmul(active, values.double(), x, False)
    with pytest.raises(AssertionError):
        numba_cpu.sampled(active, torch.randn(300, 127), x)


def test_python_threads_may_call_at_once():
    active, values, x = problem()
    expected = active.scatter(values) @ x

    def call(_):
        return numba_cpu.matmul(active, values, x, False)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(200)):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_uses_as_many_threads_as_torch(monkeypatch):
    if numba_cpu._parallel is None:
        pytest.skip("no OpenMP here")
    asked, parallel = [], numba_cpu._parallel

    def spy(function, job, threads, flags):
        asked.append(threads)
        parallel(function, job, threads, flags)

    monkeypatch.setattr(numba_cpu, "_parallel", spy)
    active, values, x = problem()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_equals_dense(active, values, x, torch.randn(300, 128))
    assert asked == [2, 2, 2, 3, 3, 3]  # one thread needs no pool


def in_child(queue, active, values, x):
    torch.set_num_threads(2)
    queue.put(numba_cpu.matmul(active, values, x, False).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_child():
    active, values, x = problem()
    expected = numba_cpu.matmul(active, values, x, False)  # the pool's threads exist from here on
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue, active, values, x), daemon=True)
    child.start()
    try:
        end = time.monotonic() + 20
        while queue.empty() and child.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert not queue.empty(), "the child hangs or has died"
        assert queue.get() == expected.tolist()
    finally:
        child.kill()
        child.join()


def test_importing_the_package_does_not_import_numba():
    code = "import sys, pyro_ssvi; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
