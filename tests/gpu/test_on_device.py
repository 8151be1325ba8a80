"""The same on every device: on CPU always, on CUDA where there is one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO

from pyro_ssvi import (
    SSVI,
    AutoSparseNormal,
    ConstantSchedule,
    SparsePredictive,
    forbid_materialise,
    kernels,
)
from pyro_ssvi.criteria import REMOVAL

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    """The default device: models and data are made there."""
    with torch.device(request.param):
        yield torch.device(request.param)


def weight(name, *shape):
    zero, one = torch.zeros(()), torch.ones(())
    return pyro.sample(name, dist.Normal(zero, one).expand(shape).to_event(len(shape)))


def linear(x, y=None):
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(())))
    hidden = F.linear(x, weight("w0", 20, 12), weight("b0", 20)).tanh()
    mean = F.linear(hidden, weight("w1", 1, 20)).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def convolution(x, y=None):
    images = x.reshape(-1, 3, 2, 2)
    hidden = F.conv2d(images, weight("w0", 8, 3, 3, 3), padding=1).tanh()
    mean = F.linear(hidden.flatten(1), weight("w1", 1, 32)).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, torch.ones(())), obs=y)


def embedding(x, y=None):
    rows = (x[:, 0] > 0).long()
    mean = F.embedding(rows, weight("w0", 2, 30)).sum(-1) + x @ weight("w1", 12, 1).squeeze(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, torch.ones(())), obs=y)


def hierarchical(x, y=None):
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(())))
    w = pyro.sample("w0", dist.Normal(torch.zeros(()), scale).expand([1, 12]).to_event(2))
    with pyro.plate("data", len(x)):
        mean = F.linear(x, w).squeeze(-1)
        return pyro.sample("obs", dist.Normal(mean, torch.ones(())), obs=y)


MODELS = [linear, convolution, embedding, hierarchical]
LOSSES = {
    "Trace_ELBO": (Trace_ELBO, {}),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO, {}),
    "local": (TraceMeanField_ELBO, {"local_reparam": True}),
}


def data():
    x = torch.linspace(-1, 1, 24 * 12).reshape(24, 12).sin()
    return x, x.sum(-1).cos()


def make(model, loss="Trace_ELBO", density=0.25, **kwargs):
    pyro.clear_param_store()
    elbo, options = LOSSES[loss]
    guide = AutoSparseNormal(model, density=density)
    optim = pyro.optim.Adam({"lr": 0.01})
    schedule = ConstantSchedule(every=2)
    return SSVI(model, guide, optim, elbo(), schedule=schedule, **options, **kwargs)


def tensors_of(svi):
    yield from svi.guide.parameters()
    yield from svi.guide.buffers()
    for optim in svi.optim.optim_objs.values():
        for state in optim.state.values():
            yield from (v for v in state.values() if isinstance(v, torch.Tensor) and v.dim())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_training(device, model, loss):
    if loss == "local" and model is embedding:
        pytest.skip("rows of a table are no products")
    svi = make(model, loss)
    x, y = data()
    losses = [svi.step(x, y) for _ in range(9)]
    assert torch.tensor(losses).isfinite().all()
    assert {tensor.device.type for tensor in tensors_of(svi)} == {device.type}
    for name, active in svi.guide.active_sets.items():
        assert (active.indices.diff() > 0).all(), name
        assert active.indices.device.type == device.type


@pytest.mark.parametrize("model", [linear, convolution, hierarchical])
def test_nothing_becomes_dense(device, model):
    svi = make(model)
    with forbid_materialise():
        for _ in range(3):
            svi.step(*data())


@pytest.mark.parametrize("removal", REMOVAL)
def test_criteria(device, removal):
    svi = make(linear, removal=removal)
    x, y = data()
    for _ in range(2):
        svi.step(x, y)
    assert sum(svi.exchange(x, y, share=0.5).values()) > 0


@pytest.mark.parametrize("kernel", ["torch", "dense", "auto"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
def test_loss_and_gradient_are_those_of_the_cpu(device, model, kernel):
    if kernel == "torch" and model is embedding:
        pytest.skip("a table is read row by row, whatever the back end")
    svi = make(model, "TraceMeanField_ELBO")
    svi.guide(*data())
    state = svi.guide.state_dict()
    state["scale_unconstrained"].fill_(-20.0)  # the draw is the mean
    state["loc_unconstrained"].copy_(torch.linspace(-1, 1, len(state["loc_unconstrained"])))
    svi.guide.load_state_dict(state)
    with kernels.use(kernel):
        loss = svi.loss_and_grads(svi.model, svi.guide, *data())
    gradient = svi.guide.loc_unconstrained.grad.cpu()
    with torch.device("cpu"):
        twin = make(model, "TraceMeanField_ELBO")
        twin.guide(*data())
        cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        twin.guide.load_state_dict(cpu)
        with kernels.use("dense"):
            expected = twin.loss_and_grads(twin.model, twin.guide, *data())
        assert loss == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(
            gradient, twin.guide.loc_unconstrained.grad, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_predictions(device, density):
    svi = make(linear, density=density)
    x, y = data()
    svi.step(x, y)
    for predictive in (Predictive(linear, guide=svi.guide, num_samples=3), None):
        predictive = predictive or SparsePredictive(linear, svi.guide, 3)
        drawn = predictive(x)["obs"]
        assert drawn.shape == (3, 24)
        assert drawn.device.type == device.type


@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_checkpoint_goes_from_device_to_device(device, other, tmp_path):
    svi = make(linear)
    for _ in range(3):
        svi.step(*data())
    svi.save(tmp_path / "a.ckpt")
    kept = svi.guide.state_dict()
    with torch.device(other):
        moved = make(linear)
        moved.load(tmp_path / "a.ckpt", map_location=other)
        moved.step(*data())
        assert {tensor.device.type for tensor in tensors_of(moved)} == {other}
        assert len(moved.guide.loc) == len(kept["loc_unconstrained"])


def test_moved_to_the_device_after_it_was_made(device):
    with torch.device("cpu"):
        svi = make(hierarchical)
        svi.guide(*data())
    svi.guide.to(device)
    pyro.clear_param_store()
    svi.step(*data())
    assert {tensor.device.type for tensor in tensors_of(svi)} == {device.type}
