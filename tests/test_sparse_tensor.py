"""Every way to use a sparse value against its dense twin, in value and in every gradient."""

import copy
import linecache
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from pyro import poutine

from pyro_ssvi import (
    ActiveSet,
    MaterialiseError,
    PerformanceWarning,
    SparseTensor,
    dense_fallbacks,
    forbid_materialise,
    kernels,
)
from pyro_ssvi.gradient_record import GradientRecord

OUT, IN, BATCH = 5, 4, 3

# name -> function of the weight W [OUT, IN], x [BATCH, IN], z [BATCH, OUT] and a bias [OUT]
PRODUCTS = {
    "linear": lambda W, x, z, b: F.linear(x, W),
    "linear with bias": lambda W, x, z, b: F.linear(x, W, b),
    "linear with one bias for all": lambda W, x, z, b: F.linear(x, W, b[:1]),
    "linear with a bias for each row": lambda W, x, z, b: F.linear(x, W, z),
    "linear by keyword": lambda W, x, z, b: F.linear(bias=b, weight=W, input=x),
    "linear, 1-d input": lambda W, x, z, b: F.linear(x[0], W, b),
    "linear, 3-d input": lambda W, x, z, b: F.linear(x.expand(2, BATCH, IN), W, b),
    "linear, strided input": lambda W, x, z, b: F.linear(x.t().contiguous().t(), W, b),
    "x @ W.T": lambda W, x, z, b: x @ W.T,
    "x @ W.mT": lambda W, x, z, b: x @ W.mT,
    "x @ W.t()": lambda W, x, z, b: x @ W.t(),
    "x @ torch.t(W)": lambda W, x, z, b: x @ torch.t(W),
    "x @ W.transpose(0, 1)": lambda W, x, z, b: x @ W.transpose(0, 1),
    "x @ torch.transpose(W, -1, 0)": lambda W, x, z, b: x @ torch.transpose(W, -1, 0),
    "x @ W.T.T.T": lambda W, x, z, b: x @ W.T.T.T,
    "z @ W": lambda W, x, z, b: z @ W,
    "1-d z @ W": lambda W, x, z, b: z[0] @ W,
    "3-d z @ W": lambda W, x, z, b: z.expand(2, BATCH, OUT) @ W,
    "W @ x.T": lambda W, x, z, b: W @ x.T,
    "W @ 1-d x": lambda W, x, z, b: W @ x[0],
    "W.T @ z.T": lambda W, x, z, b: W.T @ z.T,
    "torch.matmul(x, W.T)": lambda W, x, z, b: torch.matmul(x, W.T),
    "torch.matmul by keyword": lambda W, x, z, b: torch.matmul(input=x, other=W.T),
    "torch.matmul(W, x.T)": lambda W, x, z, b: torch.matmul(W, x.T),
    "x.matmul(W.T)": lambda W, x, z, b: x.matmul(W.T),
    "W.matmul(x.T)": lambda W, x, z, b: W.matmul(x.T),
    "torch.mm(x, W.T)": lambda W, x, z, b: torch.mm(x, W.T),
    "torch.mm by keyword": lambda W, x, z, b: torch.mm(input=x, mat2=W.T),
    "torch.mm(W, x.T)": lambda W, x, z, b: torch.mm(W, x.T),
    "z.mm(W)": lambda W, x, z, b: z.mm(W),
    "torch.mv(W, x)": lambda W, x, z, b: torch.mv(W, x[0]),
    "W.mv(x)": lambda W, x, z, b: W.mv(x[0]),
    "W.T.mv(z)": lambda W, x, z, b: W.T.mv(z[0]),
    "x.__rmatmul__": lambda W, x, z, b: W.__rmatmul__(z),
    "W used twice": lambda W, x, z, b: F.linear(x, W) @ W,
    "W.clone()": lambda W, x, z, b: F.linear(x, W.clone()),
    "W.contiguous()": lambda W, x, z, b: F.linear(x, W.contiguous()),
}

# The same of a vector v [IN].
VECTOR_PRODUCTS = {
    "x @ v": lambda v, x, z, b: x @ v,
    "1-d x @ v": lambda v, x, z, b: x[0] @ v,
    "3-d x @ v": lambda v, x, z, b: x.expand(2, BATCH, IN) @ v,
    "v @ x.T": lambda v, x, z, b: v @ x.T,
    "v @ 1-d x": lambda v, x, z, b: v @ x[0],
    "v @ 3-d x.T": lambda v, x, z, b: v @ x.T.expand(2, IN, BATCH),
    "torch.mv(x, v)": lambda v, x, z, b: torch.mv(x, v),
    "x.mv(v)": lambda v, x, z, b: x.mv(v),
    "torch.dot(x, v)": lambda v, x, z, b: torch.dot(x[0], v),
    "v.dot(x)": lambda v, x, z, b: v.dot(x[0]),
    "torch.matmul by keyword": lambda v, x, z, b: torch.matmul(input=x, other=v),
    "v used twice": lambda v, x, z, b: (x @ v).sin() @ x @ v,
}

