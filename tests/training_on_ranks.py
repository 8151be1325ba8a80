"""Trainings in several processes on this machine, that test_distributed.py starts and reads.

Reads lines ``case world_size folder``; each process writes what it saw to ``folder/rank.pt``.
"""

import datetime
import os
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import pyro
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pyro.distributions import Normal
from pyro.infer import ReweightedWakeSleep, TraceMeanField_ELBO
from training_to_resume import Net, X, Y, bnn, fingerprint, guide_list, make, regression

from pyro_ssvi import AutoSparseNormal, ConstantSchedule, checkpoint
from pyro_ssvi.addition import Evidence, Gradient
from pyro_ssvi.distributed import DistributedSSVI
from pyro_ssvi.safe_file import Format
from pyro_ssvi.structures import NM, Tiles

SEED = 7
STEPS = 10


make_distributed = partial(make, inference=DistributedSSVI)


def batch_of(rank):
    """Rows that no other process has."""
    return X[rank::4], Y[rank::4]


def train(svi, steps=STEPS, after=lambda: None):
    """Go on to this step with random batches; the state's hash after each step."""
    x, y = batch_of(dist.get_rank())
    seen = []
    while svi.steps < steps:
        rows = torch.randperm(len(x))[:4]
        svi.step(x[rows], y[rows])
        seen.append(shared_state(svi))
        after()
    return seen


def shared_state(svi):
    """A hash of what all processes should have in common."""
    state = svi.state_dict()
    return fingerprint([state[key] for key in ("guide", "optim", "store", "steps")])


class Oddities(Net):
    """A net with a frozen parameter, and buffers of many kinds that differ at first."""

    def __init__(self):
        super().__init__()
        self.norm.weight.requires_grad_(False)
        self.register_buffer("flags", torch.rand(3) < 0.5)
        self.register_buffer("count", torch.randint(9, ()))
        self.register_buffer("short", torch.rand(3).half())
        self.register_buffer("turned", torch.rand(3, 2).t())


def structured(structure):
    return AutoSparseNormal(bnn, density={"w0": 0.25, "w1": 0.3}, structure={"w0": structure})


def random_score(loc, scale):
    return torch.rand_like(loc)


def wide(gradient):
    """Whatever is in the first site is better."""
    return gradient.abs() + (gradient.shape[-1] == 12)


SETTINGS = {
    "adam": dict,
    "random addition": lambda: {"addition": "random"},
    "random removal": lambda: {"removal": random_score},
    "sampled": lambda: {"addition": Gradient(sampled=1.0)},
    "at the mean": lambda: {"addition": Gradient(at="mean")},
    "evidence": lambda: {
        "allocation": "global",
        "removal": "evidence",
        "addition": Evidence(batches=3),
    },
    "sites compete": lambda: {"allocation": "global"},
    "sites compete, mixed": lambda: {"allocation": "global", "addition": "mixed_gradient"},
    "a site that only loses": lambda: {
        "allocation": "global",
        "density": {"w0": 0.3, "w1": 0.9},
        "schedule": ConstantSchedule(every=4, fraction=0.1),
        "removal": lambda loc, scale: loc.abs() + len(loc),
        "addition": Gradient(score=wide),
    },
    "sites compete at random": lambda: {
        "allocation": "global",
        "addition": "random",
        "removal": random_score,
    },
    "sites compete, sampled": lambda: {"allocation": "global", "addition": Gradient(sampled=1.0)},
    "local reparameterisation": lambda: {"loss": TraceMeanField_ELBO(), "local_reparam": True},
    "scheduler": lambda: {
        "optim": pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.9}
        )
    },
    "module": lambda: {"model": Net()},
    "frozen parameters and odd buffers": lambda: {"model": Oddities()},
    "list of guides": lambda: {"guide": guide_list().guide},
    "tiles": lambda: {"guide": structured(Tiles(2, 3))},
    "groups": lambda: {"guide": structured(NM(1, 4)), "addition": "sampled_gradient"},
    "wake-sleep": lambda: {
        "model": regression,
        "density": {"w": 0.5},
        "loss": ReweightedWakeSleep(num_particles=2, vectorize_particles=False, insomnia=1.0),
        "addition": "random",
    },
}


