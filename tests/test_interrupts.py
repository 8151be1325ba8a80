import os
import signal
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_ssvi.svi
from pyro_ssvi import SSVI, ActiveSet, AutoSparseNormal
from pyro_ssvi.interrupts import uninterrupted

X, Y = torch.randn(20, 12), torch.randn(20)


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 12]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(torch.tanh(x @ w.T).sum(-1), 1.0), obs=y)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("when", ["deciding", "changing"])
def test_an_exchange_is_done_whole_or_not_at_all(when, monkeypatch):
    guide = AutoSparseNormal(model, density=0.3)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(X, Y)
    before = guide.active_sets["w"], guide.loc.detach().clone()
    name = {"deciding": "weakest", "changing": "carry_state"}[when]
    original = getattr(pyro_ssvi.svi, name)

    def interrupted(*args):
        result = original(*args)
        interrupt()
        return result

    monkeypatch.setattr(pyro_ssvi.svi, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        svi.exchange(X, Y, share=0.5)
    active = guide.active_sets["w"]
    if when == "deciding":
        assert active.same(before[0])
        assert torch.equal(guide.loc, before[1])
        return
    ActiveSet(active.indices, active.shape)  # checks that it is one
    new = ~torch.isin(active.indices, before[0].indices)
    assert int(new.sum()) == 11
    assert not guide.loc[new].any()
    for param in guide.parameters_in_place():
        moments = svi.optim.optim_objs[param].state[param]["exp_avg"]
        assert not moments[new].any()
        assert moments[~new].all()
    svi.step(X, Y)


def test_other_threads_and_other_handlers_are_left_alone():
    seen = []
    original = signal.signal(signal.SIGINT, lambda *args: seen.append("handled"))
    try:
        with uninterrupted():
            interrupt()
            assert seen == []
        assert seen == ["handled"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with uninterrupted():
            interrupt()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, original)

    def work():
        with uninterrupted():
            seen.append("in a thread")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[-1] == "in a thread"
