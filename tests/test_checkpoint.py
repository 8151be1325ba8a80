import copy
import hashlib
import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroParam
from torch import nn
from torch.distributions import transform_to
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_to_resume import (
    CASES,
    STEPS,
    Net,
    X,
    Y,
    bnn,
    fingerprint,
    fresh,
    guide_list,
    hidden_net,
    make,
    scheduled,
    train,
)

from pyro_ssvi import (
    SSVI,
    AutoSparseDelta,
    AutoSparseLowRankMultivariateNormal,
    AutoSparseNormal,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    checkpoint,
)
from pyro_ssvi.guides import site_table
from pyro_ssvi.structures import NM, Tiles

SCRIPT = Path(__file__).with_name("training_to_resume.py")
OLD_FILE = Path(__file__).parent / "data" / "checkpoint_v1.ssvi"


# Resuming


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Every case's end without a stop, and its ends after a stop at each step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    expected = {}
    for case, made in CASES.items():
        (folder / case).mkdir()
        with fresh(case, seed=1):
            svi = made()

            def save(svi=svi, case=case):
                svi.save(folder / case / f"{svi.steps}.ckpt")

            save()
            train(svi, after=save)
            expected[case] = fingerprint(svi.state_dict())
    done = subprocess.run(
        [sys.executable, SCRIPT, "resume", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resumed = {case: {} for case in CASES}
    for line in done.stdout.splitlines():
        case, step, end = line.split("|")
        resumed[case][int(step)] = end
    return expected, resumed


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_a_new_process_bit_for_bit(ends, case):
    expected, resumed = ends
    assert resumed[case] == dict.fromkeys(range(STEPS + 1), expected[case])


@pytest.mark.parametrize("case", CASES)
def test_back_to_an_earlier_step_in_memory(case):
    """In the same objects, that have gone on; the state is a copy, which they do not change."""
    with fresh(case, seed=1):
        svi = CASES[case]()
        train(svi, 3)
        state = svi.state_dict()
        parameters = list(svi.guide.parameters())
        train(svi)
        expected = fingerprint(svi.state_dict())
        svi.load_state_dict(state)
        assert svi.steps == 3
        train(svi)
        assert fingerprint(svi.state_dict()) == expected
        assert all(a is b for a, b in zip(parameters, svi.guide.parameters(), strict=True))


def wait_for_saves(path, number):
    """By what is done, not by time: who knows how fast this machine is now."""

    def saved_at():
        return path.stat().st_mtime_ns if path.exists() else None

    until = time.monotonic() + 60
    for _ in range(number):
        before = saved_at()
        while saved_at() == before and time.monotonic() < until:
            time.sleep(0.0005)


def test_killed_at_random_moments(tmp_path):
    path = tmp_path / "training.ckpt"
    moments, seen = random.Random(0), [0]
    command = [sys.executable, SCRIPT, "serve", path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as server:
        for _ in range(30):
            server.stdin.write("train\n")
            process = int(server.stdout.readline())
            wait_for_saves(path, moments.randrange(4))
            time.sleep(moments.uniform(0.0, 0.03))
            os.kill(process, signal.SIGKILL)
            assert int(server.stdout.readline()) == -signal.SIGKILL
            if path.exists():
                seen.append(checkpoint.FILES.read(path)["steps"])
        server.stdin.close()
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert set(os.listdir(tmp_path)) <= {path.name, f"{path.name}.part"}
    with fresh("Adam", seed=1):
        svi = make()
        train(svi, seen[-1])
        assert fingerprint(svi.state_dict()) == fingerprint(checkpoint.FILES.read(path))


# Files


def trained(steps=6, **kwargs):
    pyro.clear_param_store()
    svi = make(**kwargs)
    train(svi, steps)
    return svi


def snapshot(svi):
    store = pyro.get_param_store()
    return fingerprint(svi.state_dict()), list(store.keys()), list(svi.optim.optim_objs)


def refuses(svi, path, match):
    """Loading raises, and changes nothing."""
    before = snapshot(svi)
    with pytest.raises(ValueError, match=match) as error:
        svi.load(path)
    assert str(path) in str(error.value)
    after = snapshot(svi)
    assert after[:2] == before[:2]
    assert all(a is b for a, b in zip(after[2], before[2], strict=True))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.ckpt"
    trained().save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_truncated_file(path, share):
    svi = trained()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuses(svi, path, "is not a")


@pytest.mark.parametrize("share", [0.0, 0.0025, 0.02, 0.5, 0.9, 0.9999])
def test_tampered_file(path, share):
    svi = trained()
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    refuses(svi, path, "is not a|newer")


def with_header(payload, version=1):
    digest = hashlib.sha256(payload).hexdigest()
    return f"pyro_ssvi checkpoint {version} sha256 {digest}\n".encode() + payload


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_no_code_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    svi = trained()
    payload = io.BytesIO()
    torch.save({"version": 1, "steps": Harm()}, payload)
    for content in (payload.getvalue(), pickle.dumps(Harm())):
        path.write_bytes(with_header(content))
        refuses(svi, path, "cannot be read")
    assert not (tmp_path / "harm").exists()


def test_newer_version(path):
    svi = trained()
    payload = path.read_bytes().split(b"\n", 1)[1]
    path.write_bytes(with_header(payload, version=2))
    refuses(svi, path, r"newer pyro_ssvi \(checkpoint version 2, this one reads up to 1\): upgrade")
    with pytest.raises(ValueError, match="newer"):
        svi.load_state_dict({**svi.state_dict(), "version": 2})


def test_other_files(path, tmp_path):
    svi = trained()
    torch.save(svi.guide.state_dict(), path)
    refuses(svi, path, r"is not a pyro_ssvi checkpoint: .* guide.load_state_dict\(torch.load")
    with pytest.raises(FileNotFoundError):
        svi.load(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"has no \['version'"):
        svi.load_state_dict(svi.guide.state_dict())


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(path, monkeypatch, broken):
    svi, content = trained(8), path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    if broken == "write":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        svi.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    svi.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert checkpoint.FILES.read(path)["steps"] == 8


def test_content_is_on_disk_before_the_name_changes(path, monkeypatch):
    svi, calls = trained(), []
    for name in ("fsync", "replace"):
        function = getattr(os, name)

        def call(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(os, name, call)
    svi.save(path)
    assert calls == ["fsync", "replace", "fsync"]


def test_file_of_version_1_goes_on_loading():
    svi = make()
    svi.load(OLD_FILE)
    state = svi.state_dict()
    assert svi.steps == 6
    assert state["guide"]["_extra_state"].pop("observed") == []
    assert list(state["guide"]["_extra_state"].pop("constraints")) == ["loc", "scale"]
    kept = {key: state[key] for key in ("guide", "store", "record", "elbo", "random")}
    assert fingerprint(kept) == OLD_FINGERPRINT
    assert math.isfinite(svi.step(X, Y))


OLD_FINGERPRINT = "e0799b61f9cfcf8fd67d2f65ffe7bff9cec359c34a9207d385dcebd3d9db34cd"


# What does not fit


def other_shape(x, y=None):
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([10, 13]).to_event(2))
    pyro.sample("obs", dist.Normal((w0 @ torch.ones(13)).sum(), 1.0), obs=torch.tensor(0.0))


OTHERS = {
    "density": (
        {"density": 0.2},
        r"site 'w0': saved with 36 active of \(10, 12\), this guide has 24",
    ),
    "density by site": (
        {"density": {"w0": 0.1, "w1": 0.3}},
        r"site 'w0': saved with 36 active of \(10, 12\), this guide has 12",
    ),
    "density by function": (
        {"density": lambda name, shape: 0.3 if name == "w0" else 0.5},
        r"site 'w1': saved with 3 active of \(1, 10\), this guide has 5",
    ),
    "module": ({"model": Net()}, "model: 'model.norm.weight' is not in it"),
    "optimizer": (
        {"optim": pyro.optim.SGD({"lr": 0.1})},
        "optimizer of 'guide.loc_unconstrained': saved from Adam, here it is SGD",
    ),
    "scheduler": (
        {"optim": scheduled("ExponentialLR", gamma=0.5)},
        "saved from Adam, here it is ExponentialLR of Adam",
    ),
}


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", OTHERS)
def test_differences_are_named(path, name, seen):
    pyro.clear_param_store()
    kwargs, match = OTHERS[name]
    svi = make(**kwargs)
    if seen:
        train(svi, 2)
        match = "saved with the sites" if name == "module" else match
    refuses(svi, path, match)
    if not seen:
        assert not svi.guide.sites
        assert not list(svi.guide.parameters())


def test_other_model(path):
    pyro.clear_param_store()
    svi = make(other_shape, density=0.3)
    svi.load(path)  # a function tells nothing before it is called
    state = snapshot(svi)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"another model: saved with the sites \['w0', 'b0'"):
            svi.step(X, Y)
        assert snapshot(svi) == state
    pyro.clear_param_store()
    svi = make(other_shape, density=0.3)
    svi.step(X, Y)
    refuses(svi, path, "saved with the sites")


def test_other_shape_and_kind_of_a_site():
    def model(shape, prior):
        pyro.sample("w", prior.expand(shape).to_event(2))

    guides = {}
    for name, shape, prior in (
        ("a", [4, 5], dist.Normal(0.0, 1.0)),
        ("b", [5, 4], dist.Normal(0.0, 1.0)),
        ("c", [4, 5], dist.Exponential(1.0)),
        ("d", [4, 5], dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)),
    ):
        pyro.clear_param_store()
        guides[name] = AutoSparseNormal(model, density=1.0)
        guides[name](shape, prior)
    state = guides["a"].state_dict()
    for name, match in (
        ("b", r"'w': saved with 20 active of \(4, 5\), this guide has 20 active of \(5, 4\)"),
        ("c", "real-valued, this guide has 20 active of .4, 5., constrained"),
        ("d", "in torch.float32, this guide has .* in torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=match):
            guides[name].load_state_dict(state)


def test_shape_of_a_parameter(path):
    pyro.clear_param_store()
    pyro.param("slope", torch.ones(7), constraint=dist.constraints.positive)
    refuses(make(), path, r"'slope': saved as \(10,\) torch.float32, here it is \(7,\)")


@pytest.mark.parametrize("local", [False, True], ids=["", "saved with local parameters"])
def test_stale_parameter_store(path, local):
    if local:
        pyro.clear_param_store()
        state = {**checkpoint.FILES.read(path), "store": {}, "optim": {}}
        checkpoint.FILES.write(path, state)
    trained()
    svi = make()  # and its guide would find the other guide's values in the store
    before = fingerprint(dict(pyro.get_param_store().items()))
    with pytest.raises(ValueError, match=r"store holds 'AutoSparseNormal.loc'.*clear_"):
        svi.load(path)
    assert fingerprint(dict(pyro.get_param_store().items())) == before
    assert not svi.guide.sites


def changed(optim, change):
    """A copy of the optimizers' states in which one is changed."""
    optim = copy.deepcopy(optim)
    change(optim["guide.loc_unconstrained"])
    return optim


def shorten(saved):
    (state,) = saved["state"]["state"].values()
    state["exp_avg"] = state["exp_avg"][1:]


def test_damaged_state():
    svi = trained()
    state = svi.state_dict()
    for key, value, match in (
        ("indices", state["guide"]["indices"].flip(0), "indices of site 'w0' are damaged"),
        ("indices", state["guide"]["indices"][1:], r"indices of shape \(39,\), got \(38,\)"),
        ("loc_unconstrained", None, "expected a tensor loc_unconstrained"),
        ("_extra_state", None, "no table of sites"),
    ):
        before = fingerprint(svi.state_dict())
        with pytest.raises(ValueError, match=match):
            svi.load_state_dict({**state, "guide": {**state["guide"], key: value}})
        assert fingerprint(svi.state_dict()) == before
    with pytest.raises(ValueError, match="random state is damaged"):
        svi.load_state_dict({**state, "random": {**state["random"], "torch": torch.zeros(3)}})
    optim = {key: {**saved, "state": {}} for key, saved in state["optim"].items()}
    before = fingerprint(svi.state_dict())
    for key, value, match in (
        ("steps", "6", r"\['steps'\] is a str, expected int"),
        ("steps", -1, "expected a number of steps, got -1"),
        ("record", [{"guide": "", "site": "w7", "parts": []}], "unknown site 'w7'"),
        ("record", [{}], r"damaged: \['record'\]\[0\] has no 'guide'"),
        (
            "optim",
            {"guide.loc_unconstrained": None},
            r"loc_unconstrained'\] is a NoneType, expecte",
        ),
        ("record", [{"guide": "", "site": "w0"}], "has no 'parts'"),
        ("record", [{"guide": "", "site": "w0", "parts": [["Nothing", 1]]}], "'w0': KeyError"),
        ("record", [{"guide": "", "site": "w0", "parts": [["Product"]]}], "'w0': TypeError"),
        ("store", {"shift": None}, r"\['shift'\] is a NoneType, expected Mapping"),
        ("elbo", {"max_plate_nesting": 1}, r"\['elbo'\] has no 'may_fuse'"),
        ("elbo", None, r"\['elbo'\] is a NoneType"),
        ("schedule", {"class": "CosineSchedule"}, r"\['schedule'\] has no 'fields'"),
        ("random", {k: v for k, v in state["random"].items() if k != "cuda"}, "has no 'cuda'"),
        ("optim", changed(state["optim"], lambda saved: saved.pop("grad")), "has no 'grad'"),
        ("optim", changed(state["optim"], shorten), "'exp_avg' was saved with shape"),
    ):
        with pytest.raises(ValueError, match=match):
            svi.load_state_dict({**state, key: value})
        assert fingerprint(svi.state_dict()) == before
    with pytest.raises(ValueError, match="optimizer's state cannot be loaded"):
        svi.load_state_dict({**state, "optim": optim})


NAN, HUGE = float("nan"), 2**62
GUIDES = {
    "normal": {"guide": partial(AutoSparseNormal, density=0.3)},
    "delta": {"guide": partial(AutoSparseDelta, density=0.3)},
    "low rank": {"guide": partial(AutoSparseLowRankMultivariateNormal, density=0.3)},
    "tiles": {
        "guide": partial(AutoSparseNormal, density={"w0": 0.2}, structure={"w0": Tiles(2, 3)})
    },
    "N:M": {"guide": partial(AutoSparseNormal, density={"w0": 0.25}, structure={"w0": NM(1, 4)})},
    "competing": {"guide": partial(AutoSparseNormal, density=0.3), "allocation": "global"},
}
SITE = ("guide", "_extra_state", "sites", 0)
OPTIM = ("optim", "guide.loc_unconstrained")
MOMENT = (*OPTIM, "state", "state", 0, "exp_avg")
GROUP = (*OPTIM, "state", "param_groups", 0)
# Where in a state, what becomes of it, and what is said.
DAMAGES = [
    (("guide", "indices"), lambda v: v.flip(0), "indices of site 'w0' are damaged"),
    (("guide", "indices"), lambda v: v * 0 + v[0], "indices of site 'w0' are damaged"),
    (("guide", "indices"), lambda v: v - 10**6, "indices of site 'w0' are damaged"),
    (("guide", "indices"), lambda v: v + HUGE, "indices of site 'w0' are damaged"),
    (("guide", "indices"), lambda v: v.int(), "expects a 1-d int64 tensor"),
    (("guide", "indices"), lambda v: v.to("meta"), "indices is not dense"),
    (("guide", "indices"), lambda v: v.to_sparse(), "indices is not dense"),
    (("guide", "loc_unconstrained"), lambda v: v.unsqueeze(-1), "parameters are damaged"),
    (("guide", "loc_unconstrained"), lambda v: v.repeat(2, 1).T, "parameters are damaged"),
    (
        ("guide", "loc_unconstrained"),
        lambda v: v[:1].clone().expand(len(v)),
        "no numbers for all of it",
    ),
    (("guide", "loc_unconstrained"), lambda v: v.long(), "dtypes are|loc: saved as torch.int64"),
    (("guide", "loc_unconstrained"), lambda v: v * NAN, r"not finite .* at sites \['w0'"),
    (("guide", "loc_unconstrained"), lambda v: v + 1e39, r"not finite .* at sites \['w0'"),
    (("guide", "extra"), lambda v: torch.zeros(1), "'extra' is not here"),
    ((*SITE, "name"), lambda v: "b0", "two sites of one name"),
    ((*SITE, "shape", 0), lambda v: -v, "site 'w0' cannot be"),
    ((*SITE, "shape", 0), lambda v: HUGE, "site 'w0' cannot be"),
    ((*SITE, "shape", 0), lambda v: 10**30, "table of sites is damaged"),
    ((*SITE, "shape", 0), lambda v: True, "is a bool, expected int"),
    ((*SITE, "k"), lambda v: 0, "site 'w0' cannot be"),
    ((*SITE, "k"), lambda v: float(v), "is a float, expected int"),
    ((*SITE, "dtype"), lambda v: "load", "cannot be of 'load'"),
    ((*SITE, "dtype"), lambda v: "int64", "cannot be of 'int64'"),
    ((*SITE, "real"), lambda v: False, "is sparse, and constrained"),
    ((*SITE, "event_dim"), lambda v: 3, "site 'w0' cannot be"),
    ((*SITE, "structure"), lambda v: {"class": "NM", "x": 1}, "structure .* is damaged"),
    ((*SITE, "structure"), lambda v: {"class": "NM", "n": 1, "m": 5}, "w0"),
    (("model",), lambda v: [], r"\['model'\] is a list"),
    (("scales",), lambda v: 1, r"\['scales'\] is a int"),
    (("scales",), lambda v: ["x"], r"\['scales'\]\[0\] is a str"),
    (("elbo", "max_plate_nesting"), lambda v: -1, "number of nested plates, got -1"),
    (("store", "slope", "value"), lambda v: v.long(), "'slope'"),
    (("store", "slope", "value"), lambda v: v.to("meta"), "'slope'"),
    (("store", "slope", "constraint", "class"), lambda v: "dependent", "constraint of .*'slope'"),
    (("store", "slope", "constraint", "fields"), lambda v: {}, "constraint of .*'slope'"),
    (
        ("store", "slope", "constraint", "fields", "check"),
        lambda v: 1,
        "constraint of parameter 'slope'.*(no field|saved as)",
    ),
    (MOMENT, lambda v: v.unsqueeze(-1), "'exp_avg' was saved with shape"),
    (MOMENT, lambda v: v * NAN, "loc_unconstrained': it cannot go on from"),
    (MOMENT[:-1], lambda v: {"step": v["step"]}, r"it cannot go on from \['step'\]"),
    (MOMENT[:-2], lambda v: {}, "what it had of earlier steps is not in it"),
    ((*GROUP, "lr"), lambda v: "0.1", "'lr' was saved as '0.1'"),
    ((*GROUP, "lr"), lambda v: NAN, "'lr' was saved as nan"),
    ((*GROUP, "betas"), lambda v: 0.9, "'betas' was saved as 0.9"),
    (("optim",), lambda v: {}, "it has no optimizer of .*'guide.loc_unconstrained'"),
]


class Normalised(torch.optim.Optimizer):
    """Of a user's: it has no step where the gradient is 0, and no state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad / p.grad.norm()


@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": np.float64(0.01)}),
        lambda: pyro.optim.PyroOptim(Normalised, {"lr": 0.01}),
        lambda: pyro.optim.DCTAdam({"lr": 0.01, "subsample_aware": True}),
        lambda: pyro.optim.Adagrad({"lr": 0.01}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
        lambda: pyro.optim.SGD({"lr": 1e-6}),
        pytest.param(
            lambda: pyro.optim.PyroOptim(torch.optim.Adafactor, {"lr": 0.01}),
            marks=pytest.mark.skipif(
                not hasattr(torch.optim, "Adafactor"), reason="torch has no Adafactor"
            ),
        ),
    ],
)
def test_valid_states_of_optimizers_load(optim):
    def made():
        pyro.clear_param_store()
        guide = AutoSparseLowRankMultivariateNormal(bnn, density=0.3, rank=2)
        return SSVI(bnn, guide, optim(), Trace_ELBO())

    svi = made()
    train(svi, 3)
    state = svi.state_dict()
    called: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *args: called.append(1))
    fresh = made()
    fresh.load_state_dict(state)
    assert not called
    hook.remove()
    assert fingerprint(fresh.state_dict()) == fingerprint(state)


@pytest.mark.parametrize("saved", [False, True])
def test_capturable_is_the_file_s_as_with_torch(saved):
    """On a GPU Adam may count its steps there, and cannot go on so on a CPU before it is told."""
    svi = make()
    train(svi, 3)
    state = svi.state_dict()
    expected = svi.step(X, Y)
    optim = copy.deepcopy(state["optim"])
    for each in optim.values():
        each["state"]["param_groups"][0]["capturable"] = saved
    pyro.clear_param_store()
    again = make(optim=pyro.optim.Adam({"lr": 0.02, "capturable": not saved}))
    again.load_state_dict({**state, "optim": optim})
    if saved:
        with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be"):
            again.step(X, Y)
        again.load_state_dict({**state, "optim": optim})
    for each in again.optim.optim_objs.values():
        assert each.param_groups[0]["capturable"] is saved
        each.param_groups[0]["capturable"] = False
    assert again.step(X, Y) == expected


class Smoothed(Normalised):
    """Of a user's, with a state."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                old = self.state[p].get("buffer", torch.zeros_like(p))
                self.state[p]["buffer"] = 0.9 * old + p.grad
        super().step()


def test_moments_of_a_user_s_optimizer_have_the_parameter_s_shape():
    svi = make(optim=pyro.optim.PyroOptim(Smoothed, {"lr": 0.01}))
    train(svi, 2)
    state = svi.state_dict()
    place = (*OPTIM, "state", "state", 0, "buffer")
    with pytest.raises(ValueError, match="'buffer' was saved with shape"):
        svi.load_state_dict(with_damage(state, place, lambda v: v[1:]))
    svi.load_state_dict(state)


def test_bounds_in_numbers_of_numpy():
    def model(x, y=None):
        bounds = dist.constraints.interval(np.float64(0.01), np.float64(2.0))
        pyro.param("bounded", torch.tensor(0.5), constraint=bounds)
        return bnn(x, y)

    state = trained(model=model).state_dict()
    pyro.clear_param_store()
    svi = make(model=model)
    train(svi, 1)
    svi.load_state_dict(state)
    assert fingerprint(svi.state_dict()) == fingerprint(state)


def with_damage(state, place, change):
    """A copy of plain data with something else at one place."""
    if not place:
        return change(state)
    key, *rest = place
    inner = state.get(key) if isinstance(state, dict) else state[key]
    copied = copy.copy(state)
    copied[key] = with_damage(inner, rest, change)
    return copied


@pytest.mark.parametrize(
    ("name", "seen"), [*((name, i % 2) for i, name in enumerate(GUIDES)), ("normal", 1)]
)
def test_damage_is_named_and_changes_nothing(name, seen):
    kwargs = {**GUIDES[name], "guide": GUIDES[name]["guide"](bnn)}
    state = trained(**kwargs).state_dict()
    pyro.clear_param_store()
    svi = make(**{**kwargs, "guide": GUIDES[name]["guide"](bnn)})
    if seen:
        train(svi, 2)
    before = snapshot(svi)
    for place, change, match in DAMAGES:
        if "guide" in place and not seen and (name, match) == ("delta", "dtypes are"):
            continue
        with pytest.raises(ValueError, match=match):
            svi.load_state_dict(with_damage(state, place, change))
        assert snapshot(svi) == before, place
    svi.load_state_dict(state)
    assert fingerprint(svi.state_dict()) == fingerprint(state)


def test_what_is_no_state():
    svi = make()
    for state in (None, 1, [], torch.zeros(3), "x"):
        with pytest.raises(ValueError, match="is not what SSVI"):
            svi.load_state_dict(state)


def test_a_record_of_another_shape():
    svi = trained(7)
    state = svi.state_dict()
    (first, *_) = state["record"]
    for change in (
        lambda parts: [[kind, *(field[:-1] for field in fields)] for kind, *fields in parts],
        lambda parts: [["Dense", torch.zeros(3)]],
        lambda parts: [["Dense", torch.zeros(10, 12, device="meta")]],
        lambda parts: [["Convolution", torch.zeros(1), torch.zeros(1), 3, "x"]],
    ):
        record = [{**first, "parts": change(first["parts"])}]
        with pytest.raises(ValueError, match="gradient of site 'w0'"):
            svi.load_state_dict({**state, "record": record})


@pytest.mark.parametrize(
    ("name", "seen"), [("normal", 0), ("normal", 1), ("delta", 0), ("low rank", 1), ("tiles", 0)]
)
def test_damage_to_the_state_of_a_guide(name, seen):
    """As above, for what torch.save(guide.state_dict()) wrote."""
    make_guide = GUIDES[name]["guide"]
    state = trained(guide=make_guide(bnn)).guide.state_dict()
    pyro.clear_param_store()
    guide = make_guide(bnn)
    if seen:
        guide(X, Y)
    before = fingerprint(guide.state_dict()), repr(guide.sites)
    damages = [(place[1:], *rest) for place, *rest in DAMAGES if place[0] == "guide"]
    for place, change, match in damages:
        with pytest.raises(RuntimeError, match=match.replace("'extra' is not here", "'extra'")):
            guide.load_state_dict(with_damage(state, place, change))
        assert (fingerprint(guide.state_dict()), repr(guide.sites)) == before, place
    with pytest.raises(RuntimeError, match="assign=True would part"):
        guide.load_state_dict(state, assign=True)
    if "scale_unconstrained" in state:
        scale = state["scale_unconstrained"] - 1000.0
        with pytest.raises(RuntimeError, match="scale is not positive at sites"):
            guide.load_state_dict({**state, "scale_unconstrained": scale})
    assert (fingerprint(guide.state_dict()), repr(guide.sites)) == before
    guide.load_state_dict(state)
    assert fingerprint(guide.state_dict()) == fingerprint(state)


class ExpScale(AutoSparseNormal):
    """Scales by another transform: the same numbers mean other ones."""

    scale_constraint = dist.constraints.positive


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
def test_scales_under_another_constraint(path, seen):
    state = checkpoint.FILES.read(path)["guide"]
    pyro.clear_param_store()
    svi = make(guide=ExpScale(bnn, density=0.3))
    if seen:
        train(svi, 2)
    refuses(svi, path, "'scale': saved as SoftplusPositive.* here it is GreaterThan")
    with pytest.raises(RuntimeError, match="'scale': saved as SoftplusPositive"):
        svi.guide.load_state_dict(state)


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
def test_a_module_s_parameter_under_another_constraint(path, seen):
    model = Net()
    trained(model=model).save(path)
    pyro.clear_param_store()
    other = Net()
    other.noise = PyroParam(torch.tensor(0.5), dist.constraints.softplus_positive)
    svi = make(model=other)
    if seen:
        train(svi, 2)
    refuses(svi, path, "constraint of parameter 'noise': saved as GreaterThan")


def test_another_schedule_is_reported_and_stays(path):
    pyro.clear_param_store()
    guide = AutoSparseNormal(bnn, density=0.3)
    schedule = CosineSchedule(every=4)
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), schedule=schedule)
    with pytest.raises(UserWarning, match="schedule"):  # warnings are errors here
        svi.load(path)
    assert not svi.guide.sites
    with pytest.warns(UserWarning, match=r"ConstantSchedule\(every=4, .*CosineSchedule") as caught:
        svi.load(path)
    assert caught[0].filename == __file__
    assert svi.schedule is schedule
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyro.clear_param_store()
        make().load(path)


# Before the guide has seen data


def test_loaded_guide_needs_no_data(path):
    svi = trained()
    state, active, summary = svi.guide.state_dict(), svi.guide.active_sets, str(svi.guide.summary())
    pyro.clear_param_store()
    guide = AutoSparseNormal(pyro.poutine.block(bnn, hide=["noise"]), density=0.3)
    with pytest.raises(RuntimeError, match="has no parameters before it has seen data"):
        _ = guide.active_sets
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    guide.load_state_dict(torch.load(file, weights_only=True))
    assert all(guide.active_sets[name].same(active[name]) for name in active)
    assert str(guide.summary()) == summary
    assert torch.equal(guide.loc, svi.guide.loc)
    assert torch.equal(guide.scale, svi.guide.scale)
    for use in (guide.median, guide.posterior):
        with pytest.raises(RuntimeError, match="constrained, and the loaded guide has not seen"):
            use()


def test_medians_of_a_loaded_guide():
    model = Net()
    svi = trained(model=model)
    medians = svi.guide.median()
    pyro.clear_param_store()
    guide = AutoSparseNormal(model, density=0.3)
    guide.load_state_dict(svi.guide.state_dict())
    for name, median in guide.median().items():
        assert torch.equal(median, medians[name])
    assert set(guide.posterior()) == set(medians)


def test_first_call_of_a_loaded_guide_draws_what_a_later_one_draws():
    svi = trained(model=(model := Net()))
    state, buffers = svi.guide.state_dict(), {k: v.clone() for k, v in model.named_buffers()}
    pyro.set_rng_seed(7)
    expected = svi.guide(X, Y)
    pyro.clear_param_store()
    guide = AutoSparseNormal(model, density=0.3)
    guide.load_state_dict(state)
    pyro.set_rng_seed(7)
    for name, value in guide(X, Y).items():
        assert torch.equal(torch.as_tensor(value.to_dense()), expected[name].to_dense())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert torch.equal(guide.loc, svi.guide.loc)


def test_loaded_for_prediction(path):
    svi = trained()
    svi.load(path)
    pyro.set_rng_seed(3)
    expected = Predictive(bnn, guide=svi.guide, num_samples=4)(X)["obs"]
    pyro.clear_param_store()
    svi = make()
    svi.load(path)
    svi.guide(X, Y)  # or the guide would take "obs" for a latent site
    pyro.set_rng_seed(3)
    assert torch.equal(Predictive(bnn, guide=svi.guide, num_samples=4)(X)["obs"], expected)


def test_state_from_before_the_first_call():
    svi = make()
    state = svi.state_dict()
    train(svi, 2)
    with pytest.raises(ValueError, match="saved before the guide had seen data"):
        svi.load_state_dict(state)
    assert svi.steps == 2


@pytest.mark.parametrize("seen", [False, True])
def test_state_dict_of_another_density(seen):
    state = trained().guide.state_dict()
    pyro.clear_param_store()
    guide = AutoSparseNormal(bnn, density=0.2)
    if seen:
        guide(X, Y)
    before = fingerprint(guide.state_dict())
    with pytest.raises(
        RuntimeError, match=r"saved with 36 active of \(10, 12\), this guide has 24"
    ):
        guide.load_state_dict(state)
    assert fingerprint(guide.state_dict()) == before


def test_state_dict_of_a_guide_that_predicts_first():
    """Without labels, a loaded guide knows that they are observed."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 12]).to_event(2))
        with pyro.plate("data", len(x)):  # a site that would be sparse, if it were latent
            pyro.sample("obs", dist.Normal(x @ w.T, 1.0).to_event(1), obs=y)

    y = torch.randn(len(X), 4)
    svi = make(model)
    svi.step(X, y)
    state, guide = svi.guide.state_dict(), svi.guide
    loaded = AutoSparseNormal(model, density=0.3)
    draws = []
    for each in (guide, loaded):
        pyro.clear_param_store()
        if each is loaded:
            loaded.load_state_dict(state)
        pyro.set_rng_seed(0)
        draws.append(Predictive(model, guide=each, num_samples=3)(X[:5])["obs"])
    assert draws[0].shape == (3, 5, 4)
    assert torch.equal(*draws)
    assert fingerprint(loaded.state_dict()) == fingerprint(state)
    SSVI(model, loaded, svi.optim, Trace_ELBO()).step(X, y)


def test_state_dict_without_its_table():
    svi = trained()
    state = svi.guide.state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="no table of sites at '_extra_state'"):
        svi.guide.load_state_dict(state)


def test_state_dict_of_a_newer_version():
    svi = trained()
    state = svi.guide.state_dict()
    state["_extra_state"]["version"] = site_table.VERSION + 1
    with pytest.raises(RuntimeError, match="newer pyro_ssvi"):
        svi.guide.load_state_dict(state)


def test_older_state_dict_learns_from_its_first_call_what_is_observed():
    state = trained().guide.state_dict()
    (observed,) = state["_extra_state"].pop("observed")
    pyro.clear_param_store()
    guide = AutoSparseNormal(bnn, density=0.3)
    guide.load_state_dict(state)
    guide(X, Y)
    assert guide.observed == [observed]


# The parameter store


def test_parameter_store_alone_is_refused(tmp_path):
    trained()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(ValueError, match="cannot say which coordinates"):
        AutoSparseNormal(bnn, density=0.3)(X, Y)


@pytest.mark.parametrize("store_first", [False, True])
def test_parameter_store_beside_a_loaded_guide_is_refused(tmp_path, store_first):
    svi = trained()
    pyro.get_param_store().save(tmp_path / "store")
    state = svi.guide.state_dict()
    pyro.clear_param_store()
    guide = AutoSparseNormal(bnn, density=0.3)
    if store_first:
        pyro.get_param_store().load(tmp_path / "store")
        with pytest.raises(RuntimeError, match="parameter store holds"):
            guide.load_state_dict(state)
        assert not guide.sites
    else:
        guide.load_state_dict(state)
        pyro.get_param_store().load(tmp_path / "store")
        with pytest.raises(ValueError, match="parameter store holds"):
            guide(X, Y)


@pytest.mark.parametrize("own", ["loc", "scale"])
def test_a_store_with_one_foreign_parameter_is_refused(tmp_path, own):
    trained()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    svi = make()
    train(svi, 2)
    before = fingerprint(svi.guide.state_dict())
    name, raw = f"AutoSparseNormal.{own}", svi.guide.get_parameter(f"{own}_unconstrained")
    store = pyro.get_param_store()
    store.load(tmp_path / "store")
    store._params[name], store._param_to_name[raw] = raw, name
    with pytest.raises(ValueError, match="parameter store holds 'AutoSparseNormal"):
        svi.guide(X, Y)
    assert fingerprint(svi.guide.state_dict()) == before


def test_parameters_of_other_models_are_left_alone(path):
    svi = trained()
    other = pyro.param("other", torch.tensor(1.0))
    state = svi.state_dict()
    with torch.no_grad():
        other.unconstrained().fill_(2.0)
    svi.load_state_dict(state)
    assert pyro.param("other").item() == 2.0


@pytest.mark.parametrize(
    "constraint",
    [
        dist.constraints.interval(torch.tensor([0.0, 1.0]), 3.0),
        dist.constraints.independent(dist.constraints.greater_than(-1.0), 1),
        dist.constraints.cat([dist.constraints.positive, dist.constraints.real], -1, [1, 1]),
        dist.constraints.softplus_positive,
        dist.constraints.simplex,
    ],
    ids=lambda c: type(c).__name__,
)
def test_constraints(constraint):
    start = torch.tensor([0.25, 1.5])
    start = start / start.sum() if constraint is dist.constraints.simplex else start
    start = start + 1 if isinstance(constraint, dist.constraints.interval) else start

    def model(x, y=None):
        pyro.param("p", start, constraint=constraint)
        return bnn(x, y)

    state = trained(model=model).state_dict()
    values = pyro.param("p").detach().clone()
    pyro.clear_param_store()
    svi = make(model)
    svi.load_state_dict(state)
    assert torch.equal(pyro.param("p").detach(), values)
    assert fingerprint(svi.state_dict()) == fingerprint(state)


class Own(type(dist.constraints.positive)):
    pass


transform_to.register(Own)(lambda constraint: dist.transforms.ExpTransform())


def test_constraint_of_the_user():
    def model(x, y=None):
        pyro.param("p", torch.tensor(1.0), constraint=Own(0.0))
        return bnn(x, y)

    state = trained(model=model).state_dict()
    pyro.clear_param_store()
    svi = make(model)
    with pytest.raises(ValueError, match="'p' has a constraint of your own: run the model once"):
        svi.load_state_dict(state)
    model(X)
    svi.load_state_dict(state)
    assert fingerprint(svi.state_dict()) == fingerprint(state)


def test_module_out_of_reach():
    """Its parameters are in the store, but nobody can see its buffers."""
    net, model = hidden_net()
    svi = trained(model=model)
    with pytest.raises(ValueError, match=r"svi.model.add_module\('net', the_module\)"):
        svi.state_dict()
    svi.model.add_module("net", net)
    state = svi.state_dict()
    pyro.clear_param_store()
    net, model = hidden_net()
    svi = make(model)
    with pytest.raises(ValueError, match=r"'net.0.weight' is not here.*svi.model.add_module"):
        svi.load_state_dict(state)
    svi.model.add_module("net", net)
    svi.load_state_dict(state)
    assert fingerprint(svi.state_dict()) == fingerprint(state)


def test_part_that_has_not_seen_data():
    state = CASES["with an AutoNormal"]().state_dict()
    pyro.clear_param_store()
    svi = guide_list(AutoNormal)
    with pytest.raises(ValueError, match=r"noise_unconstrained' is not here.*first call"):
        svi.load_state_dict(state)


def test_what_a_file_cannot_hold_is_named():
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"a": [object()]}

        def set_extra_state(self, state):
            pass

        def forward(self, x, y=None):
            return bnn(x, y)

    with pytest.raises(TypeError, match=r"\['model.\_extra_state'\]\['a'\]\[0\] is a object: a ch"):
        trained(model=Odd()).state_dict()


@pytest.mark.parametrize("kind", [ConstantSchedule, CosineSchedule, InverseSqrtSchedule])
def test_state_is_plain(kind):
    schedule = kind(every=2)
    guide = AutoSparseNormal(bnn, density=0.3)
    svi = SSVI(bnn, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), schedule=schedule)
    svi.step(X, Y)
    file = io.BytesIO()
    torch.save(svi.state_dict(), file)
    file.seek(0)
    assert fingerprint(torch.load(file, weights_only=True)) == fingerprint(svi.state_dict())
