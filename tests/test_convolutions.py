"""Sparse convolutions against torch's dense ones, for each back end."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyro_ssvi import ActiveSet, SparseTensor, autograd, kernels
from pyro_ssvi.gradient_record import GradientRecord
from pyro_ssvi.patches import Patches

BACKENDS = list(kernels.CONVOLUTIONS)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c, n = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    size = (draw(st.integers(1, 9)), draw(st.sampled_from([1, 4, 7, 15, 16, 19, 33])))
    patches = Patches(
        draw(pairs(1, 3)),
        draw(pairs(1, 3)),
        tuple(draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))),
        draw(pairs(1, 2)),
    )
    assume(min(patches.out_size(size)) >= 1)
    return (draw(st.integers(1, 5)), c, *size), n, groups, patches


def problem(convolution, share=0.4, dtype=torch.float64):
    shape, n, groups, patches = convolution
    site = (n, shape[1] // groups, *patches.kernel)
    active = ActiveSet.random(site, max(1, round(share * math.prod(site))))
    values = torch.randn(len(active), dtype=dtype, requires_grad=True)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    return active, values, x


def dense(weight, x, patches, groups):
    x = F.pad(x, patches.padding)
    return F.conv2d(x, weight, None, patches.stride, 0, patches.dilation, groups)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None)
@given(convolutions(), st.sampled_from([0.0, 0.4, 1.0]), st.booleans())
def test_value_gradients_and_record_equal_dense(backend, convolution, share, strided):
    *_, groups, patches = convolution
    active, values, x = problem(convolution, share)
    inputs = x.transpose(2, 3).contiguous().transpose(2, 3) if strided else x
    with kernels.use(backend), GradientRecord() as record:
        out = autograd.conv(values, active, inputs, patches, groups)
        g = torch.randn_like(out)
        grads = torch.autograd.grad(out, (values, x), g)
    weight = active.scatter(values.detach()).requires_grad_()
    expected = dense(weight, x, patches, groups)
    grad_weight, grad_x = torch.autograd.grad(expected, (weight, x), g)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads[0], active.gather(grad_weight))
    torch.testing.assert_close(grads[1], grad_x)
    recorded = torch.cat([record.block(active, i, i + 1) for i in range(active.shape[0])])
    torch.testing.assert_close(recorded.reshape(active.shape), grad_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 7, 32, 100])
@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_a_residual_net(dtype, batch, size, stride):
    patches = Patches((3, 3), (stride, stride), (1, 1, 1, 1), (1, 1))
    active, values, x = problem(((batch, 16, *size), 24, 1, patches), 0.05, dtype)
    results = []
    for backend in ("numba", "dense"):
        with kernels.use(backend):
            out = autograd.conv(values, active, x, patches)
        results.append([out, *torch.autograd.grad(out.square().sum(), (values, x))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    patches = Patches((2, 3), (2, 1), (1, 0, 2, 1), (1, 2))
    active, values, x = problem(((2, 4, 5, 6), 6, 2, patches))
    with kernels.use(backend):
        assert torch.autograd.gradcheck(
            lambda v, x: autograd.conv(v, active, x, patches, 2), (values, x)
        )


def test_an_output_channel_without_weights():
    patches = Patches((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    active = ActiveSet(torch.tensor([40]), (4, 2, 3, 3))
    x = torch.randn(2, 2, 20, 20)
    for backend in BACKENDS:
        with kernels.use(backend):
            out = autograd.conv(torch.ones(1), active, x, patches)
        assert (out[:, [0, 1, 3]] == 0).all()
        assert (out[:, 2] != 0).any()


def test_auto_takes_the_measured_back_end():
    x = torch.zeros(1)
    sparse, full = ActiveSet.random((10, 10, 3, 3), 45), ActiveSet.full((2, 2, 3, 3))
    assert kernels._convolution(sparse, x).__name__.endswith("numba_conv")
    assert kernels._convolution(full, x).__name__.endswith("dense")
    with kernels.use("torch"):
        assert kernels._convolution(full, x).__name__.endswith("im2col")


@pytest.mark.parametrize("backend", kernels.CONVOLUTIONS)
def test_an_empty_batch(backend):
    active = ActiveSet.random((4, 3, 3, 3), 20)
    values = torch.randn(20, requires_grad=True)
    x = torch.randn(0, 3, 5, 5, requires_grad=True)
    with kernels.use(backend):
        out = F.conv2d(x, SparseTensor(values, active))
        assert out.shape == (0, 4, 3, 3)
        out.sum().backward()
    assert x.grad.shape == x.shape
    assert not values.grad.any()


def test_gradient_of_a_pointwise_kernel_in_another_memory_format():
    """torch's own has overwritten memory there: strided, of few channels, on channels_last."""
    x = torch.randn(16, 2, 1, 17).contiguous(memory_format=torch.channels_last)
    active = ActiveSet.random((2, 1, 1, 1), 1)
    options = {"stride": (1, 3), "padding": (2, 2), "groups": 2}
    for _ in range(20):
        values = torch.randn(1, requires_grad=True)
        with GradientRecord() as record:
            out = F.conv2d(x, SparseTensor(values, active), **options)
            g = torch.randn(out.shape)
            out.backward(g)
        weight = torch.zeros(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        F.conv2d(x.double().contiguous(), weight, **options).backward(g.double())
        found = record.block(active, 0, 2).double()
        torch.testing.assert_close(found, weight.grad.reshape(2, 1), rtol=1e-4, atol=1e-4)
