"""Train one Bayesian neural network with AutoNormal and with AutoSparseNormal, and compare.

The model is an ordinary Pyro program. The guides get the same model, optimizer, loss and
number of epochs; only ``AutoNormal`` is swapped for ``AutoSparseNormal`` and ``SVI`` for ``SSVI``.
The deterministic network of the same shape is trained beside them. Contenders take turns epoch
by epoch, so that their times are measured side by side::

    python examples/compare_with_autonormal.py --dataset digits
    python examples/compare_with_autonormal.py --dataset fashion-mnist --data-dir DIR --hidden 400
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, pairwise
from pathlib import Path

import datasets
import matplotlib
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from metrics import measures
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from tqdm import tqdm

from pyro_ssvi import SSVI, AutoSparseNormal, CosineSchedule, __version__

NUM_SAMPLES = 16  # posterior samples of a prediction

# Hidden units, epochs, batch size, steps between exchanges.
DEFAULTS = {
    "digits": (400, 30, 64, 20),
    "fashion-mnist": (400, 5, 128, 100),
    "mnist": (400, 5, 128, 100),
    "cifar10": (1000, 10, 128, 100),
}


def make_model(sizes: list[int], prior_scale: float, num_data: float) -> Callable:
    """A Bayesian multi-layer perceptron with layers of the given sizes.

    :param num_data: how many data a minibatch stands for.
    """

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        zero = x.new_zeros(())
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            prior = dist.Normal(zero, prior_scale)
            w = pyro.sample(f"w{i}", prior.expand([fan_out, fan_in]).to_event(2))
            b = pyro.sample(f"b{i}", prior.expand([fan_out]).to_event(1))
            x = F.linear(x if i == 0 else F.relu(x), w, b)
        with pyro.plate("data", len(x)), poutine.scale(scale=num_data / len(x)):
            pyro.sample("obs", dist.Categorical(logits=x), obs=y)
        return x

    return model


def init_to_fan_in(density: float) -> Callable:
    """First locations of a weight: as usual for relu, by the inputs that it really has."""

    def init(site: dict) -> Tensor:
        fn = site["fn"]
        shape = fn.shape()
        if len(shape) < 2:
            return fn.mean.clone()
        return torch.randn(shape, device=fn.mean.device) * (2 / (density * shape[1])) ** 0.5

    return init


class Deterministic:
    """The same network without a posterior, trained by Adam."""

    def __init__(self, args: argparse.Namespace, sizes: list[int]) -> None:
        self.name, self.objective = "deterministic", "log-likelihood"
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1]).to(args.device)
        self.optim = torch.optim.Adam(self.net.parameters(), lr=args.lr)
        self.active = sum(p.numel() for p in self.net.parameters())

    def step(self, x: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(self.net(x), y)
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        return loss.item()

    def predict(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)

    def first_layer(self) -> list[Tensor]:
        return []

    def tensors(self) -> Iterator[Tensor]:
        yield from self.net.parameters()
        yield from tensors_of(self.optim.state)


class Bayesian:
    """The model with AutoNormal, or with AutoSparseNormal at some density."""

    def __init__(
        self,
        args: argparse.Namespace,
        sizes: list[int],
        data: datasets.Dataset,
        density: float | None,
    ) -> None:
        self.objective = "ELBO per datum"
        num_data = len(data.train_y)
        # The KL divergence counts kl_weight times when the data count 1 / kl_weight times.
        self.num_data = num_data / args.kl_weight
        self.model = make_model(sizes, args.prior_scale, self.num_data)
        options = {"init_loc_fn": init_to_fan_in(density or 1.0), "init_scale": args.init_scale}
        optim = pyro.optim.Adam({"lr": args.lr})
        if density is None:
            self.name = "AutoNormal"
            self.guide = AutoNormal(self.model, **options)
            self.svi = SVI(self.model, self.guide, optim, Trace_ELBO())
        else:
            self.name = f"AutoSparseNormal {100 * density:.3g}%"
            self.guide = AutoSparseNormal(self.model, density=density, **options)
            steps = args.epochs * math.ceil(num_data / args.batch_size)
            stop = max(1, int(0.75 * steps))
            schedule = CosineSchedule(every=min(args.exchange_every, stop), stop=stop)
            self.svi = SSVI(self.model, self.guide, optim, Trace_ELBO(), schedule=schedule)
        self.store = None  # each guide has a parameter store of its own
        with self.own_store():
            self.guide(data.train_x[:1], data.train_y[:1])  # makes its parameters

    @contextmanager
    def own_store(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self.store) as self.store:
            yield

    def step(self, x: Tensor, y: Tensor) -> float:
        with self.own_store():
            return self.svi.step(x, y) / self.num_data

    def predict(self, x: Tensor) -> Tensor:
        with self.own_store():
            total = 0.0
            for _ in range(NUM_SAMPLES):
                trace = poutine.trace(self.guide).get_trace(x)
                total = total + poutine.replay(self.model, trace)(x).softmax(-1)
            return total / NUM_SAMPLES

    @property
    def active(self) -> int:
        return sum(p.numel() for p in self.guide.parameters()) // 2  # loc and scale

    def first_layer(self) -> list[Tensor]:
        """The flat indices of the first layer's active weights, if there is a choice of them."""
        is_sparse = isinstance(self.guide, AutoSparseNormal)
        return [self.guide.active_sets["w0"].indices] if is_sparse else []

    def tensors(self) -> Iterator[Tensor]:
        yield from self.guide.parameters()
        yield from self.guide.buffers()
        for optim in self.svi.optim.optim_objs.values():
            yield from tensors_of(optim.state)


