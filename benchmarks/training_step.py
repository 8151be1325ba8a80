"""What a training step costs: sparse guides beside dense ones, in time, memory and arithmetic.

Each contender is a process of its own that steps on command. They take turns, round by round, so
that only one computes at a time and a slow spell of the machine hits all alike; ratios are formed
round by round::

    python benchmarks/training_step.py
    python benchmarks/training_step.py --hidden 1200 --density 0.05 --json step.json
    python benchmarks/training_step.py --hidden --resnet18 --density 0.05
    python benchmarks/training_step.py --contenders autonormal ssvi --quick
    python benchmarks/training_step.py --device cuda --contenders autonormal deterministic ssvi

The contenders (see contenders.py) train the network 784-H-H-10 on random images:

- autonormal, autonormal-meanfield: Pyro's AutoNormal, with Trace_ELBO and TraceMeanField_ELBO
- deterministic: a plain network with Adam; ivon: a plain network with IVON
- masked: SSVI as published, with dense tensors times masks
- ssvi, ssvi-meanfield: this package, with either loss; ssvi-torch: with torch's CSR products;
  ssvi-tiles: with tiles of 4 x 4 weights; ssvi-rows, ssvi-columns: with whole ones; ssvi-exp: with
  standard deviations through exp
- ssvi-delta, ssvi-lowrank: with a sparse point estimate, and with correlations of rank 10
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FEATURES, CLASSES = 784, 10
IMAGE = (3, 32, 32)  # of the residual net
RESNET18 = "ResNet-18"
RESNET18_BATCH = 32
EXCHANGE_EVERY = 100
DENSE = ("autonormal", "autonormal-meanfield", "deterministic", "ivon", "masked")
SPARSE = (
    "ssvi",
    "ssvi-meanfield",
    "ssvi-exp",
    "ssvi-delta",
    "ssvi-lowrank",
    "ssvi-tiles",
    "ssvi-rows",
    "ssvi-columns",
    "ssvi-torch",
)
PLAIN = ("deterministic", "ivon", "masked")  # nets that have, or start from, numbers of their own
REFERENCES = ("autonormal", "deterministic")
PACKAGES = ("pyro_ssvi", "pyro-ppl", "torch", "numba", "ivon-opt")

DEFAULTS = {"hidden": [400, 1200, 4000], "density": [0.1, 0.05, 0.01], "rounds": 5, "seconds": 0.5}
QUICK = {"hidden": [400], "density": [0.05], "rounds": 2, "seconds": 0.1}


# In the process of one contender.


def memory(field: str) -> int | None:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at its peak; where Linux tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(sizes[0]) if sizes else None


def peak_memory(device: str) -> int | None:
    """Bytes at this process's peak, of the device where that has a memory of its own."""
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else memory("VmHWM")


clock = time.perf_counter


