"""A Bayesian neural network from a torch network: classify, save, load, and doubt.

python examples/bnn_digits.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from comparison import make
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide, init_to_sample
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from pyro_ssvi.diagnostics import uncertainty
from pyro_ssvi.nn import bayesianize
from pyro_ssvi.progress import progress

NUM_SAMPLES = 50  # posterior samples of a prediction
NUM_DATA = 1257  # digits for training
BATCH = 128
OPTIONS = {"lr": 5e-3, "init_loc_fn": init_to_sample, "init_scale": 0.01}

net = bayesianize(nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)), prior=0.3)


def model(x: Tensor, y: Tensor | None = None) -> None:
    out = net(x)
    with pyro.plate("data", len(x)), poutine.scale(scale=NUM_DATA / len(x)):
        logits = pyro.deterministic("logits", out, event_dim=1)
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def predict(guide: AutoGuide, x: Tensor) -> Tensor:
    """Class probabilities of each posterior sample, ``[S, N, 10]``."""
    pyro.set_rng_seed(0)
    samples = Predictive(model, guide=guide, num_samples=NUM_SAMPLES)(x)
    return samples["logits"].reshape(NUM_SAMPLES, len(x), 10).softmax(-1)


def score(probs: Tensor, strange: Tensor, y: Tensor) -> dict[str, float]:
    """On test data, and by comparison with images that are no digits."""
    mean = probs.mean(0)
    right = mean.argmax(-1) == y
    doubt, strange_doubt = uncertainty(probs).total, uncertainty(strange).total
    surest = doubt.argsort()[: int(0.9 * len(y))]
    return {
        "accuracy": right.float().mean().item(),
        "surest": right[surest].float().mean().item(),
        "nll": F.nll_loss(mean.clamp(min=1e-12).log(), y).item(),
        "doubt": doubt.mean().item(),
        "strange doubt": strange_doubt.mean().item(),
    }


def plot(images: Tensor, labels: Tensor, probs: Tensor, path: Path) -> None:
    """The digits that the posterior is least sure of, and what it takes them for."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 6, figsize=(11, 4), layout="constrained", sharey="row")
    order = uncertainty(probs).total.argsort(descending=True)
    for i, (top, bottom) in zip(order[:6].tolist(), axes.T, strict=True):
        top.imshow(images[i].reshape(8, 8).numpy(), cmap="gray_r")
        top.set(title=f"a {labels[i]}", xticks=[], yticks=[])
        low, high = probs[:, i].quantile(torch.tensor([0.05, 0.95]), dim=0)
        bottom.bar(range(10), probs[:, i].mean(0).numpy(), color="#0072B2")
        bottom.vlines(range(10), low, high, color="#D55E00")
        bottom.set(xticks=range(10), ylim=(0, 1))
        bottom.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set(ylabel="probability,\n90 % of the posterior")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("results/bnn_digits.png"))
    parser.add_argument("--checkpoint", type=Path, default=Path("results/bnn_digits.ckpt"))
    args = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, train_size=NUM_DATA, random_state=args.seed)
    x, test_x = (torch.tensor(part).float() for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])
    # No digits: every image with its pixels in another order.
    generator = torch.Generator().manual_seed(args.seed)
    no_digits = test_x.gather(1, torch.rand(test_x.shape, generator=generator).argsort(1))
    print(f"digits: {len(x)} images for training, {len(test_x)} for test, {args.steps} steps\n")
    print(
        "                       active  accuracy  surest 90%    NLL    entropy: digits  no digits"
    )
    print(
        "----------------------------------------------------------------------------------------"
    )
    rows = []
    for density in (1, 0.1, 0.05):
        pyro.set_rng_seed(args.seed)
        svi = make(model, density, args.steps, **OPTIONS)
        batches = [(x[i], y[i]) for i in torch.randint(len(x), (args.steps, BATCH))]
        for _ in progress(svi, batches, desc=f"density {density:g}", leave=False):
            pass
        guide = svi.guide
        name = "AutoNormal" if density == 1 else f"AutoSparseNormal {density:.0%}"
        active = sum(int((value != 0).sum()) for value in guide.median().values())
        probs = predict(guide, test_x)
        row = {"name": name, "active": active}
        row |= score(probs, predict(guide, no_digits), test_y)
        rows.append(row)
        print(f"{name:<22}{active:>7}{row['accuracy']:>10.1%}{row['surest']:>12.1%}", end="")
        print(f"{row['nll']:>7.3f}{row['doubt']:>19.2f}{row['strange doubt']:>11.2f}")

    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    svi.save(args.checkpoint)
    loaded = make(model, density, args.steps, **OPTIONS)  # as another program would
    loaded.load(args.checkpoint)
    same = torch.equal(predict(loaded.guide, test_x), probs)
    print(f"\n{name} saved, {args.checkpoint.stat().st_size:,} bytes, and loaded: ", end="")
    print("the same predictions" if same else "OTHER PREDICTIONS")
    plot(test_x, test_y, probs, args.plot)
    print(f"Plot of the least certain digits: {args.plot}")
    return rows


if __name__ == "__main__":
    main()