def tensors_of(state: dict) -> Iterator[Tensor]:
    for each in state.values():
        yield from (value for value in each.values() if isinstance(value, Tensor))


def evaluate(contender: Deterministic | Bayesian, x: Tensor, y: Tensor) -> dict[str, float]:
    pyro.set_rng_seed(0)
    with torch.no_grad():
        probs = torch.cat([contender.predict(part) for part in x.split(2000)])
    return measures(probs, y)


def train(contenders: list, data: datasets.Dataset, args: argparse.Namespace) -> list[dict]:
    """Train all contenders, in turns of an epoch.

    :return: for each contender its losses by epoch, times by step, and the first layer's active
        set before training and after each epoch.
    """
    logs: list[dict] = [
        {"loss": [], "seconds": [], "first_layer": contender.first_layer()}
        for contender in contenders
    ]
    order = torch.Generator().manual_seed(args.seed)
    bars = [
        tqdm(
            total=args.epochs * math.ceil(len(data.train_y) / args.batch_size),
            desc=f"{contender.name:<21}",
            position=i,
            bar_format="{desc} {percentage:3.0f}% {bar:30} {postfix}",
            disable=args.quiet or None,  # None: where there is no terminal
        )
        for i, contender in enumerate(contenders)
    ]
    for _ in range(args.epochs):
        batches = torch.randperm(len(data.train_y), generator=order).split(args.batch_size)
        seed = int(torch.randint(2**31, (), generator=order))
        for contender, log, bar in zip(contenders, logs, bars, strict=True):
            pyro.set_rng_seed(seed)  # no contender's noise depends on who else takes part
            losses: list[float] = []
            for index in batches:
                x, y = data.train_x[index], data.train_y[index]
                start = time.perf_counter()
                losses.append(contender.step(x, y))
                log["seconds"].append(time.perf_counter() - start)
                bar.set_postfix_str(f"-{contender.objective} {losses[-1]:.3f}", refresh=False)
                bar.update()
            log["loss"].append(statistics.fmean(losses))
            bar.set_postfix_str(f"-{contender.objective} {log['loss'][-1]:.3f}")
            log["first_layer"] += contender.first_layer()
    for bar in bars:
        bar.close()
    return logs


