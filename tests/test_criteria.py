"""Removal criteria against exact values: closed forms to 80 digits, and draws from q."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor

from pyro_ssvi import criteria
from pyro_ssvi.criteria import REMOVAL, removal_criterion

NAMES = sorted(REMOVAL)
LOGS = {"mean_exp_abs", "snr_exp_abs"}
WIDE = {"mean_abs", *LOGS}  # float64 whatever comes in


@pytest.fixture(autouse=True)
def _digits() -> Iterator[None]:
    with mp.workdps(80):
        yield


def mgf(t: int, mu: mpf, s: mpf) -> mpf:
    """E exp(t |theta|) as the paper writes it."""
    return mp.exp(t**2 * s**2 / 2) * (
        mp.exp(t * mu) * mp.ncdf(mu / s + t * s) + mp.exp(-t * mu) * mp.ncdf(-mu / s + t * s)
    )


def exact_mean_abs(mu: mpf, s: mpf) -> mpf:
    r = mu / s
    return mu * mp.erf(r / mp.sqrt(2)) + s * mp.sqrt(2 / mp.pi) * mp.exp(-(r**2) / 2)


def exact_snr_abs(mu: mpf, s: mpf) -> mpf:
    m = exact_mean_abs(mu, s)
    return m / mp.sqrt(s**2 + mu**2 - m**2)


#: The paper's quantities; of the two that overflow, the logarithm.
EXACT: dict[str, Callable[[mpf, mpf], mpf]] = {
    "abs_mean": lambda mu, s: abs(mu),
    "snr": lambda mu, s: abs(mu) / s,
    "mean_abs": exact_mean_abs,
    "snr_abs": exact_snr_abs,
    "mean_exp_abs": lambda mu, s: mp.log(mgf(1, mu, s)),
    "snr_exp_abs": lambda mu, s: mp.log(
        mgf(1, mu, s) / mp.sqrt(mgf(2, mu, s) - mgf(1, mu, s) ** 2)
    ),
}


def exact(name: str, loc: Tensor, scale: Tensor) -> list[mpf]:
    pairs = zip(loc.tolist(), scale.tolist(), strict=True)
    return [EXACT[name](mpf(mu), mpf(s)) for mu, s in pairs]


def spread(n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Points with |loc| and scale anywhere from 1e-6 to 1e6, either sign."""
    draw = torch.Generator().manual_seed(seed)
    loc, scale = 10 ** (12 * torch.rand(2, n, generator=draw, dtype=torch.float64) - 6)
    sign = 2 * torch.randint(2, (n,), generator=draw) - 1
    return (loc * sign).to(dtype), scale.to(dtype)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"snr_abs"}))
def test_matches_the_closed_form(name: str) -> None:
    decades = [10.0**k for k in range(-6, 7)]
    # Both sides of the scale at which the exponential criteria change formula, and mu ~ s there.
    decades += [0.02, 0.031, criteria.SMALL, 0.032, 0.05, 0.3, 3.0, 30.0]
    grid = [(mu, s) for mu, s in itertools.product([0.0, *decades, -0.3, -3.0], decades)]
    loc, scale = torch.tensor(grid, dtype=torch.float64).T
    want = torch.tensor([float(x) for x in exact(name, loc, scale)], dtype=torch.float64)
    torch.testing.assert_close(REMOVAL[name](loc, scale), want, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"snr_abs"}))
def test_ranks_as_the_exact_score(name: str, dtype: torch.dtype) -> None:
    loc, scale = spread(500, 0, dtype)
    score = REMOVAL[name](loc, scale)
    want = torch.tensor([float(x) for x in exact(name, loc, scale)], dtype=torch.float64)
    larger = torch.maximum(want[:, None].abs(), want.abs())
    # A logarithm that differs by 1e-3 is a score that differs by 0.1 %, however large it is.
    most = 1e-3 if name in LOGS else float("inf")
    clear = ((1e-9 if name in WIDE else 1e-6) * larger).clamp(max=most)
    above = want[:, None] - want > clear
    assert above.sum() > 0.49 * 500 * 499
    assert (score[:, None] > score)[above].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snr_abs_ranks_as_the_exact_signal_to_noise_ratio_of_abs_theta(dtype: torch.dtype) -> None:
    loc, scale = spread(500, 1, dtype)
    want = exact("snr_abs", loc, scale)
    order = sorted(range(500), key=want.__getitem__)
    score = criteria.snr_abs(loc, scale)[order]
    assert (score.diff() >= 0).all()
    assert len(score.unique()) == 500


