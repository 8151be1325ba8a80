import io
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule
from pyro_ssvi.progress import progress

X, Y = torch.randn(20, 12), torch.randn(20)


def model(x, y=Y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 12]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(torch.tanh(x @ w.T).sum(-1), 1.0), obs=y)


def make_ssvi():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSparseNormal(model, density=0.25)
    schedule = CosineSchedule(every=2, stop=4)
    return SSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), schedule=schedule)


def test_it_takes_the_steps_and_gives_their_losses():
    svi = make_ssvi()
    expected = [svi.step(X, Y) for _ in range(5)]
    svi = make_ssvi()
    assert list(progress(svi, [(X, Y)] * 5)) == expected
    assert svi.steps == 5


def test_a_step_waits_until_its_loss_is_asked_for():
    svi = make_ssvi()
    losses = progress(svi, iter([(X, Y)] * 5))
    assert svi.steps == 0
    next(losses)
    assert svi.steps == 1


def test_the_bar_shows_loss_time_and_exchanged_share():
    text = io.StringIO()
    list(progress(make_ssvi(), [(X, Y)] * 3, file=text, disable=False, mininterval=0, desc="net"))
    last = text.getvalue().split("\r")[-1]
    assert last.startswith("net")
    for part in ("loss=", "ms/step=", "exchanged=15.0%", "3/3"):  # 0.3 / 2 (1 + cos(pi / 2))
        assert part in last


def test_it_is_quiet_where_there_is_no_terminal(capsys):
    list(progress(make_ssvi(), [(X, Y)] * 3))
    assert capsys.readouterr() == ("", "")


def test_pyro_s_own_svi_and_batches_of_one_argument():
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    text = io.StringIO()
    assert len(list(progress(svi, [X, [X, Y]], file=text, disable=False, mininterval=0))) == 2
    assert "loss=" in text.getvalue()
    assert "exchanged" not in text.getvalue()


def test_without_tqdm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install tqdm.*'examples'"):
        progress(make_ssvi(), [(X, Y)])
