import pytest
import torch
import torch.nn.functional as F

from pyro_ssvi import ActiveSet, SparseTensor
from pyro_ssvi.gradient_record import GradientRecord, recording

USES = {
    "linear": lambda W, x, z: F.linear(x, W).sin(),
    "transposed": lambda W, x, z: (z @ W).sin(),
    "from the left": lambda W, x, z: (W @ x.T).sin(),
    "twice": lambda W, x, z: (F.linear(x, W).sin() @ W).sin(),
    "dense": lambda W, x, z: W.exp() * 3,
    "transposed dense": lambda W, x, z: torch.cat([W.T, W.mT]).exp(),
    "both": lambda W, x, z: F.linear(x, W).sin() + W.sum(1).exp(),
}


@pytest.mark.filterwarnings("ignore::pyro_ssvi.PerformanceWarning")
@pytest.mark.parametrize("name", USES)
def test_equals_the_gradient_of_the_dense_twin(name):
    active = ActiveSet.random((5, 4), 6)
    values = torch.randn(6, requires_grad=True)
    x, z = torch.randn(3, 4), torch.randn(3, 5)
    dense = active.scatter(values.detach()).requires_grad_()
    with GradientRecord() as record:
        for _ in range(2):  # several backward passes add up
            USES[name](SparseTensor(values, active), x, z).sum().backward()
            USES[name](dense, x, z).sum().backward()
    torch.testing.assert_close(record.block(active, 0, 5), dense.grad)
    torch.testing.assert_close(record.block(active, 1, 3), dense.grad[1:3])


@pytest.mark.parametrize("use", [lambda v, x: (x @ v).sin(), lambda v, x: (v @ x.T).exp()])
def test_of_a_vector(use):
    active = ActiveSet.random((4,), 2)
    values, x = torch.randn(2, requires_grad=True), torch.randn(3, 4)
    dense = active.scatter(values.detach()).requires_grad_()
    with GradientRecord() as record:
        use(SparseTensor(values, active), x).sum().backward()
    use(dense, x).sum().backward()
    torch.testing.assert_close(record.block(active, 0, 4).squeeze(-1), dense.grad)


def test_nothing_is_recorded_outside():
    active = ActiveSet.random((5, 4), 6)
    W = SparseTensor(torch.randn(6, requires_grad=True), active)
    record = GradientRecord()
    F.linear(torch.randn(3, 4), W).sum().backward()
    assert active not in record
    assert recording() is None


def test_the_forward_pass_decides():
    """The backward pass may run in another thread, which sees no open record."""
    active = ActiveSet.random((5, 4), 6)
    W = SparseTensor(torch.randn(6, requires_grad=True), active)
    with GradientRecord() as record:
        loss = F.linear(torch.randn(3, 4), W).sum()
    loss.backward()
    assert active in record


def test_batched_values_are_summed():
    active = ActiveSet.random((5, 4), 6)
    values = torch.randn(2, 6, requires_grad=True)
    dense = active.scatter(values.detach()).requires_grad_()
    with GradientRecord() as record:
        SparseTensor(values, active).to_dense().exp().sum().backward()
    dense.exp().sum().backward()
    torch.testing.assert_close(record.block(active, 0, 5), dense.grad.sum(0))
