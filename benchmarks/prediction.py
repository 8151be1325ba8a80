"""What a prediction costs: SparsePredictive beside Predictive with AutoNormal, in time and memory.

And the network with mean weights, sparse beside dense. Each contender is a process of its own, and
they take turns, round by round::

    python benchmarks/prediction.py
    python benchmarks/prediction.py --columns
    python benchmarks/prediction.py --hidden 4000 --density 0.01
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from contenders import PRIOR_SCALE, perceptron
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from torch import Tensor

from pyro_ssvi import SSVI, AutoSparseNormal, SparsePredictive
from pyro_ssvi.nn import bayesianize, shrink
from pyro_ssvi.structures import Columns


class Contender(NamedTuple):
    """:ivar density: of a sparse guide; ``None`` for AutoNormal.
    :ivar samples: of the weights; ``None`` for their mean.
    :ivar columns: whether whole columns are active.
    :ivar shrunk: the network without the units that nothing reads, torch's own.
    """

    name: str
    density: float | None
    samples: int | None
    columns: bool = False
    shrunk: bool = False


def serve(pipe: Connection, contender: Contender, args: argparse.Namespace) -> None:
    """Predict on command; the first answer is the size of the file that this needs."""
    torch.manual_seed(0)
    net = bayesianize(perceptron([784, args.hidden, args.hidden, 10], "meta"), PRIOR_SCALE)
    net.module.to_empty(device="cpu")

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x, y = torch.rand(args.batch_size, 784), torch.zeros(args.batch_size, dtype=torch.int64)
    options: Any = {"init_loc_fn": init_to_sample, "init_scale": 0.01}
    _, density, samples, columns, shrunk = contender
    structure = Columns() if columns else None
    guide: Any
    if density is None:
        guide = AutoNormal(model, **options)
    else:
        guide = AutoSparseNormal(model, density=density, structure=structure, **options)
    with torch.no_grad():
        guide(x, y)
        predict: Any
        if samples is None:
            if density is None:
                predict = net.with_weights(guide.median())
            elif shrunk:
                predict = shrink(net.with_weights(guide.median()))
            else:
                predict = net.with_sparse_weights(guide)
            size = file_bytes(lambda path: torch.save(predict.state_dict(), path))
        elif density is None:
            predict = Predictive(model, guide=guide, num_samples=samples, return_sites=["obs"])
            size = file_bytes(lambda path: torch.save(guide.state_dict(), path))
        else:
            predict = SparsePredictive(model, guide, samples, ["obs"])
            svi = SSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO())
            size = file_bytes(svi.export)
        pipe.send(size)
        before = peak()
        while times := pipe.recv():
            start = time.perf_counter()
            for _ in range(times):
                predict(x)
            pipe.send(((time.perf_counter() - start) / times, peak() - before))


def file_bytes(write: Callable[[Path], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path)
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
    parser.add_argument("--columns", action="store_true", help="with whole columns, too")
    args = parser.parse_args(argv)
    print(
        f"784-{args.hidden}-{args.hidden}-10, batch {args.batch_size}, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    sparse = [
        (f"{100 * density:g}%" + ", columns" * columns, density, columns)
        for density in args.density
        for columns in (False, True)[: 1 + args.columns]
    ]
    compare(
        f"{args.samples} samples",
        [
            Contender("Predictive, AutoNormal", None, args.samples),
            *(Contender(f"SparsePredictive {name}", d, args.samples, c) for name, d, c in sparse),
        ],
        args,
    )
    compare(
        "mean weights",
        [
            Contender("torch's dense network", None, None),
            *(Contender(f"SparseNetwork {name}", d, None, c) for name, d, c in sparse),
            *(Contender(f"shrunk {name}", d, None, c, True) for name, d, c in sparse if c),
        ],
        args,
    )


def compare(title: str, contenders: list[Contender], args: argparse.Namespace) -> None:
    """Have them take turns; ratios are to the first."""
    context = multiprocessing.get_context("spawn")
    pipes, sizes = [], []
    for contender in contenders:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, contender, args), daemon=True).start()
        sizes.append(ours.recv())
        pipes.append(ours)
    times: list[list[float]] = [[] for _ in pipes]
    memory = [0] * len(pipes)
    for i in range(args.rounds + 1):
        for j, pipe in enumerate(pipes):
            # The first compiles. A mean is quick: it is predicted several times.
            pipe.send(1 if i == 0 or contenders[j].samples else 20)
            seconds, memory[j] = pipe.recv()
            if i:
                times[j].append(seconds)
    for pipe in pipes:
        pipe.send(0)
    print(
        f"\n{title:30}{'ms':>8}{'min .. max':>18}{'times faster':>14}{'peak MB above set-up':>22}"
        f"{'file MB':>10}{'smaller':>9}"
    )
    for contender, each, grown, size in zip(contenders, times, memory, sizes, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[0], each, strict=True))
        span = f"{1e3 * min(each):.1f} .. {1e3 * max(each):.1f}"
        print(
            f"{contender.name:30}{1e3 * statistics.median(each):8.1f}{span:>18}{ratio:13.1f}x"
            f"{grown / 2**20:22.1f}{size / 1e6:10.2f}{sizes[0] / size:8.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
