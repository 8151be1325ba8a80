"""The paper's experiment: a sparse Bayesian ResNet-18 on CIFAR-10 or CIFAR-100.

By default all settings are those of the published code; docs/networks.md has the table. The
network is torchvision's, an ordinary Pyro model by ``bayesianize``. Stopped at any time, it goes on
where it was::

    python examples/resnet_cifar.py --data-dir DIR
    python examples/resnet_cifar.py --data-dir DIR --resume
    python examples/resnet_cifar.py --data-dir DIR --dataset cifar100 --density 0.05 --policy erk
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from metrics import measures
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torchvision.models import resnet18
from tqdm import tqdm

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule, SparsePredictive
from pyro_ssvi.addition import ADDITION, Gradient
from pyro_ssvi.criteria import REMOVAL
from pyro_ssvi.densities import ErdosRenyiKernel, Policy, Uniform
from pyro_ssvi.diagnostics import elbo_parts
from pyro_ssvi.nn import bayesianize

# Classes, then the published code's mean and standard deviation of each channel.
DATASETS = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Data(NamedTuple):
    """Images as bytes ``[n, 3, 32, 32]``, labels, and what makes images the network's input."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor

    def inputs(self, images: Tensor) -> Tensor:
        return (images / 255 - self.mean) / self.std


class Classifier(nn.Module):
    """The Pyro model: its loss is per image, as the paper's is.

    So the learning rates mean what they mean there, and the KL divergence, which is to be set
    against the likelihood of all data, gets the weight ``1 / num_data``. Biases and the parameters
    of normalisation layers are no random variables in the published code.
    """

    def __init__(self, num_classes: int, prior_scale: float) -> None:
        super().__init__()
        net = resnet18(num_classes=num_classes)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for 32x32 pixels
        net.maxpool = nn.Identity()
        self.net = bayesianize(net, prior_scale, trained=["fc.bias"])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits


def init_to_small(site: dict) -> Tensor:
    """First locations: the published code's N(0, 0.01^2)."""
    shape = site["fn"].shape()
    return 0.01 * torch.randn(shape, device=site["fn"].mean.device)


def density_policy(args: argparse.Namespace) -> Policy:
    if args.policy == "erk":
        return ErdosRenyiKernel(args.density)
    return Uniform(args.density, first_dense=args.policy == "first-dense")


def make_optim(args: argparse.Namespace) -> Any:
    """SGD with a learning rate of its own for scales, which have no weight decay."""

    def options(name: str) -> dict[str, float]:
        if name.endswith("scale"):
            return {"lr": args.scale_lr, "momentum": args.momentum}
        return {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay}

    schedule = {"optimizer": torch.optim.SGD, "optim_args": options, "T_max": args.epochs}
    return pyro.optim.CosineAnnealingLR(schedule)


