"""A sparse Bayesian network trained by several processes, on one machine or on many.

Each process has its share of every epoch's images; what they exchange are the gradients of active
weights. Stopped at any time, the training goes on from its last checkpoint, with as many processes
as there are then::

    torchrun --nproc-per-node 2 examples/many_processes.py
    torchrun --nproc-per-node 2 examples/many_processes.py --dataset fashion-mnist --data-dir DIR

On several machines, the same on each of them, with torchrun's ``--nnodes`` and ``--rdzv-endpoint``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import datasets
import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from pyro_ssvi import AutoSparseNormal, CosineSchedule, DistributedSSVI, SparsePredictive
from pyro_ssvi.nn import bayesianize


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", help="folder with the data set's files")
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--checkpoint", type=Path, help="written each epoch; if there, resumed")
    args = parser.parse_args(argv)

    torch.distributed.init_process_group()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    pyro.set_rng_seed(rank)  # draws of its own for each process

    data = datasets.load(args.dataset, args.data_dir)
    train = TensorDataset(data.train_x, data.train_y)
    sampler = DistributedSampler(train)  # the same number of images for all
    # So that an epoch has as many steps in any number of processes.
    loader = DataLoader(train, max(1, args.batch_size // world_size), sampler=sampler)
    steps = args.epochs * len(loader)

    sizes = data.train_x.shape[1], args.hidden, data.num_classes
    layers = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    net = bayesianize(layers, prior=0.3).to(device)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = net(x)
        # As if alone: a batch stands for all data. The gradient is the mean over processes.
        with pyro.plate("data", len(x)), poutine.scale(scale=len(train) / len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits

    guide = AutoSparseNormal(model, density=args.density)
    stop = max(1, int(0.75 * steps))
    schedule = CosineSchedule(every=min(20, stop), stop=stop)
    optim = pyro.optim.Adam({"lr": args.lr})
    svi = DistributedSSVI(model, guide, optim, Trace_ELBO(), schedule=schedule)
    # A buffer of the model is saved with it.
    svi.model.register_buffer("epochs", torch.tensor(0, device=device))
    if args.checkpoint and args.checkpoint.exists():
        svi.load(args.checkpoint, map_location=device)

    test_x, test_y = data.test_x.to(device), data.test_y.to(device)
    predictive = SparsePredictive(model, guide, num_samples=16, return_sites=["_RETURN"])
    for epoch in range(int(svi.model.epochs), args.epochs):
        sampler.set_epoch(epoch)
        loss = 0.0
        for x, y in loader:
            loss = svi.step(x.to(device), y.to(device))
        svi.model.epochs += 1
        if args.checkpoint:
            svi.save(args.checkpoint)
        if rank == 0:
            probs = predictive(test_x)["_RETURN"].softmax(-1).mean(0)
            accuracy = multiclass_accuracy(probs, test_y, data.num_classes, average="micro")
            print(
                f"epoch {epoch + 1:3d}  processes {world_size}  "
                f"loss per datum {loss / len(train):.3f}  test accuracy {accuracy:.1%}",
                flush=True,
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
