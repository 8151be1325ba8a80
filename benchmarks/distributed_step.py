"""What processes send each other in a step, and how long it takes, beside dense posteriors.

The processes are all on this machine and talk over its loopback device, whose count of bytes is
read (on Linux). Contenders take turns, round by round::

    python benchmarks/distributed_step.py
    python benchmarks/distributed_step.py --hidden 4000 --processes 2 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed
from contenders import EXCHANGE_EVERY, Batch, Deterministic, Sparse, perceptron
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ssvi import ConstantSchedule, DistributedSSVI


class Distributed(Sparse):
    """DistributedSSVI; at density 1 it has AutoNormal's parameters, and sends their gradients."""

    def __init__(self, net: nn.Module, batch: Batch, density: float) -> None:
        self.store: dict | None = None  # of its own: all contenders are in one process
        super().__init__(net, batch, density, Trace_ELBO())

    def make_svi(self, optim: Any) -> SVI:
        schedule = ConstantSchedule(every=10**9)  # exchanges are measured apart
        return DistributedSSVI(self.model, self.guide, optim, self.elbo, schedule=schedule)

    def step(self) -> float:
        with pyro.get_param_store().scope(self.store) as self.store:
            return super().step()

    def exchange(self) -> None:
        with pyro.get_param_store().scope(self.store) as self.store:
            self.svi.exchange(self.batch.x, self.batch.y, share=0.3)


def sent_bytes() -> int:
    """What this machine has sent over its loopback device."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise SystemExit("this machine has no loopback device to count bytes on")


def measure(action: Any, times: int) -> tuple[float, float]:
    """Seconds and bytes that one of ``times`` calls takes, of all processes together."""
    torch.distributed.barrier()
    before, start = sent_bytes(), time.perf_counter()
    for _ in range(times):
        action()
    torch.distributed.barrier()
    return (time.perf_counter() - start) / times, (sent_bytes() - before) / times


def worker(rank: int, world_size: int, hidden: int, args: argparse.Namespace, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world_size
    )
    pyro.set_rng_seed(rank)
    sizes = [784, hidden, hidden, 10]
    batch = Batch(args.batch_size, (784,), 10)
    deterministic = Deterministic(DistributedDataParallel(perceptron(sizes)), batch)
    made = {"deterministic, DDP": (deterministic.step, lambda: None)}
    for density in (1.0, *args.density):
        name = "dense posterior" if density == 1 else f"AutoSparseNormal {100 * density:g}%"
        contender = Distributed(perceptron(sizes, "meta"), batch, density)
        made[name] = contender.step, contender.exchange
    measured: dict[str, list[list[tuple[float, float]]]] = {name: [[], []] for name in made}
    for step, exchange in made.values():
        step()
        exchange()
    for _ in range(args.rounds):
        for name, (step, exchange) in made.items():
            measured[name][0].append(measure(step, args.steps))
            measured[name][1].append(measure(exchange, 1))
    if rank == 0:
        report(measured, f"784-{hidden}-{hidden}-10, {world_size} processes", args)
    torch.distributed.barrier()
    # DistributedDataParallel keeps gloo's threads alive, which can abort an interpreter that ends.
    os._exit(0)


def report(measured: dict, title: str, args: argparse.Namespace) -> None:
    def median(pairs: list, which: int) -> float:
        return statistics.median(pair[which] for pair in pairs)

    print(f"\n{title}, batch {args.batch_size} each, 1 thread each, {args.rounds} rounds\n")
    print(f"{'':22}{'kB a step':>11}{'kB an exchange':>16}{'kB sent':>10}{'less':>8}{'ms':>9}")
    dense = median(measured["dense posterior"][0], 1)
    for name, (step, exchange) in measured.items():
        sent = median(step, 1)
        total = sent + median(exchange, 1) / EXCHANGE_EVERY
        print(
            f"{name:22}{sent / 1e3:11,.1f}{median(exchange, 1) / 1e3:16,.1f}"
            f"{total / 1e3:10,.1f}{dense / total:7.1f}x{1e3 * median(step, 0):9.1f}"
        )
    print(
        "\nkB sent: by all processes together, a step with its part of an exchange of 30 % every "
        f"{EXCHANGE_EVERY} steps.\nless: than the dense posterior. ms: a step without exchange.",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 1200])
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="steps of a contender in a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    for hidden in args.hidden:
        for world_size in args.processes:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(
                    worker, (world_size, hidden, args, f"{folder}/store"), nprocs=world_size
                )


if __name__ == "__main__":
    main()
