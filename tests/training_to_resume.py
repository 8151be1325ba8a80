"""Trainings that test_checkpoint.py stops and resumes, here or in another process."""

import hashlib
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import PyroLRScheduler
from torch import nn

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule
from pyro_ssvi.addition import Evidence, Gradient

STEPS = 9
X = torch.linspace(-1, 1, 240).reshape(20, 12).sin()
Y = X.sum(-1).cos()


def bnn(x, y=None):
    """A function with sparse and dense sites, a constrained one, and parameters of its own."""
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([10, 12]).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 10]).to_event(2))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    start = torch.rand(())
    shift = pyro.param("shift", start, constraint=dist.constraints.interval(-1.0, 2.0))
    slope = pyro.param("slope", lambda: torch.rand(10) + 0.5, constraint=dist.constraints.positive)
    hidden = F.linear(x, w0, b0).tanh() * slope
    mean = F.linear(hidden, w1).squeeze(-1) + shift
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def regression(x, y=None):
    """A model for vectorized particles."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([12]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.5), obs=y)


class Net(PyroModule):
    """A module with buffers that every run changes, and parameters with and without constraint."""

    def __init__(self, unconstrained=True):
        super().__init__()
        self.norm = nn.BatchNorm1d(12, affine=unconstrained)
        self.conv = PyroModule[nn.Conv1d](2, 4, 3, groups=2, bias=unconstrained)
        prior = dist.Normal(0.0, 1.0).expand([4, 1, 3]).to_event(3)
        self.conv.weight = PyroSample(prior)
        self.table = PyroModule[nn.Embedding](5, 3)
        self.table.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2))
        self.noise = PyroParam(torch.tensor(0.5), dist.constraints.positive)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x, y=None):
        self.runs = self.runs + 1  # a new tensor each time
        hidden = self.conv(self.norm(x).reshape(-1, 2, 6)).tanh().flatten(1).mean(1)
        hidden = hidden + self.table(torch.arange(len(x)) % 5).sum(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(hidden, self.noise), obs=y)


def hidden_net():
    """A function with a module in its closure, that is made known to the checkpoint."""
    net = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))

    def model(x, y=None):
        pyro.module("net", net)
        return bnn(net(x), y)

    return net, model


def make(model=bnn, density=0.3, guide=None, optim=None, loss=None, inference=SSVI, **kwargs):
    return inference(
        model,
        guide or AutoSparseNormal(model, density=density),
        optim or pyro.optim.Adam({"lr": 0.02}),
        loss or Trace_ELBO(),
        **{"schedule": ConstantSchedule(every=4), "addition": Gradient(batches=3), **kwargs},
    )


def scheduled(name, **kwargs):
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, **kwargs}
    return getattr(pyro.optim, name)(args)


def with_hidden_net():
    net, model = hidden_net()
    svi = make(model)
    svi.model.add_module("net", net)
    return svi


def by_name(name):
    return {"lr": 0.02 if name.startswith("Auto") else 0.01}


def guide_list(second=AutoSparseNormal):
    guide = AutoGuideList(bnn)
    guide.append(AutoSparseNormal(pyro.poutine.block(bnn, hide=["noise"]), density=0.3))
    guide.append(second(pyro.poutine.block(bnn, expose=["noise"])))
    return make(guide=guide)


def with_autonormal():
    svi = guide_list(AutoNormal)
    svi.guide(X, Y)  # an AutoNormal makes its parameters at its first call only
    return svi


CASES = {
    "Adam": make,
    "arguments by name": lambda: make(optim=pyro.optim.ClippedAdam(by_name)),
    "ClippedAdam": lambda: make(optim=pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9})),
    "SGD": lambda: make(optim=pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})),
    "ExponentialLR": lambda: make(optim=scheduled("ExponentialLR", gamma=0.8)),
    "MultiStepLR": lambda: make(optim=scheduled("MultiStepLR", milestones=[2, 5], gamma=0.5)),
    "OneCycleLR": lambda: make(optim=scheduled("OneCycleLR", max_lr=0.1, total_steps=20)),
    "at the mean": lambda: make(addition=Gradient(batches=3, at="mean")),
    "module": lambda: make(Net()),
    # Pyro's SVI cannot train unconstrained parameters of a module when they are local.
    "module, local parameters": lambda: make(Net(unconstrained=False)),
    "net in a closure": with_hidden_net,
    "particles": lambda: make(
        regression, loss=Trace_ELBO(num_particles=2, vectorize_particles=True)
    ),
    "local reparameterisation": lambda: make(loss=TraceMeanField_ELBO(), local_reparam=True),
    "evidence": lambda: make(addition=Evidence(batches=3), removal="evidence"),
    "sites compete": lambda: make(allocation="global"),
    "list of guides": guide_list,
    "with an AutoNormal": with_autonormal,
}


def fresh(case, seed):
    """The training of this name in an empty store, and the settings it needs."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    local = case == "module, local parameters"
    return pyro.settings.context(module_local_params=True) if local else nullcontext()


def train(svi, steps=STEPS, after=lambda: None):
    """Go on to this step, with batches that torch's and numpy's generators draw."""
    while svi.steps < steps:
        rows = torch.randperm(20)[:15]
        svi.step(X[rows] + float(np.random.normal()) * 0.01, Y[rows])  # noqa: NPY002
        if isinstance(svi.optim, PyroLRScheduler):
            svi.optim.step()
        after()


def fingerprint(state):
    """A hash of every bit of a state."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            add([str(value.dtype), list(value.shape)])
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add([key, value[key]])
        elif isinstance(value, list | tuple):
            digest.update(b"[%d" % len(value))
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def resume(folder):
    """Go on from every file in a folder, each in a training made anew; print the ends."""
    for path in sorted(Path(folder).rglob("*.ckpt")):
        case = path.parent.name
        with fresh(case, seed=hash(path) % 2**31):
            svi = CASES[case]()
            svi.load(path)
            train(svi)
            print(case, path.stem, fingerprint(svi.state_dict()), sep="|", flush=True)


def train_until_killed(path):
    """Train and save after every step, without end."""
    signal.alarm(60)  # should nobody come
    with fresh("Adam", seed=1):
        svi = make()
        if Path(path).exists():
            svi.load(path)
        train(svi, 10**9, after=lambda: svi.save(path))


def serve(path):
    """For each line read, start a training; print its process, and how it ended."""
    with fresh("Adam", seed=0):
        train(make(), 1)  # compiles what all of them need
    for _ in sys.stdin:
        process = os.fork()
        if not process:
            train_until_killed(path)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"resume": resume, "serve": serve}[sys.argv[1]](sys.argv[2])