# No rule: right all the same, through the dense tensor.
OTHERS = {
    "einsum": lambda W, x, z, b: torch.einsum("bi,oi->bo", x, W),
    "W + 1": lambda W, x, z, b: W + 1,
    "W * W": lambda W, x, z, b: W * W,
    "2 * W - W": lambda W, x, z, b: 2 * W - W,
    "x @ (W * 2).T": lambda W, x, z, b: x @ (W * 2).T,
    "exp": lambda W, x, z, b: W.exp(),
    "sum": lambda W, x, z, b: W.sum(0),
    "index": lambda W, x, z, b: W[1:3, [0, 2]],
    "embedding with max_norm": lambda W, x, z, b: F.embedding(
        torch.tensor([0, 4, 4]), W * 1.0, max_norm=1.0
    ),
    "cat": lambda W, x, z, b: torch.cat([W, x]),
    "cat of transposed": lambda W, x, z, b: torch.cat([W.T, z]),
    "stack": lambda W, x, z, b: torch.stack([W, W * 3]),
    "where": lambda W, x, z, b: torch.where(W > 0, W, W * 2),
    "permute": lambda W, x, z, b: W.permute(1, 0),
    "reshape": lambda W, x, z, b: W.reshape(-1),
    "as the input": lambda W, x, z, b: F.linear(W, x),
    "W @ W.T": lambda W, x, z, b: W @ W.T,
    "batched W @": lambda W, x, z, b: W @ x.T.expand(2, IN, BATCH),
    "bilinear": lambda W, x, z, b: F.bilinear(z, x, W.expand(2, OUT, IN)),
    "sparse bias": lambda W, x, z, b: F.linear(x, x[:1], W[0, :1]) + W.sum(),
    "to_dense": lambda W, x, z, b: W.to_dense(),
    "transposed to_dense": lambda W, x, z, b: W.T.to_dense(),
    "added to in place": lambda W, x, z, b: torch.ones(OUT, IN).add_(W),
}


def both(function, active):
    """Value and gradients with the sparse value, and with its dense twin."""
    inputs = {
        "values": torch.randn(len(active)),
        "x": torch.randn(BATCH, IN),
        "z": torch.randn(BATCH, OUT),
        "bias": torch.randn(OUT),
    }
    results = []
    for wrap in (SparseTensor, lambda values, active: active.scatter(values)):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        W = wrap(leaves["values"], active)
        out = function(W, leaves["x"], leaves["z"], leaves["bias"])
        weights = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), leaves.values(), allow_unused=True)
        results.append((out.detach(), dict(zip(leaves, grads, strict=True))))
    return results


