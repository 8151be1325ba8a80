import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ssvi.low_rank_draw import low_rank_draw


def by_pyro(loc, scale, cov_factor):
    factor = scale.unsqueeze(-1) * cov_factor
    joint = dist.LowRankMultivariateNormal(loc, factor, scale.square())
    draw = joint.rsample()
    return draw, joint.log_prob(draw)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 5), (40, 3)])
@pytest.mark.parametrize("weight", [-1.0, 0.0, 2.5])
def test_draw_density_and_gradients_are_those_of_pyro(size, rank, weight):
    pyro.set_rng_seed(size)
    loc, scale = torch.randn(size).double(), torch.rand(size).double() + 0.1
    numbers = [loc, scale, torch.randn(size, rank).double()]
    results = []
    for function in (by_pyro, low_rank_draw):
        pyro.set_rng_seed(0)
        params = [each.clone().requires_grad_() for each in numbers]
        draw, log_density = function(*params)
        loss = (draw.sin() * torch.arange(size)).sum() + weight * log_density
        results.append([draw, log_density, *torch.autograd.grad(loss, params)])
    for ours, pyros in zip(*results, strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-9, atol=1e-9)


def test_covariance():
    pyro.set_rng_seed(0)
    scale, cov_factor = torch.tensor([0.5, 2.0, 1.0]), torch.randn(3, 2)
    draws = torch.stack([low_rank_draw(torch.ones(3), scale, cov_factor)[0] for _ in range(20_000)])
    covariance = scale.diag() @ (torch.eye(3) + cov_factor @ cov_factor.T) @ scale.diag()
    torch.testing.assert_close(draws.mean(0), torch.ones(3), rtol=0, atol=0.1)
    torch.testing.assert_close(draws.T.cov(), covariance, rtol=0.05, atol=0.1)
