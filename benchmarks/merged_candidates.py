"""How many of the coordinates with the largest mean gradient do several processes find together?

Processes that train together add to the active set from what each of them proposes by its own
gradient (docs/distributed.md). This trains a small net in one process. Before each exchange the
batch is split into shards, each with its own draw of the weights, as processes would have them,
and their merged proposals are compared with the choice from the mean gradient of all
coordinates::

    python benchmarks/merged_candidates.py
    python benchmarks/merged_candidates.py --dataset fashion-mnist --data-dir DIR
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule
from pyro_ssvi.addition import Gradient
from pyro_ssvi.allocation import as_they_are
from pyro_ssvi.exchange import read_at, top_inactive
from pyro_ssvi.gradient_record import GradientRecord
from pyro_ssvi.nn import bayesianize

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import datasets


def compared(svi: SSVI, share: float, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What an exchange would add: coordinates, of them those found, and their sums of gradients.

    :param batches: each process's.
    :return: ``[4]``: how many are to be added; how many of the best are among the proposals; the
        sum of ``|mean gradient|`` of those that are chosen from proposals, and of the best.
    """
    records = []
    for x, y in batches:
        with GradientRecord() as record:
            svi.loss_and_grads(svi.model, svi.guide, x, y)
        records.append(record)
    total = torch.zeros(4, dtype=torch.float64)
    for active in svi.guide.active_sets.values():
        n = min(int(share * len(active) + 0.5), active.numel() - len(active))
        if n == 0:
            continue

        def mean(start: int, stop: int, active=active) -> Tensor:
            return torch.stack([r.block(active, start, stop) for r in records]).mean(0).abs()

        wanted = [(n, as_they_are)]
        ((best, scores),) = top_inactive(active, wanted, mean)
        proposals = [Gradient().propose(active, wanted, record)[0][0] for record in records]
        proposals = torch.cat(proposals).unique()
        chosen = read_at(active, proposals, mean).topk(n).values
        found = torch.isin(best, proposals).sum()
        total += torch.tensor([n, found, chosen.sum(), scores.sum()])
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", help="folder with the data set's files")
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps from exchange to exchange")
    parser.add_argument("--batch-size", type=int, default=128, help="of all shards together")
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    data = datasets.load(args.dataset, args.data_dir)
    sizes = data.train_x.shape[1], args.hidden, data.num_classes
    print(
        f"{args.dataset}: {'-'.join(map(str, sizes))}, {args.density:.0%} active, batch "
        f"{args.batch_size} of all shards, {args.steps} steps, an exchange every {args.every}"
    )
    sums: dict[int, list[Tensor]] = defaultdict(list)
    for seed in range(args.seeds):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        layers = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
        net = bayesianize(layers, prior=0.3)

        def model(x: Tensor, y: Tensor, net=net) -> None:
            logits = net(x)
            scale = len(data.train_x) / len(x)
            with pyro.plate("data", len(x)), poutine.scale(scale=scale):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

        schedule = CosineSchedule(every=args.every, stop=int(0.75 * args.steps))
        guide = AutoSparseNormal(model, density=args.density)
        optim = pyro.optim.Adam({"lr": 5e-3})
        svi = SSVI(model, guide, optim, Trace_ELBO(), addition="gradient", schedule=schedule)
        seen = {shards: torch.zeros(4, dtype=torch.float64) for shards in args.shards}
        while svi.steps < args.steps:
            rows = torch.randint(len(data.train_x), (args.batch_size,))
            x, y = data.train_x[rows], data.train_y[rows]
            if schedule.due(svi.steps + 1) and svi.steps:
                share = schedule.share(svi.steps + 1)
                for shards in args.shards:
                    batches = list(zip(x.chunk(shards), y.chunk(shards), strict=True))
                    seen[shards] += compared(svi, share, batches)
                for param in guide.parameters():
                    param.grad = None
            svi.step(x, y)
        for shards in args.shards:
            sums[shards].append(seen[shards])
    print("shards   of the best are found   of their gradient     (least .. most of the seeds)")
    for shards, seeds in sums.items():
        count, found, chosen, best = torch.stack(seeds).unbind(1)
        shares = [f"{100 * s.min():.1f} .. {100 * s.max():.1f}" for s in (found / count,)]
        print(
            f"{shards:6}{found.sum() / count.sum():24.1%}{chosen.sum() / best.sum():20.1%}"
            f"     ({shares[0]} %)"
        )


if __name__ == "__main__":
    main()