def agree(rank, folder, name):
    """Train with these settings."""
    svi = make_distributed(**SETTINGS[name]())
    seen = train(svi)
    if name == "frozen parameters and odd buffers":
        kept = ["flags", "count", "short", "turned", "norm.weight"]
        seen.append(fingerprint([svi.model.model.state_dict()[key] for key in kept]))
    return {"seen": seen, "random": fingerprint(torch.rand(3))}


def one_process(rank, folder):
    """With one process it is SSVI."""
    ends = []
    for made in (make_distributed, make):
        pyro.set_rng_seed(SEED)
        pyro.clear_param_store()
        svi = made()
        x, y = batch_of(0)
        for _ in range(STEPS):
            svi.step(x, y)
        ends.append(shared_state(svi))
    return ends


def gradients(rank, folder, structure=None):
    """Steps and exchanges in float64: where it went from and to, and the random states."""
    torch.set_default_dtype(torch.float64)
    guide = None if structure is None else structured(structure)
    schedule = ConstantSchedule(every=2)
    svi = make_distributed(guide=guide, addition=Gradient(), schedule=schedule)
    x, y = (part.double() for part in batch_of(rank))
    svi._begin((x, y), {})
    start = svi.state_dict()
    losses = [svi.step(x, y) for _ in range(5)]
    return {"start": start, "losses": losses, "end": svi.state_dict()}


def save(rank, folder):
    svi = make_distributed()
    train(svi, 6)
    svi.save(folder / "a.ckpt")
    svi.export(folder / "a.posterior")
    return {"seen": train(svi), "random": fingerprint(torch.rand(3))}


def load(rank, folder):
    """Go on from the file of another run, in a fresh process."""
    svi = make_distributed()
    svi.load(folder.parent / "a.ckpt")
    return {"seen": train(svi), "random": fingerprint(torch.rand(3))}


def nan_in_one(rank, folder):
    """One process gets a batch of NaN, in the step that feeds an exchange and in another one."""
    pyro.enable_validation(False)  # it would raise in that process
    svi = make_distributed()
    train(svi, 2)
    x, y = batch_of(rank)
    before, caught = svi.state_dict(), []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            svi.step(x, y.clone().fill_(torch.nan) if rank == 1 else y)
        caught += [str(warning.message) for warning in record]
    after = svi.state_dict()
    same = [fingerprint(before[key]) == fingerprint(after[key]) for key in ("guide", "optim")]
    return {"same": same, "caught": caught, "seen": train(svi)}


def bad_score_in_one(rank, folder):
    """One process has scores that are not finite, of whatever the gradient is."""
    factor = torch.inf if rank == 1 else 1.0

    def score(gradient):
        return gradient.abs().nan_to_num() * factor

    return skipped_exchange(rank, addition=Gradient(score=score))


def bad_scores_in_all(rank, folder):
    score = Gradient(score=lambda gradient: gradient * torch.nan)
    return skipped_exchange(rank, addition=score)


def skipped_exchange(rank, **options):
    svi = make_distributed(**options)
    train(svi, 2)
    before = svi.guide.indices.clone()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        svi.exchange(*batch_of(rank))
    caught = [str(warning.message) for warning in record]
    unchanged = torch.equal(before, svi.guide.indices)
    return {"unchanged": unchanged, "caught": caught, "seen": train(svi, 3)}


def site_unused_in_one(rank, folder):
    """The model of one process does without a site."""

    def model(x, y):
        w0 = pyro.sample("w0", Normal(0.0, 1.0).expand([10, 12]).to_event(2))
        w1 = pyro.sample("w1", Normal(0.0, 1.0).expand([1, 10]).to_event(2))
        hidden = F.linear(x, w0).tanh() if rank != 1 else x[:, :10]
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", Normal(F.linear(hidden, w1).squeeze(-1), 1.0), obs=y)

    svi = make_distributed(model, addition=Gradient())
    train(svi, 2)
    return {"exchanged": svi.exchange(*batch_of(rank)), "seen": train(svi)}


