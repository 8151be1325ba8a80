"""Device mixing and hidden host syncs, found without a GPU: on fake CUDA tensors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import kl_divergence

from pyro_ssvi import ActiveSet, SparseNormal, SubspacePrior, kernels
from pyro_ssvi.criteria import REMOVAL
from pyro_ssvi.exchange import carry, smallest, swap, top_inactive

cuda = torch.device("cuda")


@pytest.fixture
def active():
    pyro.enable_validation(False)  # it asks tensors for their truth, by its nature
    with FakeTensorMode():
        active = ActiveSet.full((10, 6), cuda)
        # As an exchange leaves it; the public constructor checks the numbers, which are fake.
        active._indices = torch.arange(0, 60, 3, device=cuda)
        yield active


def test_forward(active):
    q = SparseNormal(torch.zeros(20, device=cuda), torch.ones(20, device=cuda), active)
    prior = SubspacePrior(
        dist.Normal(torch.zeros((), device=cuda), 1.0).expand([10, 6]).to_event(2)
    )
    x = torch.ones(3, 6, device=cuda)
    with kernels.use("dense"):  # a fake device has no CSR tensors
        w = q.rsample()
        results = [
            F.linear(x, w),
            F.linear(x, w) @ w,
            w @ x.T,
            w.to_dense(),
            q.log_prob(w),
            prior.log_prob(w),
            kl_divergence(q, prior),
        ]
    assert {result.device.type for result in results} == {"cuda"}


def test_matrix_views(active):
    for csr in (active.csr, active.csr_t):
        assert csr.crow.device.type == csr.col.device.type == "cuda"


def test_exchange(active):
    loc, scale = torch.zeros(20, device=cuda), torch.ones(20, device=cuda)
    gradient = torch.ones(10, 6, device=cuda)
    for criterion in REMOVAL.values():
        removed = smallest(criterion(loc, scale), 4)
        added, _ = top_inactive(active, 4, lambda a, b: gradient[a:b])
        move = swap(active, removed, added)
        carry(loc, move.source, torch.zeros_like(loc))
        assert move.indices.device == move.source.device == loc.device
        assert loc.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_real_device():
    from pyro.infer import Trace_ELBO

    from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule, forbid_materialise

    x, y = torch.randn(20, 12, device=cuda), torch.randn(20, device=cuda)

    def model(x, y):
        zero = x.new_zeros(())
        w = pyro.sample("w", dist.Normal(zero, 1.0).expand([1, 12]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, w).squeeze(-1), 1.0), obs=y)

    guide = AutoSparseNormal(model, density=0.25)
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SSVI(model, guide, optim, Trace_ELBO(), schedule=ConstantSchedule(every=2))
    with forbid_materialise():
        for _ in range(5):
            svi.step(x, y)
    assert guide.active_sets["w"].indices.is_cuda