def timed(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def take_turn(contender: Any, steps: int) -> dict[str, float]:
    """Seconds a step, and the extra seconds of an exchange.

    An exchange is paid for by two steps: the one that it follows, and the next, which lays out
    the new active set.
    """
    for _ in range(steps // 10):
        contender.step()  # the caches are another contender's
    step = timed(lambda: [contender.step() for _ in range(steps)]) / steps
    exchange = 0.0
    if contender.exchange_step is not None:
        exchange = timed(contender.exchange_step) + timed(contender.step) - 2 * step
    return {"step": step, "exchange": exchange}


def worker(args: argparse.Namespace) -> None:
    """Answer each line of standard input: ``turn STEPS`` or ``report``."""
    global clock
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    if args.cpu_time:
        clock = time.process_time

    import contenders
    import pyro
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    pyro.set_rng_seed(0)
    on_host = args.device == "cpu"
    imports = memory("VmRSS") if on_host else 0
    make = contenders.CONTENDERS[args.worker]
    # Much is loaded at first use: torch's compiler by Adam, MKL's products, compiled kernels.
    batch = contenders.Batch(args.batch_size, [FEATURES], CLASSES)
    take_turn(make(contenders.perceptron([FEATURES, 12, CLASSES]), batch, 0.1), 1)
    small_net = memory("VmRSS") if on_host else 0
    pyro.clear_param_store()

    if args.resnet18:
        net = contenders.resnet18(CLASSES)
        batch = contenders.Batch(args.batch_size, IMAGE, CLASSES)
    else:
        sizes = [FEATURES, *args.hidden, *args.hidden, CLASSES]
        device = None if args.worker in PLAIN else "meta"
        net = contenders.perceptron(sizes, device)
    contender = make(net, batch, *args.density)
    del net
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "turn":
            answer: dict[str, Any] = dict(take_turn(contender, int(numbers[0])))
        else:
            answer = {
                "memory_bytes": {
                    "peak": peak_memory(args.device),
                    "after_imports": imports,
                    "after_small_net": small_net,
                },
                "state_bytes": contender.state_bytes(),
                "flops": contender.flops(),
                "threads": torch.get_num_threads(),
            }
        print(json.dumps(answer), file=answers, flush=True)


# In the process that compares them.


class Entry(NamedTuple):
    """A contender at a density, which is None where it makes no difference to the cost."""

    name: str
    density: float | None


class Worker:
    """The process of one contender."""

    def __init__(self, entry: Entry, net: int | str, args: argparse.Namespace) -> None:
        self.entry = entry
        density = 0.05 if entry.density is None else entry.density
        command = [sys.executable, __file__, "--worker", entry.name, "--density", str(density)]
        if net == RESNET18:
            command += ["--resnet18", "--batch-size", str(RESNET18_BATCH)]
        else:
            command += ["--hidden", str(net), "--batch-size", str(args.batch_size)]
        command += ["--device", args.device]
        if args.threads is not None:
            command += ["--threads", str(args.threads)]
        if args.cpu_time:
            command += ["--cpu-time"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(command, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"the process of {self.entry.name} ended, see above") from None

    def close(self) -> None:
        self.process.communicate()  # a worker ends where its input ends


def line_up(args: argparse.Namespace) -> list[Entry]:
    """Those who take part: a dense contender once, a sparse one at each density."""
    return [
        Entry(name, density)
        for name in args.contenders
        for density in (args.density if name in SPARSE else [None])
    ]


def compile_kernels(args: argparse.Namespace) -> None:
    """Have sparse kernels compiled, once for a machine, where it is not measured."""
    names = ["ssvi"] if {"ssvi", "ssvi-meanfield"} & set(args.contenders) else []
    for name in [*names, *({"ssvi-tiles"} & set(args.contenders))]:
        first = Worker(Entry(name, 0.1), 32, args)
        first.ask("turn 1")
        first.close()


def measure(net: int | str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds in which each contender trains the network in turn; one result for each.

    :param net: units in a hidden layer, or :data:`RESNET18`.
    """
    workers = [Worker(entry, net, args) for entry in line_up(args)]
    try:
        for each in workers:
            progress(f"{net}: {each.entry.name} is set up")
            each.ask("turn 1")
        steps = [math.ceil(args.seconds / each.ask("turn 2")["step"]) for each in workers]
        turns: list[list[dict]] = [[] for _ in workers]
        for i in range(args.rounds):
            for each, n, done in zip(workers, steps, turns, strict=True):
                progress(f"{net}: round {i + 1} of {args.rounds}, {each.entry.name}")
                done.append({"steps": n, **each.ask(f"turn {n}")})
        progress("")
        return [
            result(each.entry, done, each.ask("report"))
            for each, done in zip(workers, turns, strict=True)
        ]
    finally:
        for each in workers:
            each.close()


def result(entry: Entry, turns: list[dict], report: dict[str, Any]) -> dict[str, Any]:
    """What is known of one contender: medians over rounds, and the rounds."""
    rounds = [
        {
            "steps": turn["steps"],
            "step_ms": 1000 * turn["step"],
            "exchange_ms": 1000 * turn["exchange"],
            "ms": 1000 * (turn["step"] + turn["exchange"] / EXCHANGE_EVERY),
        }
        for turn in turns
    ]
    ms = [one["ms"] for one in rounds]
    exchange_ms = statistics.median(one["exchange_ms"] for one in rounds)
    return {
        "name": entry.name,
        "density": entry.density,
        "ms": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "exchange_ms": exchange_ms if entry.name in SPARSE else None,
        **report,
        "rounds": rounds,
    }


def add_ratios(results: list[dict[str, Any]]) -> None:
    """How many times faster than a reference: the median over rounds of the ratio of times."""
    rounds_of = {each["name"]: each["rounds"] for each in results if each["name"] in REFERENCES}
    for each in results:
        each["times_faster_than"] = {
            name: statistics.median(
                reference["ms"] / own["ms"]
                for reference, own in zip(rounds, each["rounds"], strict=True)
            )
            for name, rounds in rounds_of.items()
        }


def progress(text: str) -> None:
    """Show whoever watches what goes on, in a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


HEAD = [
    ("", "den-", "ms a", "", "exch.", "times faster", "than", "peak MB", "above", "state", ""),
    (
        "",
        "sity",
        "step",
        "min .. max",
        "ms",
        "AutoNormal",
        "Adam",
        "import",
        "small",
        "MB",
        "MFLOP",
    ),
]


def table(results: list[dict[str, Any]]) -> str:
    lines = [*HEAD, *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*rows[:2], "-" * len(rows[0]), *rows[2:]])


def cells(each: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    memory_bytes, faster = each["memory_bytes"], each["times_faster_than"]
    peak = memory_bytes["peak"]
    return (
        each["name"],
        "" if each["density"] is None else f"{100 * each['density']:g}%",
        digits(each["ms"]),
        f"{digits(each['ms_min'])} .. {digits(each['ms_max'])}",
        "" if each["exchange_ms"] is None else digits(each["exchange_ms"]),
        *(f"{digits(faster[name])}x" if name in faster else "" for name in REFERENCES),
        *(
            "" if peak is None else digits((peak - memory_bytes[base]) / 1e6)
            for base in ("after_imports", "after_small_net")
        ),
        digits(each["state_bytes"] / 1e6),
        digits(each["flops"] / 1e6),
    )


def digits(value: float) -> str:
    """The number with about three digits."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*DENSE, *SPARSE)
    parser.add_argument("--hidden", type=int, nargs="*", help="units in a hidden layer")
    parser.add_argument("--resnet18", action="store_true", help="a ResNet-18, too, at batch 32")
    parser.add_argument("--density", type=float, nargs="+", help="of the sparse contenders")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="a contender's steps in a round take so long")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, as torch names it")
    parser.add_argument("--threads", type=int, help="of each contender (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of all threads, rather than the clock's: with --threads 1, on a machine in use",
    )
    parser.add_argument("--json", type=Path, help="write settings and results to this file")
    parser.add_argument("--quick", action="store_true", help="one small net, and short rounds")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("rounds", "batch_size", "seconds", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if min(args.hidden, default=1) < 1:
        parser.error(f"--hidden must be at least 1, got {min(args.hidden)}")
    for density in args.density:
        if not 0 < density <= 1:
            parser.error(f"expected a density in (0, 1], got {density}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        worker(args)
        return
    args.contenders = list(args.contenders)
    if "ivon" in args.contenders and importlib.util.find_spec("ivon") is None:
        args.contenders.remove("ivon")
        print("ivon is left out: pip install ivon-opt")
    compile_kernels(args)
    nets, threads = [], 0
    for net in [*args.hidden, *([RESNET18] if args.resnet18 else [])]:
        results = measure(net, args)
        add_ratios(results)
        threads = max(each.pop("threads") for each in results)
        name, batch_size = f"{FEATURES}-{net}-{net}-{CLASSES}", args.batch_size
        if net == RESNET18:
            name, batch_size = f"{RESNET18}, 32x32 images", RESNET18_BATCH
        print(f"\n{name}, batch {batch_size}, {threads} threads, {args.rounds} rounds\n")
        print(table(results), flush=True)
        nets.append({"net": name, "batch_size": batch_size, "results": results})
    found = versions()
    print(
        "\nms a step: median over rounds, with one exchange in 100 steps. exch.: extra time of an "
        "exchange\nof 30 % of the coordinates. times faster: median of the ratios round by round. "
        "peak: memory above\nthat after imports, and above that after training a small net. "
        "state: parameters, optimizer,\nactive sets. MFLOP: of a step's products."
    )
    print(f"{cpu_model()}\n" + ", ".join(f"{name} {each}" for name, each in found.items()))
    if args.json:
        settings = {
            "rounds": args.rounds,
            "seconds": args.seconds,
            "exchange_every": EXCHANGE_EVERY,
            "threads": threads,
            "device": args.device,
            "cores": os.cpu_count(),
            "cpu": cpu_model(),
            "versions": found,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "nets": nets}, indent=2))


if __name__ == "__main__":
    main()