def some_of_them(rank, folder):
    """The last two processes train, and save and load, without the others."""
    world_size = dist.get_world_size()
    group = dist.new_group([world_size - 2, world_size - 1])
    if rank < world_size - 2:
        return None
    svi = make_distributed(process_group=group)
    seen = [svi.rank, svi.world_size]
    for _ in range(6):
        svi.step(*batch_of(rank))
    svi.save(folder / "a.ckpt")
    ends = []
    for _ in range(2):
        svi.load(folder / "a.ckpt")
        for _ in range(4):
            svi.step(*batch_of(rank))
        ends.append(shared_state(svi))
    return {"seen": seen, "ends": ends}


class Clock(ConstantSchedule):
    """Exchanges at another step in each process."""

    def due(self, step):
        return step == 3 + dist.get_rank()


def sized_buffer(rank):
    net = Net()
    net.register_buffer("sized", torch.zeros(3 + rank))
    return net


# What the processes are to have in common, and what each of them has.
DIFFERENT = {
    "density": lambda rank: {"density": 0.3 if rank == 0 else 0.4},
    # As many active coordinates in all.
    "shares of sites": lambda rank: {
        "density": {"w0": 37 / 120 if rank == 1 else 0.3, "w1": 0.4 if rank == 1 else 0.5}
    },
    "schedule": lambda rank: {"schedule": ConstantSchedule(every=4 + rank)},
    "steps to exchange": lambda rank: {"schedule": Clock(), "addition": Gradient()},
    "buffer": lambda rank: {"model": sized_buffer(rank)},
    "learning rate": lambda rank: {"optim": pyro.optim.Adam({"lr": 0.01 * (1 + rank)})},
    "kl weight": lambda rank: {"kl_weight": 1.0 - 0.1 * rank},
    "parameters": lambda rank: {},
}


def differ(rank, folder, what):
    """Processes that do not train the same thing."""
    x, y = batch_of(rank)
    svi = make_distributed(**DIFFERENT[what](rank))
    svi.step(x, y)
    if what == "parameters" and rank == 1:
        svi.guide.loc_unconstrained.data += 1e-3
    train_alone(svi, 5, rank)


def train_alone(svi, steps, rank):
    """Go on to this step, and let nothing but steps tell how far the others are."""
    while svi.steps < steps:
        svi.step(*batch_of(rank))


def other_share(rank, folder):
    svi = make_distributed()
    train_alone(svi, 1, rank)
    svi.exchange(*batch_of(rank), share=0.2 + 0.1 * rank)


def other_numbers_of_steps(rank, folder):
    """As from loaders of different lengths."""
    svi = make_distributed()
    train_alone(svi, 5 + rank, rank)
    svi.save(folder / "a.ckpt")


def saved_with_other_parameters(rank, folder):
    svi = make_distributed(schedule=ConstantSchedule(every=100))
    train_alone(svi, 2, rank)
    svi.guide.loc_unconstrained.data += 1e-3 * rank
    svi.save(folder / "a.ckpt")


def raising(rank, folder, at):
    """The model of one process raises once, after it has made gradients of its first particle."""
    calls = []

    def model(x, y):
        value = bnn(x, y)
        if rank == 1 and svi.steps == at and not calls:
            calls.append(1)
            raise OSError("cannot read")
        return value

    svi = make_distributed(model)
    train_alone(svi, at, rank)
    before = svi.state_dict()
    try:
        svi.step(*batch_of(rank))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    if at:
        after = svi.state_dict()
        kept = fingerprint(before["guide"]) == fingerprint(after["guide"])
        cleared = not any(param.grad.any() for param in svi.optim.optim_objs)
    else:
        kept = cleared = True
    return {"told": told, "kept": kept, "cleared": cleared, "seen": train(svi)}


def raising_in_exchange(rank, folder):
    def model(x, y):
        if rank == 1 and svi.steps == 2:
            raise OSError("cannot read")
        return bnn(x, y)

    svi = make_distributed(model)
    train_alone(svi, 2, rank)
    svi.exchange(*batch_of(rank))


def bad_removal_in_one(rank, folder):
    def score(loc, scale):
        return loc.new_full(loc.shape, torch.nan) if rank == 1 else loc

    return skipped_exchange(rank, removal=score)