def test_snr_and_snr_abs_rank_alike() -> None:
    loc, scale = spread(10_000, 2, torch.float32)
    order = criteria.snr(loc, scale).argsort(stable=True)
    assert torch.equal(criteria.snr_abs(loc, scale).argsort(stable=True), order)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.03, 0.032, 0.1, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_candidates_for_removal_do_not_tie(name: str, scale: float) -> None:
    # One scale, as after initialisation, and means far below it: scores differ by r^2 or less.
    r = torch.logspace(-6, 0, 49, dtype=torch.float64)
    loc, scales = (r * scale).float(), torch.full((49,), scale)
    score = REMOVAL[name](loc, scales)
    want = exact(name, loc, scales)
    signs = [int(mp.sign(b - a)) for a, b in itertools.pairwise(want)]
    assert 0 not in signs
    assert score.diff().sign().tolist() == signs


def test_agrees_with_draws() -> None:
    loc = torch.tensor([0.3, -1.0, 0.05, -0.4], dtype=torch.float64)
    scale = torch.tensor([0.5, 0.4, 0.1, 0.7], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(1_000_000, 4, generator=draw, dtype=torch.float64)
    theta = loc + scale * z

    def ratio(x: Tensor) -> Tensor:
        return x.mean(0) / x.std(0)

    size, grown = theta.abs(), theta.abs().exp()
    r = criteria.snr_abs(loc, scale)
    m = criteria.mean_abs(r, torch.ones_like(r))
    got = {
        "abs_mean": criteria.abs_mean(loc, scale),
        "mean_abs": criteria.mean_abs(loc, scale),
        "snr": criteria.snr(loc, scale),
        "snr_abs": m / (1 + r**2 - m**2).sqrt(),
        "mean_exp_abs": criteria.mean_exp_abs(loc, scale).exp(),
        "snr_exp_abs": criteria.snr_exp_abs(loc, scale).exp(),
    }
    drawn = {
        "abs_mean": theta.mean(0).abs(),
        "mean_abs": size.mean(0),
        "snr": ratio(theta).abs(),
        "snr_abs": ratio(size),
        "mean_exp_abs": grown.mean(0),
        "snr_exp_abs": ratio(grown),
    }
    assert got.keys() == REMOVAL.keys()
    torch.testing.assert_close(got, drawn, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(
    loc=st.floats(0, 1e6, width=32),
    scale=st.floats(2.0**-20, 1e6, width=32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_finite_and_even_in_loc(name: str, loc: float, scale: float, dtype: torch.dtype) -> None:
    locs = torch.tensor([loc, -loc], dtype=dtype)
    plus, minus = REMOVAL[name](locs, torch.full_like(locs, scale))
    assert plus.isfinite()
    assert plus == minus


@pytest.mark.parametrize("name", NAMES)
def test_finite_over_all_of_float32(name: str) -> None:
    edges = torch.tensor([1e-18, 1e-9, 1.0, 1e9, 1e18])
    loc, scale = torch.cartesian_prod(edges, edges).T
    assert REMOVAL[name](loc, scale).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden(name: str) -> None:
    nan = torch.tensor(float("nan"))
    assert REMOVAL[name](nan, torch.tensor(1.0)).isnan()
    if name != "abs_mean":
        assert REMOVAL[name](torch.tensor(1.0), nan).isnan()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_keeps_shape_and_inputs(name: str, shape: tuple[int, ...]) -> None:
    loc, scale = torch.randn(shape), torch.rand(shape) + 0.1
    before = loc.clone(), scale.clone()
    score = REMOVAL[name](loc, scale)
    assert score.shape == shape
    assert score.dtype == (torch.float64 if name in WIDE else torch.float32)
    assert torch.equal(loc, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize("name", NAMES)
def test_never_looks_at_a_value(name: str) -> None:
    empty = torch.empty(3, device="meta")  # .item(), or a branch on a score, would raise here
    assert REMOVAL[name](empty, empty).device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_finds_its_function(name: str) -> None:
    assert removal_criterion(name) is getattr(criteria, name)


def test_a_callable_passes_through() -> None:
    def mine(loc: Tensor, scale: Tensor) -> Tensor:
        return -scale

    assert removal_criterion(mine) is mine


@pytest.mark.parametrize("spec", ["snr_of_abs", None, ["snr"]])
def test_an_unknown_criterion_is_told_the_known_ones(spec: object) -> None:
    with pytest.raises(ValueError, match="unknown removal criterion") as error:
        removal_criterion(spec)  # type: ignore[arg-type]
    for part in (repr(spec), *NAMES, "callable(loc, scale) -> scores"):
        assert part in str(error.value)
