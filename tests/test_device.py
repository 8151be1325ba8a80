"""Device mixing and hidden host syncs, found without a GPU: on fake CUDA tensors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import kl_divergence

from pyro_ssvi import ActiveSet, SparseNormal, SparseTensor, SubspacePrior, kernels
from pyro_ssvi.addition import race
from pyro_ssvi.allocation import as_they_are
from pyro_ssvi.criteria import REMOVAL
from pyro_ssvi.exchange import carry, swap, top_inactive, weakest
from pyro_ssvi.optimizer_state import carry_state
from pyro_ssvi.structures import Columns, Rows

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 5), reason="fake CUDA tensors of torch 2.4 ask for a driver"
)

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


@pytest.mark.parametrize(
    ("structure", "indices"),
    [(Columns(), [6 * i + j for i in range(10) for j in (1, 4)]), (Rows(), range(6, 18))],
)
def test_whole_columns_and_rows(structure, indices):
    with FakeTensorMode():
        active = ActiveSet.full((10, 6), cuda)
        active._indices, active.structure = torch.tensor(indices, device=cuda), structure
        x, g = torch.ones(3, 6, device=cuda), torch.ones(10, 3, device=cuda)
        w = SparseTensor(torch.ones(len(active), device=cuda), active)
        results = [F.linear(x, w), w.T @ g, kernels.sampled(active, g, x.t())]
    assert [result.shape for result in results] == [(3, 10), (6, 3), (len(active),)]
    assert {result.device.type for result in results} == {"cuda"}


def test_matrix_views(active):
    for csr in (active.csr, active.csr_t):
        assert csr.crow.device.type == csr.col.device.type == "cuda"


def test_exchange(active):
    loc, scale = torch.zeros(20, device=cuda), torch.ones(20, device=cuda)
    gradient = torch.ones(10, 6, device=cuda)
    for criterion in REMOVAL.values():
        removed = weakest(active, criterion(loc, scale), 4)
        rounds = [(4, as_they_are), (2, race)]
        (added, _), (drawn, _) = top_inactive(active, rounds, lambda a, b: gradient[a:b])
        move = swap(active, removed, added)
        carry(loc, move.source, torch.zeros_like(loc))
        assert move.indices.device == move.source.device == loc.device
        assert loc.device.type == drawn.device.type == "cuda"


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=repr)
def test_the_state_of_an_optimizer_stays_where_it_is(options):
    """Adam counts its steps on the CPU, or on the device; a load moves them as torch does."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.zeros(20, device=cuda))
        param.grad = torch.ones_like(param)
        optim = torch.optim.Adam([param], **options)
        optim.step()
        before = {key: value.device for key, value in optim.state[param].items()}
        assert before["step"].type == ("cuda" if options else "cpu")
        carry_state(optim, param, torch.arange(20, device=cuda))
        assert {key: value.device for key, value in optim.state[param].items()} == before
        optim.step()