def loaded_in_one_only(rank, folder):
    """A file that does not fit in one of the processes."""
    svi = make_distributed()
    train_alone(svi, 5, rank)
    svi.save(folder / "a.ckpt")
    pyro.clear_param_store()
    svi = make_distributed(density=0.4 if rank == 1 else 0.3)
    try:
        svi.load(folder / "a.ckpt")
    except Exception as error:
        return {"told": f"{type(error).__name__}: {error}", "steps": svi.steps}


def outside(rank, folder):
    """A process that is not in the group."""
    group = dist.new_group([0])
    if rank:
        make_distributed(process_group=group)


def where_warned(rank, folder):
    """The files that warnings point at, of every kind."""
    pyro.enable_validation(False)
    x, y = batch_of(rank)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        pyro.set_rng_seed(0)
        svi = make_distributed()
        train_alone(svi, 2, rank)
        svi.step(x, y * torch.nan)
        svi.addition = Gradient(score=lambda gradient: gradient * torch.nan)
        svi.step(x, y)
        svi.exchange(x, y)
        state = svi.state_dict()
        svi.schedule = ConstantSchedule(every=100)
        svi.load_state_dict(state)
        svi.schedule = ConstantSchedule(every=4)
        svi.save(folder / "a.ckpt")
        svi.schedule = ConstantSchedule(every=100)
        svi.load(folder / "a.ckpt")
    return [(Path(warning.filename).name, str(warning.message)) for warning in record]


def same_seed(rank, folder):
    pyro.set_rng_seed(0)
    svi = make_distributed()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train(svi, 2)
    return [str(warning.message) for warning in record]


def not_all_use(rank, folder):
    """The model of one process has a parameter that comes late."""

    def model(x, y):
        if rank == 1 and svi.steps > 1:
            pyro.param("late", torch.tensor(0.0))
        return bnn(x, y)

    svi = make_distributed(model)
    train(svi, 5)


def die(rank, folder):
    """One process is killed in the middle of training."""
    svi = make_distributed()

    def after():
        if svi.steps == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(svi, 1000, after)


def cannot_save(rank, folder):
    svi = make_distributed()
    train(svi, 2)
    svi.save(folder / "missing" / "a.ckpt")


def cannot_write(rank, folder):
    """What torch raises if the disk is full."""

    class Full(Format):
        def write(self, path, state):
            raise RuntimeError("write failed")

    svi = make_distributed()
    train(svi, 2)
    checkpoint.FILES = Full("checkpoint", 1, "another")
    svi.save(folder / "a.ckpt")


def cannot_load(rank, folder):
    make_distributed().load(folder / "missing.ckpt")


CASES = {
    "gradients of tiles": partial(gradients, structure=Tiles(2, 3)),
    **{name: lambda rank, folder, name=name: agree(rank, folder, name) for name in SETTINGS},
    **{
        f"other {what}": lambda rank, folder, what=what: differ(rank, folder, what)
        for what in DIFFERENT
    },
    "raising in a step": partial(raising, at=2),
    "raising in the first step": partial(raising, at=0),
    **{
        function.__name__.replace("_", " "): function
        for function in (
            one_process,
            gradients,
            save,
            load,
            nan_in_one,
            bad_score_in_one,
            bad_scores_in_all,
            bad_removal_in_one,
            other_share,
            other_numbers_of_steps,
            saved_with_other_parameters,
            raising_in_exchange,
            loaded_in_one_only,
            outside,
            where_warned,
            site_unused_in_one,
            same_seed,
            not_all_use,
            die,
            cannot_save,
            cannot_write,
            cannot_load,
            some_of_them,
        )
    },
}


def run(case, rank, world_size, folder):
    """One process of a case; what it gives, or how it failed, goes to a file."""
    start = time.monotonic()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=30),
    )
    pyro.set_rng_seed(SEED + rank)
    try:
        result = {"result": CASES[case](rank, folder)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    torch.save({**result, "seconds": time.monotonic() - start}, folder / f"{rank}.pt")
    os._exit("error" in result)  # without farewells to others, which may be gone


def serve():
    for line in sys.stdin:
        case, world_size, folder = line.rstrip("\n").split("|")
        children = []
        for rank in range(int(world_size)):
            child = os.fork()
            if not child:
                run(case, rank, int(world_size), Path(folder))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(*codes, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make().step(X, Y)  # compiles what all of them need
    pyro.clear_param_store()
    serve()