def make_svi(args: argparse.Namespace, model: Classifier, num_data: int) -> SSVI:
    guide = AutoSparseNormal(
        model,
        density=density_policy(args),
        init_loc_fn=init_to_small,
        init_scale=args.init_scale,
    )
    epoch = math.ceil(num_data / args.batch_size)
    stop = max(1, int(0.75 * args.epochs * epoch))

    def kl_weight(step: int) -> float:
        # The published code's cold posterior. The KL divergence of all weights is set against the
        # log likelihood of one image: with a likelihood of all images the weight would be 0.01.
        return args.kl_weight / num_data * min(2 * (step // epoch + 1) / args.epochs, 1)

    addition = ADDITION[args.addition]
    if isinstance(addition, Gradient):
        batches, samples, at = args.gradient_batches, args.gradient_samples, args.gradient_at
        addition = replace(addition, batches=batches, samples=samples, at=at)
    return SSVI(
        model,
        guide,
        make_optim(args),
        TraceMeanField_ELBO(),
        removal=args.removal,
        addition=addition,
        # The paper's share, 0.15 (1 + cos), is a fraction of 0.3 at the start.
        schedule=CosineSchedule(min(args.exchange_every, stop), args.fraction, stop),
        new_scale=args.new_scale,
        kl_weight=kl_weight,
        local_reparam=args.local_reparam,
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of the images with a black border of 4 pixels, and a flip of half of them.

    :param images: ``[n, 3, 32, 32]``.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(-1), columns)
    index = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    image, row, column = (each.to(images.device) for each in index)
    return padded[image, :, row, column].movedim(-1, 1)


def train_epoch(args: argparse.Namespace, svi: SSVI, data: Data, epoch: int) -> float:
    """:return: the mean loss."""
    # The same if it is resumed, and another in every epoch of other seeds.
    generator = torch.Generator().manual_seed(args.epochs * args.seed + epoch)
    svi.model.train()
    losses = []
    batches = torch.randperm(len(data.train_y), generator=generator).split(args.batch_size)
    bar = tqdm(batches, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=None)
    for index in bar:
        x = data.inputs(augment(data.train_x[index], generator))
        losses.append(svi.step(x, data.train_y[index]))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: Classifier, data: Data, logits: Callable) -> dict[str, float]:
    """:param logits: of images, ``[..., n, classes]``; probabilities are averaged over draws."""
    model.eval()
    parts = [logits(data.inputs(images)).softmax(-1) for images in data.test_x.split(500)]
    probs = torch.cat([part.reshape(-1, *part.shape[-2:]).mean(0) for part in parts])
    return measures(probs, data.test_y)


def at_mean(model: Classifier, guide: AutoSparseNormal) -> Any:
    """The network with the posterior's mean for weights, which stay sparse."""
    means = {name: posterior.mean for name, posterior in guide.posterior().items()}
    return poutine.condition(model, means)


def load(args: argparse.Namespace) -> Data:
    train_x, train_y, test_x, test_y = datasets.torchvision_arrays(args.dataset, args.data_dir)
    images = (torch.as_tensor(x[: args.limit]).movedim(-1, 1) for x in (train_x, test_x))
    labels = (torch.as_tensor(y[: args.limit]) for y in (train_y, test_y))
    channels = (torch.tensor(each)[:, None, None] for each in DATASETS[args.dataset][1:])
    tensors = (*images, *labels, *channels)
    train_x, test_x, train_y, test_y, mean, std = (each.to(args.device) for each in tensors)
    return Data(train_x, train_y, test_x, test_y, mean, std)


def learning_rate(svi: SSVI) -> float:
    """That of locations."""
    loc, _ = svi.guide.parameters_in_place()
    return svi.optim.optim_objs[loc].get_last_lr()[0]


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    aside = path.with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)  # never half a log


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def new_scale(text: str) -> float | str:
        return text if text == "mean" else float(text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--data-dir", required=True, help="torchvision's folder for data sets")
    parser.add_argument("--out", type=Path, default=Path("results/resnet_cifar"))
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--stop-after", type=int, help="stop after this epoch, to go on later")
    parser.add_argument("--limit", type=int, help="use only so many images, to try it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("the posterior")
    group.add_argument("--density", type=float, default=0.1)
    group.add_argument("--policy", choices=["first-dense", "uniform", "erk"], default="first-dense")
    group.add_argument("--prior-scale", type=float, default=0.005)
    group.add_argument("--init-scale", type=float, default=6e-4)
    group.add_argument("--kl-weight", type=float, default=0.01)
    group.add_argument("--local-reparam", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--samples", type=int, default=10, help="draws of the last evaluation")
    group = parser.add_argument_group("exchanges")
    group.add_argument("--removal", choices=sorted(REMOVAL), default="snr_abs")
    group.add_argument("--addition", choices=sorted(ADDITION), default="gradient")
    group.add_argument("--gradient-at", choices=["sample", "mean"], default="sample")
    group.add_argument("--gradient-samples", type=int, default=1)
    group.add_argument("--gradient-batches", type=int, default=1)
    group.add_argument("--new-scale", type=new_scale, default="mean", help="or a number")
    group.add_argument("--exchange-every", type=int, default=100, help="steps")
    group.add_argument("--fraction", type=float, default=0.3, help="share exchanged at first")
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=int, default=200)
    group.add_argument("--batch-size", type=int, default=128)
    group.add_argument("--lr", type=float, default=0.01)
    group.add_argument("--scale-lr", type=float, default=0.01)
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=5e-4, help="of all but scales")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    data = load(args)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    model = Classifier(DATASETS[args.dataset][0], args.prior_scale).to(args.device)
    svi = make_svi(args, model, len(data.train_y))
    guide = svi.guide
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "last.ckpt", args.out / "log.csv"
    rows: list[dict[str, Any]] = []
    if args.resume:
        if not checkpoint.exists():
            raise SystemExit(f"there is no {checkpoint} to resume from: leave out --resume")
        svi.load(checkpoint, map_location=args.device)
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
    first, rest = divmod(svi.steps, math.ceil(len(data.train_y) / args.batch_size))
    if rest:
        raise SystemExit(f"{checkpoint} was saved with another --batch-size or --limit")
    batch = data.inputs(data.train_x[: args.batch_size]), data.train_y[: args.batch_size]
    guide.set_up(*batch)  # with labels: without, a guide from a file cannot tell what is observed
    del rows[first:]  # an epoch that was logged but not saved is done again
    for epoch in range(first, min(args.epochs, args.stop_after or args.epochs)):
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": train_epoch(args, svi, data, epoch)}
        seconds = time.perf_counter() - start
        measured = evaluate(model, data, at_mean(model, guide))
        parts = elbo_parts(model, guide, *batch)  # the log likelihood of an image, all weights' KL
        row |= {"log_likelihood": parts.log_likelihood, "kl": sum(parts.kl.values()), **measured}
        row |= {"lr": learning_rate(svi), "active": guide.summary().total.active}
        rows.append(row | {"seconds": round(seconds, 3)})
        svi.optim.step()
        write_log(log, rows)
        svi.save(checkpoint)
        print(
            f"epoch {epoch + 1:3d}  loss {row['loss']:.4f}  "
            f"log likelihood {parts.log_likelihood:.4f}  KL {row['kl']:.3e}  "
            f"test accuracy {row['accuracy']:.2%}  NLL {row['nll']:.4f}  {seconds:.1f} s",
            flush=True,
        )
    predictive = SparsePredictive(model, guide, args.samples, ["_RETURN"])
    pyro.set_rng_seed(args.seed)
    final = evaluate(model, data, lambda x: predictive(x)["_RETURN"])
    print(guide.summary())
    print(
        f"{args.samples} samples: accuracy {final['accuracy']:.2%}, NLL {final['nll']:.4f}, "
        f"ECE {final['ece']:.4f}, class-wise calibration error {final['class_ece']:.4f}"
    )


if __name__ == "__main__":
    main()
