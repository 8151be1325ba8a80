"""What a prediction costs: SparsePredictive beside Predictive with AutoNormal, in time and memory.

Each contender is a process of its own, and they take turns, round by round::

    python benchmarks/prediction.py
    python benchmarks/prediction.py --hidden 4000 --density 0.01
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from contenders import PRIOR_SCALE, perceptron
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor

from pyro_ssvi import SSVI, AutoSparseNormal, SparsePredictive
from pyro_ssvi.nn import bayesianize


def serve(pipe: Connection, density: float | None, args: argparse.Namespace) -> None:
    """Predict on command; the first answer is what was needed to get ready."""
    torch.manual_seed(0)
    net = bayesianize(perceptron([784, args.hidden, args.hidden, 10], "meta"), PRIOR_SCALE)
    net.module.to_empty(device="cpu")

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x, y = torch.rand(args.batch_size, 784), torch.zeros(args.batch_size, dtype=torch.int64)
    options: Any = {"init_loc_fn": init_to_sample, "init_scale": 0.01}
    if density is None:
        guide: Any = AutoNormal(model, **options)
        predictive: Any = Predictive(
            model, guide=guide, num_samples=args.samples, return_sites=["obs"]
        )
    else:
        guide = AutoSparseNormal(model, density=density, **options)
        predictive = SparsePredictive(model, guide, args.samples, ["obs"])
    with torch.no_grad():
        guide(x, y)
        pipe.send(file_bytes(model, guide))
        before = peak()
        while pipe.recv():
            start = time.perf_counter()
            predictive(x)
            pipe.send((time.perf_counter() - start, peak() - before))


def file_bytes(model: Any, guide: Any) -> int:
    """Size of the file that predictions need."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior"
        if isinstance(guide, AutoNormal):
            torch.save(guide.state_dict(), path)
        else:
            SSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).export(path)
        return path.stat().st_size


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1200, help="units of the two hidden layers")
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    context = multiprocessing.get_context("spawn")
    names = ["Predictive, AutoNormal", *(f"SparsePredictive {100 * d:g}%" for d in args.density)]
    pipes, sizes = [], []
    for density in (None, *args.density):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, density, args), daemon=True).start()
        sizes.append(ours.recv())
        pipes.append(ours)
    times: list[list[float]] = [[] for _ in pipes]
    memory = [0] * len(pipes)
    for i in range(args.rounds + 1):
        for j, pipe in enumerate(pipes):
            pipe.send(True)
            seconds, memory[j] = pipe.recv()
            if i:  # the first compiles
                times[j].append(seconds)
    for pipe in pipes:
        pipe.send(False)
    print(
        f"784-{args.hidden}-{args.hidden}-10, batch {args.batch_size}, {args.samples} samples, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds\n"
    )
    print(
        f"{'':24}{'ms':>8}{'min .. max':>16}{'times faster':>14}{'peak MB above set-up':>22}"
        f"{'file MB':>10}{'smaller':>9}"
    )
    for name, each, grown, size in zip(names, times, memory, sizes, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[0], each, strict=True))
        span = f"{1e3 * min(each):.0f} .. {1e3 * max(each):.0f}"
        print(
            f"{name:24}{1e3 * statistics.median(each):8.0f}{span:>16}{ratio:13.1f}x"
            f"{grown / 2**20:22.1f}{size / 1e6:10.2f}{sizes[0] / size:8.1f}x"
        )


if __name__ == "__main__":
    main()