def table(rows: list[dict]) -> str:
    """The comparison, as text."""
    reference = next(row for row in rows if row["name"] == "AutoNormal")
    lines = [
        ("", "accuracy", "NLL", "ECE", "active", "bytes", "smaller", "ms/step", "faster"),
        *(
            (
                row["name"],
                f"{row['accuracy']:.2%}",
                f"{row['nll']:.3f}",
                f"{row['ece']:.3f}",
                f"{row['active']:,}",
                f"{row['bytes']:,}",
                f"{reference['bytes'] / row['bytes']:.1f}x",
                f"{row['ms_per_step']:.2f}",
                f"{reference['ms_per_step'] / row['ms_per_step']:.1f}x",
            )
            for row in rows
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def plot(rows: list[dict], logs: list[dict], image_shape: tuple[int, int, int], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's colours, told apart by the colour-blind too.
    colours = cycle(["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"])
    mosaic = [["loss", "accuracy", "settling"], ["before", "after", "legend"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(13, 7.5), layout="constrained")
    for row, log, colour in zip(rows, logs, colours, strict=False):
        epochs = range(1, len(log["loss"]) + 1)
        is_net = row["name"] == "deterministic"
        if not is_net:
            axes["loss"].plot(epochs, log["loss"], ".-", color=colour)
        style = {"marker": "X" if is_net else "o", "ms": 9, "color": colour, "ls": "none"}
        axes["accuracy"].plot(row["active"], 100 * row["accuracy"], label=row["name"], **style)
        if sets := log["first_layer"]:
            settled = [100 * torch.isin(sets[-1], each).float().mean().item() for each in sets]
            axes["settling"].plot(settled, ".-", color=colour)
    axes["loss"].set(title="Negative ELBO per datum", xlabel="epoch", yscale="log")
    axes["loss"].yaxis.set_major_formatter("{x:g}")
    axes["loss"].yaxis.set_minor_formatter("{x:.1g}")
    axes["accuracy"].set(title="Test accuracy, %", xlabel="active parameters", xscale="log")
    title = "First layer: final weights already active, %"
    axes["settling"].set(title=title, xlabel="epoch", ylim=(0, 103))
    for name in mosaic[0]:
        axes[name].spines[["top", "right"]].set_visible(False)
        axes[name].grid(alpha=0.25)

    # The receptive fields of the sparsest first layer.
    sparse = [i for i, log in enumerate(logs) if log["first_layer"]]
    sparsest = min(sparse, key=lambda i: rows[i]["active"])
    sets = logs[sparsest]["first_layer"]
    pixels = math.prod(image_shape)
    counts = {
        when: torch.bincount(active.cpu() % pixels, minlength=pixels).reshape(image_shape).sum(-1)
        for when, active in (("before", sets[0]), ("after", sets[-1]))
    }
    top = max(int(count.max()) for count in counts.values())
    for when, count in counts.items():
        image = axes[when].imshow(count, cmap="viridis", vmin=0, vmax=top)
        axes[when].set(title=f"Active weights of each pixel {when} training", xticks=[], yticks=[])
        axes[when].set_xlabel(rows[sparsest]["name"])
    figure.colorbar(image, ax=axes["after"], shrink=0.8)
    axes["legend"].axis("off")
    axes["legend"].legend(*axes["accuracy"].get_legend_handles_labels(), loc="center", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(DEFAULTS), default="digits")
    parser.add_argument("--data-dir", help="folder with the data set's files")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    parser.add_argument("--hidden", type=int, help="units in each of the two hidden layers")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--exchange-every", type=int, help="steps between exchanges")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--kl-weight", type=float, default=0.1, help="factor of the KL divergence")
    parser.add_argument("--prior-scale", type=float, default=0.3, help="sd of weights in the prior")
    parser.add_argument("--init-scale", type=float, default=0.01, help="sd of weights at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", type=Path, help="write settings and results to this file")
    parser.add_argument("--plot", type=Path, help="PNG (default: results/compare_DATASET.png)")
    args = parser.parse_args(argv)
    names = ("hidden", "epochs", "batch_size", "exchange_every")
    for name, value in zip(names, DEFAULTS[args.dataset], strict=True):
        given = getattr(args, name)
        setattr(args, name, value if given is None else given)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.plot = args.plot or Path(f"results/compare_{args.dataset}.png")
    if args.dataset != "digits" and args.data_dir is None:
        parser.error(f"--dataset {args.dataset} needs --data-dir, the folder with its files")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse_args(argv)
    pyro.set_rng_seed(args.seed)
    data = datasets.load(args.dataset, args.data_dir)
    data = data._replace(
        **{k: v.to(args.device) for k, v in data._asdict().items() if isinstance(v, Tensor)}
    )
    sizes = [data.train_x.shape[1], args.hidden, args.hidden, data.num_classes]
    # All are made, and every density checked, before the first is trained.
    contenders = [
        Deterministic(args, sizes),
        *(Bayesian(args, sizes, data, density) for density in (None, *args.density)),
    ]
    print(
        f"{args.dataset}: {len(data.train_y):,} training images, "
        f"network {'-'.join(map(str, sizes))}, {args.epochs} epochs, batch {args.batch_size}, "
        f"{torch.get_num_threads()} threads, {args.device}"
    )
    logs = train(contenders, data, args)
    rows = [
        {
            "name": contender.name,
            **evaluate(contender, data.test_x, data.test_y),
            "active": contender.active,
            "bytes": sum(t.numel() * t.element_size() for t in contender.tensors()),
            "ms_per_step": 1000 * statistics.median(log["seconds"]),
            "loss": log["loss"],
        }
        for contender, log in zip(contenders, logs, strict=True)
    ]
    print("\n" + table(rows))
    print(
        f"\nNLL and ECE with {NUM_SAMPLES} posterior samples. active: coordinates with a "
        "posterior.\nbytes: variational parameters, indices and optimizer state, without the "
        "working copies\nof the indices that products keep. smaller, faster: against AutoNormal; "
        "ms/step is a median."
    )
    plot(rows, logs, data.image_shape, args.plot)
    print(f"Plot: {args.plot}")
    if args.json:
        versions = {"pyro_ssvi": __version__, "pyro": pyro.__version__, "torch": torch.__version__}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        settings |= {"sizes": sizes, "threads": torch.get_num_threads(), "versions": versions}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "results": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()
