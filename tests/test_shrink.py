"""Perceptrons without the units that make no difference."""

import copy
import warnings
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyro_ssvi import AutoSparseNormal
from pyro_ssvi.nn import bayesianize, shrink
from pyro_ssvi.structures import Columns

ACTIVATIONS = [nn.ReLU(), nn.Sigmoid(), nn.ELU(), nn.Dropout(0.9), nn.Softplus()]


def perceptron(sizes, activation=None, bias=True):
    layers = []
    for n, m in zip(sizes[1:], sizes[:-1], strict=True):
        layers += [nn.Linear(m, n, bias=bias), activation or nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def linears(network):
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def zeroed(network, rows, columns):
    """Rows and columns of each layer's weight set to 0."""
    with torch.no_grad():
        for layer, off in zip(linears(network), rows, strict=True):
            layer.weight[off] = 0.0
        for layer, off in zip(linears(network), columns, strict=True):
            layer.weight[:, off] = 0.0
    return network


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_the_outputs_are_the_same_and_no_idle_unit_is_left(sizes, share, activation, bias):
    network = perceptron(sizes, activation, bias).double().eval()
    zeroed(
        network,
        [torch.rand(n) < share for n in sizes[1:]],
        [torch.rand(m) < share for m in sizes[:-1]],
    )
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(6, sizes[0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = shrink(network)
    torch.testing.assert_close(small(x), network(x))
    layers = linears(small)
    for first, second in pairwise(layers):
        if first.out_features > 1:
            assert (first.weight != 0).any(1).all()
            assert (second.weight != 0).any(0).all()
    for layer in layers:
        assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert (layers[0].in_features, layers[-1].out_features) == (sizes[0], sizes[-1])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_units_go_that_only_idle_ones_read_or_feed():
    network = perceptron([3, 4, 4, 4, 2])
    first, second, third, fourth = linears(network)
    with torch.no_grad():
        fourth.weight[:, 0] = 0.0  # unit 0 of the third layer is not read,
        third.weight[1:, 1] = 0.0  # so unit 1 of the second is not, either
        first.weight[2] = 0.0  # unit 2 of the first is constant,
        second.weight[3, [0, 1, 3]] = 0.0  # so unit 3 of the second is, too
    small = shrink(network)
    assert [layer.out_features for layer in linears(small)] == [3, 2, 3, 2]
    x = torch.randn(5, 3)
    torch.testing.assert_close(small(x), network(x))


def test_other_modules_stay_around_it():
    inner = nn.Sequential(nn.BatchNorm1d(3), *zeroed(perceptron([3, 4]), [[0]], [[]]))
    network = nn.Sequential(
        nn.Flatten(), inner, *zeroed(perceptron([4, 6, 2]), [[1], []], [[], [2]]), nn.Softmax(-1)
    ).eval()
    small = shrink(network.train())
    assert not any(module.training for module in small.modules())
    assert small[2].out_features == 4
    x = torch.randn(5, 3, 1)
    torch.testing.assert_close(small(x), network.eval()(x))


def test_what_it_cannot_shrink_is_told():
    for layer in (nn.BatchNorm1d(4), nn.PReLU(), nn.Softmax(-1), nn.Sequential(nn.ReLU())):
        with pytest.raises(
            ValueError, match=rf"between nn.Linear layers, got {type(layer).__name__}"
        ):
            shrink(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"expects an nn\.Sequential, got Linear"):
        shrink(nn.Linear(3, 4))

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(ValueError, match=r"expects an nn\.Sequential, got Residual"):
        shrink(Residual(nn.Linear(3, 4), nn.Linear(4, 3)))


def test_a_posterior_of_whole_columns_makes_a_small_network():
    net = bayesianize(perceptron([20, 40, 40, 3]))

    def model(x):
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits))

    x = torch.randn(7, 20)
    guide = AutoSparseNormal(
        pyro.poutine.block(model, hide=["obs"]),
        density=0.1,
        structure=Columns(),
        init_loc_fn=lambda site: torch.randn(site["fn"].shape()),
    )
    guide(x)
    plain = net.with_weights(guide.median())
    small = shrink(plain)
    assert [tuple(layer.weight.shape) for layer in linears(small)] == [(4, 20), (4, 4), (3, 4)]
    torch.testing.assert_close(small(x), plain(x))
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))
