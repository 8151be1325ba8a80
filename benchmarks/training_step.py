"""Time and memory of a training step, side by side.

Every contender trains the same network, 784-H-H-10 with Gaussian priors, in a process of its own.
The processes take turns, a round of steps each, so a drift of the machine's speed meets them
all; ratios are formed round by round. Exchanges are included, at their share of the steps::

    python benchmarks/training_step.py --hidden 400 1200 --json results/training_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NUM_DATA = 60_000
EVERY = 100  # steps between exchanges, as the default schedule has it

CONTENDERS = {
    "autonormal": "AutoNormal, Trace_ELBO",
    "autonormal-meanfield": "AutoNormal, TraceMeanField_ELBO",
    "deterministic": "deterministic, Adam",
    "masked": "dense tensors times masks",
    "ssvi": "AutoSparseNormal",
    "ssvi-torch": "AutoSparseNormal, torch's CSR",
}
SPARSE = ("masked", "ssvi", "ssvi-torch")


# In the worker.


class Worker:
    """One contender: makes its network, then steps as it is told."""

    def __init__(self, name: str, hidden: int, density: float, batch_size: int) -> None:
        import pyro
        import torch

        # Everything a contender may import or start: the base line of its memory.
        from pyro.infer.autoguide import AutoNormal  # noqa: F401

        import pyro_ssvi

        if name == "ssvi":
            from pyro_ssvi.kernels import numba_cpu  # noqa: F401
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        base = memory_now()

        pyro.set_rng_seed(0)
        self.x = torch.randn(batch_size, 784)
        self.y = torch.randint(10, (batch_size,))
        self.exchange: Callable[[], object] | None = None
        sizes = [784, hidden, hidden, 10]
        make = {
            "autonormal": self.autonormal,
            "autonormal-meanfield": self.autonormal,
            "deterministic": self.deterministic,
            "masked": self.masked,
        }.get(name, self.ssvi)
        if name == "ssvi-torch":
            pyro_ssvi.kernels.use("torch")
        make(name, sizes, density)
        self.base = base

    def model(self, sizes: list[int]) -> Callable:
        import pyro
        import pyro.distributions as dist
        import torch
        import torch.nn.functional as F

        index = torch.arange(len(self.x))

        def model(x: torch.Tensor, y: torch.Tensor) -> None:
            prior = dist.Normal(0.0, 0.1)
            for i in range(3):
                w = pyro.sample(f"w{i}", prior.expand([sizes[i + 1], sizes[i]]).to_event(2))
                b = pyro.sample(f"b{i}", prior.expand([sizes[i + 1]]).to_event(1))
                x = F.linear(x if i == 0 else F.relu(x), w, b)
            # The batch's places are given: drawing them anew is not what is measured.
            with pyro.plate("data", NUM_DATA, subsample=index):
                pyro.sample("obs", dist.Categorical(logits=x), obs=y)

        return model

    def autonormal(self, name: str, sizes: list[int], _: float) -> None:
        import pyro
        from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
        from pyro.infer.autoguide import AutoNormal

        model = self.model(sizes)
        guide = AutoNormal(model, init_scale=0.01)
        loss = TraceMeanField_ELBO() if name.endswith("meanfield") else Trace_ELBO()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        self.step = lambda: svi.step(self.x, self.y)
        self.tensors = lambda: [*guide.parameters(), *pyro_states(svi)]

    def ssvi(self, name: str, sizes: list[int], density: float) -> None:
        import pyro
        from pyro.infer import Trace_ELBO

        from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule

        model = self.model(sizes)
        guide = AutoSparseNormal(model, density=density, init_scale=0.01)
        schedule = ConstantSchedule(every=10**9)  # exchanges are timed apart
        adam = pyro.optim.Adam({"lr": 1e-3})
        svi = SSVI(model, guide, adam, Trace_ELBO(), schedule=schedule)
        self.step = lambda: svi.step(self.x, self.y)
        self.exchange = lambda: svi.exchange(self.x, self.y, share=0.3)
        self.tensors = lambda: [*guide.parameters(), *guide.buffers(), *pyro_states(svi)]

    def deterministic(self, name: str, sizes: list[int], _: float) -> None:
        import torch
        import torch.nn.functional as F
        from torch import nn

        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        optim = torch.optim.Adam(net.parameters(), lr=1e-3)

        def step() -> None:
            optim.zero_grad()
            F.cross_entropy(net(self.x), self.y).backward()
            optim.step()

        self.step = step
        self.tensors = lambda: [*net.parameters(), *states(optim)]

    def masked(self, name: str, sizes: list[int], density: float) -> None:
        """The way of the paper's own code, without Pyro: weights are dense, and masked."""
        import torch
        import torch.nn.functional as F

        shapes = [(sizes[i + 1], sizes[i]) for i in range(3)]
        masks = [(torch.rand(shape) < density).float() for shape in shapes]
        locs = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        raws = [torch.full(shape, -4.6, requires_grad=True) for shape in shapes]
        biases = [torch.zeros(shape[0], requires_grad=True) for shape in shapes]
        optim = torch.optim.Adam([*locs, *raws, *biases], lr=1e-3)

        def step() -> None:
            optim.zero_grad()
            h, kl = self.x, 0.0
            for i, (loc, raw, mask, bias) in enumerate(zip(locs, raws, masks, biases, strict=True)):
                scale = F.softplus(raw)
                weight = (loc + scale * torch.randn_like(loc)) * mask
                h = F.linear(h if i == 0 else F.relu(h), weight, bias)
                ratio = (scale / 0.1).square()
                kl = kl + 0.5 * (mask * (ratio + (loc / 0.1).square() - 1 - ratio.log())).sum()
            (F.cross_entropy(h, self.y) * NUM_DATA + kl).backward()
            optim.step()

        self.step = step
        self.tensors = lambda: [*locs, *raws, *biases, *masks, *states(optim)]

    def report(self) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        size = sum(t.numel() * t.element_size() for t in self.tensors())
        return {"peak_bytes": peak - self.base, "state_bytes": size}

    def serve(self) -> None:
        """Read a number of steps or ``exchange`` or ``report`` a line; answer in JSON."""
        for line in sys.stdin:
            command = line.strip()
            if command == "report":
                answer: object = self.report()
            else:
                act = self.exchange if command == "exchange" else self.step
                assert act is not None
                start = time.perf_counter()
                for _ in range(1 if command == "exchange" else int(command)):
                    act()
                answer = time.perf_counter() - start
            print(json.dumps(answer), flush=True)