def assert_equal_in_value_and_gradient(function, active):
    (out, grads), (expected, expected_grads) = both(function, active)
    torch.testing.assert_close(out, expected)
    assert grads["values"] is not None
    for name, expected_grad in expected_grads.items():
        if expected_grad is None:
            assert grads[name] is None, name
        else:
            torch.testing.assert_close(grads[name], expected_grad, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("k", [1, 6, OUT * IN])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_sparsely(name, k):
    with forbid_materialise():
        assert_equal_in_value_and_gradient(PRODUCTS[name], ActiveSet.random((OUT, IN), k))
    assert not dense_fallbacks


@pytest.mark.parametrize("k", [1, 2, IN])
@pytest.mark.parametrize("name", VECTOR_PRODUCTS)
def test_products_with_a_vector_run_sparsely(name, k):
    with forbid_materialise():
        assert_equal_in_value_and_gradient(VECTOR_PRODUCTS[name], ActiveSet.random((IN,), k))


@pytest.mark.parametrize("wrong", [lambda v, x: x.t() @ v, lambda v, x: v @ x])
def test_a_vector_of_another_length_gets_torch_s_own_error(wrong):
    v = SparseTensor(torch.randn(2), ActiveSet.random((IN,), 2))
    with pytest.raises(RuntimeError), pytest.warns(PerformanceWarning):
        wrong(v, torch.randn(BATCH, IN))


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_equals_dense(name):
    assert_equal_in_value_and_gradient(OTHERS[name], ActiveSet.random((OUT, IN), 7))


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_batched_values_are_never_mistaken_for_a_matrix():
    active = ActiveSet.random((OUT, IN), 7)
    values = torch.randn(2, 7)
    W = SparseTensor(values, active)
    assert W.shape == (2, OUT, IN)
    x = torch.randn(2, BATCH, IN)
    torch.testing.assert_close(x @ W.mT, x @ active.scatter(values).mT)


def test_an_unknown_function_is_counted_and_warned_of_once():
    W = SparseTensor(torch.randn(3), ActiveSet.random((OUT, IN), 3))
    with pytest.warns(PerformanceWarning, match="sin"):
        torch.sin(W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.sin(W)
    assert dense_fallbacks == {"torch.sin": 2}
    with forbid_materialise(), pytest.raises(MaterialiseError, match="sin"):
        torch.sin(W)


def test_the_warning_is_at_the_line_of_the_model():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x.cumsum(0)

    def model():
        return Layer()(SparseTensor(torch.randn(3), ActiveSet.random((OUT, IN), 3)))[0]

    with pytest.warns(PerformanceWarning, match="cumsum") as caught:
        poutine.trace(model).get_trace()
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip() == "return x.cumsum(0)"

    def network():
        layer = torch.nn.Conv3d(1, 1, 1)
        w = SparseTensor(torch.zeros(1), ActiveSet.random((1, 1, 1, 1, 1), 1))
        return torch.func.functional_call(layer, {"weight": w}, torch.zeros(1, 1, 2, 2, 2))

    with pytest.warns(PerformanceWarning, match="conv3d") as caught:
        poutine.trace(network).get_trace()
    assert linecache.getline(__file__, caught[0].lineno).strip().startswith("return torch.func")


IN_PLACE = {
    "add_": lambda W: W.add_(1),
    "zero_": lambda W: W.zero_(),
    "copy_": lambda W: W.copy_(torch.ones(OUT, IN)),
    "+=": lambda W: W.__iadd__(1),
    "*=": lambda W: W.__imul__(2),
    "W[0] = 1": lambda W: W.__setitem__(0, 1.0),
    "clamp_": lambda W: torch.clamp_(W, 0),
    "relu inplace": lambda W: F.relu(W, inplace=True),
    "out=": lambda W: torch.add(torch.ones(OUT, IN), 1, out=W),
    "requires_grad_": lambda W: W.requires_grad_(),
    "requires_grad =": lambda W: setattr(W, "requires_grad", True),
    "data =": lambda W: setattr(W, "data", torch.ones(OUT, IN)),
    "grad =": lambda W: setattr(W, "grad", torch.ones(OUT, IN)),
    "register_hook": lambda W: W.register_hook(print),
    "retain_grad": lambda W: W.retain_grad(),
    "init.normal_": lambda W: torch.nn.init.normal_(W),
    "by keyword": lambda W: torch.add(input=torch.ones(OUT, IN), other=1, out=W),
    "T then add_": lambda W: W.T.add_(1),
    "swapped =": lambda W: torch.relu_(input=W),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_functions_are_refused(name):
    W = SparseTensor(torch.randn(3, requires_grad=True), ActiveSet.random((OUT, IN), 3))
    before = W.values.clone()
    with pytest.raises(RuntimeError, match=r"sparse value"):
        IN_PLACE[name](W)
    assert torch.equal(W.values, before)


class Scaled(torch.autograd.Function):
    """As users write them; apply() bypasses torch's function protocol."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


@pytest.mark.parametrize(
    "spelling", [lambda W, x, z, b: Scaled.apply(z, W), lambda W, x, z, b: Scaled.apply(x, W.T)]
)
def test_autograd_functions_of_the_user_keep_the_gradient(spelling):
    assert_equal_in_value_and_gradient(spelling, ActiveSet.random((OUT, IN), 7))


def test_what_bypasses_autograd_raises():
    W = SparseTensor(torch.randn(3), ActiveSet.random((OUT, IN), 3))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="to_dense"):
        torch.sin(W)


def test_metadata_needs_no_numbers():
    W = SparseTensor(torch.randn(3, dtype=torch.float64), ActiveSet.random((OUT, IN), 3))
    with forbid_materialise():
        assert isinstance(W, torch.Tensor)
        assert W.shape == W.size() == (OUT, IN)
        assert (W.ndim, W.dim(), W.numel(), len(W), W.size(1)) == (2, 2, OUT * IN, OUT, IN)
        assert W.dtype == torch.float64
        assert W.device == torch.device("cpu")
        assert W.layout == torch.strided
        assert W.is_floating_point()
        assert not any([W.is_sparse, W.requires_grad, W.is_cuda])
        assert {W: 1}[W] == 1
        assert "active=3" in repr(W)
        assert f"{W}" == repr(W)
        assert W.T.shape == (IN, OUT)
        assert W.grad is None
    assert SparseTensor(W.values.requires_grad_(), W.active).requires_grad


def test_detach_clone_to_deepcopy_and_pickle_stay_sparse():
    W = SparseTensor(torch.randn(3, requires_grad=True), ActiveSet.random((OUT, IN), 3)).T
    with forbid_materialise():
        twins = [W.detach(), W.data, W.clone(), copy.deepcopy(W), W.to(torch.float64)]
        twins.append(pickle.loads(pickle.dumps(W.detach())))
    for twin in twins:
        assert isinstance(twin, SparseTensor)
        torch.testing.assert_close(twin.to_dense(), W.to_dense(), check_dtype=False)
    assert not W.detach().requires_grad
    assert W.clone().requires_grad
    assert twins[4].dtype == torch.float64


def test_wrong_number_of_values():
    with pytest.raises(ValueError, match=r"\[\*batch, 3\].*got shape \(4,\)"):
        SparseTensor(torch.randn(4), ActiveSet.random((OUT, IN), 3))


# Sites of other shapes

IMAGES, SIGNALS = torch.randn(2, 4, 7, 6), torch.randn(2, 4, 9)
WORDS = torch.tensor([[0, 3], [3, 5]])

# name -> function of the weight, an input and a bias; shape of the weight; the input
LAYERS = {
    "conv2d": (lambda W, x, b: F.conv2d(x, W), (6, 4, 3, 2), IMAGES),
    "conv2d with bias": (lambda W, x, b: F.conv2d(x, W, b), (6, 4, 3, 3), IMAGES),
    "conv2d by keyword": (
        lambda W, x, b: F.conv2d(bias=b, padding=1, weight=W, input=x),
        (6, 4, 3, 3),
        IMAGES,
    ),
    "torch.conv2d": (lambda W, x, b: torch.conv2d(x, W, b, 2, 1), (6, 4, 3, 3), IMAGES),
    "conv2d 1x1, strided": (
        lambda W, x, b: F.conv2d(x, W, b, stride=(2, 3)),
        (6, 4, 1, 1),
        IMAGES,
    ),
    "conv2d 1x1": (lambda W, x, b: F.conv2d(x, W, b), (6, 4, 1, 1), IMAGES),
    "conv2d, all options": (
        lambda W, x, b: F.conv2d(x, W, b, (2, 1), (1, 2), (1, 2)),
        (6, 4, 3, 2),
        IMAGES,
    ),
    "conv2d same": (lambda W, x, b: F.conv2d(x, W, b, padding="same"), (6, 4, 3, 2), IMAGES),
    "conv2d valid": (lambda W, x, b: F.conv2d(x, W, b, padding="valid"), (6, 4, 3, 2), IMAGES),
    "conv2d groups": (lambda W, x, b: F.conv2d(x, W, b, groups=2), (6, 2, 3, 2), IMAGES),
    "conv2d depthwise": (lambda W, x, b: F.conv2d(x, W, padding=1, groups=4), (4, 1, 3, 3), IMAGES),
    "conv2d strided input": (
        lambda W, x, b: F.conv2d(x.contiguous(memory_format=torch.channels_last), W),
        (6, 4, 3, 2),
        IMAGES,
    ),
    "conv2d twice": (
        lambda W, x, b: F.conv2d(F.conv2d(x, W, padding=1).tanh(), W),
        (4, 4, 3, 3),
        IMAGES,
    ),
    "conv1d": (lambda W, x, b: F.conv1d(x, W), (6, 4, 3), SIGNALS),
    "conv1d, all options": (
        lambda W, x, b: F.conv1d(x, W, b, stride=2, padding=(2,), dilation=2),
        (6, 4, 3),
        SIGNALS,
    ),
    "conv1d same": (lambda W, x, b: F.conv1d(x, W, b, padding="same"), (6, 4, 4), SIGNALS),
    "conv1d groups": (lambda W, x, b: F.conv1d(x, W, b, groups=2), (6, 2, 3), SIGNALS),
    "embedding": (lambda W, x, b: F.embedding(WORDS, W).tanh(), (6, 4), torch.zeros(1)),
    "embedding with padding": (
        lambda W, x, b: F.embedding(WORDS, W, padding_idx=-3).tanh(),
        (6, 4),
        torch.zeros(1),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_sparsely(name, share):
    """Value, gradients, and the recorded gradient of every coordinate."""
    function, shape, given = LAYERS[name]
    active = ActiveSet.random(shape, max(1, int(share * torch.Size(shape).numel())))
    values, bias = torch.randn(len(active)), torch.randn(shape[0])
    results = []
    for sparse in (True, False):
        v, x, b = (t.clone().requires_grad_() for t in (values, given, bias))
        W = SparseTensor(v, active) if sparse else active.scatter(v)
        if not sparse:
            W.retain_grad()
        with GradientRecord() as record, forbid_materialise():
            out = function(W, x, b)
        (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum().backward()
        results.append((out.detach(), v.grad, x.grad, b.grad))
    for found, expected in zip(*results, strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected = W.grad.reshape(active.matrix_shape)
    with GradientRecord() as record:
        out = function(SparseTensor(values.requires_grad_(), active), given, bias)
    (out * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum().backward()
    torch.testing.assert_close(record.block(active, 0, shape[0]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record.block(active, 1, 3), expected[1:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_a_convolution(groups):
    active = ActiveSet.random((4, 4 // groups, 3, 2), 11)
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def convolution(values, x):
        return F.conv2d(x, SparseTensor(values, active), None, 2, 1, 1, groups)

    assert torch.autograd.gradcheck(convolution, (values, x))


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("index", [-1, 6])
def test_embedding_of_a_word_that_is_not_there(index):
    weight = SparseTensor(torch.randn(9), ActiveSet.random((6, 4), 9))
    with pytest.raises(IndexError, match="out of range"):
        F.embedding(torch.tensor([0, index]), weight)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_embedding_takes_what_torch_s_own_takes(dtype):
    weight = SparseTensor(torch.randn(9), ActiveSet.random((6, 4), 9))
    with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
        F.embedding(torch.ones(3, dtype=dtype), weight)


def test_a_convolution_of_no_images():
    weight = SparseTensor(torch.randn(20), ActiveSet.random((6, 4, 3, 2), 20))
    assert F.conv2d(torch.zeros(0, 4, 7, 6), weight).shape == (0, 6, 5, 5)


def test_a_use_that_needs_no_gradient_is_not_recorded():
    active = ActiveSet.random((6, 4), 9)
    weight = SparseTensor(torch.randn(9, requires_grad=True), active)
    inputs = torch.randn(3, 4, requires_grad=True)
    with GradientRecord() as record:
        F.linear(inputs, weight.detach()).sum().backward()
    assert active not in record


@pytest.mark.parametrize("backend", ["auto", "numba", "torch", "dense"])
@pytest.mark.parametrize(
    ("layer", "shape", "inputs"),
    [
        (F.linear, (6, 8), (3, 8)),
        (lambda x, w: x @ w, (40,), (3, 40)),
        (F.conv2d, (6, 4, 3, 2), (2, 4, 7, 6)),
    ],
)
def test_autocast_leaves_sparse_products_in_their_precision(backend, layer, shape, inputs):
    weight = SparseTensor(torch.randn(20, requires_grad=True), ActiveSet.random(shape, 20))
    inputs = torch.randn(inputs, requires_grad=True)
    expected = layer(inputs, weight.to_dense())
    grads = torch.autograd.grad(expected.square().sum(), (weight.values, inputs))
    with kernels.use(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(inputs, weight)
        found_grads = torch.autograd.grad(found.square().sum(), (weight.values, inputs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grads, grads)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_writing_through_a_view_raises_where_a_gradient_is_at_stake():
    weight = SparseTensor(torch.randn(9, requires_grad=True), ActiveSet.random((6, 4), 9))
    with pytest.raises(RuntimeError, match="view"):
        weight[0].fill_(1.0)


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_wrong_sizes_get_torch_s_own_error():
    W = SparseTensor(torch.randn(6), ActiveSet.random((OUT, IN), 6))
    K = SparseTensor(torch.randn(6), ActiveSet.random((6, 4, 3, 3), 6))
    for call in (
        lambda: F.linear(torch.randn(3, IN + 1), W),
        lambda: torch.randn(3, OUT + 1) @ W,
        lambda: W @ torch.randn(IN + 1, 2),
        lambda: torch.mm(W, torch.randn(IN)),
        lambda: F.conv2d(torch.randn(1, 5, 7, 7), K),
        lambda: F.conv2d(torch.randn(1, 4, 2, 2), K),
        lambda: F.linear(torch.randn(3, IN, dtype=torch.float64), W),
    ):
        with pytest.raises(RuntimeError):
            call()
