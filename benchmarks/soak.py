"""A long training: memory and the time of a step must stay what they were.

    python benchmarks/soak.py                    # 100 000 steps with 1 000 exchanges

After a warm-up of a tenth, memory may grow by 1 %, and the median step of the last tenth may take
1.2 times as long as that of the second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from torch import Tensor
from tqdm import trange

from pyro_ssvi import SSVI, AutoSparseNormal, ConstantSchedule


def model(x: Tensor, y: Tensor) -> None:
    w0 = pyro.sample("w0", dist.Normal(0.0, 1.0).expand([100, 50]).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(0.0, 1.0).expand([1, 100]).to_event(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.linear(F.linear(x, w0).tanh(), w1)[:, 0], sigma), obs=y)


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=100, help="steps between exchanges")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSparseNormal(model, density=0.1)
    schedule = ConstantSchedule(every=args.every)
    svi = SSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), schedule=schedule)
    tenth = args.steps // 10
    times, memory, exchanges = [0.0] * args.steps, [], 0
    before = None
    for step in trange(args.steps, disable=None):
        x = torch.randn(32, 50)
        start = time.process_time()  # of this process alone: others may come and go
        svi.step(x, x[:, 0])
        times[step] = time.process_time() - start
        if guide.indices is not before:
            exchanges, before = exchanges + 1, guide.indices
        if (step + 1) % tenth == 0:
            memory.append(resident_bytes())
    grown = memory[-1] / memory[0] - 1
    slower = statistics.median(times[-tenth:]) / statistics.median(times[tenth : 2 * tenth])
    print(
        f"{args.steps:,} steps, {exchanges - 1:,} exchanges: memory {memory[0] / 2**20:.1f} MiB "
        f"after a tenth, {memory[-1] / 2**20:.1f} MiB at the end ({grown:+.2%}); a step of the "
        f"last tenth takes {slower:.2f} times one of the second"
    )
    if grown > 0.01 or slower > 1.2:
        sys.exit("memory or step time has grown")


if __name__ == "__main__":
    main()