def states(optim: object) -> Iterator:
    import torch

    for state in optim.state.values():  # type: ignore[attr-defined]
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def pyro_states(svi: object) -> Iterator:
    for optim in svi.optim.optim_objs.values():  # type: ignore[attr-defined]
        yield from states(optim)


def memory_now() -> int:
    """Resident memory of this process in bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no /proc: the peak so far, which only imports have made
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


# In the parent.


class Contender:
    """A worker in another process."""

    def __init__(self, name: str, hidden: int, density: float, args: argparse.Namespace) -> None:
        self.name, self.density = name, density if name in SPARSE else None
        command = [sys.executable, __file__, "--worker", name, "--hidden", str(hidden)]
        command += ["--density", str(density), "--batch-size", str(args.batch_size)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.rounds: list[float] = []  # seconds a step
        self.exchanges: list[float] = []

    def ask(self, command: object) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"contender {self.name} has died with {self.process.wait()}")
        return json.loads(line)

    def warm_up(self, seconds: float) -> None:
        self.ask(2)
        once = float(self.ask(2)) / 2  # type: ignore[arg-type]
        self.steps = max(1, round(seconds / once))
        if self.name.startswith("ssvi"):
            self.ask("exchange")

    def round(self) -> None:
        self.rounds.append(float(self.ask(self.steps)) / self.steps)  # type: ignore[arg-type]
        if self.name.startswith("ssvi"):
            self.exchanges.append(float(self.ask("exchange")))  # type: ignore[arg-type]

    def per_step(self) -> list[float]:
        """Seconds a step in each round, exchanges included."""
        if not self.exchanges:
            return self.rounds
        extra = statistics.median(self.exchanges) / EVERY
        return [seconds + extra for seconds in self.rounds]

    def close(self) -> dict:
        report = self.ask("report")
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert isinstance(report, dict)
        return {
            "name": self.name,
            "density": self.density,
            "seconds_per_step": self.per_step(),
            "exchange_seconds": self.exchanges,
            **report,
        }


def measure(hidden: int, args: argparse.Namespace) -> list[dict]:
    runs = [
        (name, density)
        for name in args.contenders
        for density in (args.density if name in SPARSE else args.density[:1])
    ]
    contenders = [Contender(name, hidden, density, args) for name, density in runs]
    for contender in contenders:
        contender.warm_up(args.seconds)
    for _ in range(args.rounds):
        for contender in contenders:
            contender.round()
    return [contender.close() for contender in contenders]


def ratio(rows: list[dict], row: dict, to: str, key: str = "seconds_per_step") -> float | None:
    """How many times less ``row`` takes than the contender ``to``, in the median round."""
    reference = next((other for other in rows if other["name"] == to), None)
    if reference is None:
        return None
    if key == "seconds_per_step":
        pairs = zip(reference[key], row[key], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)
    return reference[key] / row[key]


def table(rows: list[dict]) -> str:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    header = ("", "ms/step", "min-max", "exchange", "vs AutoNormal", "vs Adam")
    lines = [(*header, "peak MB", "vs AutoNormal", "state MB")]
    for row in rows:
        density = "" if row["density"] is None else f" {row['density']:.0%}"
        seconds, exchange = row["seconds_per_step"], row["exchange_seconds"]
        lines.append(
            (
                CONTENDERS[row["name"]] + density,
                f"{1e3 * statistics.median(seconds):.2f}",
                f"{1e3 * min(seconds):.2f}-{1e3 * max(seconds):.2f}",
                f"{1e3 * statistics.median(exchange):.0f} ms" if exchange else "",
                times(ratio(rows, row, "autonormal")),
                times(ratio(rows, row, "deterministic")),
                f"{row['peak_bytes'] / 1e6:.0f}",
                times(ratio(rows, row, "autonormal", "peak_bytes")),
                f"{row['state_bytes'] / 1e6:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 1200])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.05, 0.01])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round of a contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write settings and all rounds to this file")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        Worker(args.worker, args.hidden[0], args.density[0], args.batch_size).serve()
        return {}

    settings = {k: v for k, v in vars(args).items() if k not in ("json", "worker")}
    settings |= {"python": platform.python_version(), "processor": platform.processor()}
    results = {}
    for hidden in args.hidden:
        results[hidden] = rows = measure(hidden, args)
        print(f"\n784-{hidden}-{hidden}-10, batch {args.batch_size}, {args.threads} threads\n")
        print(table(rows), flush=True)
    print(
        f"\nms/step: median of {args.rounds} rounds, with one exchange in {EVERY} steps. vs: how "
        "many times less, round by\nround. peak: above the process after its imports. state: "
        "parameters, optimizer state, indices, masks."
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2))
    return results


if __name__ == "__main__":
    main()
