import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_ssvi import ActiveSet, autograd, kernels
from pyro_ssvi.kernels import csr

BACKENDS = list(kernels.BACKENDS)
LAYOUTS = {
    "contiguous": torch.randn,
    "transposed": lambda n, batch: torch.randn(batch, n).t(),
    "strided": lambda n, batch: torch.randn(2 * n, 3 * batch)[::2, ::3],
    "columns": lambda n, batch: torch.randn(n, batch + 5)[:, 2:-3],
    "expanded": lambda n, batch: torch.randn(batch).expand(n, batch),
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    batch=st.sampled_from([1, 7, 32]),
    share=st.floats(0, 1),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
)
def test_product_equals_dense(backend, rows, cols, batch, share, transposed, dtype, strided):
    active = ActiveSet.random((rows, cols), max(1, int(share * rows * cols)))
    values = torch.randn(len(active), dtype=dtype, requires_grad=True)
    inner, outer = (rows, cols) if transposed else (cols, rows)
    x = torch.randn(batch, inner, dtype=dtype).t() if strided else None
    x = torch.randn(inner, batch, dtype=dtype) if x is None else x
    x = x.detach().requires_grad_()
    g = torch.randn(outer, batch, dtype=dtype)

    with kernels.use(backend):
        out = autograd.matmul(values, active, x, transposed)
        grads = torch.autograd.grad(out, (values, x), g)

    matrix = active.scatter(values)
    expected = (matrix.t() if transposed else matrix) @ x
    expected_grads = torch.autograd.grad(expected, (values, x), g)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(backend, transposed):
    active = ActiveSet(torch.tensor([0, 2, 7, 8, 14]), (5, 3))  # row 3 is empty
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5 if transposed else 3, 4, dtype=torch.float64, requires_grad=True)
    with kernels.use(backend):
        assert torch.autograd.gradcheck(
            lambda v, x: autograd.matmul(v, active, x, transposed), (values, x)
        )


def test_sampled_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(csr, "_GATHERED_BYTES", 4 * 6 * 2)  # two entries at a time
    active = ActiveSet.random((5, 4), 9)
    g, x = torch.randn(5, 6), torch.randn(4, 6)
    found = csr.sampled(active, g, x)
    torch.testing.assert_close(found, active.gather(g @ x.t()))


def test_use_is_a_setting_and_a_context():
    active, values, x = ActiveSet.full((2, 2)), torch.ones(4), torch.ones(2, 1)
    with kernels.use("dense"):
        with kernels.use("torch"):
            assert kernels._backend(active, x).__name__ == "pyro_ssvi.kernels.csr"
        assert kernels._backend(active, x).__name__ == "pyro_ssvi.kernels.dense"
    assert kernels._choice == "auto"
    kernels.use("dense")
    try:
        assert kernels._backend(active, x).__name__ == "pyro_ssvi.kernels.dense"
        torch.testing.assert_close(kernels.matmul(active, values, x), torch.full((2, 1), 2.0))
    finally:
        kernels.use("auto")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cublas'.*'auto', 'numba', 'torch', 'dense'"):
        kernels.use("cublas")
